"""What the benchmarks share: waiting for the device and the peak of its memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch


@dataclass
class Peak:
    """Memory at its highest above the start, in MiB; set when the measurement ends."""

    mib: float = 0.0


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak above the start: allocated bytes on a GPU, resident memory of the process (read every 2 ms) on a
    CPU."""
    peak = Peak()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        synchronize(device)
        peak.mib = (torch.cuda.max_memory_allocated(device) - start) / 2**20
        return
    process, done = psutil.Process(), threading.Event()
    start = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield peak
    done.set()
    watcher.join()
    peak.mib = (highest - start) / 2**20

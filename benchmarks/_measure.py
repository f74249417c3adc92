"""What the benchmarks share: waiting for the device and the peak of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

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
    """Bytes that torch has allocated at the highest moment above the start, on the device or, on a CPU, in
    its allocator."""
    peak = Peak()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        synchronize(device)
        peak.mib = (torch.cuda.max_memory_allocated(device) - start) / 2**20
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield peak
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    peak.mib = highest / 2**20

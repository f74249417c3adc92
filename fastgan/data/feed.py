"""Training batches one after the other: from the device's memory where the images fit, else read ahead on the
host.

A thread on the host reads, crops and stacks into a ring of buffers, pinned for a GPU. All work on the device
is queued by the consumer, because a second thread would disturb the capture of a CUDA graph: with batch k it
also queues the transfer of batch k + 1, on a stream of its own, so that it runs beside the step of batch k.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgan.data.augment import OutputRange, to_device
from fastgan.data.dataset import Data, HostImages, Split
from fastgan.data.images import DataError
from fastgan.data.resident import SHARE, Resident, fits, one_size

Host = tuple[HostImages, ...]
# memory for the pixels of A and of B
Buffers = list[np.ndarray]


class _Staged(NamedTuple):
    """A batch whose transfer has been queued; `done` is None where it is still on the host."""

    images: Host
    buffers: Buffers
    done: torch.cuda.Event | None


class Loader:
    """Iterate over training batches k = start, start + 1, ... without end, prepared ahead in a thread.

    `wait` counts the seconds the consumer has waited for the thread. A context manager; else call `close`.

    Args:
        split: training images.
        batch_size: images per domain, batch and rank.
        depth: batches prepared ahead.
        rank, ranks: as for `Split.batch`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        output_range: OutputRange = "tanh",
        start: int = 0,
        depth: int = 2,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.wait = 0.0
        self._split, self._batch_size, self._seed = split, batch_size, seed
        self._device, self._output_range = torch.device(device), output_range
        self._rank, self._ranks = rank, ranks
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None
        self._ready: queue.Queue[tuple[Host, Buffers] | BaseException] = queue.Queue(max(1, depth))
        self._free: queue.Queue[Buffers | None] = queue.Queue()
        self._staged: deque[_Staged | BaseException] = deque()
        self._in_transfer: deque[_Staged] = deque()
        # those that are ready, one that is filled, one whose transfer is queued, one that is used
        for _ in range(max(1, depth) + 3):
            sizes = [batch_size * split.largest(domain) for domain in range(len(split.stores))]
            self._free.put([torch.empty(n, dtype=torch.uint8, pin_memory=cuda).numpy() for n in sizes])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(start,), name="loader", daemon=True)
        self._thread.start()

    def _run(self, k: int) -> None:
        while not self._stop.is_set():
            buffers = self._free.get()
            if buffers is None:
                return
            item: tuple[Host, Buffers] | BaseException
            try:
                host = self._split.host_batch(
                    k, self._batch_size, seed=self._seed, rank=self._rank, ranks=self._ranks, out=buffers
                )
                item = host, buffers
            except BaseException as error:  # the consumer raises it
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return
            k += 1

    def _stage(self, *, block: bool) -> None:
        """Take a batch from the thread, if there is one, and queue its transfer."""
        try:
            item = self._ready.get(block)
        except queue.Empty:
            return
        if isinstance(item, BaseException):
            self._staged.append(item)
            return
        host, buffers = item
        if self._stream is None:
            self._staged.append(_Staged(host, buffers, None))
            return
        with torch.cuda.stream(self._stream):
            sent = tuple(images._replace(pixels=self._sent(images.pixels)) for images in host)
            done = torch.cuda.Event()
            done.record()
        self._staged.append(_Staged(sent, buffers, done))

    def _sent(self, pixels: np.ndarray | Tensor) -> Tensor:
        return pixels if isinstance(pixels, Tensor) else to_device(pixels, self._device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._stop.is_set():
            raise StopIteration
        if not self._staged:
            began = time.perf_counter()
            self._stage(block=True)
            self.wait += time.perf_counter() - began
        item = self._staged[0]
        if isinstance(item, BaseException):
            raise item
        self._staged.popleft()
        if not self._staged:
            self._stage(block=False)
        if item.done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(item.done)
            for images in item.images:
                # else its memory could be used for the next transfer while this stream still reads it
                if isinstance(images.pixels, Tensor):
                    images.pixels.record_stream(stream)
        batch = self._split.finish(item.images, device=self._device, output_range=self._output_range)
        self._in_transfer.append(item)
        # the transfer before this one has long been over: it was queued a step ago
        while len(self._in_transfer) > 1 or self._stream is None and self._in_transfer:
            used = self._in_transfer.popleft()
            if used.done is not None:
                used.done.synchronize()
            self._free.put(used.buffers)
        return batch

    def close(self) -> None:
        """Stop the thread; afterwards the iterator is at its end."""
        self._stop.set()
        self._free.put(None)
        while self._thread.is_alive():
            # the thread may be waiting for room
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Where = Literal["auto", "device", "host"]


def resident_bytes(data: Data, device: torch.device, where: Where) -> int:
    """Bytes that the training images will take of a GPU's memory; 0 where they stay on the host."""
    if device.type != "cuda" or where == "host":
        return 0
    possible = one_size(data.train) is not None and fits(data.train, torch.cuda.mem_get_info(device)[0])
    return data.train.nbytes if possible else 0


def open_feed(
    data: Data,
    batch_size: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    output_range: OutputRange = "tanh",
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    where: Where = "auto",
) -> Resident | Loader:
    """Return the training batches from batch `start` on, the same wherever the images lie.

    where: "device" keeps the images in device memory (Resident), "host" reads ahead (Loader); "auto" takes
    the memory of a GPU where the images are of one size and fit.

    Raises:
        DataError: "device" where images are of unequal size or do not fit.
    """
    split, device = data.train, torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if where == "device" and free is not None and not fits(split, free):
        raise DataError(
            f"--data-on device: the images take {split.nbytes / 2**20:.0f} MiB, more than {SHARE:.0%} of the "
            f"{free / 2**20:.0f} MiB that are free; use --data-on host"
        )
    kind = Resident if where == "device" or resident_bytes(data, device, where) else Loader
    return kind(
        split, batch_size, seed=seed, device=device, output_range=output_range, start=start, rank=rank,
        ranks=ranks,
    )  # fmt: skip

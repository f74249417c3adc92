"""Work that is recorded once and replayed: CUDA graphs that share one memory pool and one stream.

A step is a generator that yields where ranks have to talk to each other; `run` runs it, `record` makes a
graph of each piece between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from torch import Tensor

Between = Callable[[], object]  # what ranks do between two pieces of a step


class Report(NamedTuple):
    """Scalars of one step: their names, and one tensor with their values."""

    names: tuple[str, ...]
    values: Tensor

    def terms(self) -> dict[str, Tensor]:
        """By name; a copy, since a recorded step writes the same memory again."""
        return dict(zip(self.names, self.values.clone().unbind()))


class Recording(NamedTuple):
    """A recorded step: its pieces with what follows each, and its scalars."""

    pieces: list[tuple[Callable[[], None], Between | None]]
    report: Report

    def replay(self) -> Report:
        """Run the step again."""
        for piece, between in self.pieces:
            piece()
            if between is not None:
                between()
        return self.report


class Recorder:
    """Records pieces of work on a GPU; what they read and write later lies where it lay when recorded.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work on the stream of the recording, so that libraries, autotuning and allocations are done
        with."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as something to replay; nothing is computed now.

        Raises:
            RuntimeError: work that waits for the device, copies from pageable memory or allocates outside of
                torch's allocator.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


def run(body: Generator[Between, None, Report]) -> Report:
    """A step, launch by launch."""
    while True:
        try:
            between = next(body)
        except StopIteration as end:
            return end.value
        between()


def record(recorder: Recorder, body: Generator[Between, None, Report]) -> Recording:
    """A step as something to replay.

    Raises:
        RuntimeError: see `Recorder.record`.
    """
    pieces: list[tuple[Callable[[], None], Between | None]] = []
    report: list[Report] = []
    while not report:
        after: list[Between] = []

        def work(after: list[Between] = after) -> None:
            try:
                after.append(next(body))
            except StopIteration as end:
                report.append(end.value)

        pieces.append((recorder.record(work), after[0] if after else None))
    return Recording(pieces, report[0])

"""What the benchmarks share: waiting for the device, peak memory, ceilings, the time of a call."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
CUDA = torch.device("cuda")
# floats of the copy and side of the product that show the ceilings
COPIED, SIDE = {"cuda": 2**28, "cpu": 2**26}, {"cuda": 8192, "cpu": 2048}


@dataclass
class Peak:
    """Memory at its highest above the start, in MiB; set when the measurement ends."""

    mib: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in this process: bytes read plus written by a copy, a matrix product."""

    bytes_per_second: float
    flop_per_second: float


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


def events_seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds of the GPU per call, for calls that are longer than their launch."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def measure_ceilings(
    watch: Callable[[], object], device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16
) -> Ceilings:
    """Medians of a 1 GiB copy and of an 8192 x 8192 x 8192 product; on a CPU 256 MiB and 2048.

    `watch` is called while a GPU is at work.
    """
    cuda = device.type == "cuda"
    source = torch.randn(COPIED[device.type], device=device)
    target = torch.empty_like(source)
    n = SIDE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def once(call: Callable[[], object]) -> float:
        if cuda:
            return events_seconds(call, 10)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    copies = [once(lambda: target.copy_(source)) for _ in range(7)]
    products = [once(lambda: a @ b) for _ in range(7)]
    if cuda:
        for _ in range(100):
            a @ b
        watch()
        torch.cuda.synchronize()
    return Ceilings(2 * source.nbytes / statistics.median(copies), 2 * n**3 / statistics.median(products))


@dataclass(frozen=True)
class Timed:
    """run() does `calls` calls and waits. eager_seconds: of one call, with its launches.

    how: "graph", replayed from a CUDA graph, without the time of the launches; "eager" where a call cannot be
    captured.
    """

    run: Callable[[], object]
    calls: int
    how: str
    eager_seconds: float


def prepare(call: Callable[[], object]) -> Timed:
    """Warms a call up and captures it, on the current stream, which must not be the default one."""
    for _ in range(3):
        call()

    def eager(calls: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / calls

    seconds = statistics.median(eager(5) for _ in range(11))
    # a replay of 5 ms or more, beside which the wait for it does not count; launches may be most of `seconds`
    calls = max(5, min(100, int(5e-3 / seconds)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(calls):
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return Timed(lambda: eager(calls), calls, "eager", seconds)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return Timed(replay, calls, "graph", seconds)


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """A call as the replay of a CUDA graph, which writes the result of the capture anew; warmed up first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest norm(got - expected) / norm(expected) of the pairs."""
    pairs = ((g.double(), e.double()) for g, e in zip(got, expected, strict=True))
    return max(float((g - e).norm() / e.norm()) for g, e in pairs)

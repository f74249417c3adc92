"""Fixtures of the op benchmarks: the copy ceiling of the device and the timing of one call."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.benchmark import Timer

CUDA = torch.cuda.is_available()
# so many calls per wait for the GPU: the wait costs more than a kernel
CALLS = 20 if CUDA else 1


@pytest.fixture(scope="session")
def copy_bytes_per_second() -> float:
    """What this device reaches when it copies 256 MiB (64 on a CPU): the ceiling of a bandwidth kernel."""
    source = torch.ones((2**28 if CUDA else 2**26) // 4, device="cuda" if CUDA else "cpu")
    target = torch.empty_like(source)
    timer = Timer("target.copy_(source)", globals={"target": target, "source": source})
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=0.2).median


@pytest.fixture(autouse=True)
def reusable_graphs() -> Iterator[None]:
    # a compiled backward may otherwise overwrite what it saved, and then cannot run twice
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@pytest.fixture
def measure(benchmark: BenchmarkFixture, copy_bytes_per_second: float) -> Callable[..., None]:
    """Times a call and reports its bandwidth, the floor of its bytes and its peak memory.

    The time of a call includes its eager launch. bytes_moved are those that have to move once; tensors that
    fit in the cache can beat the floor.
    """

    def timed(call: Callable[[], Any], bytes_moved: int, group: str) -> None:
        def run() -> None:
            for _ in range(CALLS):
                call()
            if CUDA:
                torch.cuda.synchronize()

        # compilation and tuning stay outside the clock
        run()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            run()
            benchmark.extra_info["peak_mib"] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
        benchmark.group = group
        benchmark(run)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median / CALLS
        floor = bytes_moved / copy_bytes_per_second
        benchmark.extra_info["us_per_call"] = round(seconds * 1e6, 2)
        benchmark.extra_info["gb_per_s"] = round(bytes_moved / seconds / 1e9, 1)
        benchmark.extra_info["floor_us"] = round(floor * 1e6, 2)
        benchmark.extra_info["times_floor"] = round(seconds / floor, 2)

    return timed

"""Fixtures of the op benchmarks: the ceilings of the GPU and the timing of one call; without a GPU they are
skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
import torch._functorch.config
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks._machine import describe, gpu_state
from benchmarks._measure import Ceilings, measure_ceilings, peak_memory, prepare

CUDA = torch.cuda.is_available()
NO_GPU = "op benchmarks: skipped, torch sees no GPU"
UNDER_LOAD = pytest.StashKey[dict[str, Any]]()
NOT_MEASURED = pytest.StashKey[list[tuple[str, str]]]()
BEGIN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip the op benchmarks that have not begun after so many")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGIN] = time.monotonic()
    config.stash[NOT_MEASURED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU, one skipped test stands for all cases of an op."""
    if CUDA:
        return
    kept: dict[Any, pytest.Item] = {}
    dropped = []
    for item in items:
        if "measure" not in getattr(item, "fixturenames", ()):
            kept[item.nodeid] = item
        elif item.path in kept:
            dropped.append(item)
        else:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
            kept[item.path] = item
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept.values()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if any(NO_GPU in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(NO_GPU)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is not None and CUDA and "measure" in getattr(item, "fixturenames", ()):
        reason = str(call.excinfo.value).strip().splitlines() or [call.excinfo.typename]
        item.config.stash[NOT_MEASURED].append((item.name, reason[0][:300]))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """The machine, also in a file that `--benchmark-json` asks for."""
    output_json["machine"] = describe()
    output_json["gpu_under_load"] = config.stash.get(UNDER_LOAD, None)
    output_json["not_measured"] = config.stash[NOT_MEASURED]


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Ceilings:
    stash = request.config.stash
    return measure_ceilings(lambda: stash.setdefault(UNDER_LOAD, gpu_state()))


@pytest.fixture
def fair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What each implementation may count on, and nothing that an earlier case left behind."""
    limit = request.config.getoption("--minutes")
    if limit is not None and time.monotonic() - request.config.stash[BEGIN] > 60 * limit:
        pytest.skip("out of time")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    # a function compiled for too many shapes falls back to eager
    torch.compiler.reset()
    inductor, option = import_module("torch._inductor.config"), "force_layout_optimization"
    with (
        # else a compiled backward loses channels_last (pytorch#189239)
        inductor.patch({option: True} if hasattr(inductor, option) else {}),
        # else a compiled backward may overwrite what it saved, and cannot run twice
        torch._functorch.config.patch(donated_buffer=False),
        # a graph can be captured on this stream, of a backward whose forward was not
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        yield
        torch.cuda.synchronize()


@pytest.fixture
def measure(benchmark: BenchmarkFixture, fair: None, ceilings: Ceilings) -> Callable[..., None]:
    """Times a call and reports how far it is from its floor.

    bytes_moved, flop: those that have to move or be done once. us is the time of the device, from a CUDA
    graph of many calls; eager_us that of a call with its launches. Tensors that fit in the cache can beat the
    floor.
    """

    def timed(
        call: Callable[[], object],
        *,
        op: str,
        case: str,
        direction: str,
        implementation: str,
        bytes_moved: int,
        flop: int = 0,
        **more: float,
    ) -> None:
        # compilation and tuning stay outside the clock
        prepared = prepare(call)
        with peak_memory(torch.device("cuda")) as peak:
            call()
        benchmark.group = f"{op} {direction} {case}"
        benchmark.pedantic(prepared.run, rounds=20, warmup_rounds=2, iterations=1)
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds = benchmark.stats.stats.median / prepared.calls
        by_bytes, by_flop = bytes_moved / ceilings.bytes_per_second, flop / ceilings.flop_per_second
        floor = max(by_bytes, by_flop)
        benchmark.extra_info |= {
            "op": op,
            "case": case,
            "direction": direction,
            "implementation": implementation,
            "us": round(seconds * 1e6, 2),
            "timed": prepared.how,
            "eager_us": round(prepared.eager_seconds * 1e6, 2),
            "tflop_per_s": round(flop / seconds / 1e12, 2),
            "gb_per_s": round(bytes_moved / seconds / 1e9, 1),
            "ceiling": "flop" if by_flop > by_bytes else "bytes",
            "percent_of_ceiling": round(100 * floor / seconds, 1),
            "floor_us": round(floor * 1e6, 2),
            "times_floor": round(seconds / floor, 2),
            "peak_mib": round(peak.mib, 1),
            "ceiling_tflop_per_s": round(ceilings.flop_per_second / 1e12, 1),
            "ceiling_gb_per_s": round(ceilings.bytes_per_second / 1e9, 1),
            **more,
        }

    return timed

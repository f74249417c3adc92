"""One training step of CycleGAN (128x128, ngf 64, 6 blocks, batch 1, identity loss on) beside the upstream
way of running it.

    pytest benchmarks/bench_training.py --benchmark-only

Rungs: upstream (eager float32, NCHW), the same in bfloat16 and channels_last, fastgan, fastgan with
torch.compile. All start from the same weights and see the same images;
`test_the_rungs_train_the_same_networks` says that they compute the same step. Work: 2 x MAC of the
convolutions, counted by torch's FlopCounterMode on the upstream step; floor: that over the matrix product of
the same dtype measured in the same process.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._measure import peak_memory, synchronize
from benchmarks._upstream import UpstreamStep
from fastgan.recipes.cyclegan import CycleGAN, CycleGANConfig
from fastgan.step import Step

ROOT = Path(__file__).parents[1]
SIZE, NGF, BLOCKS, BATCH = 128, 64, 6, 1
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNGS = ("upstream_fp32_nchw", "upstream_bf16_channels_last", "fastgan", "fastgan_compile")


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of each domain in [-1, 1], NHWC."""
    torch.manual_seed(0)
    a, b = (torch.rand(BATCH, 3, SIZE, SIZE, device=DEVICE) * 2 - 1 for _ in range(2))
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in (a, b))  # type: ignore[return-value]


def weights() -> dict[str, dict[str, torch.Tensor]]:
    """Initial weights for every rung."""
    torch.manual_seed(1)
    nets = CycleGAN(CycleGANConfig(ngf=NGF, blocks=BLOCKS)).networks(3, 3)
    return {name: net.state_dict() for name, net in nets.items()}


def upstream(autocast: bool) -> Callable[[], dict[str, float]]:
    """A step of the upstream way; with autocast, bfloat16 and channels_last."""
    step, (a, b) = UpstreamStep(NGF, NGF, BLOCKS, DEVICE), images()
    for name, state in weights().items():
        step.nets[name].load_state_dict(state)
        if autocast:
            step.nets[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not autocast:
        a, b = a.contiguous(), b.contiguous()

    def run() -> dict[str, float]:
        with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            return step(a, b)

    return run


def ours(autocast: torch.dtype | None, compile: bool) -> Callable[[], dict[str, float]]:
    """A step of fastgan; the losses are read, as the peers read theirs."""
    recipe = CycleGAN(CycleGANConfig(ngf=NGF, blocks=BLOCKS))
    nets = recipe.networks(3, 3)
    for name, state in weights().items():
        nets[name].load_state_dict(state)
    step = Step(recipe, nets, device=DEVICE, autocast=autocast, compile=compile)
    a, b = images()
    index = iter(range(10**9))

    def run() -> dict[str, float]:
        return {k: float(v) for k, v in step([{"A": a, "B": b}], next(index)).items()}

    return run


def make(rung: str) -> Callable[[], dict[str, float]]:
    """The step of a rung."""
    if rung.startswith("upstream"):
        return upstream(autocast=rung != "upstream_fp32_nchw")
    return ours(torch.bfloat16, compile=rung == "fastgan_compile")


def peak_here(rung: str) -> float:
    """Peak memory of a step above its start, in MiB: activations and gradients."""
    step = make(rung)
    step()
    with peak_memory(DEVICE) as peak:
        step()
    return round(peak.mib, 1)


def peak_apart(rung: str) -> float:
    """The same from a process of its own: the profiler that counts on a CPU slows down all that follows."""
    code = f"from benchmarks.bench_training import peak_here; print(peak_here({rung!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        stdout=subprocess.PIPE,
    )
    return float(child.stdout.split()[-1])


@pytest.fixture(scope="module")
def work() -> Iterator[dict[str, float]]:
    """FLOP of a step, and the FLOP/s of a large matrix product per dtype."""
    run = upstream(autocast=False)
    with FlopCounterMode(display=False) as counter:
        run()
    ceilings = {}
    for dtype in (torch.float32, torch.bfloat16):
        n = 8192 if DEVICE.type == "cuda" else 2048
        x = torch.randn(n, n, dtype=dtype, device=DEVICE)
        times = []
        for _ in range(8):
            synchronize(DEVICE)
            begin = time.perf_counter()
            x @ x
            synchronize(DEVICE)
            times.append(time.perf_counter() - begin)
        ceilings[str(dtype)] = 2 * n**3 / sorted(times)[len(times) // 2]
    yield {"flop": counter.get_total_flops(), **ceilings}


def test_the_rungs_train_the_same_networks() -> None:
    # the same losses in the first step: float32 against float32, sums taken in another order
    one, two = upstream(autocast=False)(), ours(None, compile=False)()
    for key, value in {"G_A": one["G_A"], "G_B": one["G_B"], "D_A": one["D_A"], "D_B": one["D_B"]}.items():
        assert two[key] == pytest.approx(value, rel=1e-3)
    assert two["cycle_A"] + two["cycle_B"] == pytest.approx(one["cycle"], rel=1e-3)
    assert two["idt_A"] + two["idt_B"] == pytest.approx(one["idt"], rel=1e-3)


@pytest.fixture(scope="module")
def baseline() -> Callable[[], float]:
    """Seconds of one step of the first rung, run between the rounds of every rung."""
    step = make(RUNGS[0])
    step()

    def timed() -> float:
        synchronize(DEVICE)
        begin = time.perf_counter()
        step()
        synchronize(DEVICE)
        return time.perf_counter() - begin

    return timed


@pytest.mark.benchmark(group=f"cyclegan step {SIZE}x{SIZE} ngf {NGF} blocks {BLOCKS} batch {BATCH}")
@pytest.mark.parametrize("rung", RUNGS)
def bench_training_step(
    benchmark: Any, rung: str, work: dict[str, float], baseline: Callable[[], float]
) -> None:
    """Median time, speed-up, TFLOP/s, share of the floor and peak memory of one step.

    The speed-up is over baseline steps alternating with the timed ones: a shared CPU drifts by more than 5 %.
    """
    step = make(rung)
    step()
    before: list[float] = []

    def timed() -> None:
        step()
        synchronize(DEVICE)

    rounds = 11 if DEVICE.type == "cpu" else 100
    benchmark.pedantic(
        timed, setup=lambda: before.append(baseline()), warmup_rounds=2, rounds=rounds, iterations=1
    )
    ceiling = work[str(torch.float32 if rung == RUNGS[0] else torch.bfloat16)]
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "speedup": round(statistics.median(before[-rounds:]) / median, 3),
        "GFLOP": round(work["flop"] / 1e9, 1),
        "TFLOP/s": round(work["flop"] / median / 1e12, 3),
        "floor_ms": round(work["flop"] / ceiling * 1e3, 2),
        "share_of_floor": round(work["flop"] / ceiling / median, 3),
        "peak_MiB": peak_apart(rung),
    }

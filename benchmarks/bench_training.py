"""A training step of cyclegan and pix2pix, rung by rung, in pytest-benchmark's form.

    pytest benchmarks/bench_training.py --benchmark-only

Rungs, sizes and the check of their losses are those of `python benchmarks/ladder.py`, which also writes the
table and the chart; here they can be selected (-k), compared and stored with pytest-benchmark's own options.
Work: FLOP of the convolutions, see `benchmarks._floors`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks._ladder import Run, Rung, System, differences, fair, first_losses, free, limits, seconds
from benchmarks.ladder import make_plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAN = make_plan(DEVICE)
CASES = [
    pytest.param(system, rung, id=f"{system.recipe}-{rung.name}")
    for system in PLAN.systems
    for rung in PLAN.rungs
]
Baseline = tuple[Run, list[dict[str, float]]]


@pytest.fixture(scope="module")
def baseline() -> Iterator[Callable[[System], Baseline]]:
    """The first rung of a system, that of the last one asked for, and the losses of its first steps."""
    kept: dict[System, Baseline] = {}

    def get(system: System) -> Baseline:
        if system not in kept:
            kept.clear()
            free(DEVICE)
            run = PLAN.rungs[0].build(system, DEVICE)
            kept[system] = run, first_losses(run)
        return kept[system]

    yield get
    kept.clear()


@pytest.mark.parametrize(("system", "rung"), CASES)
def bench_training_step(
    benchmark: Any, system: System, rung: Rung, baseline: Callable[[System], Baseline]
) -> None:
    """Median time, speed-up over baseline steps that alternate with the timed ones, and TFLOP/s."""
    with fair():
        first, expected = baseline(system)
        run = rung.build(system, DEVICE)
        assert differences(first_losses(run), expected, limits(system, rung)) == []
        before: list[float] = []
        benchmark.group = f"{system}, batch 1"
        benchmark.pedantic(
            lambda: seconds(run, 1, DEVICE),
            setup=lambda: before.append(seconds(first, 1, DEVICE)),
            warmup_rounds=3,
            rounds=PLAN.rounds,
            iterations=1,
        )
    if benchmark.stats is None:  # --benchmark-disable
        return
    median = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "speedup": round(statistics.median(before[-PLAN.rounds :]) / median, 3),
        "TFLOP": round(system.work.flop / 1e12, 4),
        "TFLOP/s": round(system.work.flop / median / 1e12, 3),
    }

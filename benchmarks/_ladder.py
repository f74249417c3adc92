"""The rungs of the ladder: ways to run one training step, from upstream's eager one to fastgan's, on the same
images and from the same weights, and how they are timed.

A rung is checked before it is timed: the losses of its first two steps must be those of the first rung; the
second ones depend on what the first step did to the weights. Every round of a rung follows a round of the
first rung, because clocks drift; a speed-up is the median of the ratios of such pairs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import _floors
from benchmarks._measure import peak_memory, synchronize
from benchmarks._upstream import CycleGANStep, Discriminator, Generator, Pix2PixStep, Unet, UpstreamStep
from fastgan.device import pick_precision
from fastgan.recipes import RECIPES
from fastgan.step import Step

ROOT = Path(__file__).parents[1]
BASELINE = "eager"
Losses = dict[str, Tensor]
Run = Callable[[], Losses]


@dataclass(frozen=True)
class System:
    """A recipe at a size, batch 1; `depth` is the residual blocks of cyclegan, the levels of pix2pix."""

    recipe: str
    size: int
    depth: int
    width: int = 64

    def __str__(self) -> str:
        if self.recipe == "cyclegan":
            return f"cyclegan {self.size}x{self.size}, ngf {self.width}, {self.depth} blocks, identity loss"
        return f"pix2pix {self.size}x{self.size}, ngf {self.width}, U-Net of {self.depth} levels"

    @property
    def work(self) -> _floors.Work:
        count = _floors.cyclegan_step if self.recipe == "cyclegan" else _floors.pix2pix_step
        return count(self.size, self.width, self.width, self.depth)

    @property
    def dropout(self) -> bool:
        """Whether the losses depend on draws, which no two rungs share."""
        return self.recipe == "pix2pix"

    @property
    def settings(self) -> Any:
        """Settings of fastgan for this system."""
        depth = {"blocks" if self.recipe == "cyclegan" else "levels": self.depth}
        return RECIPES[self.recipe].config_class(ngf=self.width, ndf=self.width, **depth)

    def images(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """One image of each domain in [-1, 1]."""
        draw = torch.Generator().manual_seed(0)
        a, b = (torch.rand((1, 3, self.size, self.size), generator=draw) * 2 - 1 for _ in range(2))
        return a.to(device), b.to(device)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Initial weights of every rung."""
        torch.manual_seed(1)
        nets = RECIPES[self.recipe](self.settings).networks(3, 3)
        return {name: net.state_dict() for name, net in nets.items()}

    def upstream(self, device: torch.device, **options: bool) -> UpstreamStep:
        """Upstream's step with the options of `UpstreamStep`."""
        cls: type[UpstreamStep]
        nets: dict[str, nn.Module]
        if self.recipe == "cyclegan":
            cls = CycleGANStep
            nets = {name: Generator(self.width, self.depth) for name in ("G_A", "G_B")}
            nets |= {name: Discriminator(3, self.width, nn.InstanceNorm2d) for name in ("D_A", "D_B")}
        else:
            cls = Pix2PixStep
            nets = {"G": Unet(self.width, self.depth), "D": Discriminator(6, self.width, nn.BatchNorm2d)}
        for name, state in self.weights().items():
            nets[name].load_state_dict(state)
        return cls(nets, *self.images(device), **options)


class FastganStep:
    """fastgan's step on the images of a system, one per call."""

    def __init__(
        self, system: System, device: torch.device, *, autocast: torch.dtype | None, compile: bool
    ) -> None:
        recipe = RECIPES[system.recipe](system.settings)
        nets = recipe.networks(3, 3)
        for name, state in system.weights().items():
            nets[name].load_state_dict(state)
        self.step = Step(recipe, nets, device=device, autocast=autocast, compile=compile, capture=True)
        a, b = (x.contiguous(memory_format=torch.channels_last) for x in system.images(device))
        self.batches, self.index = [{"A": a, "B": b}], 0

    @property
    def note(self) -> str:
        """Why it is no CUDA graph, on a GPU."""
        return self.step.note

    def __call__(self) -> Losses:
        self.index += 1
        return self.step(self.batches, self.index - 1)


def common(terms: Losses) -> Losses:
    """Losses under the names of upstream's."""
    if "G_L1" in terms:
        return {key: terms[key] for key in ("G_GAN", "G_L1", "D")}
    both = {key: terms[f"{key}_A"] + terms[f"{key}_B"] for key in ("cycle", "idt") if key not in terms}
    return {key: terms[key] for key in ("G_A", "G_B", "D_A", "D_B", "cycle", "idt") if key in terms} | both


class Rung(NamedTuple):
    """A way to run a step: name, what the table calls it, whether it computes in bfloat16, how it is made."""

    name: str
    label: str
    half: bool
    build: Callable[[System, torch.device], Run]


def rungs(device: torch.device, *, quick: bool = False) -> list[Rung]:
    """The ladder of a device, the baseline first. On a CPU there is no graph, and no bfloat16 where the CPU
    would emulate it."""
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else pick_precision("auto", device)
    half = dtype is not None
    options = {"autocast": half, "channels_last": True, "fused": True}
    best = "bf16 autocast, channels_last, fused Adam" if half else "channels_last, fused Adam (fp32: no bf16)"

    def upstream(**more: bool) -> Callable[[System, torch.device], Run]:
        return lambda system, device: system.upstream(device, **more)

    def ours(compile: bool) -> Callable[[System, torch.device], Run]:
        return lambda system, device: FastganStep(system, device, autocast=dtype, compile=compile)

    ladder = [
        Rung(BASELINE, f"upstream's step, eager {'fp32/TF32' if cuda else 'fp32'}, NCHW", False, upstream()),
        Rung("options", f"+ {best}", half, upstream(**options)),
        Rung("compile", "+ torch.compile per network", half, upstream(**options, compile=True)),
    ]
    if cuda:
        more = upstream(**options, compile=True, capture=True)
        ladder.append(Rung("graph", "+ one CUDA graph of the step", half, more))
    ladder.append(Rung("fastgan", "fastgan", half, ours(compile=False)))
    if not quick:
        ladder.append(Rung("fastgan_compile", "fastgan `--compile`", half, ours(compile=True)))
    return ladder


@contextlib.contextmanager
def fair() -> Iterator[None]:
    """What every rung may count on: cuDNN's benchmark mode, as upstream sets it, and channels_last through a
    compiled backward. What torch.compile gives up on is an error, not an eager step."""
    inductor, option = import_module("torch._inductor.config"), "force_layout_optimization"
    given = {option: True} if torch.cuda.is_available() and hasattr(inductor, option) else {}
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with (
            inductor.patch(given),
            import_module("torch._dynamo.config").patch(fail_on_recompile_limit_hit=True),
        ):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def free(device: torch.device) -> None:
    """Give back what the last rung left, compiled code too: a function compiled too often stays eager."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# relative, of the first and the second step: float32 sums in another order; bfloat16, or other draws of
# dropout. a rung that leaves out an update is off by more than these, see tests/test_ladder.py
EXACT, ROUNDED = (2e-3, 2e-3), (0.05, 0.15)


def limits(system: System, rung: Rung) -> tuple[float, float]:
    """What the losses of a rung may differ by; TF32 on a GPU rounds, too."""
    return ROUNDED if rung.half or system.dropout or torch.cuda.is_available() else EXACT


def first_losses(run: Run) -> list[dict[str, float]]:
    """Losses of the first two steps."""
    return [{name: float(value) for name, value in common(run()).items()} for _ in range(2)]


def differences(
    found: list[dict[str, float]], expected: list[dict[str, float]], within: tuple[float, float]
) -> list[str]:
    """What is not within the limit of its step of what was expected, in words."""
    return [
        f"{name} of step {number} is {theirs[name]:.4g}, not {value:.4g}"
        for number, (theirs, ours, limit) in enumerate(zip(found, expected, within), start=1)
        for name, value in ours.items()
        if not abs(theirs[name] - value) <= limit * abs(value)
    ]


@dataclass
class Timing:
    """Seconds of a step, one per round, and of the baseline's in the round before each."""

    own: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Medians in ms, the speed-up with the quartiles of its rounds, and the rounds themselves."""
        ratios = [theirs / mine for mine, theirs in zip(self.own, self.baseline)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        return {
            "ms": 1e3 * statistics.median(self.own),
            "baseline_ms": 1e3 * statistics.median(self.baseline),
            "speedup": statistics.median(ratios),
            "speedup_quartiles": [low, high],
            "rounds_ms": [1e3 * s for s in self.own],
            "baseline_rounds_ms": [1e3 * s for s in self.baseline],
        }


def seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one call, in a round of several that ends when the device is done."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / calls


def alternate(run: Run, baseline: Run, device: torch.device, rounds: int, *, span: float = 0.05) -> Timing:
    """Rounds of both in turn, each at least `span` seconds long; the baseline is warm."""
    # its first two steps are done; on a GPU fastgan records its step in the fourth
    seconds(run, 3 if device.type == "cuda" else 1, device)
    calls = {call: max(1, round(span / seconds(call, 1, device))) for call in (baseline, run)}
    timing = Timing()
    for _ in range(rounds):
        timing.baseline.append(seconds(baseline, calls[baseline], device))
        timing.own.append(seconds(run, calls[run], device))
    return timing


def held(device: torch.device) -> int:
    """Bytes of a GPU that are taken: tensors outside of CUDA graphs, and the memory pools of those."""
    taken = 0
    for segment in torch.cuda.memory_snapshot():
        if torch.device("cuda", segment["device"]) == torch.device("cuda", device.index or 0):
            shared = tuple(segment["segment_pool_id"]) == (0, 0)
            taken += segment["allocated_size" if shared else "total_size"]
    return taken


def footprint(run: Run, before: int, device: torch.device) -> float:
    """MiB that a warm step needs on a GPU beyond what was `held` before it was built: weights, optimiser
    state, gradients, activations, graphs."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    above = torch.cuda.max_memory_allocated(device) - start
    return (held(device) + above - before) / 2**20


def footprint_apart(system: System, rung: str) -> float:
    """The same on a CPU, in a process of its own: the profiler that counts slows down all that follows."""
    code = f"from benchmarks._ladder import *; print(cpu_footprint({system!r}, {rung!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    return float(child.stdout.split()[-1])


def cpu_footprint(system: System, rung: str) -> float:
    """What `footprint_apart` runs: MiB at the highest moment from before the networks are built."""
    device = torch.device("cpu")
    (found,) = (r for r in rungs(device) if r.name == rung)
    with fair(), peak_memory(device) as peak:
        run = found.build(system, device)
        run()
        run()
    return peak.mib


def climb(
    system: System,
    ladder: list[Rung],
    device: torch.device,
    *,
    rounds: int,
    memory: bool = True,
    span: float = 0.05,
) -> Iterator[dict[str, Any]]:
    """Check, time and measure every rung beside the first; a record of each as soon as it is done.

    A rung that fails has "error", one whose losses are others has "differs", and no times.
    """
    with fair():
        baseline = ladder[0].build(system, device)
        expected = first_losses(baseline)
        for rung in ladder:
            record: dict[str, Any] = {"system": str(system), "rung": rung.name, "label": rung.label}
            begin = time.monotonic()
            cuda = device.type == "cuda"
            before = held(device) if cuda else 0
            try:
                run = rung.build(system, device)
                record["losses"] = first_losses(run)
                record["differs"] = differences(record["losses"], expected, limits(system, rung))
                record["prepared_s"] = round(time.monotonic() - begin, 1)
                if not record["differs"]:
                    record |= alternate(run, baseline, device, rounds, span=span).record()
                    record["note"] = getattr(run, "note", "")
                    if cuda:
                        record["peak_mib"] = round(footprint(run, before, device), 1)
                    elif memory:
                        record["peak_mib"] = round(footprint_apart(system, rung.name), 1)
            except Exception as error:
                record["error"] = reason(error)
            run = None  # type: ignore[assignment]
            free(device)
            yield record


def reason(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""How much memory a run will need, before it starts: the step itself, run on tensors without data.

Two steps are run on fake tensors (shapes only, nothing is computed) while every storage is followed from its
first use to its last; the second step's highest sum is the estimate. With the kernels, the path of a GPU is
taken, on any machine. What is not a tensor of the step is an allowance: the passes inside a fused op, from
their layouts (an upper bound), and `RESERVE` for what the libraries take.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastgan_kernels._block import Parameters, Run, parse
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgan.config import UsageError
from fastgan.models import translate_any_size
from fastgan.recipes.base import Nets, Recipe
from fastgan.stack import MEMORY
from fastgan.step import Step

GB = 1e9
# code of the kernels, workspaces of cuBLAS and cuDNN, and what the allocator cannot use again: not measured
RESERVE = 10**9
OPS = ("conv_norm_act", "conv_transpose_norm_act", "residual_block")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes that a run holds at its highest moment, and what they are.

    peak_bytes: all of it, `reserve_bytes` included. fixed_bytes: weights, gradients, optimiser and averaged
    networks, which stay between steps. pool_bytes: the full history pool. data_bytes: the batches of a step.
    activation_bytes_per_image: what a step adds at its highest moment, per image of a domain's batch.
    """

    memory: str
    peak_bytes: int
    fixed_bytes: int
    pool_bytes: int
    data_bytes: int
    reserve_bytes: int
    activation_bytes_per_image: int

    def __str__(self) -> str:
        return (
            f"--memory {self.memory}, about {self.peak_bytes / GB:.2f} GB at the highest: "
            f"{self.fixed_bytes / GB:.2f} GB of weights, gradients and optimiser, "
            f"{self.activation_bytes_per_image / 1e6:.0f} MB of activations per image"
        )


def estimate(
    recipe: Recipe,
    channels: tuple[int, int],
    size: tuple[int, int],
    *,
    memory: str = "fast",
    autocast: torch.dtype | None = None,
    gpu: bool = True,
) -> Estimate:
    """What a run of a recipe will hold; a few seconds on one core, without a GPU.

    Args:
        recipe: the system; batch size and all else come from its settings.
        channels: of the images of A and B.
        size: height and width of a training image in pixels.
        memory: see `fastgan.stack.set_memory`.
        autocast: dtype of mixed precision, None without.
        gpu: as on a GPU, with the fused kernels; False: as on a CPU.
    """
    config = recipe.config
    count, remembered = config.batches, 0
    if config.optimizer == "lbfgs":
        # it decides by numbers, which tensors without data do not have: Adam stands for all but its memory
        recipe, remembered = copy.copy(recipe), 2 * config.history
        vars(recipe)["config"] = dataclasses.replace(config, optimizer="adam")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake.runs_kernels = gpu  # type: ignore[attr-defined]
    with fake, _Live() as live:
        nets = _networks(recipe, channels)
        step = Step(recipe, nets, device=torch.device("cpu"), autocast=autocast, memory=memory)
        shapes: dict[str, tuple[int, ...]] = {}
        shapes |= {k: (config.batch_size, c, *size) for k, c in zip(recipe.domains, channels)}
        if recipe.labelled:
            shapes["label"] = (config.batch_size, channels[1])
        batches = [{k: torch.empty(shape) for k, shape in shapes.items()} for _ in range(count)]
        # the optimiser has its state from the first step on
        step(batches, 0)
        live.peak = live.now
        step(batches, 1)
        extra = remembered * sum(p.nbytes for net in step.nets.values() for p in net.parameters())
        peak, held = live.peak + extra, live.now + extra
        stored = [v.element_size() for k, v in step.state().items() if k.startswith("pool.")]
    data = sum(x.nbytes for batch in batches for x in batch.values())
    # both domains have a pool of their own, or one of pairs; it has its full size from the first step on
    pool = (
        config.pool_size * sum(channels[: len(recipe.domains)]) * size[0] * size[1] * max(stored, default=0)
    )
    reserve = RESERVE if gpu else 0
    return Estimate(
        memory=memory,
        peak_bytes=peak + reserve,
        fixed_bytes=held - data - pool,
        pool_bytes=pool,
        data_bytes=data,
        reserve_bytes=reserve,
        activation_bytes_per_image=(peak - held) // config.batch_size,
    )


def fit(
    recipe: Recipe,
    channels: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    memory: str = "auto",
    images: int = 0,
) -> tuple[str, str]:
    """What the networks shall keep (see `fastgan.stack.set_memory`), and a line that says what it takes.

    Args:
        recipe, channels, size, autocast: see `estimate`.
        device: where the run will be. On a CPU a quick bound comes first, and the estimate where that is not
            below the free memory.
        memory: "auto" for the fastest that fits, or the one to check.
        images: bytes of the training images that will lie on the device besides.

    Raises:
        UsageError: nothing fits; says what would.
    """
    free = free_bytes(device)
    free = None if free is None else free - images
    first = MEMORY[0] if memory == "auto" else memory
    if free is None:
        return first, f"memory: --memory {first}; the free memory of {device} is not known"
    bound = _at_most(recipe, channels, size)
    if device.type == "cpu" and bound < free:
        return first, f"memory: --memory {first}, below {bound / GB:.2f} of {free / GB:.2f} GB"
    gpu = device.type == "cuda"
    found = choose(recipe, channels, size, free=free, autocast=autocast, memory=memory, gpu=gpu)
    return found.memory, f"memory: {found}; {free / GB:.2f} GB are free"


def choose(
    recipe: Recipe,
    channels: tuple[int, int],
    size: tuple[int, int],
    *,
    free: int,
    autocast: torch.dtype | None = None,
    memory: str = "auto",
    gpu: bool = True,
) -> Estimate:
    """The estimate of the fastest mode that fits into `free` bytes, or of `memory` where it is not "auto".

    Raises:
        UsageError: none fits; says what would.
    """
    estimated = partial(estimate, channels=channels, autocast=autocast, gpu=gpu)
    found = None
    # without the kernels "low" is "fast"
    for mode in (MEMORY if gpu else (MEMORY[0], MEMORY[-1])) if memory == "auto" else (memory,):
        found = estimated(recipe, size=size, memory=mode)
        if found.peak_bytes <= free:
            return found
    assert found is not None
    advice: dict[str, str] = {}
    for flag, value, other, smaller in _changes(recipe, size, memory):
        if flag in advice:
            # the first of the sizes that fits
            continue
        try:
            needed = estimated(other, size=smaller, memory=MEMORY[-1]).peak_bytes
        except ValueError:
            # a size that the networks do not take
            continue
        if needed <= free:
            advice[flag] = f"{flag} {value} (about {needed / GB:.2f} GB)"
    use = " or ".join(advice.values()) or "a smaller --crop-size, --ngf or --batch-size"
    raise UsageError(
        f"--memory {found.memory} needs about {found.peak_bytes / GB:.2f} GB, "
        f"{free / GB:.2f} GB are free: use {use}"
    )


def _changes(
    recipe: Recipe, size: tuple[int, int], memory: str
) -> Iterator[tuple[str, str, Recipe, tuple[int, int]]]:
    """What a person can change: flag, value, and the recipe and the size that follow."""
    config, least = recipe.config, "" if memory == "auto" else f" --memory {MEMORY[-1]}"
    if memory not in ("auto", MEMORY[-1]):
        yield "--memory", MEMORY[-1], recipe, size
    if config.batch_size > 1:
        # the same images in each update
        parts = config.batch_size * config.accumulate
        one = type(recipe)(dataclasses.replace(config, batch_size=1, accumulate=parts))
        if not one.unfit(*size):
            yield "--batch-size", f"1 --accumulate {parts}{least}", one, size
    flag = "--crop-size" if "crop" in config.preprocess else "--load-size"
    if config.preprocess == "none":
        flag = "--preprocess resize_and_crop --crop-size"
    for k in (1, 2, 3):
        yield flag, f"{size[1] >> k}{least}", recipe, (size[0] >> k, size[1] >> k)
    thin = dataclasses.replace(config, ngf=max(1, config.ngf // 2))
    yield "--ngf", f"{thin.ngf}{least}", type(recipe)(thin), size


def translation_bytes(net: nn.Module, shape: tuple[int, int, int], autocast: torch.dtype | None) -> int:
    """The most bytes that one image of (C, H, W) takes on its way through a generator on a CPU."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake.runs_kernels = False  # type: ignore[attr-defined]
    mixed = torch.autocast("cpu", autocast, enabled=autocast is not None)
    with fake, _Live() as live, torch.inference_mode(), mixed:
        translate_any_size(net, torch.empty(1, *shape).to(memory_format=torch.channels_last))
        return live.peak


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, of a CPU the machine's; None where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _at_most(recipe: Recipe, channels: tuple[int, int], size: tuple[int, int]) -> int:
    """A bound of a run without the kernels, from its settings alone."""
    c, pixels = recipe.config, size[0] * size[1]
    with torch.device("meta"):
        nets = recipe.networks(*channels).values()
    # weights, gradients, two moments, an average and a copy in the dtype of the computation
    weights = 6 * sum(p.nbytes for net in nets for p in net.parameters())
    # planes of full size and width that a pass keeps; CycleGAN has six passes of its generators
    planes = c.batch_size * max(c.ngf, c.ndf) * (40 + 4 * c.blocks) * 8
    images = (c.pool_size + 4 * c.batch_size * c.batches) * sum(channels)
    return weights + 4 * pixels * (planes + images)


def _networks(recipe: Recipe, channels: tuple[int, int]) -> Nets:
    """Networks of fake parameters that lie as `fastgan.layers.place` lays them, and cannot be moved."""
    nets = recipe.networks(*channels)
    for net in nets.values():
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() == 4:
                    laid = p.detach().contiguous(memory_format=torch.channels_last)
                    setattr(module, name, nn.Parameter(laid))
        # torch neither moves nor copies a module with fake parameters
        own, methods = type(net), {"to": lambda self, *args, **kwargs: self, "__deepcopy__": _copy}
        net.__class__ = type(own.__name__, (own,), methods)
    return nets


def _copy(net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    for p in net.parameters():
        memo[id(p)] = nn.Parameter(p.detach().clone(), p.requires_grad)
    for buffer in net.buffers():
        memo[id(buffer)] = buffer.clone()
    new = net.__class__.__new__(net.__class__)
    new.__dict__ = copy.deepcopy(net.__dict__, memo)
    return new


class _Live(TorchDispatchMode):
    """Bytes of all storages that are alive, and the highest sum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        self.peak = max(self.peak, self.now + _inside(func, args))
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def end(_: object) -> None:
            del self.storages[key]
            self.now -= size

        self.storages[key] = weakref.ref(storage, end)
        self.now += size


def _inside(func: Any, args: Sequence[Any]) -> int:
    """Bytes that a fused op holds besides what it takes and returns, at most."""
    name = func.name().removeprefix("fastgan::").removesuffix(".default")
    if not func.name().startswith("fastgan::") or name.removesuffix("_backward") not in OPS:
        return 0
    backward = name.endswith("_backward")
    x, residual, seed, *lists = args[1:10] if backward else args[:9]
    parameters, plan = Parameters(*lists), parse(args[11] if backward else args[9])
    run, layers = Run(x, residual, seed, parameters, plan), range(len(plan.layers))
    row = len(x) * x.element_size()
    reads, writes, images = (
        [row * at.rows * at.columns for at in map(find, layers)]
        for find in (run.reads, run.writes, run.image)
    )
    if not backward:
        # the laid-out input and skip where they are not kept; a product per network before they are joined
        return max(images) * (2 if plan.keep != "none" else 4) + (0 if plan.keep == "all" else 2 * max(reads))
    again = sum(reads) if plan.keep == "raw" else 0
    # the gradient on its way from layer to layer, and of the weights in the accumulator's type
    products = sum(w.numel() for w in parameters.weights) * 4 * 2
    return again + sum(writes) + 4 * max(reads + writes + images) + products

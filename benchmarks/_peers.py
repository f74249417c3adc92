"""Convolution layers of CycleGAN and pix2pix at 256x256, and what fastgan's ops are measured against there.

Peers are what a user writes: torch functions, bfloat16, cuDNN's benchmark mode on, weights and images brought
to channels_last outside the clock, S networks one after the other. A bias in front of a norm, which has no
effect, is left out for all. All implementations get the same values, and each result is compared with the
first peer's in float32 before it is timed: ours must be right to be timed, and all errors are reported (torch
has wrong gradients of its own: on a CPU, those of instance_norm of one image with a channels_last gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._measure import relative_error

IMPLEMENTATIONS = ("triton", "cudnn", "cudnn_channels_last", "compile")
DIRECTIONS = ("fwd", "bwd")
# weight sets x images of each: one network at batch 1 and 4; CycleGAN's cycle pass and, with the identity
# images, its first pass at batch 1; its cycle pass at batch 4
LOADS = ((1, 1), (1, 4), (2, 1), (2, 2), (2, 4))
ONE_NETWORK = ((1, 1), (1, 4))
# norm of the difference from float32, relative. bfloat16 peers on a CPU: at most 0.011 and, through nine
# blocks, whose ReLUs switch where values are rounded, 0.14; a wrong function is near 1
LIMITS = {"fwd": 0.03, "bwd": 0.3}

Function = Callable[[Tensor, list[Tensor]], Tensor]


@dataclass(frozen=True)
class Layer:
    """A convolution of `size` x `size` images, from inputs to outputs channels, with what follows it."""

    name: str
    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    pad: int = 1
    mode: str = "zeros"
    norm: str = "instance"
    act: str = "relu"
    transposed: bool = False
    output_pad: int = 0

    @property
    def bias(self) -> bool:
        return self.norm == "none"

    @property
    def out_size(self) -> int:
        if self.transposed:
            return (self.size - 1) * self.stride - 2 * self.pad + self.kernel + self.output_pad
        return (self.size + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def flop(self) -> int:
        """Of one image, forward: two for each weight at each place of the smaller image."""
        pixels = (self.size if self.transposed else self.out_size) ** 2
        return 2 * pixels * self.kernel**2 * self.inputs * self.outputs

    @property
    def parameters(self) -> list[tuple[int, ...]]:
        """Shapes: weight, then bias or a batch norm's weight and bias."""
        channels = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        vectors = 2 if self.norm == "batch" else int(self.bias)
        return [(*channels, self.kernel, self.kernel)] + [(self.outputs,)] * vectors

    def named(self, parameters: list[Tensor]) -> dict[str, Tensor]:
        """The arguments of the op beside x."""
        vectors = ("norm_weight", "norm_bias") if self.norm == "batch" else ("bias",)
        return dict(zip(("weight", *vectors), parameters))

    def peer(self, x: Tensor, parameters: list[Tensor]) -> Tensor:
        p = self.named(parameters)
        if self.transposed:
            x = F.conv_transpose2d(x, p["weight"], p.get("bias"), self.stride, self.pad, self.output_pad)
        elif self.mode == "zeros":
            x = F.conv2d(x, p["weight"], p.get("bias"), self.stride, self.pad)
        else:
            x = F.pad(x, (self.pad,) * 4, mode=self.mode)
            x = F.conv2d(x, p["weight"], p.get("bias"), self.stride)
        if self.norm == "instance":
            x = F.instance_norm(x)
        elif self.norm == "batch":
            x = F.batch_norm(x, None, None, p["norm_weight"], p["norm_bias"], training=True)
        if self.act == "leaky_relu":
            return F.leaky_relu(x, 0.2)
        return {"relu": F.relu, "tanh": torch.tanh, "none": lambda y: y}[self.act](x)


LEAKY: dict[str, Any] = {"kernel": 4, "stride": 2, "act": "leaky_relu"}
UNET: dict[str, Any] = LEAKY | {"norm": "batch"}
UP: dict[str, Any] = {"kernel": 4, "stride": 2, "norm": "batch", "transposed": True}
RESNET = (
    Layer("resnet 256^2 3-64 7x7", 3, 64, 256, 7, 1, 3, "reflect"),
    Layer("resnet 256^2 64-128 3x3/2", 64, 128, 256, 3, 2),
    Layer("resnet 128^2 128-256 3x3/2", 128, 256, 128, 3, 2),
    Layer("resnet 64^2 256-256 3x3", 256, 256, 64, 3, 1, 1, "reflect"),
    Layer("resnet 256^2 64-3 7x7 tanh", 64, 3, 256, 7, 1, 3, "reflect", "none", "tanh"),
)
PATCHGAN = (
    Layer("patchgan 256^2 3-64 4x4/2", 3, 64, 256, norm="none", **LEAKY),
    Layer("patchgan 128^2 64-128 4x4/2", 64, 128, 128, **LEAKY),
    Layer("patchgan 64^2 128-256 4x4/2", 128, 256, 64, **LEAKY),
    Layer("patchgan 32^2 256-512 4x4", 256, 512, 32, 4, act="leaky_relu"),
    Layer("patchgan 31^2 512-1 4x4", 512, 1, 31, 4, norm="none", act="none"),
)
PIX2PIX = (
    Layer("patchgan 256^2 6-64 4x4/2", 6, 64, 256, **LEAKY | {"norm": "none"}),
    Layer("unet 128^2 64-128 4x4/2", 64, 128, 128, **UNET),
    Layer("unet 32^2 256-512 4x4/2", 256, 512, 32, **UNET),
    Layer("unet 8^2 512-512 4x4/2", 512, 512, 8, **UNET),
    Layer("unet 2^2 512-512 4x4/2", 512, 512, 2, **UNET | {"norm": "none", "act": "relu"}),
)
RESNET_UP = (
    Layer("resnet 64^2 256-128 3x3/2", 256, 128, 64, 3, 2, transposed=True, output_pad=1),
    Layer("resnet 128^2 128-64 3x3/2", 128, 64, 128, 3, 2, transposed=True, output_pad=1),
)
UNET_UP = (
    Layer("unet 1^2 512-512 4x4/2", 512, 512, 1, **UP),
    Layer("unet 4^2 1024-512 4x4/2", 1024, 512, 4, **UP),
    Layer("unet 16^2 1024-256 4x4/2", 1024, 256, 16, **UP),
    Layer("unet 64^2 256-64 4x4/2", 256, 64, 64, **UP),
    Layer("unet 128^2 128-3 4x4/2 tanh", 128, 3, 128, **UP | {"norm": "none", "act": "tanh"}),
)


@dataclass(frozen=True)
class Work:
    """A call of an op: x (sets * images, *shape) and parameters, with a leading dimension of sets if several.

    The peer computes one network. flop: of one image, forward.
    """

    op: str
    case: str
    ours: Function
    peer: Function
    shape: tuple[int, int, int]
    parameters: list[tuple[int, ...]]
    sets: int
    images: int
    flop: int


def cases(
    layers: tuple[Any, ...], loads: tuple[tuple[int, int], ...], quick: tuple[tuple[int, int], ...] = ()
) -> list[Any]:
    """A test parameter for every layer and load; those of the loads in `quick` carry the mark."""
    return [
        pytest.param(
            layer, sets, images, id=f"{getattr(layer, 'name', layer)} {sets}x{images}",
            marks=[pytest.mark.quick] if (sets, images) in quick else [],
        )
        for layer in layers
        for sets, images in loads
    ]  # fmt: skip


def operands(work: Work, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x and parameters with their dimension of sets, the same for each implementation."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = draw(work.sets * work.images, *work.shape)
    parameters = []
    for shape in work.parameters:
        value = draw(work.sets, *shape)
        # of size 1 after the convolution; parameters of a norm near 1
        parameters.append(
            1 + 0.1 * value if len(shape) == 1 else value / torch.Size(shape[1:]).numel() ** 0.5
        )
    return x.to(dtype), [p.to(dtype) for p in parameters]


@dataclass(frozen=True)
class Call:
    """An implementation's forward on its own copies: outputs, one for ours, one per network for a peer."""

    forward: Callable[[], list[Tensor]]
    leaves: list[list[Tensor]]

    def gradients(self, ys: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
        leaves = [leaf for network in self.leaves for leaf in network]
        return list(torch.autograd.grad(ys, leaves, dys, retain_graph=True))


def build(work: Work, implementation: str, x: Tensor, parameters: list[Tensor]) -> Call:
    """The call of an implementation; the operands are brought to its layout here."""

    def leaf(value: Tensor) -> Tensor:
        nhwc = implementation != "cudnn" and value.dim() == 4
        layout = torch.channels_last if nhwc else torch.contiguous_format
        return value.detach().clone(memory_format=layout).requires_grad_()

    if implementation == "triton":
        given = parameters if work.sets > 1 else [p[0] for p in parameters]
        leaves = [leaf(x), *(p.detach().clone().requires_grad_() for p in given)]
        return Call(lambda: [work.ours(leaves[0], leaves[1:])], [leaves])
    networks = [
        [leaf(part), *(leaf(p[s]) for p in parameters)]
        for s, part in enumerate(x.split(work.images))
    ]  # fmt: skip

    def run(networks: list[list[Tensor]]) -> list[Tensor]:
        return [work.peer(network[0], network[1:]) for network in networks]

    function = torch.compile(run, dynamic=False) if implementation == "compile" else run
    return Call(lambda: function(networks), networks)


def gathered(work: Work, call: Call, gradients: list[Tensor]) -> list[Tensor]:
    """Gradients of x and of the parameters with their dimension of sets, whatever the implementation."""
    if len(call.leaves) == work.sets > 1:
        size = len(call.leaves[0])
        networks = [gradients[k : k + size] for k in range(0, len(gradients), size)]
        return [torch.cat(g) if i == 0 else torch.stack(g) for i, g in enumerate(zip(*networks))]
    return [g if i == 0 or work.sets > 1 else g[None] for i, g in enumerate(gradients)]


def checked(
    work: Work, implementation: str, device: torch.device, dtype: torch.dtype
) -> tuple[Call, list[Tensor], list[Tensor], dict[str, float]]:
    """A call, its outputs, their gradients, and the errors of both directions against the float32 peer."""
    x, parameters = operands(work, device, dtype)
    call = build(work, implementation, x, parameters)
    ys = call.forward()
    generator = torch.Generator(device).manual_seed(1)
    dy = torch.randn(torch.cat(ys).shape, generator=generator, device=device).to(dtype)
    dys = [part.contiguous(memory_format=layout(y)) for part, y in zip(dy.split(len(ys[0])), ys)]
    oracle = build(work, "cudnn", x.float(), [p.float() for p in parameters])
    expected = oracle.forward()
    dys32 = list(dy.float().split(len(expected[0])))
    wanted = gathered(work, oracle, oracle.gradients(expected, dys32))
    got = gathered(work, call, call.gradients(ys, dys))
    errors = {
        "fwd": relative_error([torch.cat(ys).detach()], [torch.cat(expected).detach()]),
        "bwd": relative_error(got, wanted),
    }
    return call, ys, dys, errors


def layout(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def compare(measure: Callable[..., None], work: Work, implementation: str, direction: str) -> None:
    """Measures a case, in bfloat16 on the GPU. AssertionError where our result is wrong: it has no speed."""
    call, ys, dys, errors = checked(work, implementation, torch.device("cuda"), torch.bfloat16)
    right = errors[direction] < LIMITS[direction]
    assert right or implementation != "triton", f"wrong by {errors[direction]:.3f}"
    x, y = (sum(t.numel() for t in group) for group in ([leaves[0] for leaves in call.leaves], ys))
    weights = sum(leaf.numel() for leaves in call.leaves for leaf in leaves[1:])
    # read x, weights, write y; backward: read dy, y (for norm and activation), x, weights, write dx, dw
    elements = {"fwd": x + weights + y, "bwd": 2 * y + 2 * x + 2 * weights}[direction]
    measure(
        call.forward if direction == "fwd" else lambda: call.gradients(ys, dys),
        op=work.op,
        case=f"{work.case} {work.sets}x{work.images}",
        direction=direction,
        implementation=implementation,
        bytes_moved=2 * elements,
        # backward: once for dx, once for dw
        flop=(1 if direction == "fwd" else 2) * work.sets * work.images * work.flop,
        error=round(errors[direction], 4),
        right=right,
    )

"""Small networks in the styles of public code, and what the tests of accelerate compare.

Where numbers are compared the arithmetic is float64, so that two orders of summation differ by some 1e-15 of
a value of order one and a tolerance of 1e-10 still sees any difference of definition.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import fastgan
from fastgan import runs
from fastgan.accelerate import Report, accelerate

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def block(norm: Callable[[int], nn.Module], c: int = 4, drop: bool = False, pad: bool = True) -> nn.Module:
    """The body of a residual block, padded by a layer or by the convolution."""

    def half() -> list[nn.Module]:
        padded = [nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3)] if pad else [nn.Conv2d(c, c, 3, padding=1)]
        return [*padded, norm(c)]

    return nn.Sequential(*half(), nn.ReLU(True), *([nn.Dropout(0.5)] if drop else []), *half())


class Skip(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SkipLast(Skip):
    def forward(self, x: Tensor) -> Tensor:
        skip = x
        x = self.body(x)
        x += skip
        return x


class SkipIntoInput(Skip):
    """Adds in place to its input, which its caller then sees."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.body(x)
        return x


class Cell(nn.Module):
    """Layers as attributes, registered in another order than they are called in; norm and act may be None."""

    def __init__(self, cin: int, cout: int, k: int, stride: int, norm: nn.Module | None, act: str) -> None:
        super().__init__()
        self.norm = norm
        acts = {
            "relu": nn.ReLU(True),
            "leaky": nn.LeakyReLU(0.2, True),
            "tanh": nn.Tanh(),
            "prelu": nn.PReLU(),
        }
        self.act = acts.get(act)
        self.conv = nn.Conv2d(cin, cout, k, stride)
        self.pad = nn.ReflectionPad2d(k // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pad(x))
        if self.norm:
            x = self.norm(x)
        if self.act is not None:
            x = self.act(x)
        return x


class Level(nn.Module):
    """A level of a U-Net whose in-place LeakyReLU overwrites the skip."""

    def __init__(self, c: int, inside: nn.Module | None, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        wide = 2 * c if inside else c
        middle = [norm(c), inside] if inside else []
        up = [nn.ReLU(True), nn.ConvTranspose2d(wide, c, 4, 2, 1), norm(c), nn.Dropout(0.0)]
        self.model = nn.Sequential(nn.LeakyReLU(0.2, True), nn.Conv2d(c, c, 4, 2, 1), *middle, *up)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.model(x)], 1)


class Functional(nn.Module):
    """Activations as functions, a residual before the last one, and a shortcut computed in between."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.conv2, self.conv1 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, 2, 1)
        self.shortcut = nn.Conv2d(c, c, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.leaky_relu(y, 0.1) if self.bn1 is not None else y


class Shared(nn.Module):
    """One activation, one norm and one convolution, each called at several places."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.act, self.norm, self.conv = nn.ReLU(True), nn.BatchNorm2d(c), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.act(self.norm(self.conv(x)))


def generator(norm: Callable[[int], nn.Module], skip: type[nn.Module] = Skip, pad: bool = True) -> nn.Module:
    act = nn.ReLU(True)
    return nn.Sequential(
        *(nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), norm(4), act),
        *(nn.Conv2d(4, 4, 3, 2, 1, bias=False), norm(4), act),
        *(skip(block(norm, pad=pad)) for _ in range(2)),
        *(nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1), norm(4), act),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")),
        *(nn.ZeroPad2d(1), nn.Conv2d(4, 3, 3), nn.Tanh()),
    )


def instance(c: int) -> nn.Module:
    return nn.InstanceNorm2d(c)


def affine(c: int) -> nn.Module:
    return nn.InstanceNorm2d(c, affine=True)


def batch(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, eps=1e-3, momentum=0.3)


def cumulative(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, momentum=None)


def unnormed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(4, 4, 3, padding="same")
    )


def cells() -> nn.Module:
    body = nn.Sequential(Cell(4, 4, 3, 1, instance(4), "relu"), Cell(4, 4, 3, 1, instance(4), ""))
    return nn.Sequential(Cell(3, 4, 7, 1, None, "leaky"), Cell(4, 4, 5, 2, batch(4), "tanh"), SkipLast(body))


# network, its input, ops per call; a cumulative average has a momentum of its own in every norm, so that the
# residual blocks are not one op
NETWORKS = {
    "instance": (lambda: generator(instance), (2, 3, 12, 16), 6),
    "affine": (lambda: generator(affine, SkipLast), (2, 3, 12, 16), 6),
    "batch": (lambda: generator(batch, pad=False), (2, 3, 12, 16), 6),
    "cumulative": (lambda: generator(cumulative), (2, 3, 12, 16), 9),
    "cells": (cells, (2, 3, 12, 16), 3),
    "unet": (lambda: nn.Sequential(Level(3, Level(3, None, instance), instance)), (2, 3, 16, 16), 4),
    "unet batch": (lambda: nn.Sequential(Level(3, Level(3, None, batch), batch)), (2, 3, 16, 16), 4),
    "functional": (lambda: nn.Sequential(Functional(3), Functional(3)), (2, 3, 16, 16), 4),
    "shared": (lambda: Shared(3), (2, 3, 8, 8), 2),
    "patch": (unnormed, (2, 3, 16, 16), 1),
}


def count_ops(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op ran since."""
    found: Counter[str] = Counter()

    def count(module: object, name: str) -> None:
        op = getattr(module, name)

        def counting(*args: object, **kwargs: object) -> Tensor:
            found[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(fastgan.layers, "conv_norm_act")
    count(fastgan.layers, "conv_transpose_norm_act")
    count(runs, "residual_block")
    return found


def lively(net: nn.Module) -> nn.Module:
    """Float64, weights that let every layer matter, statistics away from zero and one."""
    generator = torch.Generator().manual_seed(0)
    net.double()
    for name, tensor in net.state_dict().items():
        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            tensor.copy_(draw.abs() + 0.5)
        elif tensor.is_floating_point():
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
            tensor.copy_(scale * draw + (1.0 if name.endswith("weight") and tensor.dim() == 1 else 0.0))
    return net


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    # an operation in place may not meet a leaf
    y = net(x * 1)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    grads = torch.autograd.grad(y, [x, *net.parameters()], dy, allow_unused=True, materialize_grads=True)
    return y.detach(), list(grads)


def assert_same(net: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """Output, gradients of the input and of every parameter, and buffers."""
    y1, grads1 = gradients(net, x)
    y2, grads2 = gradients(twin, x)
    assert_close(y1, y2, **EXACT)
    for name, a, b in zip(["input", *dict(net.named_parameters())], grads1, grads2):
        assert_close(a, b, **EXACT, msg=lambda m, name=name: f"gradient of {name}: {m}")
    assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), **EXACT)


def pair(make: Callable[[], nn.Module], **kwargs: object) -> tuple[nn.Module, nn.Module, Report]:
    net = lively(make())
    twin = copy.deepcopy(net)
    return net, twin, accelerate(net, **kwargs)  # type: ignore[arg-type]

"""Plain-torch twins of SRGAN, SRCNN, VGG and neural style, as those of reference_systems.py: from the
definitions alone. `imresize` follows MATLAB's function of that name step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference_systems import Batch, Nets, ReferenceSystem, adversarial_discriminator, softplus


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _contributions(side: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """For every place of the output the weights and the (0-based) places of the input."""
    out = math.ceil(side * scale)
    width = 4 / min(scale, 1)
    u = np.arange(1, out + 1) / scale + 0.5 * (1 - 1 / scale)
    left = np.floor(u - width / 2)
    count = math.ceil(width) + 2
    places = left[:, None] + np.arange(count)
    distance = u[:, None] - places
    weights = scale * _cubic(scale * distance) if scale < 1 else _cubic(distance)
    weights /= weights.sum(1, keepdims=True)
    mirror = np.concatenate([np.arange(side), np.arange(side)[::-1]])
    return weights, mirror[np.mod(places - 1, 2 * side).astype(int)]


def imresize(x: Tensor, scale: float) -> Tensor:
    """(N, C, H, W) float64, MATLAB's imresize(x, scale, "bicubic") of values that are not rounded."""
    values = x.numpy()
    for axis in (2, 3):
        weights, places = _contributions(values.shape[axis], scale)
        lines = np.moveaxis(values, axis, -1)
        values = np.moveaxis((lines[..., places] * weights).sum(-1), -1, axis)
    return torch.from_numpy(np.ascontiguousarray(values))


class _Same(nn.Module):
    def __init__(self, channels: int, bias: bool, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        one, two = (nn.Conv2d(channels, channels, 3, 1, 1, bias=bias) for _ in range(2))
        self.main = nn.Sequential(one, norm(channels), nn.PReLU(), two, norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + x


class ReferenceSRResNet(nn.Module):
    def __init__(
        self, channels: int, scale: int, ngf: int, blocks: int, norm: str, bicubic: bool = False
    ) -> None:
        super().__init__()
        self.bicubic, self.scale = bicubic, scale
        make = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": lambda _: nn.Identity()}[norm]
        self.head = nn.Sequential(nn.Conv2d(channels, ngf, 9, 1, 4), nn.PReLU())
        self.blocks = nn.Sequential(*(_Same(ngf, norm == "none", make) for _ in range(blocks)))
        self.join = nn.Sequential(nn.Conv2d(ngf, ngf, 3, 1, 1, bias=norm == "none"), make(ngf))
        ups = []
        for _ in range({2: 1, 4: 2}[scale]):
            ups.append(nn.Sequential(nn.Conv2d(ngf, 4 * ngf, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU()))
        self.up = nn.Sequential(*ups)
        self.tail = nn.Conv2d(ngf, channels, 9, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = self.head(x)
        y = self.tail(self.up(start + self.join(self.blocks(start))))
        return y + imresize(x, self.scale) if self.bicubic else y


class ReferenceSRCNN(nn.Module):
    """Images in [-1, 1]; RGB by way of MATLAB's rgb2ycbcr and back, whose matrix is inverted here."""

    # rows Y, Cb, Cr of R, G, B in 0..1, in 0..1 as well
    matrix = torch.tensor(
        [[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]],
        dtype=torch.float64,
    )
    offset = torch.tensor([16.0, 128.0, 128.0], dtype=torch.float64).view(1, 3, 1, 1)

    def __init__(self, scale: int, middle: int) -> None:
        super().__init__()
        self.scale = scale

        def conv(a: int, b: int, k: int) -> nn.Conv2d:
            return nn.Conv2d(a, b, k, padding=k // 2, padding_mode="replicate")

        convs = conv(1, 64, 9), conv(64, 32, middle), conv(32, 1, 5)
        # in the package the padding is a layer in front of each
        names = {"1": convs[0], "4": convs[1], "7": convs[2]}
        self.layers = nn.ModuleDict(names)

    def on_plane(self, y: Tensor) -> Tensor:
        one, two, three = self.layers["1"], self.layers["4"], self.layers["7"]
        return three(two(one(y).clamp(min=0)).clamp(min=0))

    def forward(self, x: Tensor) -> Tensor:
        x = imresize((x + 1) / 2, self.scale)
        if x.shape[1] != 3:
            return torch.cat([self.on_plane(plane) for plane in x.split(1, 1)], 1) * 2 - 1
        ycc = (torch.einsum("ij,njhw->nihw", self.matrix, x) + self.offset) / 255
        ycc = torch.cat([self.on_plane(ycc[:, :1]), ycc[:, 1:]], 1)
        rgb = torch.einsum("ij,njhw->nihw", torch.linalg.inv(self.matrix), ycc * 255 - self.offset)
        return rgb * 2 - 1


class ReferenceSRDiscriminator(nn.Module):
    def __init__(self, channels: int, side: int, ndf: int, norm: str) -> None:
        super().__init__()
        make = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": lambda _: nn.Identity()}[norm]
        rows = [(channels, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2), (2, 4, 1), (4, 4, 2), (4, 8, 1), (8, 8, 2)]
        blocks: list[nn.Module] = []
        for k, (before, after, stride) in enumerate(rows):
            into = channels if k == 0 else before * ndf
            layers: list[nn.Module] = [
                nn.Conv2d(into, after * ndf, 3, stride, 1, bias=k == 0 or norm == "none")
            ]
            layers += [make(after * ndf)] if k else []
            blocks.append(nn.Sequential(*layers, nn.LeakyReLU(0.2)))
        side = side // 16
        dense = nn.Linear(8 * ndf * side * side, 16 * ndf), nn.LeakyReLU(0.2), nn.Linear(16 * ndf, 1)
        self.blocks = nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), *dense))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def reference_vgg(kind: str, width: int = 64) -> nn.Sequential:
    """torchvision's `features`, from the paper's table 1: D has 16 layers, E has 19."""
    plan: dict[str, list[int | str]] = {
        "vgg16": [1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"],
        "vgg19": [1, 1, "M", 2, 2, "M", 4, 4, 4, 4, "M", 8, 8, 8, 8, "M", 8, 8, 8, 8, "M"],
    }
    layers: list[nn.Module] = []
    into = 3
    for each in plan[kind]:
        if each == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(into, int(each) * width, 3, padding=1), nn.ReLU()]
            into = int(each) * width
    return nn.Sequential(*layers)


def normalised(x: Tensor) -> Tensor:
    """[-1, 1] to what torchvision's networks were trained on."""
    mean, std = (
        torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1)
        for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    return ((x + 1) / 2 - mean) / std


class ReferenceSRGAN(ReferenceSystem):
    """The generator first; the discriminator then judges the images made before that update."""

    generators = ("G",)

    def __init__(
        self, nets: Nets, *, scale: int, lambda_gan: float, lambda_vgg: float, content: str = "pixels",
        vgg: nn.Sequential | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.discriminators = ("D",) if "D" in nets else ()
        super().__init__(nets, **settings)
        self.scale, self.lambda_gan, self.lambda_vgg = scale, lambda_gan, lambda_vgg
        # after the fourth convolution of the fifth group, or the second of the second, and its ReLU
        self.vgg = vgg and vgg[: {"vgg54": 36, "vgg22": 9}[content]]

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        real = batches[0]["A"]
        fake = self.nets["G"](imresize(real, 1 / self.scale))
        terms: dict[str, Tensor] = {}
        if self.vgg is None:
            terms["G_pixels"] = ((fake - real) ** 2).mean()
        else:
            gap = self.vgg(normalised(fake)) - self.vgg(normalised(real))
            terms["G_vgg"] = self.lambda_vgg * (gap**2).mean()
        if self.discriminators:
            terms["G_GAN"] = self.lambda_gan * softplus(-self.nets["D"](fake)).mean()
        self.update_g(sum(terms.values(), torch.zeros(())), factor)
        if self.discriminators:
            on_fake, on_real = self.nets["D"](fake.detach()), self.nets["D"](real)
            terms["D"] = adversarial_discriminator(self.gan_mode, on_real, on_fake, **self.weights)
            self.update_d(terms["D"], factor)
        return {name: value.item() for name, value in terms.items()}


class ReferenceStyle:
    """Loss of a picture in [-1, 1] by loops over channels; the max pooling of `vgg` is replaced."""

    places = {"1_1": 1, "2_1": 6, "3_1": 11, "4_1": 20, "4_2": 22, "5_1": 29}  # of the ReLUs

    def __init__(
        self,
        vgg: nn.Sequential,
        content: Tensor,
        style: Tensor,
        alpha: float,
        beta: float,
        smooth: float,
        paper: bool = False,
    ) -> None:
        self.smooth, self.paper = smooth, paper
        pooled = [nn.AvgPool2d(2, 2) if isinstance(layer, nn.MaxPool2d) else layer for layer in vgg]
        self.vgg, self.alpha, self.beta = nn.Sequential(*pooled[:30]), alpha, beta
        self.content, self.style = self.features(content), self.features(style)
        self.size = {k: (self.content[k].mean() + self.style[k].mean()) / 2 for k in self.places}

    def features(self, x: Tensor) -> dict[str, Tensor]:
        found, h = {}, normalised(x)
        for number, layer in enumerate(self.vgg):
            h = layer(h)
            found |= {name: h for name, place in self.places.items() if place == number}
        return found

    @staticmethod
    def gram(f: Tensor) -> Tensor:
        rows = [[(f[0, i] * f[0, j]).mean() for j in range(f.shape[1])] for i in range(f.shape[1])]
        return torch.stack([torch.stack(row) for row in rows])

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        mine = self.features(x)
        gap = (mine["4_2"] - self.content["4_2"]) / self.size["4_2"]
        style = torch.zeros((), dtype=x.dtype)
        for name in ("1_1", "2_1", "3_1", "4_1", "5_1"):
            n = mine[name].shape[1]
            difference = self.gram(mine[name] / self.size[name]) - self.gram(
                self.style[name] / self.size[name]
            )
            style = style + (difference**2).sum() / (n**2 * 4 * 5 if self.paper else n**4)
        distance = (gap**2).sum() / 2 if self.paper else (gap**2).mean()
        found = {"content": self.alpha * distance, "style": self.beta * style}
        if self.smooth:
            found["smooth"] = self.smooth * sum(
                ((x - x.roll(1, k)).narrow(k, 1, x.shape[k] - 1) ** 2).mean() for k in (2, 3)
            )
        return found


def reference_lbfgs(
    loss: Callable[[Tensor], Tensor], x: Tensor, steps: int, lr: float, history: int
) -> list[Tensor]:
    """Points after each step of L-BFGS (Nocedal and Wright 2006, algorithm 7.4) with a fixed step length, the
    first one shortened to at most lr in the sum of its absolute values."""
    pairs: list[tuple[Tensor, Tensor]] = []
    points, before = [x.clone()], None
    for k in range(steps):
        x = points[-1].clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        if before is not None:
            s, y = points[-1] - points[-2], g - before
            if (s * y).sum() > 1e-10:
                pairs = [*pairs, (s, y)][-history:]
        before, q, alphas = g, g.clone(), []
        for s, y in reversed(pairs):
            alphas.append((s * q).sum() / (s * y).sum())
            q = q - alphas[-1] * y
        if pairs:
            s, y = pairs[-1]
            q = q * (s * y).sum() / (y * y).sum()
        for (s, y), alpha in zip(pairs, reversed(alphas)):
            q = q + s * (alpha - (y * q).sum() / (s * y).sum())
        length = lr * min(1.0, 1.0 / g.abs().sum().item()) if k == 0 else lr
        points.append(points[-1] - length * q)
    return points[1:]

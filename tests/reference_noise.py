"""Plain-torch twins of the systems that make images from noise, written from their definitions alone; see
reference_systems.py, whose optimisers and adversarial losses they use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference_systems import (
    Batch,
    Nets,
    ReferenceSystem,
    _final,
    adversarial_discriminator,
    adversarial_generator,
)


def reference_noise(seed: int, index: int, batches: int, images: int, numbers: int) -> Tensor:
    """The noise of step `index`, (batches, images, numbers)."""
    rng = np.random.default_rng([seed, 2, index])
    return torch.from_numpy(rng.standard_normal((batches, images, numbers), np.float32)).double()


def _norm(kind: str, channels: int) -> nn.Module:
    return {
        "batch": nn.BatchNorm2d(channels),
        "instance": nn.InstanceNorm2d(channels),
        "layer": nn.GroupNorm(1, channels),
        "none": nn.Identity(),
    }[kind]


class _Column(nn.Module):
    """Noise and label below each other as one pixel of many channels."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.main = nn.Sequential(*layers)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        z = z if label is None else torch.cat((z, label), dim=1)
        return self.main(z.view(*z.shape, 1, 1))


class _Planes(nn.Module):
    """An image with a constant plane per number of its label."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        if label is not None:
            n, _, h, w = x.shape
            planes = torch.ones(n, label.shape[1], h, w, dtype=x.dtype) * label.view(n, -1, 1, 1)
            x = torch.cat((x, planes), dim=1)
        return self.main(x)


class _Spread(nn.Module):
    """One more channel: the mean over all values of their standard deviation over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=0, keepdim=True)
        spread = torch.sqrt((centred * centred).mean(dim=0) + 1e-8).mean()
        return torch.cat((x, spread * torch.ones_like(x[:, :1])), dim=1)


def dcgan(c: Any, channels: int, labels: int) -> Nets:
    halvings = int(math.log2(c.crop_size)) - 2
    top = c.ngf * 2 ** (halvings - 1)
    free = c.norm == "none"
    g: list[nn.Module] = [nn.ConvTranspose2d(c.noise_size + labels, top, 4, bias=free)]
    g += [_norm(c.norm, top), nn.ReLU()]
    while top > c.ngf:
        g += [nn.ConvTranspose2d(top, top // 2, 4, stride=2, padding=1, bias=free)]
        g += [_norm(c.norm, top // 2), nn.ReLU()]
        top //= 2
    g += [nn.ConvTranspose2d(c.ngf, channels, 4, stride=2, padding=1, bias=free), _final(c.output)]
    free = c.norm_d == "none"
    d: list[nn.Module] = [nn.Conv2d(channels + labels, c.ndf, 4, 2, 1, bias=free), nn.LeakyReLU(0.2)]
    width = c.ndf
    for _ in range(halvings - 1):
        d += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=free), _norm(c.norm_d, 2 * width), nn.LeakyReLU(0.2)]
        width *= 2
    if c.minibatch_std:
        d += [_Spread()]
        width += 1
    d += [nn.Conv2d(width, 1, 4, bias=free)]
    return {"G": _Column(*g), "D": _Planes(*d)}


def faces(c: Any, channels: int, labels: int) -> Nets:
    w = 8 * c.ngf
    g: list[nn.Module] = [nn.Flatten(), nn.Linear(c.noise_size + labels, 4 * 4 * w)]
    g += [nn.Unflatten(1, (16 * w, 1, 1)), nn.BatchNorm2d(16 * w), nn.Flatten(), nn.Unflatten(1, (w, 4, 4))]
    for after in (w // 2, w // 4, w // 8, w // 8):
        up = nn.ConvTranspose2d(w, after, 5, stride=2, padding=2, output_padding=1)
        g += [up, nn.BatchNorm2d(after), nn.LeakyReLU(0.3)]
        w = after
    g += [nn.Conv2d(w, channels, 5, padding=2), _final(c.output)]
    d: list[nn.Module] = []
    before = channels + labels
    for k in range(4):
        after = c.ndf * 2**k
        d += [nn.Conv2d(before, after, 5, padding=2), nn.BatchNorm2d(after)]
        d += [nn.Conv2d(after, after, 5, stride=2, padding=2), nn.BatchNorm2d(after), nn.LeakyReLU(0.3)]
        before = after
    d += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1)]
    return {"G": _Column(*g), "D": _Planes(*d)}


class _MLP(nn.Module):
    def __init__(self, c: Any, channels: int, labels: int) -> None:
        super().__init__()
        self.c, self.channels = c, channels
        self.noise, self.label = nn.Linear(c.noise_size, 200), nn.Linear(labels, 1000)
        self.joint, self.image = nn.Linear(1200, 1200), nn.Linear(1200, channels * c.crop_size**2)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        h = torch.cat((self.noise(z).clamp(min=0), self.label(label).clamp(min=0)), 1)
        y = _final(self.c.output)(self.image(self.joint(h).clamp(min=0)))
        return y.view(len(z), self.channels, self.c.crop_size, self.c.crop_size)


class _Maxout(nn.Module):
    def __init__(self, c: Any, channels: int, labels: int) -> None:
        super().__init__()
        self.image, self.label = nn.Linear(channels * c.crop_size**2, 1200), nn.Linear(labels, 250)
        self.joint, self.verdict = nn.Linear(290, 960), nn.Linear(240, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        a = self.image(x.reshape(len(x), -1)).view(-1, 240, 5).max(dim=2).values
        b = self.label(label).view(-1, 50, 5).max(dim=2).values
        h = self.joint(torch.cat((a, b), 1)).view(-1, 240, 4).max(dim=2).values
        return self.verdict(h)


def mlp(c: Any, channels: int, labels: int) -> Nets:
    return {"G": _MLP(c, channels, labels), "D": _Maxout(c, channels, labels)}


class ReferenceNoiseSystem(ReferenceSystem):
    """The discriminator n_critic times, each on images of its own; then the generator on the last of them and
    n_gen - 1 times more on further noise."""

    generators = ("G",)
    discriminators = ("D",)

    def __init__(
        self, nets: Nets, *, n_critic: int, uniform: bool, labelled: bool, gp_at: str, **settings: Any
    ) -> None:
        super().__init__(nets, **settings)
        self.n_critic, self.uniform, self.labelled, self.gp_at = n_critic, uniform, labelled, gp_at

    def make(self, batch: Batch) -> Tensor:
        z = batch["z"]
        if self.uniform:
            z = 2 * torch.distributions.Normal(0.0, 1.0).cdf(z) - 1
        return self.nets["G"](z, batch["label"]) if self.labelled else self.nets["G"](z)

    def judge(self, batch: Batch, x: Tensor) -> Tensor:
        return self.nets["D"](x, batch["label"]) if self.labelled else self.nets["D"](x)

    def penalty(self, batch: Batch, real: Tensor, fake: Tensor) -> Tensor:
        x = {"real": real, "fake": fake}.get(self.gp_at)
        if x is None:
            eps = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
            x = eps * real + (1 - eps) * fake
        x = x.detach().clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.judge(batch, x).sum(), x, create_graph=True)
        return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        terms: dict[str, Tensor] = {}
        for batch in batches[: self.n_critic]:
            image = self.make(batch)
            fake, real = image.detach(), batch["A"]
            on_real, on_fake = self.judge(batch, real), self.judge(batch, fake)
            terms["D"] = adversarial_discriminator(self.gan_mode, on_real, on_fake, **self.weights)
            if self.gan_mode == "wgan-gp":
                terms["D"] = terms["D"] + self.lambda_gp * self.penalty(batch, real, fake)
            terms |= {"D_real": on_real.mean(), "D_fake": on_fake.mean()}
            self.update_d(terms["D"], factor)
        for k, batch in enumerate(batches[self.n_critic - 1 :]):
            image = self.make(batch) if k else image
            terms["G"] = adversarial_generator(self.gan_mode, self.judge(batch, image))
            self.update_g(terms["G"], factor)
        return {name: value.item() for name, value in terms.items()}

"""Plain-torch twin of StarGAN, as those of reference_systems.py: from the paper's equations and the tables of
its networks, under the official parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference_systems import (
    Batch,
    Nets,
    ReferenceSystem,
    adversarial_discriminator,
    adversarial_generator,
)


def _norm(width: int) -> nn.Module:
    # statistics of the image in training mode, in which the official code also tests
    return nn.InstanceNorm2d(width, affine=True, track_running_stats=True)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, 1, 1, bias=False) for _ in range(2))
        self.main = nn.Sequential(first, _norm(width), nn.ReLU(), second, _norm(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x)


class ReferenceStarGenerator(nn.Module):
    def __init__(self, channels: int, labels: int, ngf: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels + labels, ngf, 7, 1, 3, bias=False)]
        layers += [_norm(ngf), nn.ReLU()]
        layers += [nn.Conv2d(ngf, 2 * ngf, 4, 2, 1, bias=False), _norm(2 * ngf), nn.ReLU()]
        layers += [nn.Conv2d(2 * ngf, 4 * ngf, 4, 2, 1, bias=False), _norm(4 * ngf), nn.ReLU()]
        layers += [_Residual(4 * ngf) for _ in range(blocks)]
        layers += [nn.ConvTranspose2d(4 * ngf, 2 * ngf, 4, 2, 1, bias=False), _norm(2 * ngf), nn.ReLU()]
        layers += [nn.ConvTranspose2d(2 * ngf, ngf, 4, 2, 1, bias=False), _norm(ngf), nn.ReLU()]
        self.main = nn.Sequential(*layers, nn.Conv2d(ngf, channels, 7, 1, 3, bias=False), nn.Tanh())

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        planes = [torch.ones_like(x[:, :1]) * label[:, k].view(-1, 1, 1, 1) for k in range(label.shape[1])]
        return self.main(torch.cat([x, *planes], dim=1))


class ReferenceStarDiscriminator(nn.Module):
    def __init__(self, channels: int, labels: int, size: int, ndf: int, levels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, after, side = channels, ndf, size
        for _ in range(levels):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.01)]
            before, after, side = after, 2 * after, side // 2
        self.main = nn.Sequential(*layers)
        self.conv1 = nn.Conv2d(before, 1, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(before, labels, side, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.main(x)
        return self.conv1(h), self.conv2(h)[:, :, 0, 0]


def entropy(logits: Tensor, labels: Tensor, attributes: bool) -> Tensor:
    if attributes:
        p = torch.sigmoid(logits)
        each = labels * p.log() + (1 - labels) * (1 - p).log()
    else:
        each = labels * (logits - logits.logsumexp(dim=1, keepdim=True))
    return -each.sum() / len(logits)


class ReferenceStarGAN(ReferenceSystem):
    """The discriminator n_critic times, each on images and targets of its own; the generator after the last
    of them, on the same images and targets, and n_gen - 1 times more."""

    generators = ("G",)
    discriminators = ("D",)

    def __init__(
        self, nets: Nets, *, n_critic: int, lambda_class: float, lambda_cycle: float, lambda_identity: float,
        attributes: Any, gp_at: str, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(nets, **settings)
        self.n_critic, self.attributes, self.gp_at = n_critic, bool(attributes), gp_at
        self.weight_class, self.weight_cycle, self.weight_own = lambda_class, lambda_cycle, lambda_identity

    def target(self, batch: Batch) -> Tensor:
        order = sorted(range(len(batch["order"])), key=lambda k: float(batch["order"][k]))
        return torch.stack([batch["label"][k] for k in order])

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.gp_at == "mixed":
            eps = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
            x = eps * real + (1 - eps) * fake
        else:
            x = {"real": real, "fake": fake}[self.gp_at]
        x = x.detach().clone().requires_grad_(True)
        # of all logits of the map together, as in the official code
        (slope,) = torch.autograd.grad(self.nets["D"](x)[0].sum(), x, create_graph=True)
        return ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        terms: dict[str, Tensor] = {}
        g, d = self.nets["G"], self.nets["D"]
        for batch in batches[: self.n_critic]:
            real = batch["A"]
            fake = g(real, self.target(batch)).detach()
            (on_real, read), (on_fake, _) = d(real), d(fake)
            loss = adversarial_discriminator(self.gan_mode, on_real, on_fake, **self.weights)
            if self.gan_mode == "wgan-gp":
                loss = loss + self.lambda_gp * self.penalty(real, fake)
            known = self.weight_class * entropy(read, batch["label"], self.attributes)
            terms = {"D": loss, "D_class": known, "D_real": on_real.mean(), "D_fake": on_fake.mean()}
            self.update_d(loss + known, factor)
        for batch in batches[self.n_critic - 1 :]:
            real, target = batch["A"], self.target(batch)
            fake = g(real, target)
            verdict, read = d(fake)
            mine = {
                "G_GAN": adversarial_generator(self.gan_mode, verdict),
                "G_class": self.weight_class * entropy(read, target, self.attributes),
                "cycle": self.weight_cycle * (g(fake, batch["label"]) - real).abs().mean(),
            }
            if self.weight_own:
                kept = [k for k in range(len(real)) if torch.equal(target[k], batch["label"][k])]
                away = sum(((fake[k] - real[k]).abs().mean() for k in kept), real.new_zeros(()))
                mine["idt"] = self.weight_own * away / len(real)
            terms |= mine
            self.update_g(sum(mine.values(), torch.zeros((), dtype=real.dtype)), factor)
        return {name: value.item() for name, value in terms.items()}

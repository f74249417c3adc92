"""Plain-torch twins of DiscoGAN and PAN, as those of reference_systems.py: from the definitions alone.

Parameter names are the package's, since neither system has published weights. A discriminator returns the
outputs of all its blocks, the last of which are the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference_systems import (
    Batch,
    Nets,
    ReferenceAdam,
    ReferenceCycleGAN,
    ReferenceSystem,
    adversarial_discriminator,
    adversarial_generator,
)


def _norm(kind: str, channels: int) -> nn.Module:
    return {
        "batch": nn.BatchNorm2d(channels),
        "instance": nn.InstanceNorm2d(channels),
        "none": nn.Identity(),
    }[kind]


def _block(conv: nn.Module, norm: str, channels: int, act: nn.Module) -> list[nn.Module]:
    return [conv, _norm(norm, channels), act]


class ReferenceBlocks(nn.Module):
    def __init__(self, blocks: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*layers) for layers in blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for block in self.blocks:
            x = block(x)
            out.append(x)
        return out


def disco_down(channels: int, levels: int, width: int, norm: str) -> list[list[nn.Module]]:
    blocks: list[list[nn.Module]] = [[nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]]
    for k in range(1, levels):
        # four doublings and no more
        before, after = width * 2 ** min(k - 1, 3), width * 2 ** min(k, 3)
        conv = nn.Conv2d(before, after, 4, 2, 1, bias=norm == "none")
        blocks.append(_block(conv, norm, after, nn.LeakyReLU(0.2)))
    return blocks


class ReferenceDiscoGenerator(nn.Module):
    def __init__(
        self, into: int, out: int, levels: int, ngf: int, norm: str, bottleneck: int, output: str
    ) -> None:
        super().__init__()
        bias, deep = norm == "none", ngf * 2 ** min(levels - 1, 3)
        self.encoder = nn.Sequential(*sum(disco_down(into, levels, ngf, norm), []))
        self.bottleneck = nn.Sequential()
        if bottleneck:
            narrow = nn.Conv2d(deep, bottleneck, 4, bias=bias)
            wide = nn.ConvTranspose2d(bottleneck, deep, 4, bias=bias)
            self.bottleneck = nn.Sequential(
                *_block(narrow, norm, bottleneck, nn.LeakyReLU(0.2)), *_block(wide, norm, deep, nn.ReLU())
            )
        up: list[nn.Module] = []
        for k in range(levels - 1, 0, -1):
            before, after = ngf * 2 ** min(k, 3), ngf * 2 ** min(k - 1, 3)
            up += _block(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=bias), norm, after, nn.ReLU())
        last = nn.Sigmoid() if output == "sigmoid" else nn.Tanh()
        self.decoder = nn.Sequential(*up, nn.ConvTranspose2d(ngf, out, 4, 2, 1, bias=False), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.bottleneck(self.encoder(x)))


def disco_discriminator(channels: int, levels: int, ndf: int, norm: str) -> nn.Module:
    head = nn.Conv2d(ndf * 2 ** min(levels - 1, 3), 1, 4, bias=False)
    return ReferenceBlocks([*disco_down(channels, levels, ndf, norm), [head]])


class ReferencePANGenerator(nn.Module):
    """Numbering from 1, as in the paper: convolutions 1 to L, deconvolutions named by what they give back."""

    def __init__(self, into: int, out: int, levels: int, ngf: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        width = [into, *(ngf * min(2**k, 8) for k in range(levels))]
        down = [nn.Sequential(nn.Conv2d(into, ngf, 3, 2, 1), nn.LeakyReLU(0.2))]
        for k in range(2, levels + 1):
            conv = nn.Conv2d(width[k - 1], width[k], 3, 2, 1, bias=bias)
            down.append(nn.Sequential(*_block(conv, norm, width[k], nn.LeakyReLU(0.2))))
        self.encoder = nn.ModuleList(down)
        up: list[nn.Module] = []
        # 512 beside level 5, 256 beside level 4, 128, 64, and 64 alone
        given = {1: ngf, 2: ngf, 3: 2 * ngf, 4: 4 * ngf, 5: 8 * ngf}
        for k in range(levels - 1, 0, -1):
            taken = width[levels] if k == levels - 1 else given[k + 1] + width[k + 1]
            deconv = nn.ConvTranspose2d(taken, given[k], 4, 2, 1, bias=bias)
            up.append(nn.Sequential(*_block(deconv, norm, given[k], nn.ReLU())))
        up.append(nn.Sequential(nn.ConvTranspose2d(ngf, out, 4, 2, 1), nn.Tanh()))
        self.decoder = nn.ModuleList(up)

    def forward(self, x: Tensor) -> Tensor:
        levels, kept = len(self.encoder), {}
        for k, block in enumerate(self.encoder, 1):
            x = kept[k] = block(x)
        for k, block in zip(range(levels - 1, -1, -1), self.decoder):
            x = block(x)
            if k >= 2:
                x = torch.cat([x, kept[k]], 1)
        return x


def pan_discriminator(channels: int, side: int, ndf: int, norm: str) -> nn.Module:
    n, blocks = ndf, []
    rows = [(channels, n, 1), (n, 2 * n, 2), (2 * n, 2 * n, 1), (2 * n, 4 * n, 2), (4 * n, 4 * n, 1)]
    rows += [(4 * n, 8 * n, 2), (8 * n, 8 * n, 1), (8 * n, 8 * n, 2), (8 * n, 8, 2)]
    for k, (before, after, stride) in enumerate(rows):
        if k == 0:
            blocks.append([nn.Conv2d(before, after, 3, stride, 1), nn.LeakyReLU(0.2)])
        else:
            conv = nn.Conv2d(before, after, 3, stride, 1, bias=norm == "none")
            blocks.append(_block(conv, norm, after, nn.LeakyReLU(0.2)))
    return ReferenceBlocks([*blocks, [nn.Flatten(), nn.Linear(8 * (side // 32) ** 2, 1)]])


class DecayingAdam(ReferenceAdam):
    """Adam of g + decay * w, as torch.optim.Adam(weight_decay=decay)."""

    decay = 0.0

    def update(self, loss: Tensor, factor: float) -> None:
        # whose gradient is w, at these values of w alone
        now = [p.detach().clone() for p in self.params]
        pull = sum(((p * old).sum() for p, old in zip(self.params, now)), torch.zeros((), dtype=loss.dtype))
        super().update(loss + self.decay * pull, factor)


class ReferenceDiscoGAN(ReferenceCycleGAN):
    """Generators first, from the weights before D's update: verdict, features and reconstruction."""

    def __init__(
        self,
        nets: Nets,
        *,
        gan_mode: str,
        lambda_gan: float,
        lambda_features: float,
        rate: float,
        start_rate: float,
        curriculum: int,
        weight_decay: float,
        levels: int,
        lr: float,
        lr_d: float | None,
        beta1: float,
        beta2: float,
        **settings: Any,
    ) -> None:
        # not those of CycleGAN
        ReferenceSystem.__init__(self, nets, gan_mode=gan_mode, **settings)
        self.weight_gan, self.weight_fm = lambda_gan, lambda_features
        self.rates, self.switch, self.seen, self.levels = (start_rate, rate), curriculum, 0, levels
        params_g = [p for name in self.generators for p in nets[name].parameters()]
        self.opt_g = DecayingAdam(params_g, lr, beta1, beta2)
        self.opt_d = DecayingAdam(self.params_d, lr if lr_d is None else lr_d, beta1, beta2)
        self.opt_g.decay = self.opt_d.decay = weight_decay

    def side(self, judge: nn.Module, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        of_fake, of_real = judge(fake), judge(real)
        distance = torch.zeros((), dtype=fake.dtype)
        # all activations but the first; the logits come last
        for k in range(1, self.levels):
            gap = of_fake[k].mean(0) - of_real[k].detach().mean(0)
            distance = distance + (gap**2).sum() / gap.numel()
        return adversarial_generator(self.gan_mode, of_fake[-1]), distance

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        (batch,) = batches
        a, b = batch["A"], batch["B"]
        rate = self.rates[1] if self.seen >= self.switch else self.rates[0]
        self.seen += 1
        fake_b, fake_a = self.nets["G_A"](a), self.nets["G_B"](b)
        gan_a, fm_a = self.side(self.nets["D_A"], fake_b, b)
        gan_b, fm_b = self.side(self.nets["D_B"], fake_a, a)
        terms = {
            "G_A": (1 - rate) * self.weight_gan * gan_a,
            "G_B": (1 - rate) * self.weight_gan * gan_b,
            "cycle_A": rate * ((self.nets["G_B"](fake_b) - a) ** 2).mean(),
            "cycle_B": rate * ((self.nets["G_A"](fake_a) - b) ** 2).mean(),
        }
        if self.weight_fm:
            terms["FM_A"] = (1 - rate) * self.weight_fm * fm_a
            terms["FM_B"] = (1 - rate) * self.weight_fm * fm_b
        self.update_g(sum(terms.values(), torch.zeros(())), factor)
        terms |= self.discriminator_step(batch, fake_a, fake_b, factor)
        return {name: value.item() for name, value in terms.items()}

    def verdict(self, name: str, real: Tensor, fake: Tensor, out: dict[str, Tensor], prefix: str) -> Tensor:
        net = self.nets[name]
        on_fake, on_real = net(fake.detach())[-1], net(real)[-1]
        out[name] = adversarial_discriminator(self.gan_mode, on_real, on_fake, **self.weights)
        out[f"{prefix}_real"], out[f"{prefix}_fake"] = on_real.mean(), on_fake.mean()
        return out[name]


class ReferencePAN(ReferenceSystem):
    """D first: its verdicts, and the hinge that makes its features of real and generated images differ."""

    generators = ("G",)
    discriminators = ("D",)

    def __init__(
        self,
        nets: Nets,
        *,
        lambda_gan: float,
        lambda_perceptual: tuple[float, ...],
        margin: float,
        lambda_L1: float,
        **settings: Any,
    ) -> None:
        super().__init__(nets, **settings)
        self.weight_gan, self.lambdas, self.margin, self.weight_l1 = (
            *(lambda_gan, lambda_perceptual),
            *(margin, lambda_L1),
        )

    def distance(self, of_real: list[Tensor], of_fake: list[Tensor]) -> Tensor:
        taps = [(of_real[k - 1], of_fake[k - 1]) for k in (1, 4, 6, 8)]
        each = [weight * (h - g).abs().mean() for weight, (h, g) in zip(self.lambdas, taps)]
        return each[0] + each[1] + each[2] + each[3]

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        (batch,) = batches
        b, fake = batch["B"], self.nets["G"](batch["A"])
        of_real, of_fake = self.nets["D"](b), self.nets["D"](fake.detach())
        verdict = adversarial_discriminator(self.gan_mode, of_real[-1], of_fake[-1], **self.weights)
        missing = (self.margin - self.distance(of_real, of_fake)).clamp(min=0)
        terms = {"D": verdict, "margin": missing}
        terms |= {"D_real": of_real[-1].mean(), "D_fake": of_fake[-1].mean()}
        self.update_d(verdict + missing, factor)
        of_real, of_fake = self.nets["D"](b), self.nets["D"](fake)
        mine = {
            "G_GAN": self.weight_gan * adversarial_generator(self.gan_mode, of_fake[-1]),
            "G_features": self.distance([h.detach() for h in of_real], of_fake),
        }
        if self.weight_l1:
            mine["G_L1"] = self.weight_l1 * (fake - b).abs().mean()
        self.update_g(sum(mine.values(), torch.zeros(())), factor)
        return {name: value.item() for name, value in (terms | mine).items()}

"""Plain-torch twins of the two systems, written from their definitions alone.

Networks are ``nn.Sequential`` chains of torch's own layers under the original release's parameter names;
losses are a few lines of arithmetic; Adam and RMSProp are written out. Nothing is shared with the package: no
helper, no order of batching, no fused pass, so whatever the package does to be fast has to give these
numbers. Everything runs in the dtype of the networks, which the tests make float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Nets = dict[str, nn.Module]
Batch = dict[str, Tensor]
PATCH_DEPTH = {16: 1, 34: 2, 70: 3, 142: 4, 286: 5}


# networks


def _norm(kind: str, channels: int) -> nn.Module:
    """Every norm takes one slot, so the numbering of the layers does not depend on it."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels)
    return nn.Identity()


def _final(kind: str) -> nn.Module:
    return {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}[kind]()


class ReferenceResidual(nn.Module):
    """y = x + f(x); the convolution pads itself only for zero padding, which then has no layer of its own."""

    def __init__(self, channels: int, norm: str, padding: str, dropout: bool) -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = []
        for half in range(2):
            if padding == "reflect":
                layers.append(nn.ReflectionPad2d(1))
            elif padding == "replicate":
                layers.append(nn.ReplicationPad2d(1))
            own = 1 if padding == "zero" else 0
            layers += [nn.Conv2d(channels, channels, 3, padding=own, bias=bias), _norm(norm, channels)]
            if half == 0:
                layers.append(nn.ReLU())
                if dropout:
                    layers.append(nn.Dropout(0.5))
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ReferenceResnet(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ngf: int,
        blocks: int,
        norm: str = "instance",
        padding: str = "reflect",
        dropout: bool = False,
        output: str = "tanh",
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        conv1 = nn.Conv2d(in_channels, ngf, 7, bias=bias)
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), conv1, _norm(norm, ngf), nn.ReLU()]
        for width in (ngf, 2 * ngf):
            down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias)
            layers += [down, _norm(norm, 2 * width), nn.ReLU()]
        layers += [ReferenceResidual(4 * ngf, norm, padding, dropout) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            up = nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1, bias=bias)
            layers += [up, _norm(norm, width // 2), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, out_channels, 7), _final(output)]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ReferenceUnetLevel(nn.Module):
    """One level with everything below it; joins its input to its result, except at the top."""

    def __init__(self, model: nn.Sequential, join: bool) -> None:
        super().__init__()
        self.model = model
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return torch.cat([x, y], 1) if self.join else y


class ReferenceUnet(nn.Module):
    """Built from the bottom up; level k halves the size and is ngf * min(2**k, 8) channels wide."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: int,
        ngf: int,
        norm: str = "batch",
        dropout: bool = False,
        skips: bool = True,
        output: str = "tanh",
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        widths = [ngf * min(2**k, 8) for k in range(levels)]
        level: ReferenceUnetLevel | None = None
        for k in range(levels - 1, -1, -1):
            width, above = widths[k], (widths[k - 1] if k else out_channels)
            source = widths[k - 1] if k else in_channels
            down = nn.Conv2d(source, width, 4, stride=2, padding=1, bias=bias)
            joined = 2 * width if skips and level is not None else width
            up = nn.ConvTranspose2d(joined, above, 4, stride=2, padding=1, bias=bias or k == 0)
            if k == 0:
                assert level is not None
                layers = [down, level, nn.ReLU(), up, _final(output)]
            elif level is None:
                layers = [nn.LeakyReLU(0.2), down, nn.ReLU(), up, _norm(norm, above)]
            else:
                layers = [nn.LeakyReLU(0.2), down, _norm(norm, width), level]
                layers += [nn.ReLU(), up, _norm(norm, above)]
                # no dropout at levels 0 to 3 and none at the bottom: three layers of 8 levels, two of 7
                if dropout and k >= 4:
                    layers.append(nn.Dropout(0.5))
            level = ReferenceUnetLevel(nn.Sequential(*layers), join=skips and k > 0)
        assert level is not None
        self.model = level

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class ReferencePixel(nn.Module):
    def __init__(self, in_channels: int, ndf: int, norm: str) -> None:
        super().__init__()
        bias = norm == "instance"
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, ndf, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            _norm(norm, 2 * ndf),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ReferencePatch(nn.Module):
    def __init__(self, in_channels: int, ndf: int, depth: int, norm: str) -> None:
        super().__init__()
        bias = norm == "instance"
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, depth + 1):
            before, after = ndf * min(2 ** (n - 1), 8), ndf * min(2**n, 8)
            conv = nn.Conv2d(before, after, 4, stride=2 if n < depth else 1, padding=1, bias=bias)
            layers += [conv, _norm(norm, after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(ndf * min(2**depth, 8), 1, 4, stride=1, padding=1))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def reference_discriminator(in_channels: int, ndf: int, patch: int, norm: str) -> nn.Module:
    if patch == 1:
        return ReferencePixel(in_channels, ndf, norm)
    return ReferencePatch(in_channels, ndf, PATCH_DEPTH[patch], norm)


# losses


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def adversarial_generator(mode: str, fake: Tensor) -> Tensor:
    """What the generator wants of the verdict on its image; its target is 1, whatever D's label for real."""
    if mode == "lsgan":
        return ((fake - 1) ** 2).mean()
    if mode == "vanilla":
        # -log sigmoid(fake): non-saturating
        return softplus(-fake).mean()
    assert mode in ("hinge", "wgan", "wgan-gp")
    return -fake.mean()


def adversarial_discriminator(
    mode: str, real: Tensor, fake: Tensor, *, label: float = 1.0, w_real: float = 0.5, w_fake: float = 0.5
) -> Tensor:
    if mode == "lsgan":
        return w_real * ((real - label) ** 2).mean() + w_fake * (fake**2).mean()
    if mode == "vanilla":
        # -(label log s + (1 - label) log(1 - s)) with s = sigmoid(real); -log(1 - sigmoid(fake))
        on_real = label * softplus(-real) + (1 - label) * softplus(real)
        return w_real * on_real.mean() + w_fake * softplus(fake).mean()
    if mode == "hinge":
        return w_real * (1 - real).clamp(min=0).mean() + w_fake * (1 + fake).clamp(min=0).mean()
    assert mode in ("wgan", "wgan-gp")
    return 2 * w_fake * fake.mean() - 2 * w_real * real.mean()


def gradient_penalty(net: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """mean (|grad D(xhat)|_2 - 1)^2 at one uniform point per sample on the line from fake to real."""
    eps = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
    xhat = (eps * real + (1 - eps) * fake).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(xhat).sum(), xhat, create_graph=True)
    return ((slope.flatten(1).square().sum(1).sqrt() - 1) ** 2).mean()


# optimisers


class ReferenceAdam:
    def __init__(self, params: Iterable[Tensor], lr: float, beta1: float, beta2: float) -> None:
        self.params = list(params)
        self.lr, self.beta1, self.beta2, self.count = lr, beta1, beta2, 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def update(self, loss: Tensor, factor: float) -> None:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, self.params)
        self.count += 1
        for p, g, m, v in zip(self.params, grads, self.m, self.v):
            m.copy_(self.beta1 * m + (1 - self.beta1) * g)
            v.copy_(self.beta2 * v + (1 - self.beta2) * g * g)
            m_hat = m / (1 - self.beta1**self.count)
            v_hat = v / (1 - self.beta2**self.count)
            p -= self.lr * factor * m_hat / (v_hat.sqrt() + 1e-8)


class ReferenceRMSProp:
    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        self.params = list(params)
        self.lr = lr
        self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def update(self, loss: Tensor, factor: float) -> None:
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, self.params)
        for p, g, v in zip(self.params, grads, self.v):
            v.copy_(0.99 * v + 0.01 * g * g)
            p -= self.lr * factor * g / (v.sqrt() + 1e-8)


# systems


class ReferenceSystem:
    """What both systems share: networks, settings of the losses, one optimiser per side, the average."""

    generators: tuple[str, ...]
    discriminators: tuple[str, ...]

    def __init__(
        self,
        nets: Nets,
        *,
        gan_mode: str,
        real_label: float = 1.0,
        d_real_weight: float = 0.5,
        d_fake_weight: float = 0.5,
        lambda_gp: float = 10.0,
        clip: float = 0.01,
        lr: float = 2e-4,
        lr_d: float | None = None,
        beta1: float = 0.5,
        beta2: float = 0.999,
        optimizer: str = "adam",
        ema: float = 0.0,
    ) -> None:
        self.nets = nets
        self.gan_mode, self.lambda_gp, self.clip, self.decay = gan_mode, lambda_gp, clip, ema
        self.weights = {"label": real_label, "w_real": d_real_weight, "w_fake": d_fake_weight}
        params_g = [p for name in self.generators for p in nets[name].parameters()]
        self.params_d = [p for name in self.discriminators for p in nets[name].parameters()]
        lr_d = lr if lr_d is None else lr_d
        self.opt_g: ReferenceAdam | ReferenceRMSProp
        self.opt_d: ReferenceAdam | ReferenceRMSProp
        if optimizer == "adam":
            self.opt_g = ReferenceAdam(params_g, lr, beta1, beta2)
            self.opt_d = ReferenceAdam(self.params_d, lr_d, beta1, beta2)
        else:
            self.opt_g = ReferenceRMSProp(params_g, lr)
            self.opt_d = ReferenceRMSProp(self.params_d, lr_d)
        self.ema = {name: copy.deepcopy(nets[name]) for name in self.generators}

    def verdict(self, name: str, real: Tensor, fake: Tensor, out: dict[str, Tensor], prefix: str) -> Tensor:
        """The loss of one discriminator; real and fake are judged in separate passes."""
        net, fake = self.nets[name], fake.detach()
        on_fake, on_real = net(fake), net(real)
        loss = adversarial_discriminator(self.gan_mode, on_real, on_fake, **self.weights)
        if self.gan_mode == "wgan-gp":
            loss = loss + self.lambda_gp * gradient_penalty(net, real, fake)
        out[name] = loss
        out[f"{prefix}_real"] = on_real.mean()
        out[f"{prefix}_fake"] = on_fake.mean()
        return loss

    def update_d(self, loss: Tensor, factor: float) -> None:
        self.opt_d.update(loss, factor)
        if self.gan_mode == "wgan":
            with torch.no_grad():
                for p in self.params_d:
                    p.clamp_(-self.clip, self.clip)

    def update_g(self, loss: Tensor, factor: float) -> None:
        self.opt_g.update(loss, factor)
        with torch.no_grad():
            for name in self.generators:
                for mean, p in zip(self.ema[name].parameters(), self.nets[name].parameters()):
                    mean.copy_(self.decay * mean + (1 - self.decay) * p)


class ReferenceCycleGAN(ReferenceSystem):
    """Generators first; the discriminators then judge the images made before that update."""

    generators = ("G_A", "G_B")
    discriminators = ("D_A", "D_B")

    def __init__(
        self,
        nets: Nets,
        *,
        gan_mode: str = "lsgan",
        lambda_A: float = 10.0,
        lambda_B: float = 10.0,
        lambda_identity: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(nets, gan_mode=gan_mode, **settings)
        self.lambda_A, self.lambda_B, self.lambda_identity = lambda_A, lambda_B, lambda_identity

    def generator_terms(self, batch: Batch, fake_A: Tensor, fake_B: Tensor) -> dict[str, Tensor]:
        to_b, to_a = self.nets["G_A"], self.nets["G_B"]
        a, b = batch["A"], batch["B"]
        terms = {
            "G_A": adversarial_generator(self.gan_mode, self.nets["D_A"](fake_B)),
            "G_B": adversarial_generator(self.gan_mode, self.nets["D_B"](fake_A)),
            "cycle_A": self.lambda_A * (to_a(fake_B) - a).abs().mean(),
            "cycle_B": self.lambda_B * (to_b(fake_A) - b).abs().mean(),
        }
        if self.lambda_identity > 0:
            terms["idt_A"] = self.lambda_identity * self.lambda_B * (to_b(b) - b).abs().mean()
            terms["idt_B"] = self.lambda_identity * self.lambda_A * (to_a(a) - a).abs().mean()
        return terms

    def discriminator_step(
        self, batch: Batch, fake_A: Tensor, fake_B: Tensor, factor: float
    ) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        loss = self.verdict("D_A", batch["B"], fake_B, out, "D_A")
        loss = loss + self.verdict("D_B", batch["A"], fake_A, out, "D_B")
        self.update_d(loss, factor)
        return out

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        first = batches[0]
        fake_B, fake_A = self.nets["G_A"](first["A"]), self.nets["G_B"](first["B"])
        terms = self.generator_terms(first, fake_A, fake_B)
        self.update_g(sum(terms.values(), torch.zeros(())), factor)
        terms.update(self.discriminator_step(first, fake_A, fake_B, factor))
        for batch in batches[1:]:
            fake_B, fake_A = self.nets["G_A"](batch["A"]), self.nets["G_B"](batch["B"])
            self.discriminator_step(batch, fake_A, fake_B, factor)
        return {name: value.item() for name, value in terms.items()}


class ReferencePix2Pix(ReferenceSystem):
    """The discriminator first, on (A, B) against (A, G(A)); the generator then faces the updated one."""

    generators = ("G",)
    discriminators = ("D",)

    def __init__(
        self, nets: Nets, *, gan_mode: str = "vanilla", lambda_L1: float = 100.0, **settings: Any
    ) -> None:
        super().__init__(nets, gan_mode=gan_mode, **settings)
        self.lambda_L1 = lambda_L1

    def step(self, batches: Sequence[Batch], factor: float) -> dict[str, float]:
        terms: dict[str, Tensor] = {}
        for batch in batches:
            a, b = batch["A"], batch["B"]
            fake = self.nets["G"](a)
            loss = self.verdict("D", torch.cat([a, b], 1), torch.cat([a, fake], 1), terms, "D")
            self.update_d(loss, factor)
        terms["G_GAN"] = adversarial_generator(self.gan_mode, self.nets["D"](torch.cat([a, fake], 1)))
        terms["G_L1"] = self.lambda_L1 * (fake - b).abs().mean()
        self.update_g(terms["G_GAN"] + terms["G_L1"], factor)
        return {name: value.item() for name, value in terms.items()}


# schedules


def reference_lr_factor(policy: str, epoch: int, epochs: int, decay: int, every: int = 50) -> float:
    """epoch counts from 0."""
    if policy == "linear":
        return 1.0 - max(0, epoch + 1 - epochs) / (decay + 1)
    if policy == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * epoch / (epochs + decay)))
    if policy == "step":
        return 0.1 ** (epoch // every)
    return 1.0

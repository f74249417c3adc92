"""A plain-torch twin of MUNIT, from its definition alone; see reference_systems.py.

Parameter names are those of the public code, the parts of the two domains in one network with `a.` and `b.`
in front. Every image goes through the networks alone, and AdaIN's numbers are handed over layer by layer.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference_features import DecayingAdam
from tests.reference_systems import Batch, adversarial_discriminator, adversarial_generator


def relu(x: Tensor) -> Tensor:
    """With no slope at 0, where a style encounters no active unit while the biases are 0."""
    return x * (x > 0)


class Conv(nn.Module):
    """Reflection, convolution, one of four norms, one of four activations."""

    def __init__(self, into: int, out: int, k: int, stride: int, pad: int, norm: str, act: str) -> None:
        super().__init__()
        self.kind, self.act, self.width = norm, act, pad
        if norm == "adain":
            self.norm = nn.Module()
            self.norm.register_buffer("running_mean", torch.zeros(out))
            self.norm.register_buffer("running_var", torch.ones(out))
        if norm == "ln":
            self.norm = nn.Module()
            self.norm.gamma, self.norm.beta = nn.Parameter(torch.rand(out)), nn.Parameter(torch.zeros(out))
        self.conv = nn.Conv2d(into, out, k, stride)

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        idle = self.kind in ("in", "adain")
        # the mean takes such a bias out again; what rounding leaves of it Adam would enlarge
        bias = 0 * self.conv.bias if idle else self.conv.bias
        x = F.pad(x, (self.width,) * 4, mode="reflect")
        y = F.conv2d(x, self.conv.weight, bias, self.conv.stride)
        if idle:
            mean = y.mean((2, 3), keepdim=True)
            y = (y - mean) / ((y - mean) ** 2).mean((2, 3), keepdim=True).add(1e-5).sqrt()
        if self.kind == "adain":
            assert scale is not None and shift is not None
            y = y * scale[:, :, None, None] + shift[:, :, None, None]
        if self.kind == "ln":
            rows = []
            for image in y:
                count = image.numel()
                centred = image - image.sum() / count
                rows.append(centred / ((centred**2).sum() / (count - 1)).sqrt().add(1e-5))
            y = torch.stack(rows) * self.norm.gamma[:, None, None] + self.norm.beta[:, None, None]
        if self.act == "relu":
            return relu(y)
        if self.act == "lrelu":
            return torch.where(y > 0, y, 0.2 * y)
        return {"none": lambda z: z, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[self.act](y)


class Holder(nn.Module):
    """Its only child is called model."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def block(width: int, norm: str) -> Holder:
    return Holder(Conv(width, width, 3, 1, 1, norm, "relu"), Conv(width, width, 3, 1, 1, norm, "none"))


class ReferenceAutoencoder(nn.Module):
    def __init__(self, channels: int, c: Any) -> None:
        super().__init__()
        n = c.ngf
        style: list[nn.Module] = [Conv(channels, n, 7, 1, 3, "none", "relu")]
        for into, out in ((n, 2 * n), (2 * n, 4 * n), (4 * n, 4 * n), (4 * n, 4 * n)):
            style.append(Conv(into, out, 4, 2, 1, "none", "relu"))
        self.enc_style = Holder(*style, nn.AdaptiveAvgPool2d(1), nn.Conv2d(4 * n, c.style_size, 1))
        content: list[nn.Module] = [Conv(channels, n, 7, 1, 3, "in", "relu")]
        for k in range(c.levels):
            content.append(Conv(n * 2**k, n * 2 ** (k + 1), 4, 2, 1, "in", "relu"))
        wide = n * 2**c.levels
        self.enc_content = Holder(*content, Holder(*(block(wide, "in") for _ in range(c.blocks))))
        up: list[nn.Module] = [Holder(*(block(wide, "adain") for _ in range(c.blocks)))]
        for k in range(c.levels, 0, -1):
            up += [nn.Upsample(scale_factor=2), Conv(n * 2**k, n * 2 ** (k - 1), 5, 1, 2, "ln", "relu")]
        self.dec = Holder(*up, Conv(n, channels, 7, 1, 3, "none", c.output))
        sizes = [c.style_size, c.mlp_size, c.mlp_size, 4 * c.blocks * wide]
        self.mlp = Holder(*(nn.Module() for _ in range(3)))
        for layer, into, out in zip(self.mlp.model, sizes, sizes[1:]):
            layer.fc = nn.Linear(into, out)

    def style(self, x: Tensor) -> Tensor:
        return self.enc_style(x)[:, :, 0, 0]

    def content(self, x: Tensor) -> Tensor:
        *first, blocks = self.enc_content.model
        for layer in first:
            x = layer(x)
        for each in blocks.model:
            x = x + each(x)
        return x

    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        one, two, three = (layer.fc for layer in self.mlp.model)
        numbers = three(relu(two(relu(one(style)))))
        blocks, *rest = self.dec.model
        wide, at, x = content.shape[1], 0, content
        for each in blocks.model:
            h = x
            for conv in each.model:
                shift, scale = numbers[:, at : at + wide], numbers[:, at + wide : at + 2 * wide]
                h, at = conv(h, shift, scale), at + 2 * wide
            x = x + h
        for layer in rest:
            x = layer(x)
        return x


class ReferenceJudge(nn.Module):
    def __init__(self, channels: int, c: Any) -> None:
        super().__init__()
        self.cnns = nn.ModuleList()
        for _ in range(c.scales):
            widths = [channels] + [c.ndf * 2**k for k in range(c.levels_d)]
            layers = [Conv(a, b, 4, 2, 1, "none", "lrelu") for a, b in zip(widths, widths[1:])]
            self.cnns.append(nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1)))

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for cnn in self.cnns:
            out.append(cnn(x))
            ones = torch.ones_like(x[:1, :1])
            inside = F.avg_pool2d(ones, 3, 2, 1)
            x = F.avg_pool2d(x, 3, 2, 1) / inside
        return out


class Both(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b


def reference_styles(seed: int, step: int, batches: int, images: int, size: int) -> list[dict[str, Tensor]]:
    """Those of step `step`, first all that are of A."""
    random = np.random.default_rng([seed, 2, step])
    found: list[dict[str, Tensor]] = [{} for _ in range(batches)]
    for name in ("style_A", "style_B"):
        values = torch.from_numpy(random.standard_normal((batches, images, size), np.float32)).double()
        for batch, value in zip(found, values):
            batch[name] = value
    return found


class ReferenceMUNIT:
    """Discriminators first; the generators then answer for the same images."""

    def __init__(self, c: Any, a: int, b: int) -> None:
        self.c = c
        g = Both(ReferenceAutoencoder(a, c), ReferenceAutoencoder(b, c)).double()
        d = Both(ReferenceJudge(a, c), ReferenceJudge(b, c)).double()
        self.nets = {"G": g, "D": d}
        self.opt_g = DecayingAdam(g.parameters(), c.lr, c.beta1, c.beta2)
        self.opt_d = DecayingAdam(d.parameters(), c.lr if c.lr_d is None else c.lr_d, c.beta1, c.beta2)
        self.opt_g.decay = self.opt_d.decay = c.weight_decay
        self.ema = copy.deepcopy(g)

    def fakes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        g = self.nets["G"]
        to_a = g.a.decode(g.b.content(batch["B"]), batch["style_A"])
        return to_a, g.b.decode(g.a.content(batch["A"]), batch["style_B"])

    def discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        c, terms, losses = self.c, {}, []
        weights = {"label": c.real_label, "w_real": c.d_real_weight, "w_fake": c.d_fake_weight}
        for name, judge, fake in zip("AB", (self.nets["D"].a, self.nets["D"].b), self.fakes(batch)):
            on_real, on_fake = judge(batch[name]), judge(fake.detach())
            losses += [
                adversarial_discriminator(c.gan_mode, r, f, **weights) for r, f in zip(on_real, on_fake)
            ]
            terms[f"D_{name}_real"] = sum(r.mean() for r in on_real) / c.scales
            terms[f"D_{name}_fake"] = sum(f.mean() for f in on_fake) / c.scales
        loss = sum(losses, torch.zeros(()))
        return loss, terms | {"D": loss / (2 * c.scales)}

    def generator_terms(self, batch: Batch) -> dict[str, Tensor]:
        c, g, d = self.c, self.nets["G"], self.nets["D"]
        terms: dict[str, Tensor] = {}
        fake_a, fake_b = self.fakes(batch)
        for name, own, other, judge, fake, back in (
            ("A", g.a, g.b, d.a, fake_a, fake_b),
            ("B", g.b, g.a, d.b, fake_b, fake_a),
        ):
            x, style = batch[name], batch[f"style_{name}"]
            verdicts = judge(fake)
            terms[f"G_{name}"] = c.lambda_gan * sum(adversarial_generator(c.gan_mode, v) for v in verdicts)
            content, own_style = own.content(x), own.style(x)
            terms[f"recon_{name}"] = c.lambda_recon * (own.decode(content, own_style) - x).abs().mean()
            terms[f"style_{name}"] = c.lambda_style * (own.style(fake) - style).abs().mean()
            found = other.content(back)
            terms[f"content_{name}"] = c.lambda_content * (found - content).abs().mean()
            if c.lambda_cycle:
                terms[f"cycle_{name}"] = c.lambda_cycle * (own.decode(found, own_style) - x).abs().mean()
        return terms

    def step(self, batches: list[Batch], factor: float) -> dict[str, float]:
        c, first, rest = self.c, batches[: self.c.n_critic], batches[self.c.n_critic - 1 :]
        for batch in first:
            loss, terms = self.discriminator_loss(batch)
            self.opt_d.update(loss, factor)
        for batch in rest:
            mine = self.generator_terms(batch)
            squares = sum((p.detach() ** 2).sum() for p in self.nets["G"].parameters())
            self.opt_g.update(sum(mine.values(), torch.zeros(())), factor)
            with torch.no_grad():
                for mean, p in zip(self.ema.parameters(), self.nets["G"].parameters()):
                    mean.copy_(c.ema * mean + (1 - c.ema) * p)
        if c.weight_decay:
            mine["decay"] = c.weight_decay / 2 * squares
        return {name: float(torch.as_tensor(value).detach()) for name, value in (terms | mine).items()}

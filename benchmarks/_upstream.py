"""The CycleGAN step as the upstream repository runs it: plain torch layers, eager, NCHW; the peer of the
training benchmarks.

Networks, order of updates and losses are those of fastgan.recipes.cyclegan, so the two can be given equal
weights.
"""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor, nn

IDENTITY, CYCLE = 5.0, 10.0


class Block(nn.Module):
    """Residual block with reflection padding and instance norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        again = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(True), *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class Generator(nn.Module):
    """ResNet generator with the state-dict keys of the release."""

    def __init__(self, ngf: int, blocks: int) -> None:
        super().__init__()

        def norm(width: int) -> list[nn.Module]:
            return [nn.InstanceNorm2d(width), nn.ReLU(True)]

        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), *norm(ngf)]
        for width in (ngf, 2 * ngf):
            layers += [nn.Conv2d(width, 2 * width, 3, 2, 1), *norm(2 * width)]
        layers += [Block(4 * ngf) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            layers += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, 1), *norm(width // 2)]
        self.model = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Discriminator(nn.Module):
    """70x70 PatchGAN with the state-dict keys of the release."""

    def __init__(self, ndf: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for cin, cout, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [nn.Conv2d(cin * ndf, cout * ndf, 4, stride, 1), nn.InstanceNorm2d(cout * ndf)]
            layers += [nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class UpstreamStep:
    """One step per call: both generators, then each discriminator with fakes out of a history of 50
    images."""

    def __init__(self, ngf: int, ndf: int, blocks: int, device: torch.device) -> None:
        self.nets = {
            "G_A": Generator(ngf, blocks), "G_B": Generator(ngf, blocks),
            "D_A": Discriminator(ndf), "D_B": Discriminator(ndf),
        }  # fmt: skip
        for net in self.nets.values():
            net.to(device)
        both = [
            itertools.chain(self.nets[a].parameters(), self.nets[b].parameters())
            for a, b in (("G_A", "G_B"), ("D_A", "D_B"))
        ]
        self.optimizer_g, self.optimizer_d = (torch.optim.Adam(p, lr=2e-4, betas=(0.5, 0.999)) for p in both)
        self.pools: dict[str, list[Tensor]] = {"D_A": [], "D_B": []}
        self.mse, self.l1 = nn.MSELoss(), nn.L1Loss()

    def _gan(self, out: Tensor, real: bool) -> Tensor:
        return self.mse(out, torch.ones_like(out) if real else torch.zeros_like(out))

    def _from_pool(self, name: str, image: Tensor) -> Tensor:
        pool = self.pools[name]
        if len(pool) < 50:
            pool.append(image.clone())
        elif random.random() > 0.5:
            place = random.randrange(50)
            image, pool[place] = pool[place], image.clone()
        return image

    def __call__(self, a: Tensor, b: Tensor) -> dict[str, float]:
        """Update all networks on one pair of batches (N, 3, H, W); losses as numbers, read every step as
        upstream does."""
        g_a, g_b, d_a, d_b = (self.nets[k] for k in ("G_A", "G_B", "D_A", "D_B"))
        critics = [*d_a.parameters(), *d_b.parameters()]
        fake_b = g_a(a)
        rec_a = g_b(fake_b)
        fake_a = g_b(b)
        rec_b = g_a(fake_a)
        for p in critics:
            p.requires_grad_(False)
        self.optimizer_g.zero_grad()
        idt = IDENTITY * (self.l1(g_a(b), b) + self.l1(g_b(a), a))
        gan_a, gan_b = self._gan(d_a(fake_b), True), self._gan(d_b(fake_a), True)
        cycle = CYCLE * (self.l1(rec_a, a) + self.l1(rec_b, b))
        (gan_a + gan_b + cycle + idt).backward()
        self.optimizer_g.step()
        for p in critics:
            p.requires_grad_(True)
        self.optimizer_d.zero_grad()
        losses = {"G_A": gan_a, "G_B": gan_b, "cycle": cycle, "idt": idt}
        for name, net, real, fake in (("D_A", d_a, b, fake_b), ("D_B", d_b, a, fake_a)):
            old = self._from_pool(name, fake.detach())
            losses[name] = 0.5 * (self._gan(net(real), True) + self._gan(net(old), False))
            losses[name].backward()
        self.optimizer_d.step()
        return {k: v.item() for k, v in losses.items()}

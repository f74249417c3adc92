"""CycleGAN and pix2pix as the upstream repository runs them, in plain torch layers: the peers of the training
benchmarks.

Networks, order of updates and losses are those of fastgan.recipes, so the two can be given equal weights. A
step is eager float32 in NCHW as it stands; its options are what a user would add: bfloat16 autocast,
channels_last, a fused optimiser, torch.compile per network, and a CUDA graph around the whole step. Losses
stay on the device: upstream reads them every hundred steps.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from benchmarks._measure import captured

IDENTITY, CYCLE, L1 = 5.0, 10.0, 100.0
HISTORY, DROPOUT = 50, 0.5


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


class Level(nn.Module):
    """A level of the U-Net: down, the level inside, up; its input beside its result."""

    def __init__(
        self, outer: int, inner: int, inside: Level | None, *, outermost: bool = False, dropout: bool = False
    ) -> None:
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(3 if outermost else outer, inner, 4, 2, 1, bias=False)
        up = nn.ConvTranspose2d(inner if inside is None else 2 * inner, outer, 4, 2, 1, bias=outermost)
        head: list[nn.Module] = [] if outermost else [nn.LeakyReLU(0.2, True)]
        middle = [] if inside is None else [inside] if outermost else [nn.BatchNorm2d(inner), inside]
        tail: list[nn.Module] = [nn.Tanh()] if outermost else [nn.BatchNorm2d(outer)]
        drop = [nn.Dropout(DROPOUT)] if dropout else []
        self.model = nn.Sequential(*head, down, *middle, nn.ReLU(True), up, *tail, *drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class Unet(nn.Module):
    """U-Net generator (8 levels: unet_256) with batch norm, dropout and the release's state-dict keys."""

    def __init__(self, ngf: int, levels: int) -> None:
        super().__init__()
        widths = [ngf * min(2**k, 8) for k in range(levels)]
        level: Level | None = None
        for k in range(levels - 1, 0, -1):
            level = Level(widths[k - 1], widths[k], level, dropout=4 <= k <= levels - 2)
        self.model = Level(3, ngf, level, outermost=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Discriminator(nn.Module):
    """70x70 PatchGAN with the state-dict keys of the release."""

    def __init__(self, channels: int, ndf: int, norm: type[nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        bias = norm is nn.InstanceNorm2d
        for cin, cout, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [nn.Conv2d(cin * ndf, cout * ndf, 4, stride, 1, bias=bias), norm(cout * ndf)]
            layers += [nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(8 * ndf, 1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _correct_gradients(net: nn.Module) -> None:
    """torch's instance norm of one image is wrong for a channels_last gradient on a CPU: give it another."""

    def forward(norm: nn.Module, x: object, y: Tensor) -> None:
        if y.requires_grad:
            y.register_hook(Tensor.contiguous)

    for module in net.modules():
        if isinstance(module, nn.InstanceNorm2d):
            module.register_forward_hook(forward)


class History:
    """The last generated images, one per call: half of the answers are older ones, once 50 are there."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def draw(self) -> None:
        """Nothing: this one draws where it answers."""

    def __call__(self, image: Tensor) -> Tensor:
        if len(self.images) < HISTORY:
            self.images.append(image.clone())
        elif random.random() > 0.5:
            place = random.randrange(HISTORY)
            image, self.images[place] = self.images[place], image.clone()
        return image


class DrawnHistory:
    """The same in one tensor, with `draw` on the host before a step: the answer can be in a CUDA graph."""

    def __init__(self, image: Tensor) -> None:
        # place 50 takes what is not kept
        self.images = torch.zeros((HISTORY + 1, *image.shape[1:]), device=image.device)
        self.place = torch.full((1,), HISTORY, device=image.device)
        self.old = torch.zeros((1,), dtype=torch.bool, device=image.device)
        self.count = 0

    def draw(self) -> None:
        """Decide what the next answer is."""
        full = self.count == HISTORY
        old = full and random.random() > 0.5
        place = random.randrange(HISTORY) if old else HISTORY if full else self.count
        self.count = min(HISTORY, self.count + 1)
        self.place.fill_(place)
        self.old.fill_(old)

    def __call__(self, image: Tensor) -> Tensor:
        stored = self.images.index_select(0, self.place).to(image.dtype)
        self.images.index_copy_(0, self.place, image.float())
        return torch.where(self.old.view(1, 1, 1, 1), stored, image)


class UpstreamStep:
    """One step per call on a pair of images (1, 3, H, W), always the same; its losses, on the device.

    Args:
        nets: networks by name, in training mode.
        a, b: the images.
        autocast: bfloat16 where torch's autocast puts it.
        channels_last: layout of networks and images.
        fused: torch's fused Adam instead of its default.
        compile: torch.compile every network.
        capture: replay the step from a CUDA graph; the weights are those given, whatever warmed it up.
    """

    generators: tuple[str, ...]

    def __init__(
        self,
        nets: dict[str, nn.Module],
        a: Tensor,
        b: Tensor,
        *,
        autocast: bool = False,
        channels_last: bool = False,
        fused: bool = False,
        compile: bool = False,
        capture: bool = False,
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.a, self.b = (x.contiguous(memory_format=layout) for x in (a, b))
        self.device, self.autocast = a.device, autocast
        self.nets = {
            name: net.to(a.device, memory_format=layout)  # type: ignore[call-overload]
            for name, net in nets.items()
        }
        critics = [name for name in nets if name not in self.generators]
        self.optimizer_g, self.optimizer_d = (
            torch.optim.Adam(
                self._parameters(names), lr=2e-4, betas=(0.5, 0.999), fused=fused or None, capturable=capture
            )
            for names in (self.generators, critics)
        )
        self.critics = self._parameters(critics)
        self.history = {name: DrawnHistory(b) if capture else History() for name in critics}
        self.mse, self.l1, self.bce = nn.MSELoss(), nn.L1Loss(), nn.BCEWithLogitsLoss()
        if compile:
            for net in self.nets.values():
                net.compile(dynamic=False)
        elif channels_last and a.device.type == "cpu":
            for net in self.nets.values():
                _correct_gradients(net)
        self.run = self._captured() if capture else self.body

    def __call__(self) -> dict[str, Tensor]:
        for history in self.history.values():
            history.draw()
        return self.run()

    def body(self) -> dict[str, Tensor]:
        """The work of a step."""
        raise NotImplementedError

    def _captured(self) -> Callable[[], dict[str, Tensor]]:
        before = {
            name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in self.nets.items()
        }
        run = captured(self.body)
        for name, net in self.nets.items():
            net.load_state_dict(before[name])
        for optimizer in (self.optimizer_g, self.optimizer_d):
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        return run

    def _parameters(self, names: Iterable[str]) -> list[nn.Parameter]:
        return list(itertools.chain.from_iterable(self.nets[name].parameters() for name in names))

    def _cast(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _freeze(self, frozen: bool) -> None:
        for p in self.critics:
            p.requires_grad_(not frozen)

    @staticmethod
    def _update(optimizer: torch.optim.Optimizer, *losses: Tensor) -> None:
        optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        optimizer.step()


class CycleGANStep(UpstreamStep):
    """Both generators, then both discriminators with fakes out of a history of 50 images."""

    generators = ("G_A", "G_B")

    def _gan(self, out: Tensor, real: bool) -> Tensor:
        return self.mse(out, torch.ones_like(out) if real else torch.zeros_like(out))

    def body(self) -> dict[str, Tensor]:
        a, b = self.a, self.b
        g_a, g_b, d_a, d_b = (self.nets[k] for k in ("G_A", "G_B", "D_A", "D_B"))
        with self._cast():
            fake_b = g_a(a)
            rec_a = g_b(fake_b)
            fake_a = g_b(b)
            rec_b = g_a(fake_a)
            self._freeze(True)
            idt = IDENTITY * (self.l1(g_a(b), b) + self.l1(g_b(a), a))
            gan_a, gan_b = self._gan(d_a(fake_b), True), self._gan(d_b(fake_a), True)
            cycle = CYCLE * (self.l1(rec_a, a) + self.l1(rec_b, b))
            total = gan_a + gan_b + cycle + idt
        self._update(self.optimizer_g, total)
        self._freeze(False)
        losses = {"G_A": gan_a, "G_B": gan_b, "cycle": cycle, "idt": idt}
        for name, net, real, fake in (("D_A", d_a, b, fake_b), ("D_B", d_b, a, fake_a)):
            old = self.history[name](fake.detach())
            with self._cast():
                losses[name] = 0.5 * (self._gan(net(real), True) + self._gan(net(old), False))
        self._update(self.optimizer_d, losses["D_A"], losses["D_B"])
        return {name: loss.detach() for name, loss in losses.items()}


class Pix2PixStep(UpstreamStep):
    """The discriminator of pairs, then the generator; no history."""

    generators = ("G",)

    def _gan(self, out: Tensor, real: bool) -> Tensor:
        return self.bce(out, torch.ones_like(out) if real else torch.zeros_like(out))

    def body(self) -> dict[str, Tensor]:
        a, b, g, d = self.a, self.b, self.nets["G"], self.nets["D"]
        with self._cast():
            fake = g(a)
        self._freeze(False)
        with self._cast():
            judged = self._gan(d(torch.cat([a, fake.detach()], 1)), False)
            judged = 0.5 * (judged + self._gan(d(torch.cat([a, b], 1)), True))
        self._update(self.optimizer_d, judged)
        self._freeze(True)
        with self._cast():
            gan = self._gan(d(torch.cat([a, fake], 1)), True)
            l1 = L1 * self.l1(fake, b)
            total = gan + l1
        self._update(self.optimizer_g, total)
        return {"G_GAN": gan.detach(), "G_L1": l1.detach(), "D": judged.detach()}

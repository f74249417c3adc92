"""Networks of StarGAN (Choi et al., CVPR 2018, tables 4 and 5). The generator takes a label: 7x7, two 4x4
stride-2, residual blocks, two transposed 4x4, 7x7. The discriminator reads one: 4x4 stride-2 and two heads.

State-dict keys are those of the official release: `main.0`, norms at `main.1`, ..., blocks `main.9.main.0`;
`main.0`, `main.2`, ..., `conv1` and `conv2` of the discriminator.
All padding is zeros: with reflection the label, constant over the image, would be removed by the first norm.
The official norms hold running statistics, but its test code never leaves training mode: statistics are those
of the image, and the stored ones are kept for the file alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgan.layers import Conv2d, ConvTranspose2d, InstanceNorm2d
from fastgan.stack import run_layers, run_line, run_plain, runs_fused


class _Norm(InstanceNorm2d):
    """Affine, with the activation; the running statistics of the files have a place and no effect."""

    def __init__(self, channels: int, act: str = "relu") -> None:
        super().__init__(channels, affine=True, act=act)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # torch's own refuses running statistics that have no effect
        nn.Module._load_from_state_dict(self, *args, **kwargs)


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        # the identities stand where upstream has activations, so that indices are the same
        self.main = nn.Sequential(first, _Norm(channels), nn.Identity(), second, _Norm(channels, "none"))

    @property
    def residual_body(self) -> nn.Sequential:
        """What is added to the input; see `fastgan.stack`."""
        return self.main

    def forward(self, x: Tensor) -> Tensor:
        *body, last = self.main
        h = x
        for layer in body:
            h = layer(h)
        return last(h, residual=x)


class StarGANGenerator(nn.Module):
    """Image (N, channels, H, W), H and W multiples of 4, and a label to (N, channels, H, W) in [-1, 1].

    Args:
        channels: channels of the image.
        labels: numbers in a label.
        ngf: width after the first convolution.
        blocks: residual blocks at a quarter of the size, 4 * ngf wide.

    Attributes:
        label: (labels,), taken where `forward` is given none.
    """

    multiple = 4
    memory = "fast"
    label: Tensor | None

    def __init__(self, channels: int = 3, labels: int = 5, *, ngf: int = 64, blocks: int = 6) -> None:
        super().__init__()
        self.labels = labels
        layers: list[nn.Module] = [Conv2d(channels + labels, ngf, 7, padding=3, bias=False)]
        layers += [_Norm(ngf), nn.Identity()]
        for width in (ngf, 2 * ngf):
            layers += [Conv2d(width, 2 * width, 4, 2, 1, bias=False), _Norm(2 * width), nn.Identity()]
        layers += [_Block(4 * ngf) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            layers += [
                ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
                _Norm(width // 2),
                nn.Identity(),
            ]
        self.main = nn.Sequential(*layers, Conv2d(ngf, channels, 7, padding=3, bias=False), nn.Tanh())
        self.register_buffer("label", None, persistent=False)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Translate x towards the label, (labels,) or (N, labels); ValueError without one or where the size
        is not a multiple of 4."""
        label = self.label if label is None else label
        if label is None or label.shape[-1] != self.labels:
            given = None if label is None else tuple(label.shape)
            raise ValueError(f"StarGANGenerator: label must have {self.labels} numbers, got {given}")
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            size = tuple(x.shape[-2:])
            raise ValueError(f"StarGANGenerator: height and width must be multiples of 4, got {size}")
        planes = label.to(x).reshape(-1, self.labels, 1, 1).expand(len(x), -1, *x.shape[2:])
        x = torch.cat([x, planes], 1)
        # the layers are no `line`: tiles would have no label
        if runs_fused(x):
            return run_layers([self.main], x, self.memory)
        return run_plain(self.main, x, self.memory)


class StarGANDiscriminator(nn.Module):
    """Image (N, channels, size, size) to a map of logits, real or generated, and the logits of its label.

    Args:
        channels: channels of the image.
        labels: numbers in a label.
        size: side of the images in pixels, a multiple of 2^levels.
        ndf: width of the first layer, which doubles with every further one.
        levels: halvings; 6 in the paper.

    Raises:
        ValueError: a size that is no multiple.
    """

    memory = "fast"

    def __init__(
        self, channels: int = 3, labels: int = 5, *, size: int = 128, ndf: int = 64, levels: int = 6
    ) -> None:
        super().__init__()
        if size % 2**levels or size < 1:
            rule = f"a multiple of {2**levels}"
            raise ValueError(f"StarGANDiscriminator: size must be {rule}, got {size}")
        self.size = size
        layers: list[nn.Module] = []
        into = channels
        for width in (ndf * 2**k for k in range(levels)):
            layers += [Conv2d(into, width, 4, 2, 1), nn.LeakyReLU(0.01, inplace=True)]
            into = width
        self.main = nn.Sequential(*layers)
        self.conv1 = Conv2d(into, 1, 3, 1, 1, bias=False)
        self.conv2 = Conv2d(into, labels, size // 2**levels, bias=False)

    @property
    def line(self) -> nn.Sequential:
        """The layers in front of the heads; see `fastgan.stack`."""
        return self.main

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 1, h, w) and (N, labels); ValueError for images of another size."""
        if tuple(x.shape[-2:]) != (self.size, self.size):
            size = tuple(x.shape[-2:])
            raise ValueError(
                f"StarGANDiscriminator: images must be of {self.size}x{self.size} pixels, got {size}"
            )
        h = run_line(self, x)
        return self.conv1(h), self.conv2(h).flatten(1)

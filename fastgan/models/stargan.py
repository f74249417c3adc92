"""Label-conditioned generator of StarGAN (Choi et al., CVPR 2018, table 4): 7x7, two 4x4 stride-2, residual
blocks, two transposed 4x4, 7x7.

State-dict keys are those of the official release: `main.0`, norms at `main.1`, ..., blocks `main.9.main.0`.
All padding is zeros: with reflection the label, constant over the image, would be removed by the first norm.
The official norms hold running statistics, but its test code never leaves training mode: statistics are those
of the image, and the stored ones are kept for the file alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.layers import Conv2d, ConvTranspose2d, InstanceNorm2d


class _Norm(InstanceNorm2d):
    """Affine, with the activation; the running statistics of the files have a place and no effect."""

    def __init__(self, channels: int, act: str = "relu") -> None:
        super().__init__(channels, affine=True, act=act)
        self.track_running_stats = True
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        # the identities stand where upstream has activations, so that indices are the same
        self.main = nn.Sequential(first, _Norm(channels), nn.Identity(), second, _Norm(channels, "none"))

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
        return self.main(torch.cat([x, planes], 1))

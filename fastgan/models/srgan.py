"""Networks that enlarge images: SRResNet, which is the generator of SRGAN, its discriminator (Ledig et al.,
CVPR 2017, arXiv 1609.04802, figure 4), and SRCNN (Dong et al. 2016, arXiv 1501.00092).

`reduce` and `enlarge` are the bicubic resizing of the field, MATLAB's imresize: Keys' kernel (a = -0.5), as
wide as the reduction asks for, beyond the border the image mirrored with its edge. Where the sides are
multiples of the factor they are imresize's values before its rounding to 8 bits. `F.interpolate` alone, like
Pillow, leaves out what lies beyond the border instead, and without `antialias` has another kernel, a = -0.75.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.layers import Conv2d, norm_act
from fastgan.models.features import FeatureDiscriminator
from fastgan.stack import run_layers, run_plain, runs_fused

# of the convolutions of D: width over ndf, stride
LAYERS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2))
HALVED = 16  # pixels of a side of the image that one of D's last convolution stands for
# luma of ITU-R BT.601 in 16..235 of 0..255, as MATLAB's rgb2ycbcr
LUMA, BLACK, SPAN = (65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255, 219 / 255


def reduce(x: Tensor, scale: int) -> Tensor:
    """Images (N, C, H, W), H and W multiples of the scale, to (N, C, H / scale, W / scale)."""
    if x.shape[2] % scale or x.shape[3] % scale:
        raise ValueError(f"reduce: height and width must be multiples of {scale}, got {tuple(x.shape[2:])}")
    return _resized(x, 2 * scale, lambda side: side // scale, 2)


def enlarge(x: Tensor, scale: int) -> Tensor:
    """Images (N, C, H, W) to (N, C, H * scale, W * scale)."""
    return _resized(x, 2, lambda side: side * scale, 2 * scale)


def luma(x: Tensor) -> Tensor:
    """The Y of RGB images (N, 3, H, W) in 0..1, in 16 / 255..235 / 255; images of other channels in 0..1 as
    they are, all channels alike."""
    if x.shape[1] != 3:
        return x
    return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True) + BLACK


def _resized(x: Tensor, around: int, size: Callable[[int], int], cut: int) -> Tensor:
    """Bicubic, with `around` mirrored pixels on each side that are `cut` afterwards."""
    height, width = x.shape[2:]
    x = x[:, :, _mirrored(height, around, x.device)][:, :, :, _mirrored(width, around, x.device)]
    sides = size(height + 2 * around), size(width + 2 * around)
    # in float32 under autocast as well
    x = F.interpolate(x, sides, mode="bicubic", antialias=True)
    return x[:, :, cut : sides[0] - cut, cut : sides[1] - cut]


def _mirrored(side: int, around: int, device: torch.device) -> Tensor:
    """Places of the pixels of a side and of `around` more at both ends: 1 0 0 1 2 ... n n n-1."""
    place = torch.arange(-around, side + around, device=device) % (2 * side)
    return torch.where(place < side, place, 2 * side - 1 - place)


class _Block(nn.Module):
    """x + f(x), f = 3x3, norm, PReLU, 3x3, norm."""

    memory = "fast"

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        first, second = (Conv2d(channels, channels, 3, padding=1, bias=norm == "none") for _ in range(2))
        norms = [norm_act(norm, channels)[0] for _ in range(2)]
        self.main = nn.Sequential(first, norms[0], nn.PReLU(), second, norms[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + _run(self, self.main, x)


def _run(net: nn.Module, layers: nn.Module, x: Tensor) -> Tensor:
    line, memory = list(layers.children()), str(net.memory)
    return run_layers([line], x, memory) if runs_fused(x) else run_plain(line, x, memory)


class SRResNet(nn.Module):
    """Images (N, channels, H, W) to (N, channels, scale H, scale W), both in [-1, 1] or both in [0, 1]; the
    last convolution has no activation, so values may lie a little outside.

    Args:
        channels: any number.
        scale: 2 or 4; each doubling is a 3x3 convolution, PixelShuffle and PReLU.
        ngf: width; 64 in the paper.
        blocks: residual blocks; 16 in the paper.
        norm: "batch", "instance" or "none".
        add_bicubic: give what is to be added to a bicubic enlargement, at first nothing. Not in the paper; a
            small network is above bicubic within minutes that way.

    Attributes:
        reach: how many pixels of the input around its own a pixel of the output depends on, norms apart.
    """

    memory = "fast"

    def __init__(
        self,
        channels: int,
        *,
        scale: int = 4,
        ngf: int = 64,
        blocks: int = 16,
        norm: str = "batch",
        add_bicubic: bool = False,
    ) -> None:
        super().__init__()
        if scale not in (2, 4):
            raise ValueError(f"SRResNet: scale must be 2 or 4, got {scale}")
        self.scale, self.add_bicubic = scale, add_bicubic
        # 9x9, the blocks and the convolution behind them; the way up reaches three pixels at either scale
        self.reach = 4 + 2 * blocks + 1 + 3
        self.head = nn.Sequential(Conv2d(channels, ngf, 9, padding=4), nn.PReLU())
        self.blocks = nn.ModuleList(_Block(ngf, norm) for _ in range(blocks))
        join = Conv2d(ngf, ngf, 3, padding=1, bias=norm == "none")
        self.join = nn.Sequential(join, norm_act(norm, ngf)[0])
        self.up = nn.ModuleList(
            nn.Sequential(Conv2d(ngf, 4 * ngf, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
            for _ in range(scale // 2)
        )
        self.tail = Conv2d(ngf, channels, 9, padding=4)
        if add_bicubic:
            nn.init.zeros_(self.tail.weight)
            nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge x."""
        # 9x9 convolutions are torch's: the fused ops end at 7x7
        first = h = self.head(x)
        for block in self.blocks:
            h = block(h)
        h = first + _run(self, self.join, h)
        for doubling in self.up:
            h = _run(self, doubling, h)
        y = self.tail(h)
        return y + enlarge(x, self.scale) if self.add_bicubic else y


class SRCNN(nn.Module):
    """Images (N, C, H, W) to (N, C, scale H, scale W): bicubic, then three convolutions on the luma of RGB
    (the chroma stays bicubic), or on every channel of other images. At the border the edge is repeated.

    Args:
        scale: 2, 3, 4 ...
        width: side of the middle convolution: 1 (9-1-5, the paper's own choice for speed) or 5 (9-5-5).
        output: "tanh" for images in [-1, 1], "sigmoid" for [0, 1].

    Attributes:
        reach: see `SRResNet`.
    """

    def __init__(self, *, scale: int = 4, width: int = 1, output: str = "tanh") -> None:
        super().__init__()
        self.scale, self.output = scale, output
        sides = 9, width, 5
        self.reach = 2 + -(-sum(side // 2 for side in sides) // scale) + 1
        layers: list[nn.Module] = []
        for into, out, side in zip((1, 64, 32), (64, 32, 1), sides):
            layers += [nn.ReplicationPad2d(side // 2), Conv2d(into, out, side), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge x."""
        x = enlarge(x, self.scale)
        y = luma(x / 2 + 0.5 if self.output == "tanh" else x)
        # what the luma gains, each colour gains; the chroma stays
        gain = (self.layers(y.reshape(-1, 1, *y.shape[2:])).view_as(y) - y) / (SPAN if x.shape[1] == 3 else 1)
        return x + (2 * gain if self.output == "tanh" else gain)


class SRGANDiscriminator(FeatureDiscriminator):
    """Images (N, channels, side, side) to logits (N, 1); no sigmoid.

    Args:
        channels: of the image.
        side: of the images in pixels, a multiple of 16; 96 in the paper.
        ndf: width of the first layer; 64 in the paper. The dense layer has 16 times as many units.
        norm: "batch", "instance" or "none"; never on the first layer.
    """

    def __init__(self, channels: int, *, side: int = 96, ndf: int = 64, norm: str = "batch") -> None:
        blocks: list[list[nn.Module]] = []
        into = channels
        for times, stride in LAYERS:
            out = ndf * times
            if blocks:
                conv = Conv2d(into, out, 3, stride, 1, bias=norm == "none")
                blocks.append([conv, *norm_act(norm, out, "leaky_relu")])
            else:
                blocks.append([Conv2d(into, out, 3, stride, 1), nn.LeakyReLU(0.2, inplace=True)])
            into = out
        dense = nn.Linear(into * (side // HALVED) ** 2, 16 * ndf)
        blocks.append([nn.Flatten(), dense, nn.LeakyReLU(0.2, inplace=True), nn.Linear(16 * ndf, 1)])
        super().__init__(blocks, ())

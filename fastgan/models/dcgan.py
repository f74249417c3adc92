"""Networks from noise to images and their discriminators, with or without a label.

`DCGANGenerator` and `DCGANDiscriminator` (Radford, Metz, Chintala 2016, arXiv 1511.06434, figure 1): strided
4x4 convolutions between 4x4 pixels and the image, state-dict keys of PyTorch's examples. `FaceGenerator` and
`FaceDiscriminator`: a small pair for 64x64 faces, of a Keras tutorial (5x5, LeakyReLU 0.3). `MLPGenerator`
and `MaxoutDiscriminator`: of the conditional GAN (Mirza, Osindero 2014, arXiv 1411.1784, section 4.1).

A label is (N, labels) in 0..1. Generators take it beside the noise; convolutional discriminators as constant
planes beside the image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.layers import Conv2d, ConvTranspose2d, MinibatchStd, norm_act
from fastgan.stack import run_line

ACTS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def doublings(size: int) -> int:
    """How often 4 pixels double to a size; ValueError where they never reach it."""
    times = size.bit_length() - 3
    if times < 1 or 4 << times != size:
        raise ValueError(f"doublings: size must be 8, 16, 32, 64 ..., got {size}")
    return times


class _FromNoise(nn.Module):
    """A line of layers on noise and label, (N, numbers, 1, 1)."""

    memory = "fast"
    main: nn.Sequential

    @property
    def line(self) -> nn.Sequential:
        """The layers one after the other; see `fastgan.stack`."""
        return self.main

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Noise (N, noise) and label (N, labels) to images (N, C, size, size)."""
        given = z if label is None else torch.cat([z, label.to(z.dtype)], 1)
        return run_line(self, given[:, :, None, None])


class _OfImages(nn.Module):
    """A line of layers on an image and planes of its label."""

    memory = "fast"
    main: nn.Sequential

    @property
    def line(self) -> nn.Sequential:
        """The layers one after the other; see `fastgan.stack`."""
        return self.main

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Images (N, C, size, size) and label (N, labels) to logits (N, 1, 1, 1)."""
        if label is not None:
            planes = label.to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, planes], 1)
        return run_line(self, x)


class DCGANGenerator(_FromNoise):
    """Noise to images: 4x4 pixels of the largest width, which halves while the size doubles.

    Args:
        noise, labels: numbers of noise and of a label.
        channels, size: of the images; size is a power of two from 8.
        ngf: width before the last convolution; 128 is the paper's (1024, 512, 256, 128 at 64x64).
        norm: "batch", "instance" or "none".
        output: "tanh" or "sigmoid".
    """

    def __init__(
        self, noise: int, channels: int, *, size: int = 64, ngf: int = 128, norm: str = "batch",
        labels: int = 0, output: str = "tanh",
    ) -> None:  # fmt: skip
        super().__init__()
        bias = norm == "none"
        widths = [ngf << k for k in reversed(range(doublings(size)))]
        layers: list[nn.Module] = [ConvTranspose2d(noise + labels, widths[0], 4, 1, 0, bias=bias)]
        layers += norm_act(norm, widths[0], "relu")
        for into, out in zip(widths, widths[1:]):
            layers += [ConvTranspose2d(into, out, 4, 2, 1, bias=bias), *norm_act(norm, out, "relu")]
        last = ConvTranspose2d(widths[-1], channels, 4, 2, 1, bias=bias)
        self.main = nn.Sequential(*layers, last, ACTS[output]())


class DCGANDiscriminator(_OfImages):
    """Images to one logit each: the generator's mirror, without a norm on the first and last layer.

    Args:
        channels, size, labels: as the generator's.
        ndf: width of the first layer.
        norm: "batch", "instance", "layer" (over channels and pixels) or "none".
        minibatch_std: show the last layer how much the images of a batch differ.
    """

    def __init__(
        self, channels: int, *, size: int = 64, ndf: int = 128, norm: str = "batch", labels: int = 0,
        minibatch_std: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        bias = norm == "none"
        widths = [ndf << k for k in range(doublings(size))]
        layers: list[nn.Module] = [Conv2d(channels + labels, ndf, 4, 2, 1, bias=bias)]
        layers += [nn.LeakyReLU(0.2, inplace=True)]
        for into, out in zip(widths, widths[1:]):
            layers += [Conv2d(into, out, 4, 2, 1, bias=bias)]
            if norm == "layer":
                layers += [nn.GroupNorm(1, out), nn.LeakyReLU(0.2, inplace=True)]
            else:
                layers += norm_act(norm, out, "leaky_relu")
        if minibatch_std:
            layers += [MinibatchStd()]
        last = Conv2d(widths[-1] + minibatch_std, 1, 4, 1, 0, bias=bias)
        self.main = nn.Sequential(*layers, last)


class FaceGenerator(_FromNoise):
    """Noise to 64x64: a linear layer to 4x4, four transposed 5x5 convolutions, one 5x5; `ngf` 16 is the
    tutorial's. Arguments as `DCGANGenerator`; batch norm everywhere."""

    def __init__(
        self, noise: int, channels: int, *, ngf: int = 16, labels: int = 0, output: str = "tanh"
    ) -> None:
        super().__init__()
        wide = 8 * ngf
        # the first norm sees every value of the 4x4 pixels as a channel of its own
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(noise + labels, 16 * wide)]
        layers += [nn.Unflatten(1, (16 * wide, 1, 1)), nn.BatchNorm2d(16 * wide)]
        layers += [nn.Flatten(), nn.Unflatten(1, (wide, 4, 4))]
        for into, out in zip((wide, 4 * ngf, 2 * ngf, ngf), (4 * ngf, 2 * ngf, ngf, ngf)):
            layers += [ConvTranspose2d(into, out, 5, 2, 2, output_padding=1)]
            layers += [nn.BatchNorm2d(out), nn.LeakyReLU(0.3, inplace=True)]
        self.main = nn.Sequential(*layers, Conv2d(ngf, channels, 5, 1, 2), ACTS[output]())


class FaceDiscriminator(_OfImages):
    """64x64 to one logit: four times a 5x5 convolution at full and one at half the size, the mean over all
    pixels, a linear layer. Arguments as `DCGANDiscriminator`; batch norm everywhere."""

    def __init__(self, channels: int, *, ndf: int = 16, labels: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = [channels + labels, ndf, 2 * ndf, 4 * ndf, 8 * ndf]
        for into, out in zip(widths, widths[1:]):
            layers += [Conv2d(into, out, 5, 1, 2), nn.BatchNorm2d(out)]
            layers += [Conv2d(out, out, 5, 2, 2), nn.BatchNorm2d(out), nn.LeakyReLU(0.3, inplace=True)]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1)]
        self.main = nn.Sequential(*layers, nn.Unflatten(1, (1, 1, 1)))


class MLPGenerator(nn.Module):
    """Noise to 200 and label to 1,000 units, joined to 1,200, then one per pixel and channel.

    dropout: probability of a dropout behind every layer but the last; else as `DCGANGenerator`.
    """

    def __init__(
        self, noise: int, channels: int, *, size: int, labels: int = 0, output: str = "tanh",
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape = channels, size, size
        self.noise = nn.Linear(noise, 200)
        self.label = nn.Linear(labels, 1000) if labels else None
        self.joint = nn.Linear(1200 if labels else 200, 1200)
        self.image = nn.Linear(1200, channels * size * size)
        self.output, self.dropout = ACTS[output](), nn.Dropout(dropout)

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Noise (N, noise) and label (N, labels) to images (N, C, size, size)."""
        h = F.relu(self.noise(z))
        if self.label is not None:
            assert label is not None
            h = torch.cat([h, F.relu(self.label(label.to(z.dtype)))], 1)
        h = self.dropout(F.relu(self.joint(self.dropout(h))))
        return self.output(self.image(h)).unflatten(1, self.shape)


class MaxoutDiscriminator(nn.Module):
    """Image to 240 and label to 50 maxout units of 5 pieces, joined to 240 of 4 pieces, one logit.

    dropout: as `MLPGenerator`; else as `DCGANDiscriminator`.
    """

    def __init__(self, channels: int, *, size: int, labels: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Linear(channels * size * size, 240 * 5)
        self.label = nn.Linear(labels, 50 * 5) if labels else None
        self.joint = nn.Linear(290 if labels else 240, 240 * 4)
        self.verdict, self.dropout = nn.Linear(240, 1), nn.Dropout(dropout)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Images (N, C, size, size) and label (N, labels) to logits (N, 1, 1, 1)."""
        h = self.image(x.flatten(1)).unflatten(1, (240, 5)).amax(2)
        if self.label is not None:
            assert label is not None
            h = torch.cat([h, self.label(label.to(x.dtype)).unflatten(1, (50, 5)).amax(2)], 1)
        h = self.joint(self.dropout(h)).unflatten(1, (240, 4)).amax(2)
        return self.verdict(self.dropout(h))[:, :, None, None]

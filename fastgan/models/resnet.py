"""ResNet generator of CycleGAN: 7x7, two stride-2, residual blocks, two transposed, 7x7 (Johnson et al. 2016;
CycleGAN, appendix 7.2).

State-dict keys are those of the original release: with instance norm and 9 blocks `model.1`, `model.4`,
`model.7`, `model.{10..18}.conv_block.{1,5}`, `model.19`, `model.22`, `model.26`; a dropout layer moves
`conv_block.5` to `conv_block.6`, CUT's blurs move what follows them by one. As there, the stride-2
convolutions pad with zeros and only the others reflect, and convolutions in front of a norm have a bias only
with instance norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.layers import (
    Conv2d,
    ConvTranspose2d,
    InstanceNorm2d,
    ReflectionPad2d,
    norm_act,
    skip_idle_biases,
)
from fastgan.stack import run_line

PADDINGS = {"reflect": ReflectionPad2d, "replicate": nn.ReplicationPad2d}
OUTPUTS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def output_layer(output: str) -> nn.Module:
    """The last activation; ValueError for anything but "tanh" and "sigmoid"."""
    if output not in OUTPUTS:
        raise ValueError(f"generator: output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    return OUTPUTS[output]()


def _padded_conv(padding: str, channels: int, bias: bool) -> list[nn.Module]:
    if padding == "zero":
        return [Conv2d(channels, channels, 3, padding=1, bias=bias)]
    if padding not in PADDINGS:
        raise ValueError(f"ResnetBlock: padding must be reflect, replicate or zero, got {padding!r}")
    return [PADDINGS[padding](1), Conv2d(channels, channels, 3, bias=bias)]


class _Blur(nn.Module):
    """Depthwise binomial filter, a buffer `filt` (channels, 1, k, k) as in CUT's files (Zhang 2019)."""

    filt: Tensor

    def __init__(self, channels: int, taps: list[float], gain: float) -> None:
        super().__init__()
        line = torch.tensor(taps)
        square = gain * line[:, None] * line / line.sum() ** 2
        self.register_buffer("filt", square.repeat(channels, 1, 1, 1))


class BlurDown(_Blur):
    """Halve (N, C, H, W): 1 2 1 filter with reflection, every second pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, [1.0, 2.0, 1.0], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, ceil(H / 2), ceil(W / 2))."""
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.filt, stride=2, groups=x.shape[1])


class BlurUp(_Blur):
    """Double (N, C, H, W): zeros between the pixels, 1 3 3 1 filter with the border repeated."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, [1.0, 3.0, 3.0, 1.0], 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 2 H, 2 W)."""
        x = F.pad(x, (1, 1, 1, 1), "replicate")
        # the border, doubled with the rest, is cut off: 3 pixels by the padding alone
        return F.conv_transpose2d(x, self.filt, stride=2, padding=3, groups=x.shape[1])


class ResnetBlock(nn.Module):
    """x + f(x), f = pad, 3x3, norm, ReLU, [dropout], pad, 3x3, norm; no activation after the add.

    Args:
        channels: channels in and out.
        norm: "instance", "batch" or "none".
        padding: "reflect", "replicate" or "zero".
        dropout: dropout 0.5 between the two convolutions.
    """

    def __init__(self, channels: int, *, norm: str, padding: str, dropout: bool) -> None:
        super().__init__()
        bias = norm == "instance"
        layers = _padded_conv(padding, channels, bias) + norm_act(norm, channels, "relu")
        layers += [nn.Dropout(0.5)] if dropout else []
        # the place of an activation after the second norm does not exist upstream: only the norm is kept
        layers += _padded_conv(padding, channels, bias) + norm_act(norm, channels)[:1]
        self.conv_block = nn.Sequential(*layers)

    @property
    def residual_body(self) -> nn.Sequential:
        """What is added to the input; see `fastgan.stack`."""
        return self.conv_block

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        *body, last = self.conv_block
        h = x
        for layer in body:
            h = layer(h)
        return last(h, residual=x) if isinstance(last, InstanceNorm2d) else x + last(h)


class ResnetGenerator(nn.Module):
    """Image (N, in_channels, H, W), H and W multiples of 4, to (N, out_channels, H, W) in the range of
    `output`.

    Args:
        in_channels, out_channels: any number.
        ngf: width after the first convolution.
        blocks: residual blocks at a quarter of the size, 4 * ngf wide.
        norm: "instance", "batch" or "none".
        padding: "reflect", "replicate" or "zero", of the residual blocks; the 7x7 layers reflect.
        dropout: dropout 0.5 inside the residual blocks.
        output: "tanh" for images in [-1, 1], "sigmoid" for [0, 1].
        blur_down, blur_up: CUT's antialiasing: 3x3 convolutions of stride 1 and a blur around them, in place
            of the stride-2 and of the transposed convolutions.
    """

    multiple = 4
    memory = "fast"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        ngf: int = 64,
        blocks: int = 9,
        norm: str = "instance",
        padding: str = "reflect",
        dropout: bool = False,
        output: str = "tanh",
        blur_down: bool = False,
        blur_up: bool = False,
    ) -> None:
        super().__init__()
        bias = norm == "instance"
        layers = [ReflectionPad2d(3), Conv2d(in_channels, ngf, 7, bias=bias), *norm_act(norm, ngf, "relu")]
        for width in (ngf, 2 * ngf):
            stride = 1 if blur_down else 2
            layers += [Conv2d(width, 2 * width, 3, stride, 1, bias=bias), *norm_act(norm, 2 * width, "relu")]
            layers += [BlurDown(2 * width)] if blur_down else []
        layers += [ResnetBlock(4 * ngf, norm=norm, padding=padding, dropout=dropout) for _ in range(blocks)]
        for width in (4 * ngf, 2 * ngf):
            if blur_up:
                layers += [BlurUp(width), Conv2d(width, width // 2, 3, padding=1, bias=bias)]
            else:
                layers += [ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1, bias=bias)]
            layers += norm_act(norm, width // 2, "relu")
        layers += [ReflectionPad2d(3), Conv2d(ngf, out_channels, 7), output_layer(output)]
        self.model = nn.Sequential(*layers)
        skip_idle_biases(self)

    @property
    def line(self) -> nn.Sequential:
        """The layers one after the other; see `fastgan.stack`."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        """Translate x; ValueError where the size is not a multiple of 4 or below 8 pixels (reflection)."""
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            size = tuple(x.shape[-2:])
            raise ValueError(f"ResnetGenerator: height and width must be multiples of 4, got {size}")
        return run_line(self, x)

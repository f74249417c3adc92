"""Networks of DiscoGAN (Kim et al. 2017, arXiv 1703.05192), of any size: 4x4 convolutions that halve, 4x4
transposed ones that double.

Widths, slopes, norms and the missing biases are those of the public code, which works on 64x64 with 4
halvings; its two generators are those without and with `bottleneck` (100 there). Without a norm the inner
convolutions have biases.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastgan.layers import Conv2d, ConvTranspose2d, norm_act, skip_idle_biases
from fastgan.models.features import FeatureDiscriminator
from fastgan.models.resnet import output_layer
from fastgan.stack import run_line


def _halvings(channels: int, widths: list[int], norm: str) -> list[list[nn.Module]]:
    """Blocks of convolution, [norm], LeakyReLU; no norm in the first."""
    blocks: list[list[nn.Module]] = [
        [Conv2d(channels, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    ]
    for cin, cout in zip(widths, widths[1:]):
        conv = Conv2d(cin, cout, 4, 2, 1, bias=norm == "none")
        blocks.append([conv, *norm_act(norm, cout, "leaky_relu")])
    return blocks


class DiscoGANGenerator(nn.Module):
    """Image (N, in_channels, H, W), H and W multiples of `multiple`, to (N, out_channels, H, W) in the range
    of `output`.

    Args:
        in_channels, out_channels: any number.
        levels: halvings; level k is ngf * min(2^k, 8) wide.
        ngf: width of the first level.
        norm: "batch", "instance" or "none".
        bottleneck: channels of a 4x4 convolution and its transposed one between encoder and decoder, which
            leave one pixel of an image of 4 * 2^levels; 0: none.
        output: "tanh" for images in [-1, 1], "sigmoid" for [0, 1].
    """

    memory = "fast"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        levels: int = 4,
        ngf: int = 64,
        norm: str = "batch",
        bottleneck: int = 0,
        output: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.multiple = 2**levels * (4 if bottleneck else 1)
        widths = [ngf * min(2**k, 8) for k in range(levels)]
        bias = norm == "none"
        self.encoder = nn.Sequential(
            *[layer for block in _halvings(in_channels, widths, norm) for layer in block]
        )
        between: list[nn.Module] = []
        if bottleneck:
            between += [Conv2d(widths[-1], bottleneck, 4, bias=bias)]
            between += norm_act(norm, bottleneck, "leaky_relu")
            between += [ConvTranspose2d(bottleneck, widths[-1], 4, bias=bias)]
            between += norm_act(norm, widths[-1], "relu")
        self.bottleneck = nn.Sequential(*between)
        up: list[nn.Module] = []
        for cin, cout in zip(widths[::-1], widths[-2::-1]):
            up += [ConvTranspose2d(cin, cout, 4, 2, 1, bias=bias), *norm_act(norm, cout, "relu")]
        up += [ConvTranspose2d(ngf, out_channels, 4, 2, 1, bias=False), output_layer(output)]
        self.decoder = nn.Sequential(*up)
        skip_idle_biases(self)

    @property
    def line(self) -> list[nn.Module]:
        """The layers one after the other; see `fastgan.stack`."""
        return [self.encoder, self.bottleneck, self.decoder]

    def forward(self, x: Tensor) -> Tensor:
        """Translate x; ValueError where the size is not a multiple of `multiple`."""
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple:
            size = tuple(x.shape[-2:])
            raise ValueError(
                f"DiscoGANGenerator: height and width must be multiples of {self.multiple}, got {size}"
            )
        return run_line(self, x)


class DiscoGANDiscriminator(FeatureDiscriminator):
    """Image (N, in_channels, H, W) to logits, one for 4 * 2^levels pixels; no sigmoid. Features are the
    levels but the first.

    Args:
        in_channels: channels of the image.
        levels: halvings.
        ndf: width of the first level.
        norm: "batch", "instance" or "none"; never on the first and last layer.
    """

    def __init__(self, in_channels: int, *, levels: int = 4, ndf: int = 64, norm: str = "batch") -> None:
        widths = [ndf * min(2**k, 8) for k in range(levels)]
        last: list[nn.Module] = [Conv2d(widths[-1], 1, 4, bias=False)]
        super().__init__([*_halvings(in_channels, widths, norm), last], range(1, levels))

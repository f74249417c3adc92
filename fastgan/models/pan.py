"""Networks of PAN (Wang, Xu, Wang, Tao 2018, arXiv 1706.09138, tables I and II): an image transformation
network with skips, and a discriminator whose hidden layers are the perceptual loss.

No convolution in front of a norm has a bias. The paper's drawing leaves open whether a skip is added or
concatenated: it is concatenated here, behind the activation, which gives the paper's widths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan.layers import Conv2d, ConvTranspose2d, norm_act, skip_idle_biases
from fastgan.models.features import FeatureDiscriminator
from fastgan.models.resnet import output_layer
from fastgan.stack import run_layers, run_plain, runs_fused

# of the eight 3x3 convolutions of D in front of the last one: width over ndf, stride
LAYERS = ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (8, 2))
TAPS = (0, 3, 5, 7)
HALVED = 32  # pixels of the image that one pixel of D's last convolution stands for


class PANGenerator(nn.Module):
    """Image (N, in_channels, H, W), H and W multiples of 2^levels, to (N, out_channels, H, W) in the range of
    `output`.

    Args:
        in_channels, out_channels: any number.
        levels: halvings by 3x3 convolutions, and doublings by transposed 4x4 ones; 6 in the paper. All levels
            but the first and the innermost are concatenated to what comes back up.
        ngf: width of the first level.
        norm: "batch", "instance" or "none".
        output: "tanh" for images in [-1, 1], "sigmoid" for [0, 1].
    """

    memory = "fast"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        levels: int = 6,
        ngf: int = 64,
        norm: str = "batch",
        output: str = "tanh",
    ) -> None:
        super().__init__()
        self.multiple = 2**levels
        bias = norm == "none"
        widths = [ngf * min(2**k, 8) for k in range(levels)]
        first = Conv2d(in_channels, ngf, 3, 2, 1)
        # not in place: the output is kept for the skip
        down = [nn.Sequential(first, nn.LeakyReLU(0.2))]
        for cin, cout in zip(widths, widths[1:]):
            conv = Conv2d(cin, cout, 3, 2, 1, bias=bias)
            down.append(nn.Sequential(conv, *norm_act(norm, cout, "leaky_relu")))
        self.encoder = nn.ModuleList(down)
        up, cin = [], widths[-1]
        for k in range(levels - 2, -1, -1):
            cout = ngf * min(2 ** max(k - 1, 0), 8)
            wider = ConvTranspose2d(cin, cout, 4, 2, 1, bias=bias)
            up.append(nn.Sequential(wider, *norm_act(norm, cout, "relu")))
            cin = cout + widths[k] if k > 0 else cout
        up.append(nn.Sequential(ConvTranspose2d(cin, out_channels, 4, 2, 1), output_layer(output)))
        self.decoder = nn.ModuleList(up)
        skip_idle_biases(self)

    def forward(self, x: Tensor) -> Tensor:
        """Translate x; ValueError where the size is not a multiple of 2^levels."""
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple:
            size = tuple(x.shape[-2:])
            raise ValueError(
                f"PANGenerator: height and width must be multiples of {self.multiple}, got {size}"
            )
        skips: list[Tensor] = []
        for block in self.encoder:
            x = self._run(block, x)
            skips.append(x)
        skips.pop()
        for block in self.decoder:
            x = self._run(block, x)
            # the first level has no way across
            if len(skips) > 1:
                x = torch.cat([x, skips.pop()], 1)
        return x

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        layers = list(block.children())
        return run_layers([layers], x, self.memory) if runs_fused(x) else run_plain(layers, x, self.memory)


class PANDiscriminator(FeatureDiscriminator):
    """Image (N, in_channels, side, side) to logits (N, 1); no sigmoid. Features are the convolutions 1, 4, 6
    and 8, activated.

    Args:
        in_channels: channels of the image.
        side: of the images in pixels, a multiple of 32.
        ndf: width of the first layer.
        norm: "batch", "instance" or "none"; never on the first layer.
    """

    def __init__(self, in_channels: int, *, side: int = 256, ndf: int = 64, norm: str = "batch") -> None:
        bias = norm == "none"
        last = 8
        blocks: list[list[nn.Module]] = []
        cin = in_channels
        for width, stride in [*((ndf * times, stride) for times, stride in LAYERS), (last, 2)]:
            if blocks:
                conv = Conv2d(cin, width, 3, stride, 1, bias=bias)
                blocks.append([conv, *norm_act(norm, width, "leaky_relu")])
            else:
                blocks.append([Conv2d(cin, width, 3, stride, 1), nn.LeakyReLU(0.2, inplace=True)])
            cin = width
        blocks.append([nn.Flatten(), nn.Linear(last * (side // HALVED) ** 2, 1)])
        super().__init__(blocks, TAPS)
        self.side = side

    def forward(self, x: Tensor, *, hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """See `FeatureDiscriminator`; ValueError for images of another size."""
        if tuple(x.shape[-2:]) != (self.side, self.side):
            size = tuple(x.shape[-2:])
            raise ValueError(
                f"PANDiscriminator: images must be of {self.side}x{self.side} pixels, got {size}"
            )
        return super().forward(x, hidden=hidden)

"""U-Net generator of pix2pix and its encoder-decoder ablation (Isola et al. 2017, section 3.2 and appendix
6.1).

Level k halves the size to ngf * min(2^k, 8) channels with a 4x4 convolution and doubles it again on the way
up; a level returns the concatenation of its input and its result. State-dict keys are the nested ones of the
original release: `model.model.0`, `model.model.1.model.1`, ... In its code the in-place LeakyReLU at the head
of a level overwrites the skip; the parent's ReLU makes that the same function, ReLU(LeakyReLU(x)) = ReLU(x),
so nothing is overwritten here. As there: no norm on the outermost level nor on the innermost down
convolution, dropout on levels 4 to levels - 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgan.layers import Conv2d, ConvTranspose2d, norm_act, skip_idle_biases
from fastgan.models.resnet import output_layer
from fastgan.stack import run_layers, run_line, run_plain


class UnetBlock(nn.Module):
    """One level: [LeakyReLU], 4x4 stride 2, [norm], inner level, ReLU, transposed 4x4 stride 2, [norm,
    dropout].

    Args:
        outer: channels entering the level and, except outermost, leaving its up convolution.
        inner: channels between the two convolutions.
        inside: the next level, None for the innermost.
        outermost: activation-free entry and an output layer of `out_channels` instead of the concatenation.
        skips: concatenate input and result.
    """

    memory = "fast"

    def __init__(
        self,
        outer: int,
        inner: int,
        inside: UnetBlock | None,
        *,
        norm: str,
        dropout: bool = False,
        skips: bool = True,
        outermost: bool = False,
        in_channels: int | None = None,
        output: str = "tanh",
    ) -> None:
        super().__init__()
        self.outermost, self.skips = outermost, skips
        bias = norm == "instance"
        down = Conv2d(outer if in_channels is None else in_channels, inner, 4, 2, 1, bias=bias)
        wide = inner * 2 if inside is not None and skips else inner
        up = ConvTranspose2d(wide, outer, 4, 2, 1, bias=bias or outermost)
        head: list[nn.Module] = [] if outermost else [nn.LeakyReLU(0.2)]
        middle = [*norm_act(norm, inner)[:1]] if inside is not None and not outermost else []
        inner_level: list[nn.Module] = [] if inside is None else [inside]
        tail = [output_layer(output)] if outermost else norm_act(norm, outer)[:1]
        drop: list[nn.Module] = [nn.Dropout(0.5)] if dropout else []
        # the LeakyReLU must not work in place, its input is the skip; the ReLU may, its input is read by
        # nobody else
        self.model = nn.Sequential(
            *head, down, *middle, *inner_level, nn.ReLU(inplace=True), up, *tail, *drop
        )

    @staticmethod
    def stacked(blocks: Sequence[UnetBlock], x: Tensor) -> Tensor:
        """This level of several networks; see `fastgan.stack`."""
        y = run_layers([block.model for block in blocks], x, blocks[0].memory)
        return y if blocks[0].outermost or not blocks[0].skips else torch.cat([x, y], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, outer, H, W) to (N, 2 * outer, H, W); without skips or outermost: no concatenation."""
        y = run_plain(self.model, x, self.memory)
        return y if self.outermost or not self.skips else torch.cat([x, y], 1)


class UnetGenerator(nn.Module):
    """Image (N, in_channels, H, W), H and W multiples of 2^levels, to (N, out_channels, H, W) in the range of
    `output`.

    Args:
        in_channels, out_channels: any number.
        levels: halvings; 8 is the release's unet_256, 7 its unet_128.
        ngf: width of the first level.
        norm: "instance", "batch" or "none".
        dropout: dropout 0.5 on levels 4 to levels - 2.
        skips: False gives the encoder-decoder of the papers' ablation.
        output: "tanh" for images in [-1, 1], "sigmoid" for [0, 1].

    Raises:
        ValueError: fewer than 2 levels.
    """

    memory = "fast"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        levels: int = 8,
        ngf: int = 64,
        norm: str = "batch",
        dropout: bool = False,
        skips: bool = True,
        output: str = "tanh",
    ) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"UnetGenerator: levels must be at least 2, got {levels}")
        self.multiple = 2**levels
        widths = [ngf * min(2**k, 8) for k in range(levels)]
        block: UnetBlock | None = None
        for k in range(levels - 1, 0, -1):
            drop = dropout and 4 <= k <= levels - 2
            block = UnetBlock(widths[k - 1], widths[k], block, norm=norm, dropout=drop, skips=skips)
        self.model = UnetBlock(
            out_channels,
            ngf,
            block,
            norm=norm,
            skips=skips,
            outermost=True,
            in_channels=in_channels,
            output=output,
        )
        skip_idle_biases(self)

    @property
    def line(self) -> list[nn.Module]:
        """The layers one after the other; see `fastgan.stack`."""
        return [self.model]

    def forward(self, x: Tensor) -> Tensor:
        """Translate x; ValueError where the size is not a multiple of 2^levels."""
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple:
            size = tuple(x.shape[-2:])
            raise ValueError(
                f"UnetGenerator: height and width must be multiples of {self.multiple}, got {size}"
            )
        return run_line(self, x)

"""Networks of MUNIT (Huang, Liu, Belongie, Kautz, ECCV 2018, arXiv 1804.04732, appendix B): an autoencoder
per domain that takes an image apart into content and style, and discriminators at several scales.

    content = enc_content(x), style = enc_style(x), x = dec(content, mlp(style))

The perceptron turns a style into the bias and weight of every adaptive instance norm (AdaIN) of the decoder,
layer by layer, bias first. Both domains are one network with the parts `a` and `b`, so that state-dict keys
are those of the official files {"a": ..., "b": ...} with the letter in front: `a.enc_style.model.0.conv`,
`a.enc_content.model.3.model.0.model.1.conv`, `a.dec.model.0.model.0.model.0.norm.running_mean` (a buffer
without effect), `a.dec.model.2.norm.gamma`, `a.mlp.model.0.fc`; `a.cnns.0.0.conv` of the discriminators.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from fastgan_kernels import instance_norm_act
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.layers import ChannelLayerNorm, Conv2d, InstanceNorm2d, ReflectionPad2d
from fastgan.models.resnet import output_layer
from fastgan.stack import run_line, run_together

STYLE_LEVELS = 4  # halvings of the style encoder
LEAST = 2**STYLE_LEVELS  # pixels of a side that it takes


class AdaIN(nn.Module):
    """Instance norm whose bias and weight are given with every image; nothing of its own but the buffers of
    the official files, which have no effect."""

    def __init__(self, channels: int, act: str = "none") -> None:
        super().__init__()
        self.channels, self.act = channels, act
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, numbers: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(norm(x) * weight + bias + residual) of (N, C, H, W); numbers: (N, 2 C), the biases first."""
        bias, weight = numbers.chunk(2, 1)
        # a row of parameters for each image
        return instance_norm_act(x, weight, bias, residual, act=self.act)


class ConvBlock(nn.Module):
    """Reflection, convolution, norm, activation; the norm comes first among the keys, as upstream."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, *, norm: nn.Module | None = None,
        act: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        # halving an even side takes one pixel less than k - 1
        self.pad = ReflectionPad2d((kernel - 1) // 2)
        self.norm = nn.Identity() if norm is None else norm
        self.conv = Conv2d(cin, cout, kernel, stride)
        self.act = nn.Identity() if act is None else act
        # such a norm takes any constant of a channel out again
        self.conv.idle_bias = isinstance(norm, (InstanceNorm2d, AdaIN))

    @property
    def line(self) -> list[nn.Module]:
        """The layers one after the other; see `fastgan.stack`."""
        return [self.pad, self.conv, self.norm, self.act]

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) to (N, cout, H / stride, W / stride)."""
        return self.act(self.norm(self.conv(self.pad(x))))


class _Block(nn.Module):
    """x + f(x), f = 3x3, norm, ReLU, 3x3, norm."""

    def __init__(self, first: ConvBlock, second: ConvBlock) -> None:
        super().__init__()
        self.model = nn.Sequential(first, second)

    @property
    def halves(self) -> tuple[ConvBlock, ConvBlock]:
        """Both convolutions with what belongs to them."""
        first, second = self.model
        assert isinstance(first, ConvBlock) and isinstance(second, ConvBlock)
        return first, second


class ContentBlock(_Block):
    """A residual block with instance norm."""

    def __init__(self, channels: int) -> None:
        norms = InstanceNorm2d(channels, act="relu"), InstanceNorm2d(channels)
        super().__init__(*(ConvBlock(channels, channels, 3, norm=norm) for norm in norms))

    @property
    def residual_body(self) -> nn.Sequential:
        """What is added to the input; see `fastgan.stack`."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in and out."""
        first, second = self.halves
        return second.norm(second.conv(second.pad(first(x))), residual=x)


class StyleBlock(_Block):
    """A residual block with adaptive instance norm."""

    def __init__(self, channels: int) -> None:
        norms = AdaIN(channels, "relu"), AdaIN(channels)
        super().__init__(*(ConvBlock(channels, channels, 3, norm=norm) for norm in norms))

    def forward(self, x: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        """(N, C, H, W) in and out; numbers: those of both norms, (N, 2 C) each."""
        first, second = self.halves
        h = first.norm(first.conv(first.pad(x)), numbers[0])
        return second.norm(second.conv(second.pad(h)), numbers[1], residual=x)


class _Line(nn.Module):
    """Layers one after the other, under the name `model`."""

    memory = "fast"

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)

    @property
    def line(self) -> nn.Sequential:
        """The layers one after the other; see `fastgan.stack`."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        """x, (N, C, H, W), through all layers."""
        return run_line(self, x)


class StyleEncoder(_Line):
    """Image (N, channels, H, W) to (N, numbers, 1, 1); no norm, which would take colours out."""

    def __init__(self, channels: int, width: int, numbers: int) -> None:
        widths = [width, *(width * min(2**k, 4) for k in range(1, STYLE_LEVELS + 1))]
        blocks = [ConvBlock(channels, width, 7, act=nn.ReLU(inplace=True))]
        blocks += [ConvBlock(a, b, 4, 2, act=nn.ReLU(inplace=True)) for a, b in zip(widths, widths[1:])]
        super().__init__([*blocks, nn.AdaptiveAvgPool2d(1), Conv2d(widths[-1], numbers, 1)])


class ContentEncoder(_Line):
    """Image (N, channels, H, W) to (N, width * 2^levels, H / 2^levels, W / 2^levels)."""

    def __init__(self, channels: int, width: int, levels: int, blocks: int) -> None:
        layers: list[nn.Module] = [ConvBlock(channels, width, 7, norm=InstanceNorm2d(width, act="relu"))]
        for _ in range(levels):
            norm = InstanceNorm2d(2 * width, act="relu")
            layers.append(ConvBlock(width, 2 * width, 4, 2, norm=norm))
            width *= 2
        super().__init__([*layers, _Line([ContentBlock(width) for _ in range(blocks)])])


class _StyleBlocks(nn.Module):
    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(StyleBlock(channels) for _ in range(blocks)))

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        each = numbers.split(2 * x.shape[1], 1)
        for k, block in enumerate(self.model):
            x = block(x, each[2 * k : 2 * k + 2])
        return x


class Decoder(nn.Module):
    """Content and the numbers of all AdaIN layers to an image in the range of `output`."""

    memory = "fast"

    def __init__(self, channels: int, width: int, levels: int, blocks: int, output: str) -> None:
        super().__init__()
        wide = width * 2**levels
        self.numbers = blocks * 4 * wide
        layers: list[nn.Module] = [_StyleBlocks(wide, blocks)]
        for _ in range(levels):
            norm = ChannelLayerNorm(wide // 2, act="relu")
            layers += [nn.Upsample(scale_factor=2), ConvBlock(wide, wide // 2, 5, norm=norm)]
            wide //= 2
        self.model = nn.Sequential(*layers, ConvBlock(width, channels, 7, act=output_layer(output)))

    @property
    def line(self) -> list[nn.Module]:
        """The layers behind those with a style; see `fastgan.stack`."""
        return list(self.model)[1:]

    def forward(self, content: Tensor, numbers: Tensor) -> Tensor:
        """(N, C, h, w) and (N, numbers) to (N, channels, H, W)."""
        return run_line(self, self.model[0](content, numbers))


class _Linear(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(into, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class StyleMLP(nn.Module):
    """Style (N, numbers) to the numbers of all AdaIN layers."""

    def __init__(self, numbers: int, width: int, out: int) -> None:
        super().__init__()
        self.model = nn.Sequential(_Linear(numbers, width), _Linear(width, width), _Linear(width, out))

    def forward(self, style: Tensor) -> Tensor:
        """ReLU between the layers."""
        first, second, third = self.model
        return third(F.relu(second(F.relu(first(style)))))


class MUNITAutoencoder(nn.Module):
    """Takes images of one domain (N, channels, H, W) apart and makes them; H and W multiples of 2^levels.

    Args:
        channels: of the images.
        ngf: width after the first convolution.
        levels: halvings of the content. blocks: residual blocks of the content encoder, and of the decoder.
        style_size: numbers of a style. mlp_size: width of the perceptron.
        output: "tanh" for images in [-1, 1], "sigmoid" for [0, 1].
    """

    def __init__(
        self, channels: int, *, ngf: int = 64, levels: int = 2, blocks: int = 4, style_size: int = 8,
        mlp_size: int = 256, output: str = "tanh",
    ) -> None:  # fmt: skip
        super().__init__()
        self.enc_style = StyleEncoder(channels, ngf, style_size)
        self.enc_content = ContentEncoder(channels, ngf, levels, blocks)
        self.dec = Decoder(channels, ngf, levels, blocks, output)
        self.mlp = StyleMLP(style_size, mlp_size, self.dec.numbers)

    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        """(N, C, h, w) and (N, style_size) to (N, channels, H, W)."""
        return self.dec(content, self.mlp(style))

    def decode_each(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """`decode` of several batches of contents and styles, in one pass where their sizes allow it."""
        contents, styles = zip(*pairs)
        if len({content.shape[1:] for content in contents}) > 1:
            return [self.decode(*pair) for pair in pairs]
        return list(self.decode(torch.cat(contents), torch.cat(styles)).split([len(c) for c in contents]))

    def forward(self, x: Tensor) -> Tensor:
        """Both encoders, then the decoder."""
        return self.decode(self.enc_content(x), self.enc_style(x).flatten(1))


class MUNITGenerator(nn.Module):
    """The autoencoders `a` and `b` of both domains; they translate by exchanging contents.

    Args:
        channels_a, channels_b: of the images.
        settings: those of `MUNITAutoencoder`.
    """

    def __init__(self, channels_a: int = 3, channels_b: int = 3, **settings: int | str) -> None:
        super().__init__()
        self.style_size, self.multiple = (
            int(settings.get("style_size", 8)),
            2 ** int(settings.get("levels", 2)),
        )
        self.a = MUNITAutoencoder(channels_a, **settings)  # type: ignore[arg-type]
        self.b = MUNITAutoencoder(channels_b, **settings)  # type: ignore[arg-type]

    def encode(self, a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Contents and styles (N, style_size) of images of both domains."""
        content = run_together([(self.a.enc_content, [a]), (self.b.enc_content, [b])])
        style = run_together([(self.a.enc_style, [a]), (self.b.enc_style, [b])])
        return [found[0] for found in content], [found[0].flatten(1) for found in style]


class MUNITTranslator(nn.Module):
    """Images of one domain to those of the other, in a style.

    Args:
        net: both domains. source, target: "A" or "B".

    Attributes:
        style: (style_size,), taken where `forward` is given none; None: torch's generator draws one for each
            image.
    """

    style: Tensor | None

    def __init__(self, net: MUNITGenerator, source: str, target: str) -> None:
        super().__init__()
        self.style_size, self.multiple = net.style_size, net.multiple
        self.source, self.target = (getattr(net, domain.lower()) for domain in (source, target))
        self.register_buffer("style", None, persistent=False)

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """Translate x, (N, C, H, W), to a style, (style_size,) or (N, style_size); ValueError for a style of
        another size, or where a side of x is not a multiple of 2^levels."""
        style = self.style if style is None else style
        if style is None:
            # drawn on the host, so that one seed gives one style on every device
            style = torch.randn(len(x), self.style_size)
        if style.shape[-1] != self.style_size:
            size = tuple(style.shape)
            raise ValueError(f"MUNITTranslator: style must have {self.style_size} numbers, got {size}")
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple:
            rule, size = f"multiples of {self.multiple}", tuple(x.shape[-2:])
            raise ValueError(f"MUNITTranslator: height and width must be {rule}, got {size}")
        style = style.to(x).expand(len(x), -1)
        return self.target.decode(self.source.enc_content(x), style)

    def style_of(self, x: Tensor) -> Tensor:
        """Styles (N, style_size) of images (N, C, H, W) of the target domain; ValueError below 16 pixels."""
        if min(x.shape[2:]) < LEAST:
            size = tuple(x.shape[2:])
            raise ValueError(
                f"MUNITTranslator: a style is that of {LEAST}x{LEAST} pixels or more, got {size}"
            )
        return self.target.enc_style(x).flatten(1)


class _Scale(nn.Sequential):
    """Image to a map of logits; the layers have no name of their own."""

    memory = "fast"

    @property
    def line(self) -> list[nn.Module]:
        """The layers one after the other; see `fastgan.stack`."""
        return list(self)

    def forward(self, x: Tensor) -> Tensor:
        return run_line(self, x)


class MultiScaleDiscriminator(nn.Module):
    """Image (N, channels, H, W) to a map of logits at every scale, each half as large as the one before.

    Args:
        channels: of the images. ndf: width of the first layer.
        levels: halvings, each doubling the width. scales: how many.
    """

    def __init__(self, channels: int, *, ndf: int = 64, levels: int = 4, scales: int = 3) -> None:
        super().__init__()
        widths = [channels, *(ndf * 2**k for k in range(levels))]
        self.cnns = nn.ModuleList(
            _Scale(
                *(
                    ConvBlock(a, b, 4, 2, act=nn.LeakyReLU(0.2, inplace=True))
                    for a, b in zip(widths, widths[1:])
                ),
                Conv2d(widths[-1], 1, 1),
            )
            for _ in range(scales)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps, (N, 1, h, w), from the largest scale on."""
        return [cnn(image) for cnn, image in zip(self.cnns, pyramid(x, len(self.cnns)))]


def pyramid(x: Tensor, scales: int) -> Iterator[Tensor]:
    """Images (N, C, H, W) at so many scales: 3x3 means, every second pixel, without what lies outside."""
    for k in range(scales):
        if k:
            x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        yield x


class MUNITDiscriminator(nn.Module):
    """The discriminators `a` and `b` of both domains; settings: those of `MultiScaleDiscriminator`."""

    def __init__(self, channels_a: int = 3, channels_b: int = 3, **settings: int) -> None:
        super().__init__()
        self.a = MultiScaleDiscriminator(channels_a, **settings)
        self.b = MultiScaleDiscriminator(channels_b, **settings)

    def judge(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[list[list[Tensor]]]:
        """Logits [domain][batch][scale] of batches of images of A and of B, in as few passes as compute the
        same."""
        shown = [[pyramid(x, len(self.a.cnns)) for x in batches] for batches in (a, b)]
        found: list[list[list[Tensor]]] = [[[] for _ in batches] for batches in shown]
        for cnns in zip(self.a.cnns, self.b.cnns):
            calls = [(cnn, [next(x) for x in batches]) for cnn, batches in zip(cnns, shown)]
            for mine, maps in zip(found, run_together(calls)):
                for of_batch, one in zip(mine, maps):
                    of_batch.append(one)
        return found

"""The least work of a training step, counted by hand: multiplications and bytes of every convolution.

A step cannot be faster than its FLOP at the matrix-product ceiling, nor than its bytes at that of a copy.
Bytes are those of bfloat16 activations and weights with float32 master weights, each tensor moved once per
pass that needs it; the weights of a network are read once per launch. Norms, activations, padding and
residual adds are free in the floor of a step; "passes" is what they cost where the statistics come out of the
convolution and one pass forward and two backward do the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HALF, FULL = 2, 4
# Adam: three float32 tensors read and written, a float32 gradient read, the bfloat16 weight written
ADAM_BYTES = 6 * FULL + FULL + HALF


@dataclass(frozen=True)
class Layer:
    """A convolution of square images, `size` pixels in and `out` pixels out, that occurs `count` times."""

    name: str
    size: int
    out: int
    inputs: int
    outputs: int
    kernel: int
    norm: bool = True
    transposed: bool = False
    count: int = 1

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2

    @property
    def macs(self) -> int:
        """Of one image in one pass: every weight at each place of the image that the kernel walks over."""
        return (self.size if self.transposed else self.out) ** 2 * self.weights

    @property
    def read(self) -> int:
        """Bytes of an image that goes in."""
        return self.size**2 * self.inputs * HALF

    @property
    def written(self) -> int:
        """Bytes of an image that comes out."""
        return self.out**2 * self.outputs * HALF


Net = Sequence[Layer]


@dataclass(frozen=True)
class Work:
    """FLOP of the convolutions; bytes of the convolutions, of the passes between and of the optimiser."""

    flop: int
    conv_bytes: int
    pass_bytes: int
    adam_bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flop + other.flop,
            self.conv_bytes + other.conv_bytes,
            self.pass_bytes + other.pass_bytes,
            self.adam_bytes + other.adam_bytes,
        )

    def __mul__(self, times: int) -> Work:
        return Work(
            times * self.flop, times * self.conv_bytes, times * self.pass_bytes, times * self.adam_bytes
        )

    def seconds(self, flop_per_second: float, bytes_per_second: float) -> dict[str, float]:
        """The floor of each part alone, and of the step: all FLOP, or all bytes that cannot be avoided."""
        flop, conv = self.flop / flop_per_second, self.conv_bytes / bytes_per_second
        adam, passes = self.adam_bytes / bytes_per_second, self.pass_bytes / bytes_per_second
        return {
            "convolutions": max(flop, conv),
            "passes": passes,
            "optimiser": adam,
            "step": max(flop, conv + adam),
        }


def resnet(size: int, ngf: int, blocks: int) -> list[Layer]:
    """The ResNet generator; its residual blocks work at a quarter of the size."""
    half, quarter = size // 2, size // 4
    return [
        Layer("7x7 in", size, size, 3, ngf, 7),
        Layer("3x3/2 a", size, half, ngf, 2 * ngf, 3),
        Layer("3x3/2 b", half, quarter, 2 * ngf, 4 * ngf, 3),
        Layer("residual 3x3", quarter, quarter, 4 * ngf, 4 * ngf, 3, count=2 * blocks),
        Layer("3x3*2 b", quarter, half, 4 * ngf, 2 * ngf, 3, transposed=True),
        Layer("3x3*2 a", half, size, 2 * ngf, ngf, 3, transposed=True),
        Layer("7x7 out", size, size, ngf, 3, 7, norm=False),
    ]


def patchgan(size: int, channels: int, ndf: int) -> list[Layer]:
    """The 70x70 PatchGAN."""
    a, b, c = size // 2, size // 4, size // 8
    return [
        Layer("4x4/2 a", size, a, channels, ndf, 4, norm=False),
        Layer("4x4/2 b", a, b, ndf, 2 * ndf, 4),
        Layer("4x4/2 c", b, c, 2 * ndf, 4 * ndf, 4),
        Layer("4x4 d", c, c - 1, 4 * ndf, 8 * ndf, 4),
        Layer("4x4 e", c - 1, c - 2, 8 * ndf, 1, 4, norm=False),
    ]


def unet(size: int, ngf: int, levels: int) -> list[Layer]:
    """The U-Net generator; on the way up, every level but the innermost reads its skip too."""
    widths = [3] + [ngf * min(2**k, 8) for k in range(levels)]
    down = [
        Layer(
            f"down {k + 1}", size >> k, size >> (k + 1), widths[k], widths[k + 1], 4, norm=0 < k < levels - 1
        )
        for k in range(levels)
    ]
    up = [
        Layer(
            f"up {k + 1}", size >> (k + 1), size >> k, widths[k + 1] * (1 if k == levels - 1 else 2),
            widths[k], 4, norm=k > 0, transposed=True,
        )
        for k in reversed(range(levels))
    ]  # fmt: skip
    return down + up


def parameters(net: Iterable[Layer]) -> int:
    """Weights without biases and norms, which are less than a thousandth."""
    return sum(layer.weights * layer.count for layer in net)


def forward(net: Net, images: int) -> Work:
    """A pass of `images` through a network in one launch per layer."""
    flop = conv = passes = 0
    for layer in net:
        flop += 2 * layer.macs * images * layer.count
        conv += (images * (layer.read + layer.written) + HALF * layer.weights) * layer.count
        # normalise: what the convolution wrote is read and written once more
        passes += images * 2 * layer.written * layer.norm * layer.count
    return Work(flop, conv, passes, 0)


def backward(net: Net, images: int, *, weights: bool, to_input: bool) -> Work:
    """Its gradients: of the weights or not, and of the images that came in or not."""
    flop = conv = passes = 0
    for place, layer in enumerate(net):
        moved = images * (layer.read + layer.written)
        if to_input or place:
            flop += 2 * layer.macs * images * layer.count
            conv += (moved + HALF * layer.weights) * layer.count
        if weights:
            flop += 2 * layer.macs * images * layer.count
            conv += (moved + FULL * layer.weights) * layer.count
        # a pass for the two sums (gradient and input of the norm), one that writes the gradient
        passes += images * 5 * layer.written * layer.norm * layer.count
    return Work(flop, conv, passes, 0)


def update(*nets: Net) -> Work:
    """One Adam step of networks."""
    return Work(0, 0, 0, ADAM_BYTES * sum(parameters(net) for net in nets))


def cyclegan_step(size: int, ngf: int, ndf: int, blocks: int) -> Work:
    """Batch 1 with identity loss: per generator a translation and an identity image, then a cycle image; per
    discriminator one fake for the generators, then a real and a fake image of its own step."""
    g, d = resnet(size, ngf, blocks), patchgan(size, 3, ndf)
    one = forward(g, 2) + backward(g, 2, weights=True, to_input=False)
    one += forward(g, 1) + backward(g, 1, weights=True, to_input=True)
    one += forward(d, 1) + backward(d, 1, weights=False, to_input=True)
    one += forward(d, 2) + backward(d, 2, weights=True, to_input=False)
    return (one + update(g, d)) * 2


def pix2pix_step(size: int, ngf: int, ndf: int, levels: int) -> Work:
    """Batch 1: a translation; a real and a fake pair for the discriminator, the fake one for G."""
    g, d = unet(size, ngf, levels), patchgan(size, 6, ndf)
    work = forward(g, 1) + backward(g, 1, weights=True, to_input=False)
    work += forward(d, 2) + backward(d, 2, weights=True, to_input=False)
    work += forward(d, 1) + backward(d, 1, weights=False, to_input=True)
    return work + update(g, d)

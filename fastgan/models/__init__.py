"""Network families, one file each; state-dict keys are those of the original release."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.discogan import DiscoGANDiscriminator, DiscoGANGenerator
from fastgan.models.features import FeatureDiscriminator
from fastgan.models.init import init_weights
from fastgan.models.munit import MUNITGenerator
from fastgan.models.pan import PANDiscriminator, PANGenerator
from fastgan.models.patchgan import PatchDiscriminator
from fastgan.models.resnet import ResnetGenerator
from fastgan.models.srgan import SRCNN, SRGANDiscriminator, SRResNet
from fastgan.models.stargan import StarGANDiscriminator, StarGANGenerator
from fastgan.models.unet import UnetGenerator

GENERATORS = ("resnet", "unet", "encdec", "stargan", "discogan", "pan", "munit", "srresnet", "srcnn")
__all__ = [
    "GENERATORS",
    "DiscoGANDiscriminator",
    "DiscoGANGenerator",
    "FeatureDiscriminator",
    "MUNITGenerator",
    "PANDiscriminator",
    "PANGenerator",
    "PatchDiscriminator",
    "ResnetGenerator",
    "SRCNN",
    "SRGANDiscriminator",
    "SRResNet",
    "StarGANDiscriminator",
    "StarGANGenerator",
    "UnetGenerator",
    "build",
    "init_weights",
    "missing_pixels",
    "translate_any_size",
]


def build(description: Mapping[str, Any]) -> nn.Module:
    """A network from what `fastgan.models.describe` read off a file: "network" and keyword arguments.

    Raises:
        ValueError: unknown network.
    """
    kwargs = dict(description)
    kind = kwargs.pop("network", None)
    if kind == "resnet":
        return ResnetGenerator(**kwargs)
    if kind in ("unet", "encdec"):
        return UnetGenerator(**kwargs, skips=kind == "unet")
    if kind == "stargan":
        return StarGANGenerator(**kwargs)
    if kind == "stargan-d":
        return StarGANDiscriminator(**kwargs)
    if kind == "discogan":
        return DiscoGANGenerator(**kwargs)
    if kind == "pan":
        return PANGenerator(**kwargs)
    if kind == "munit":
        return MUNITGenerator(**kwargs)
    if kind == "srresnet":
        return SRResNet(**kwargs)
    if kind == "srcnn":
        return SRCNN(**kwargs)
    if kind == "patchgan":
        return PatchDiscriminator(**kwargs)
    raise ValueError(f"build: network must be {', '.join(GENERATORS)} or patchgan, got {kind}")


def translate_any_size(net: nn.Module, x: Tensor, *given: Tensor) -> Tensor:
    """Apply a generator to (N, C, H, W) of any size: pad bottom and right to what it divides, crop back to
    the size, `net.scale` times as large where it has one. given: what it takes besides, such as labels."""
    h, w = x.shape[-2:]
    bottom, right, mode = missing_pixels(net, h, w)
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode=mode)
    scale = int(getattr(net, "scale", 1))
    return net(x, *given)[..., : scale * h, : scale * w]


def missing_pixels(net: nn.Module, h: int, w: int) -> tuple[int, int, str]:
    """Rows and columns that an image of h x w lacks for a generator, and how to pad them: "reflect" or
    "replicate"."""
    multiple = int(getattr(net, "multiple", 1))
    # a ResNet reflects one pixel at a quarter of the size: below 8 pixels there is nothing to reflect
    bottom, right = (max(-(-s // multiple) * multiple, min(8, 2 * multiple)) - s for s in (h, w))
    return bottom, right, "reflect" if bottom < h and right < w else "replicate"

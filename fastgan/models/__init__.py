"""Network families, one file each; state-dict keys are those of the original release."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.models.init import init_weights
from fastgan.models.patchgan import PatchDiscriminator
from fastgan.models.resnet import ResnetGenerator
from fastgan.models.stargan import StarGANGenerator
from fastgan.models.unet import UnetGenerator

GENERATORS = ("resnet", "unet", "encdec", "stargan")
__all__ = [
    "GENERATORS",
    "PatchDiscriminator",
    "ResnetGenerator",
    "StarGANGenerator",
    "UnetGenerator",
    "build",
    "init_weights",
    "translate_any_size",
]


def build(description: Mapping[str, Any]) -> nn.Module:
    """A network from what `fastgan.checkpoint.describe` read off a file: "network" and keyword arguments.

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
    if kind == "patchgan":
        return PatchDiscriminator(**kwargs)
    raise ValueError(f"build: network must be {', '.join(GENERATORS)} or patchgan, got {kind}")


def translate_any_size(net: nn.Module, x: Tensor) -> Tensor:
    """Apply a generator to (N, C, H, W) of any size: pad bottom and right to what it divides, crop back."""
    multiple = int(getattr(net, "multiple", 1))
    h, w = x.shape[-2:]
    # a ResNet reflects one pixel at a quarter of the size: below 8 pixels there is nothing to reflect
    need = [max(-(-s // multiple) * multiple, min(8, 2 * multiple)) - s for s in (h, w)]
    if any(need):
        mode = "reflect" if need[0] < h and need[1] < w else "replicate"
        x = F.pad(x, (0, need[1], 0, need[0]), mode=mode)
    return net(x)[..., :h, :w]

"""Network families, one file each; state-dict keys are those of the original release."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastgan.models.init import init_weights
from fastgan.models.patchgan import PatchDiscriminator
from fastgan.models.resnet import ResnetGenerator
from fastgan.models.unet import UnetGenerator

__all__ = ["PatchDiscriminator", "ResnetGenerator", "UnetGenerator", "build", "init_weights"]


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
    if kind == "patchgan":
        return PatchDiscriminator(**kwargs)
    raise ValueError(f"build: network must be resnet, unet, encdec or patchgan, got {kind}")

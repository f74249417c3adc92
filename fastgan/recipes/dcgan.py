"""DCGAN (Radford, Metz, Chintala 2016, arXiv 1511.06434): images from noise, strided convolutions only.

`faces` is the small 64x64 pair of a Keras tutorial, with Keras' Adam and Glorot weights. Where paper and
public code differ, widths (1024 to 128) and uniform noise are the paper's, the kernels the 4x4 of public
code, which double a size exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastgan import config as settings
from fastgan.recipes.noise import NoiseConfig, NoiseRecipe


@dataclass(frozen=True)
class DCGANConfig(NoiseConfig):
    """Settings of DCGAN (section 4 of the paper)."""

    noise: Literal["normal", "uniform"] = "uniform"  # distribution of the noise; uniform is in [-1, 1]
    ngf: int = 128  # width of the generator before its last layer
    ndf: int = 128  # width of the discriminator's first layer
    flip: bool = False  # mirror left-right at random
    batch_size: int = 128  # images per update and process


class DCGAN(NoiseRecipe):
    """Settings; the losses are those of every system from noise."""

    name: ClassVar[str] = "dcgan"
    title: ClassVar[str] = "DCGAN"
    config_class: ClassVar[type[settings.Config]] = DCGANConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "faces": {
            "architecture": "faces", "ngf": 16, "ndf": 16, "noise": "normal", "init": "xavier",
            "init_gain": 1.0, "beta1": 0.9, "batch_size": 32,
        },
        # a slow D and an averaged G: with equal rates it collapses before it learns
        "digits": {
            "ngf": 32, "ndf": 32, "noise": "normal", "noise_size": 32, "lr": 5e-4, "lr_d": 1e-4, "ema": 0.99,
            "batch_size": 32, "epochs": 60, "load_size": 32, "crop_size": 32, "log_every": 50,
            "sample_every": 450, "save_every": 450,
        },
    }  # fmt: skip

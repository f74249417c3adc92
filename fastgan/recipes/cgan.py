"""Conditional GAN (Mirza, Osindero 2014, arXiv 1411.1784): G and D both know the label of the image.

Fakes are made and judged under the labels of the real batch. Networks, dropout and uniform noise are those of
section 4.1; its SGD with growing momentum is replaced by the Adam of public code. `conv` has DCGAN's networks
with the label beside the noise, and in constant planes beside the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastgan import config as settings
from fastgan.config import UsageError
from fastgan.recipes.noise import NoiseConfig, NoiseRecipe


@dataclass(frozen=True)
class CGANConfig(NoiseConfig):
    """Settings of the conditional GAN."""

    architecture: Literal["dcgan", "faces", "mlp"] = "mlp"  # networks; faces are 64x64
    noise: Literal["normal", "uniform"] = "uniform"  # distribution of the noise; uniform is in [-1, 1]
    dropout: bool = True  # dropout in both networks (mlp)
    output: Literal["tanh", "sigmoid"] = "sigmoid"  # last activation; images are in [-1, 1] or [0, 1] with it
    flip: bool = False  # mirror left-right at random
    load_size: int = 28  # size in pixels an image is resized to
    crop_size: int = 28  # size in pixels of the random crop, and of the generated images
    batch_size: int = 100  # images per update and process

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        if self.pool_size:
            raise UsageError("--pool-size must be 0: a stored image would lose its label")


class CGAN(NoiseRecipe):
    """Settings; the losses are those of every system from noise."""

    name: ClassVar[str] = "cgan"
    title: ClassVar[str] = "Conditional GAN"
    config_class: ClassVar[type[settings.Config]] = CGANConfig
    labelled: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "conv": {
            "architecture": "dcgan", "noise": "normal", "output": "tanh", "load_size": 64, "crop_size": 64,
            "batch_size": 64,
        },
        "digits": {
            "architecture": "dcgan", "ngf": 16, "ndf": 16, "noise": "normal", "noise_size": 64,
            "output": "tanh", "lr": 5e-4, "ema": 0.99, "batch_size": 32, "epochs": 27, "load_size": 32,
            "crop_size": 32, "log_every": 50, "sample_every": 300, "save_every": 300,
        },
    }  # fmt: skip

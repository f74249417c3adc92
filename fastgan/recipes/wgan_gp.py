"""WGAN with a gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028):
a critic that is held to a slope of 1 instead of clipped.

Algorithm 1: five updates of the critic in a step, penalty 10 at points between real and generated images,
Adam with betas 0 and 0.9. The penalty is per image, so the critic has layer norm, not batch norm (section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastgan import config as settings
from fastgan.recipes.noise import NoiseConfig, NoiseRecipe


@dataclass(frozen=True)
class WGANGPConfig(NoiseConfig):
    """Settings of algorithm 1."""

    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "wgan-gp"  # adversarial loss
    norm_d: Literal["batch", "instance", "layer", "none"] = "layer"  # normalisation of the discriminator
    lr: float = 1e-4  # learning rate of G
    beta1: float = 0.0  # Adam
    beta2: float = 0.9  # Adam
    n_critic: int = 5  # updates of D in a step, each on a batch of its own


class WGANGP(NoiseRecipe):
    """Settings; the losses are those of every system from noise."""

    name: ClassVar[str] = "wgan-gp"
    title: ClassVar[str] = "WGAN-GP"
    config_class: ClassVar[type[settings.Config]] = WGANGPConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "digits": {
            "ngf": 16, "ndf": 16, "noise_size": 64, "norm_d": "none", "lr": 1e-3, "n_critic": 3, "ema": 0.99,
            "batch_size": 32, "epochs": 100, "epochs_decay": 60, "lr_policy": "linear", "load_size": 32,
            "crop_size": 32, "log_every": 50, "sample_every": 300, "save_every": 300,
        },
    }  # fmt: skip

"""Wasserstein GAN (Arjovsky, Chintala, Bottou 2017, arXiv 1701.07875): a critic with clipped weights.

Algorithm 1: RMSProp, five updates of the critic in a step. The critic's loss, E f(fake) - E f(real), is a
curve of the page and follows the quality of the images; `distance` is its negative, the estimate of the
distance. The longer critic phases of the authors' code (100 updates in its first 25 steps and every 500th)
are not in the paper and not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastgan import config as settings
from fastgan.recipes.noise import NoiseConfig, NoiseRecipe


@dataclass(frozen=True)
class WGANConfig(NoiseConfig):
    """Settings of algorithm 1."""

    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "wgan"  # adversarial loss
    optimizer: Literal["adam", "rmsprop"] = "rmsprop"  # momentum makes a clipped critic unsteady
    lr: float = 5e-5  # learning rate of G
    n_critic: int = 5  # updates of D in a step, each on a batch of its own


class WGAN(NoiseRecipe):
    """Settings; the losses are those of every system from noise."""

    name: ClassVar[str] = "wgan"
    title: ClassVar[str] = "WGAN"
    config_class: ClassVar[type[settings.Config]] = WGANConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "digits": {
            # rates and the limit of the weights in the paper's proportion, ten times as large; a batch norm
            # has a weight too, which the limit would fix
            "ngf": 32, "ndf": 16, "noise_size": 64, "norm_d": "none", "lr": 1e-3, "lr_d": 5e-4, "clip": 0.1,
            "n_critic": 3, "ema": 0.99, "batch_size": 32, "epochs": 150, "epochs_decay": 120,
            "lr_policy": "linear", "load_size": 32, "crop_size": 32, "log_every": 50, "sample_every": 500,
            "save_every": 500,
        },
    }  # fmt: skip

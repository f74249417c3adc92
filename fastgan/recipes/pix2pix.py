"""pix2pix (Isola, Zhu, Zhou, Efros 2017, arXiv 1611.07004): one generator, a discriminator of (input, output)
pairs.

The discriminator is updated first; the generator then uses the same fakes and the updated discriminator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgan import config as settings
from fastgan import losses
from fastgan.models import PatchDiscriminator
from fastgan.recipes.base import (
    Batch,
    Direction,
    Nets,
    Terms,
    Trial,
    judge,
    make_discriminator,
    make_generator,
    score,
    unfit_translator,
)


@dataclass(frozen=True)
class Pix2PixConfig(settings.Config):
    """Settings of pix2pix; where they differ from CycleGAN's they are upstream's."""

    generator: Literal["resnet", "unet", "encdec"] = "unet"  # network of the generator
    norm: Literal["instance", "batch", "none"] = "batch"  # normalisation of both networks
    dropout: bool = True  # dropout in the generator, the only noise of this system
    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "vanilla"  # adversarial loss
    pool_size: int = 0  # history of generated images that D is shown
    lambda_L1: float = 100.0  # weight of the L1 distance to the true image


class Pix2Pix:
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "pix2pix"
    title: ClassVar[str] = "pix2pix"
    config_class: ClassVar[type[settings.Config]] = Pix2PixConfig
    paired: ClassVar[bool] = True
    domains: ClassVar[tuple[str, ...]] = ("A", "B")
    labelled: ClassVar[bool] = False
    noise: ClassVar[dict[str, int]] = {}
    order: ClassVar[Literal["g-first", "d-first"]] = "d-first"
    generators: ClassVar[tuple[str, ...]] = ("G",)
    discriminators: ClassVar[tuple[str, ...]] = ("D",)
    directions: ClassVar[dict[str, Direction]] = {"AtoB": Direction("G", "A", "B")}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # section 6.2 of the paper: batch 4 and no jitter for the large edge sets
        "edges": {
            "batch_size": 4, "epochs": 15, "epochs_decay": 0, "lr_policy": "constant", "load_size": 256,
            "flip": False,
        },
        "digits": {
            "levels": 5, "ngf": 32, "ndf": 32, "patch": 34, "dropout": False, "batch_size": 16, "epochs": 6,
            "epochs_decay": 5, "load_size": 32, "crop_size": 32, "flip": False, "log_every": 25,
            "sample_every": 200, "save_every": 200,
        },
    }  # fmt: skip

    def __init__(self, config: Pix2PixConfig) -> None:
        self.config = config

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G (A to B) and D (judges A and B stacked along the channels)."""
        return {
            "G": make_generator(self.config, channels_a, channels_b),
            "D": make_discriminator(self.config, channels_a + channels_b),
        }

    def unfit(self, height: int, width: int) -> str:
        """See `unfit_translator`."""
        return unfit_translator(self.config, height, width)

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"B": G(A)}."""
        return {"B": nets["G"](batch["A"])}

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """The network of that name."""
        return nets[way.net]

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Adversarial loss of (A, G(A)) and L1 to the true B (equation 4)."""
        pair = torch.cat([batch["A"], fakes["B"].to(batch["A"].dtype)], 1)
        terms = {
            "G_GAN": losses.generator_gan(nets["D"](pair), self.config.gan_mode),
            "G_L1": self.config.lambda_L1 * losses.l1(fakes["B"], batch["B"]),
        }
        return terms["G_GAN"] + terms["G_L1"], {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """D on the true pair and on the generated one. Fakes from a history pool bring their own A under
        "A"."""
        a, b, fake = batch["A"], batch["B"], fakes["B"].detach()
        pairs = torch.cat([a, b], 1), torch.cat([fakes.get("A", a), fake.to(a.dtype)], 1)
        trials = [Trial(nets["D"], *pairs, "D")]
        critic = nets["D"]
        watched = critic._forward_hooks or critic._forward_pre_hooks
        if "A" in fakes or self.config.gan_mode == "wgan-gp" or watched:
            return judge(self.config, trials)
        if not isinstance(critic, PatchDiscriminator):
            return judge(self.config, trials)
        return score(self.config, trials, [critic.compare(a, [b, fake.to(b.dtype)])])

"""What the systems share that make images from noise, with or without a label: settings, networks, losses.

The discriminator is updated first; the generator then uses the noise and the fakes of its last batch. Real
and generated images are always judged apart, as each has batch statistics of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgan import config as settings
from fastgan import losses
from fastgan.config import UsageError, flag
from fastgan.layers import spectral_norm
from fastgan.models import init_weights
from fastgan.models.dcgan import (
    DCGANDiscriminator,
    DCGANGenerator,
    FaceDiscriminator,
    FaceGenerator,
    MaxoutDiscriminator,
    MLPGenerator,
    doublings,
)
from fastgan.recipes.base import Batch, Direction, Nets, Terms, Trial, score

# of translators alone
IDLE = ("generator", "blocks", "levels", "patch", "padding", "channels_b", "direction", "range_b")


@dataclass(frozen=True)
class NoiseConfig(settings.Config):
    """Settings of the systems that make images from noise."""

    architecture: Literal["dcgan", "faces", "mlp"] = "dcgan"  # networks; faces are 64x64
    noise: Literal["normal", "uniform"] = "normal"  # distribution of the noise; uniform is in [-1, 1]
    noise_size: int = 100  # numbers of noise for an image
    norm: Literal["instance", "batch", "none"] = "batch"  # normalisation of the generator
    norm_d: Literal["batch", "instance", "layer", "none"] = "batch"  # normalisation of the discriminator
    spectral_norm: bool = False  # divide the weights of D by their largest singular value
    minibatch_std: bool = False  # show D how much the images of a batch differ (dcgan networks)
    attributes: tuple[str, ...] = ()  # columns of list_attr*.txt that make the label; default: all
    load_size: int = 64  # size in pixels an image is resized to
    crop_size: int = 64  # size in pixels of the random crop, and of the generated images
    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "vanilla"  # adversarial loss
    pool_size: int = 0  # history of generated images that D is shown
    batch_size: int = 64  # images per update and process
    epochs: int = 25  # epochs at the full learning rate
    epochs_decay: int = 0  # epochs of decay after that (linear)
    lr_policy: Literal["linear", "cosine", "step", "constant"] = "constant"  # learning-rate schedule

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        for key in IDLE:
            if getattr(self, key) != getattr(settings.Config, key):
                raise UsageError(f"{flag(key)} has no effect here: it is for translation; leave it out")
        if self.noise_size < 1:
            raise UsageError(f"--noise-size must be at least 1, got {self.noise_size}")
        if "crop" not in self.preprocess:
            raise UsageError(f"--preprocess {self.preprocess}: images must be cropped to one size")
        if self.architecture == "faces" and self.crop_size != 64:
            raise UsageError(f"--architecture faces makes images of --crop-size 64, got {self.crop_size}")
        if self.architecture == "dcgan":
            try:
                doublings(self.crop_size)
            except ValueError:
                rule = "--crop-size 8, 16, 32, 64 ..."
                raise UsageError(f"--architecture dcgan needs {rule}, got {self.crop_size}") from None
        elif self.minibatch_std:
            raise UsageError("--minibatch-std needs --architecture dcgan")


class NoiseRecipe:
    """Pure loss functions of G(z) or G(z, label) against D; see `fastgan.recipes.base.Recipe`."""

    paired: ClassVar[bool] = False
    domains: ClassVar[tuple[str, ...]] = ("A",)
    labelled: ClassVar[bool] = False
    order: ClassVar[Literal["g-first", "d-first"]] = "d-first"
    generators: ClassVar[tuple[str, ...]] = ("G",)
    discriminators: ClassVar[tuple[str, ...]] = ("D",)
    directions: ClassVar[dict[str, Direction]] = {}

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def noise(self) -> dict[str, int]:
        """{"z": numbers for an image}."""
        return {"z": self.config.noise_size}

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G (noise to A) and D (judges A); both know the label of channels_b numbers where there is one."""
        c, numbers, labels = self.config, self.config.noise_size, channels_b if self.labelled else 0
        dropout = 0.5 if c.dropout else 0.0
        g: nn.Module
        d: nn.Module
        if c.architecture == "dcgan":
            g = DCGANGenerator(
                numbers, channels_a, size=c.crop_size, ngf=c.ngf, norm=c.norm, labels=labels, output=c.output
            )
            d = DCGANDiscriminator(
                channels_a, size=c.crop_size, ndf=c.ndf, norm=c.norm_d, labels=labels,
                minibatch_std=c.minibatch_std,
            )  # fmt: skip
        elif c.architecture == "faces":
            g = FaceGenerator(numbers, channels_a, ngf=c.ngf, labels=labels, output=c.output)
            d = FaceDiscriminator(channels_a, ndf=c.ndf, labels=labels)
        else:
            g = MLPGenerator(
                numbers, channels_a, size=c.crop_size, labels=labels, output=c.output, dropout=dropout
            )
            d = MaxoutDiscriminator(channels_a, size=c.crop_size, labels=labels, dropout=dropout)
        for net in (g, d):
            init_weights(net, c.init, c.init_gain)
        return {"G": g, "D": spectral_norm(d) if c.spectral_norm else d}

    def unfit(self, height: int, width: int) -> str:
        """Images have the size of the generated ones."""
        size = self.config.crop_size
        return "" if height == width == size else f"the generated ones are of --crop-size {size}"

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"A": G(z)}, of the batch's "z", and of its "label" where the system is labelled."""
        z = batch["z"]
        if self.config.noise == "uniform":
            # the distribution function of the normal numbers, scaled to [-1, 1]
            z = torch.erf(z * 0.5**0.5)
        return {"A": nets["G"](z, batch["label"]) if self.labelled else nets["G"](z)}

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """None: images come from noise."""
        raise ValueError(f"{type(self).__name__} does not translate")

    def _critic(self, nets: Nets, batch: Batch) -> Any:
        return partial(nets["D"], label=batch["label"]) if self.labelled else nets["D"]

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """What D says of the fakes."""
        verdict = self._critic(nets, batch)(fakes["A"].to(batch["A"].dtype))
        loss = losses.generator_gan(verdict, self.config.gan_mode)
        return loss, {"G": loss.detach()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """D on real images and on fakes under the same labels; of a critic also its distance of the two."""
        critic, real = self._critic(nets, batch), batch["A"]
        fake = fakes["A"].detach().to(real.dtype)
        loss, terms = score(self.config, [Trial(critic, real, fake, "D")], [(critic(real), critic(fake))])
        if self.config.gan_mode in ("wgan", "wgan-gp"):
            terms["distance"] = terms["D_real"] - terms["D_fake"]
        return loss, terms

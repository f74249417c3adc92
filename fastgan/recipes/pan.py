"""PAN (Wang, Xu, Wang, Tao 2018, arXiv 1706.09138): the generator's perceptual loss is the
distance of D's own hidden features; D is trained to make it large, up to a margin.

The discriminator is updated first and sees B alone; the generator then uses the same fakes and the updated
discriminator. There is no official code, the paper is followed; except that G minimises -log D(G(x)), which
has a gradient where D is sure, instead of log(1 - D(G(x))). Public ports add a pixel loss (`--lambda-L1 25`),
or show D the input beside the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import config as settings
from fastgan import losses
from fastgan.config import UsageError
from fastgan.models import PANDiscriminator, PANGenerator, init_weights
from fastgan.models.pan import HALVED
from fastgan.recipes.base import Batch, Nets, Terms, Trial, refuse_idle, score
from fastgan.recipes.pix2pix import Pix2Pix


@dataclass(frozen=True)
class PANConfig(settings.Config):
    """Settings of PAN, those of the paper."""

    levels: int = 6  # halvings of the generator
    norm: Literal["instance", "batch", "none"] = "batch"  # normalisation of both networks
    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "vanilla"  # adversarial loss
    d_real_weight: float = 1.0  # weight of the real half of D's loss
    d_fake_weight: float = 1.0  # weight of the fake half of D's loss
    pool_size: int = 0  # history of generated images that D is shown
    batch_size: int = 4  # images per domain, update and process
    lambda_gan: float = 1.0  # weight of the verdict
    lambda_perceptual: tuple[float, float, float, float] = (5.0, 1.5, 1.5, 1.0)  # of D's layers 1, 4, 6, 8
    margin: float = 3.0  # D makes the weighted distance of its features this large
    lambda_L1: float = 0.0  # weight of the L1 distance to the true image

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        refuse_idle(self, "generator", "blocks", "patch", "padding", "dropout")
        if self.pool_size:
            raise UsageError("--pool-size must be 0: features are compared with the fake's own true image")
        if "crop" not in self.preprocess:
            raise UsageError(f"--preprocess {self.preprocess}: D needs images cropped to one size")


class PAN(Pix2Pix):
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "pan"
    title: ClassVar[str] = "PAN"
    config_class: ClassVar[type[settings.Config]] = PANConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "digits": {
            "levels": 5, "ngf": 32, "ndf": 8, "lambda_L1": 25.0, "lr": 5e-4, "batch_size": 16, "epochs": 6,
            "epochs_decay": 5, "load_size": 32, "crop_size": 32, "flip": False, "log_every": 25,
            "sample_every": 200, "save_every": 200,
        },
    }  # fmt: skip
    config: Any

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G (A to B) and D (judges B)."""
        c = self.config
        nets: Nets = {
            "G": PANGenerator(
                channels_a, channels_b, levels=c.levels, ngf=c.ngf, norm=c.norm, output=c.output
            ),
            "D": PANDiscriminator(channels_b, side=c.crop_size, ndf=c.ndf, norm=c.norm),
        }
        for net in nets.values():
            init_weights(net, c.init, c.init_gain)
        return nets

    def unfit(self, height: int, width: int) -> str:
        """What the networks need where they do not take images of a size, "" where they do."""
        c, multiple = self.config, max(2**self.config.levels, HALVED)
        if height % multiple or width % multiple:
            return f"--levels {c.levels} needs multiples of {multiple}; change --crop-size or --levels"
        if (height, width) != (c.crop_size, c.crop_size):
            return f"D is made for --crop-size {c.crop_size}: give the size of the images"
        if c.norm == "instance" and height == multiple:
            return (
                "the innermost layers have one pixel, which instance norm makes zero: choose another --norm"
            )
        if c.norm == "batch" and height == multiple and c.batch_size == 1:
            return "the innermost layers have one pixel: batch norm needs --batch-size 2 or more"
        return ""

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Verdict and distance of D's features to those of the true B (equations 4 and 5)."""
        c, fake = self.config, fakes["B"]
        verdict, made = nets["D"](fake, hidden=True)
        with torch.no_grad():
            _, true = nets["D"](batch["B"], hidden=True)
        terms = {
            "G_GAN": c.lambda_gan * losses.generator_gan(verdict, c.gan_mode),
            "G_features": losses.feature_matching(true, made, weights=c.lambda_perceptual),
        }
        if c.lambda_L1 > 0:
            terms["G_L1"] = c.lambda_L1 * losses.l1(fake, batch["B"])
        return sum(terms.values(), start=verdict.new_zeros(())), {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """D on B and on G(A), and what its features lack to the margin (equation 6)."""
        c, b, fake = self.config, batch["B"], fakes["B"].detach().to(batch["B"].dtype)
        (on_real, true), (on_fake, made) = (nets["D"](x, hidden=True) for x in (b, fake))
        loss, terms = score(c, [Trial(nets["D"], b, fake, "D")], [(on_real, on_fake)])
        missing = F.relu(c.margin - losses.feature_matching(true, made, weights=c.lambda_perceptual))
        return loss + missing, terms | {"margin": missing.detach()}

"""DiscoGAN (Kim, Cha, Kim, Lee, Kim 2017, arXiv 1703.05192): four small
networks as CycleGAN's, cross entropy and squared reconstruction.

`default` is the paper: -log D(G(x)) plus the reconstruction, equally weighted. `code` is what the public code
adds: feature matching, which outweighs the verdict nine to one, at first hardly any reconstruction, and two
updates of G for one of D. From that code are also, in both, Adam's weight decay and torch's own initial
weights. One logit stands for the whole image at 64 pixels, and for a patch of larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastgan import config as settings
from fastgan import losses
from fastgan.config import UsageError
from fastgan.models import DiscoGANDiscriminator, DiscoGANGenerator, init_weights
from fastgan.recipes.base import Batch, Nets, Terms, refuse_idle
from fastgan.recipes.cyclegan import CycleGAN


@dataclass(frozen=True)
class DiscoGANConfig(settings.Config):
    """Settings of DiscoGAN, those of the paper where it states them."""

    levels: int = 4  # halvings of all networks; D needs 4 * 2^levels pixels
    bottleneck: int = 0  # channels of one pixel between encoder and decoder, e.g. 100; 0 is none
    norm: Literal["instance", "batch", "none"] = "batch"  # normalisation of all networks
    output: Literal["tanh", "sigmoid"] = "sigmoid"  # last activation; images are in [-1, 1] or [0, 1] with it
    init: Literal["normal", "xavier", "kaiming", "orthogonal", "torch"] = "torch"  # initial weights
    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "vanilla"  # adversarial loss
    pool_size: int = 0  # history of generated images that D is shown
    load_size: int = 64  # size in pixels an image is resized to
    crop_size: int = 64  # size in pixels of the random crop
    flip: bool = False  # mirror left-right at random
    batch_size: int = 200  # images per domain, update and process
    epochs_decay: int = 0  # epochs of decay after that (linear)
    lambda_gan: float = 1.0  # weight of the verdict beside feature matching
    lambda_features: float = 0.0  # weight of feature matching
    rate: float = 0.5  # share of the reconstruction in G's loss; verdict and features have the rest
    start_rate: float = 0.01  # the same for the first steps
    curriculum: int = 0  # number of these first steps
    weight_decay: float = 1e-5  # Adam's, of all weights

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        refuse_idle(self, "generator", "blocks", "patch", "padding", "dropout")
        for key in ("rate", "start_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise UsageError(f"{settings.flag(key)} must be in [0, 1], got {getattr(self, key)}")
        for key in ("bottleneck", "curriculum", "lambda_features", "weight_decay"):
            if getattr(self, key) < 0:
                raise UsageError(f"{settings.flag(key)} must be at least 0, got {getattr(self, key)}")


class DiscoGAN(CycleGAN):
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "discogan"
    title: ClassVar[str] = "DiscoGAN"
    config_class: ClassVar[type[settings.Config]] = DiscoGANConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # 10,000 of its iterations, of which each updates one side
        "code": {
            "lambda_gan": 0.1, "lambda_features": 0.9, "curriculum": 3333, "n_gen": 2, "batch_size": 64,
        },
        "digits": {
            # shallow, so that what is where stays there; nearly all weight on the reconstruction
            "levels": 2, "ngf": 32, "ndf": 16, "rate": 0.95, "lr": 1e-3, "batch_size": 16, "epochs": 12,
            "epochs_decay": 10, "load_size": 32, "crop_size": 32, "log_every": 25, "sample_every": 200,
            "save_every": 400,
        },
    }  # fmt: skip
    config: Any

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G_A (A to B), G_B (B to A), D_A (judges B), D_B (judges A)."""
        c, a, b = self.config, channels_a, channels_b
        both: dict[str, Any] = {"levels": c.levels, "norm": c.norm}
        g = both | {"ngf": c.ngf, "bottleneck": c.bottleneck, "output": c.output}
        nets: Nets = {"G_A": DiscoGANGenerator(a, b, **g), "G_B": DiscoGANGenerator(b, a, **g)}
        nets["D_A"] = DiscoGANDiscriminator(b, ndf=c.ndf, **both)
        nets["D_B"] = DiscoGANDiscriminator(a, ndf=c.ndf, **both)
        for net in nets.values():
            init_weights(net, c.init, c.init_gain)
        return nets

    def unfit(self, height: int, width: int) -> str:
        """What the networks need where they do not take images of a size, "" where they do."""
        c, least = self.config, 4 * 2**self.config.levels
        multiple = least if c.bottleneck else 2**c.levels
        if height % multiple or width % multiple:
            needs = f"multiples of {multiple}"
            return f"--levels {c.levels} needs {needs}; change --crop-size, --preprocess or --levels"
        if min(height, width) < least:
            return f"--levels {c.levels} needs at least {least}; choose fewer"
        if c.bottleneck and c.norm != "none" and height == width == least:
            # one value a channel and image
            if c.norm == "instance":
                return "--bottleneck leaves one pixel, which instance norm makes zero: choose another --norm"
            if c.batch_size == 1:
                return "--bottleneck leaves one pixel: batch norm needs --batch-size 2 or more"
        return ""

    def numbers(self, step: int) -> dict[str, float]:
        """{"rate": share of the reconstruction}: the public code's curriculum."""
        return {"rate": self.config.start_rate if step < self.config.curriculum else self.config.rate}

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"B": G_A(A), "A": G_B(B)}."""
        return {"B": nets["G_A"](batch["A"]), "A": nets["G_B"](batch["B"])}

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Verdict, feature matching and reconstruction of both directions (equations 3 and 4)."""
        c, rate = self.config, batch["rate"]
        terms: Terms = {}
        for name, domain, source in (("A", "B", "A"), ("B", "A", "B")):
            judge, fake = nets[f"D_{name}"], fakes[domain]
            if c.lambda_features > 0:
                verdict, made = judge(fake, hidden=True)
                with torch.no_grad():
                    _, true = judge(batch[domain], hidden=True)
                distance = losses.feature_matching(true, made, between="means")
                terms[f"FM_{name}"] = (1 - rate) * (c.lambda_features * distance)
            else:
                verdict = judge(fake)
            terms[f"G_{name}"] = (1 - rate) * (c.lambda_gan * losses.generator_gan(verdict, c.gan_mode))
            again = nets["G_B" if name == "A" else "G_A"](fake)
            terms[f"cycle_{name}"] = rate * losses.mse(again, batch[source])
        if c.weight_decay > 0:
            terms["decay"] = self._decay(nets, self.generators)
        return sum(terms.values(), start=rate.new_zeros(())), {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Both discriminators; their parameters are disjoint, so the sum has the gradients of each alone."""
        loss, terms = super().discriminator_loss(nets, batch, fakes)
        return loss + self._decay(nets, self.discriminators), terms

    def _decay(self, nets: Nets, names: tuple[str, ...]) -> Tensor:
        parameters = [p for name in names for p in nets[name].parameters()]
        return losses.weight_decay(parameters, self.config.weight_decay)

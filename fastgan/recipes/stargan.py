"""StarGAN (Choi et al. 2018, arXiv 1711.09020): one generator for all labels, and D reads them too.

D is updated first, `n_critic` times; G then takes the fakes of the last batch. The targets of a batch are its
own labels in another order, so every image is asked for a label that occurs; of several processes each orders
its own. The schedule is the paper's: the full learning rate for half of the steps, then down to zero; the
public code has a fault and hardly ever lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgan import config as settings
from fastgan import losses
from fastgan.config import UsageError, flag
from fastgan.models import StarGANDiscriminator, StarGANGenerator, init_weights
from fastgan.recipes.base import Batch, Direction, Nets, Terms, Trial, refuse_idle, score


@dataclass(frozen=True)
class StarGANConfig(settings.Config):
    """Settings of StarGAN, those of the paper."""

    attributes: tuple[str, ...] = ()  # columns of list_attr*.txt to translate between; none: class folders
    preprocess: settings.Preprocess = "square_and_crop"  # what happens to an image before the random crop
    load_size: int = 128  # size in pixels an image is resized to
    crop_size: int = 128  # size in pixels of the random crop
    blocks: int = 6  # residual blocks of the generator
    levels: int = 6  # halvings of the discriminator
    init: Literal["normal", "xavier", "kaiming", "orthogonal", "torch"] = "torch"  # initial weights
    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "wgan-gp"  # adversarial loss
    pool_size: int = 0  # history of generated images that D is shown
    lambda_class: float = 1.0  # weight of the label that D reads
    lambda_cycle: float = 10.0  # weight of the way back to the image's own label
    lambda_identity: float = 0.0  # weight of what changes in images that are asked for their own label
    lr: float = 1e-4  # learning rate of G
    n_critic: int = 5  # updates of D in a step, each on a batch of its own
    batch_size: int = 16  # images per update and process
    epochs: int = 10  # epochs at the full learning rate
    epochs_decay: int = 10  # epochs of decay after that (linear)
    steps: int | None = 40_000  # train this many steps in all; the schedule is spread over them

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        refuse_idle(
            self, "generator", "patch", "norm", "padding", "dropout", "output", "channels_b", "direction",
            "range_b",
        )  # fmt: skip
        for key in ("lambda_class", "lambda_cycle", "lambda_identity"):
            if getattr(self, key) < 0:
                raise UsageError(f"{flag(key)} must be at least 0, got {getattr(self, key)}")
        if "crop" not in self.preprocess:
            raise UsageError(f"--preprocess {self.preprocess}: D needs images cropped to one size")


class StarGAN:
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "stargan"
    title: ClassVar[str] = "StarGAN"
    config_class: ClassVar[type[settings.Config]] = StarGANConfig
    paired: ClassVar[bool] = False
    domains: ClassVar[tuple[str, ...]] = ("A",)
    labelled: ClassVar[bool] = True
    # which of the embedded digits; and that a label is a class where no attributes are named
    digits: ClassVar[str] = "colours"
    classes: ClassVar[bool] = True
    order: ClassVar[Literal["g-first", "d-first"]] = "d-first"
    generators: ClassVar[tuple[str, ...]] = ("G",)
    discriminators: ClassVar[tuple[str, ...]] = ("D",)
    directions: ClassVar[dict[str, Direction]] = {"AtoB": Direction("G", "A", "A")}
    noise: ClassVar[dict[str, int]] = {"order": 1}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # the five attributes of CelebA in the paper
        "faces": {"attributes": ("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young")},
        "digits": {
            # without the identity a digit and its ground may change places, which D hardly sees
            "ngf": 12, "ndf": 16, "blocks": 2, "levels": 3, "lambda_identity": 10.0, "lr": 1e-3,
            "lr_d": 5e-4, "n_critic": 2, "steps": 450, "load_size": 32, "crop_size": 32, "log_every": 25,
            "sample_every": 150, "save_every": 200,
        },
    }  # fmt: skip

    def __init__(self, config: StarGANConfig) -> None:
        self.config = config

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G (image and label to image) and D (judges images and reads the channels_b numbers of a label)."""
        c = self.config
        nets: Nets = {
            "G": StarGANGenerator(channels_a, channels_b, ngf=c.ngf, blocks=c.blocks),
            "D": StarGANDiscriminator(channels_a, channels_b, size=c.crop_size, ndf=c.ndf, levels=c.levels),
        }
        for net in nets.values():
            init_weights(net, c.init, c.init_gain)
        return nets

    def unfit(self, height: int, width: int) -> str:
        """What the networks need where they do not take images of a size, "" where they do."""
        c, multiple = self.config, max(4, 2**self.config.levels)
        if height % multiple or width % multiple:
            return f"--levels {c.levels} needs multiples of {multiple}; change --crop-size or --levels"
        if (height, width) != (c.crop_size, c.crop_size):
            return f"D is made for --crop-size {c.crop_size}: give the size of the images"
        if c.batch_size == 1:
            return "an image is asked for the label of another one: --batch-size must be 2 or more"
        return ""

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def targets(self, batch: Batch) -> Tensor:
        """The labels of a batch in another order, that of its random numbers; (N, labels)."""
        return batch["label"][batch["order"].flatten().argsort()]

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"A": G(A, another image's label)}."""
        return {"A": nets["G"](batch["A"], self.targets(batch))}

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """G, which takes a label besides."""
        return nets[way.net]

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.config.lambda_class * losses.label_loss(
            logits, labels, classes=not self.config.attributes
        )

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Verdict, label and way back of the fakes (equations 3, 4 and 6)."""
        c, x, fake, target = self.config, batch["A"], fakes["A"], self.targets(batch)
        verdict, read = nets["D"](fake.to(x.dtype))
        terms = {
            "G_GAN": losses.generator_gan(verdict, c.gan_mode),
            "G_class": self._class_loss(read, target),
            "cycle": c.lambda_cycle * losses.l1(nets["G"](fake, batch["label"]), x),
        }
        if c.lambda_identity > 0:
            own = (target == batch["label"]).all(1).to(x.dtype).view(-1, 1, 1, 1)
            terms["idt"] = c.lambda_identity * losses.l1(own * fake, own * x)
        return sum(terms.values(), start=x.new_zeros(())), {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """D on real images and on fakes, and the labels of the real ones (equations 2 and 5)."""
        real, judge = batch["A"], nets["D"]
        fake = fakes["A"].detach().to(real.dtype)
        # without a norm one pass is the same as two
        (on_real, on_fake), (read, _) = (found.chunk(2) for found in judge(torch.cat([real, fake])))
        trial = Trial(lambda x: judge(x)[0], real, fake, "D")
        loss, terms = score(self.config, [trial], [(on_real, on_fake)])
        known = self._class_loss(read, batch["label"])
        return loss + known, terms | {"D_class": known.detach()}

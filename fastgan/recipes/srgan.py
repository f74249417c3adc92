"""SRGAN (Ledig et al., CVPR 2017, arXiv 1609.04802): images enlarged 4 times, with a discriminator and
the features of VGG19; also its first stage alone, SRResNet, and SRCNN (arXiv 1501.00092).

Domain A holds the large images; the small ones are made of them by bicubic reduction, see `models.srgan`. The
first stage (`--stage pixels`) minimises the squared error of pixels and has no discriminator. The second
starts from its weights (`--start RUN`) and minimises content + 1e-3 adversarial loss; the content is 0.006
times the squared error of VGG19's relu5_4 or relu2_2 (`--vgg FILE`), that of pixels without a file. D never
sees real and generated images in one batch. The paper does not tell which network is updated first: the
generator is, and the discriminator then sees the same images. The small image has the range of the large
one, where the paper has [0, 1] for the one and [-1, 1] for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fastgan import checkpoint, losses
from fastgan import config as settings
from fastgan.config import UsageError
from fastgan.models import SRCNN, SRGANDiscriminator, SRResNet, init_weights
from fastgan.models.srgan import HALVED, reduce
from fastgan.models.vgg import VGGFeatures
from fastgan.recipes.base import Batch, Direction, Nets, Terms, Trial, judge, refuse_idle

TAPS = {"vgg22": "relu2_2", "vgg54": "relu5_4"}


@dataclass(frozen=True)
class SRGANConfig(settings.Config):
    """Settings of SRGAN, those of the paper."""

    architecture: Literal["srresnet", "srcnn"] = "srresnet"  # network that enlarges
    filters: Literal["9-1-5", "9-5-5"] = "9-1-5"  # sides of srcnn's convolutions
    add_bicubic: bool = False  # srresnet gives what is added to a bicubic enlargement; not in the paper
    scale: Literal[2, 4] = 4  # how many times a side becomes as long
    stage: Literal["gan", "pixels"] = "gan"  # pixels: squared error of pixels alone, without a discriminator
    content_loss: Literal["auto", "pixels", "vgg22", "vgg54"] = "auto"  # auto: vgg54 with --vgg, else pixels
    vgg: Path | None = None  # torchvision's weights of VGG19, vgg19-dcbb9e9d.pth
    start: Path | None = None  # run, checkpoint or file whose generator a new run starts from
    lambda_gan: float = 1e-3  # weight of the verdict
    lambda_vgg: float = 0.006  # weight of the squared error of VGG's features; that of pixels has 1
    blocks: int = 16  # residual blocks
    norm: Literal["instance", "batch", "none"] = "batch"  # normalisation of both networks
    init: Literal["normal", "xavier", "kaiming", "orthogonal", "torch"] = "torch"  # initial weights
    preprocess: Literal[
        "resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "scale_shortside_and_crop", "none"
    ] = "crop"  # what happens to an image before the random crop
    crop_size: int = 96  # size in pixels of the random crop, of the large image
    gan_mode: Literal["lsgan", "vanilla", "hinge", "wgan", "wgan-gp"] = "vanilla"  # adversarial loss
    d_real_weight: float = 1.0  # weight of the real half of D's loss
    d_fake_weight: float = 1.0  # weight of the fake half of D's loss
    pool_size: int = 0  # history of generated images that D is shown
    lr: float = 1e-4  # learning rate of G
    beta1: float = 0.9  # Adam
    batch_size: int = 16  # images per domain, update and process
    epochs: int = 2  # epochs at the full learning rate
    epochs_decay: int = 0  # epochs of decay after that (linear)
    lr_policy: Literal["linear", "cosine", "step", "constant"] = "step"  # learning-rate schedule
    lr_decay_epochs: int = 1  # epochs between two falls by 0.1 (step)

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        refuse_idle(self, "generator", "levels", "patch", "padding", "dropout", "channels_b", "range_b")
        refuse_idle(self, "direction")
        if self.content_loss in TAPS and self.vgg is None:
            raise UsageError(
                f"--content-loss {self.content_loss} needs --vgg FILE, torchvision's vgg19-dcbb9e9d.pth; "
                "pixels needs none"
            )
        if self.vgg is not None and (self.stage == "pixels" or self.content_loss == "pixels"):
            raise UsageError("--vgg has no effect where pixels alone are compared: leave it out")
        if self.stage == "gan" and "crop" not in self.preprocess:
            raise UsageError(f"--preprocess {self.preprocess}: D needs images cropped to one size")


class SRGAN:
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "srgan"
    title: ClassVar[str] = "SRGAN"
    config_class: ClassVar[type[settings.Config]] = SRGANConfig
    paired: ClassVar[bool] = False
    domains: ClassVar[tuple[str, ...]] = ("A",)
    labelled: ClassVar[bool] = False
    noise: ClassVar[dict[str, int]] = {}
    order: ClassVar[Literal["g-first", "d-first"]] = "g-first"
    generators: ClassVar[tuple[str, ...]] = ("G",)
    # what leads from A to A enlarges its input, which is made of A
    directions: ClassVar[dict[str, Direction]] = {"AtoB": Direction("G", "A", "A")}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # 1e5 updates at 1e-4, 1e5 at 1e-5
        "default": {"steps": 200_000},
        "pixels": {"stage": "pixels", "steps": 1_000_000, "lr_policy": "constant"},
        # the paper's own optimiser is plain gradient descent with a small rate for the last layer
        "srcnn": {"architecture": "srcnn", "stage": "pixels", "steps": 200_000, "lr_policy": "constant"},
        "small": {
            "stage": "pixels", "add_bicubic": True, "norm": "none", "ngf": 32, "blocks": 4, "lr": 1e-3,
            "crop_size": 48, "steps": 1000, "epochs": 1, "epochs_decay": 2, "lr_policy": "linear",
        },
        "digits": {
            "ngf": 16, "ndf": 8, "blocks": 3, "lr": 1e-3, "crop_size": 32, "flip": False, "epochs": 6,
            "epochs_decay": 5, "lr_policy": "linear", "log_every": 25, "sample_every": 200, "save_every": 200,
        },
    }  # fmt: skip

    def __init__(self, config: SRGANConfig) -> None:
        self.config = config
        self.discriminators: tuple[str, ...] = ("D",) if config.stage == "gan" else ()
        self._vgg: VGGFeatures | None = None

    def prepare(self, images: Batch) -> None:
        """Read VGG's weights where the losses need them; images: one of each domain.

        Raises:
            UsageError, CheckpointError: a file that is missing, of another network, or for other images.
        """
        c = self.config
        if c.vgg is None:
            return
        if images["A"].shape[1] not in (1, 3):
            raise UsageError(f"--vgg takes grey or RGB images, these have {images['A'].shape[1]} channels")
        state, _ = checkpoint.read_weights(c.vgg)
        tap = TAPS["vgg54" if c.content_loss == "auto" else c.content_loss]
        try:
            self._vgg = VGGFeatures.load(state, [tap], output=c.output)
        except ValueError as error:
            raise UsageError(f"--vgg {c.vgg}: {error}") from error

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G (enlarges) and, in the stage that has one, D (judges large images)."""
        c = self.config
        nets: Nets = {}
        if c.architecture == "srcnn":
            nets["G"] = SRCNN(scale=c.scale, width=int(c.filters[2]), output=c.output)
        else:
            nets["G"] = SRResNet(
                channels_a, scale=c.scale, ngf=c.ngf, blocks=c.blocks, norm=c.norm, add_bicubic=c.add_bicubic
            )
        if self.discriminators:
            nets["D"] = SRGANDiscriminator(channels_a, side=c.crop_size, ndf=c.ndf, norm=c.norm)
        for net in nets.values():
            init_weights(net, c.init, c.init_gain)
        return nets

    def unfit(self, height: int, width: int) -> str:
        """What the networks need where they do not take images of a size, "" where they do."""
        multiple = HALVED if self.discriminators else self.config.scale
        if height % multiple or width % multiple:
            return f"--crop-size must be a multiple of {multiple}"
        return ""

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"A": G(A, reduced)}."""
        return {"A": nets["G"](reduce(batch["A"], self.config.scale))}

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """G, which has a `scale`."""
        return nets[way.net]

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Squared error of pixels or of VGG's features, and what D says (equations 3 to 6)."""
        c, real, fake = self.config, batch["A"], fakes["A"]
        terms: Terms = {}
        if c.vgg is None:
            terms["G_pixels"] = losses.mse(fake, real)
        elif self._vgg is None:
            raise UsageError("--vgg: the weights were not read, call prepare")
        else:
            # where the images are: it is not among the networks that are moved
            vgg = self._vgg.to(real.device)
            (made,), (true,) = vgg(fake), vgg(real)
            terms["G_vgg"] = c.lambda_vgg * losses.mse(made, true)
        if self.discriminators:
            verdict = nets["D"](fake.to(real.dtype))
            terms["G_GAN"] = c.lambda_gan * losses.generator_gan(verdict, c.gan_mode)
        return sum(terms.values(), start=fake.new_zeros(())), {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """D on the large images and on the enlarged ones."""
        return judge(self.config, [Trial(nets["D"], batch["A"], fakes["A"], "D")])

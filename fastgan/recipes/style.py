"""Neural style (Gatys, Ecker, Bethge, CVPR 2016): one picture with the content of one image and the style of
another; found by gradient descent on its pixels, what the networks of the other recipes are compared with.

No generator is trained: a run is a picture, `picture.png` in its folder. Content is relu4_2 of VGG19, style
the Gram matrices of relu1_1 to relu5_1, pooling takes averages, and L-BFGS without a line search does one
iteration a step. By default both distances are means, weighted as in the first author's code: 1 for the
content, 1e3 over the squared number of channels for each layer of the style. The preset `paper` has its sums,
a fifth a layer and 1e-3 for the content, which then weighs more in a larger picture. Without `--content` and
`--style` two digits and random features (Ustyuzhaninov et al. 2016, arXiv 1606.00021) show that it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgan import checkpoint, losses
from fastgan import config as settings
from fastgan.config import UsageError
from fastgan.models.style import CONTENT, SMALLEST, STYLE, Picture, StyleDistance
from fastgan.models.vgg import VGGFeatures
from fastgan.recipes.base import Batch, Direction, Nets, Terms, refuse_idle

# of networks, discriminators and sets of images
IDLE = (
    *("data", "direction", "channels_b", "crop_size", "serial", "pages", "max_images"),
    *("generator", "blocks", "levels", "patch", "ndf", "norm", "padding", "dropout", "init", "init_gain"),
    *("gan_mode", "real_label", "d_real_weight", "d_fake_weight", "lambda_gp", "gp_at", "clip", "lr_d"),
    *("n_critic", "n_gen", "accumulate", "batch_size", "compile"),
)


@dataclass(frozen=True)
class StyleConfig(settings.Config):
    """Settings of neural style."""

    content: Path | None = None  # image that is shown; default: an embedded digit
    style: Path | None = None  # image whose style it gets; default: an embedded digit
    vgg: Path | None = None  # torchvision's weights of VGG19, vgg19-dcbb9e9d.pth
    start_from: Literal["content", "noise"] = "content"  # picture before the first step
    weighting: Literal["code", "paper"] = "code"  # means, or the paper's sums: content grows with the picture
    lambda_content: float = 1.0  # weight of the content
    lambda_style: float = 1e3  # weight of the style
    lambda_smooth: float = 0.0  # weight of the squared differences of neighbouring pixels; not in the paper
    history: int = 20  # steps that L-BFGS remembers, each as large as two pictures
    preprocess: Literal[
        "resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "scale_shortside_and_crop", "none"
    ] = "none"  # what happens to an image before the random crop
    load_size: int = 512  # longest side in pixels; larger images are reduced to it
    channels: int | None = 3  # VGG takes colours
    ngf: int = 16  # width of random features in place of VGG's
    flip: bool = False  # mirror left-right at random
    pool_size: int = 0  # history of generated images that D is shown
    optimizer: Literal["lbfgs", "adam", "rmsprop"] = "lbfgs"  # type: ignore[assignment]
    lr: float = 1.0  # length of a step of L-BFGS; 0.02 suits adam
    beta1: float = 0.9  # Adam
    epochs: int = 500  # steps at the full learning rate
    epochs_decay: int = 0  # steps of decay after that (linear)
    lr_policy: Literal["linear", "cosine", "step", "constant"] = "constant"  # learning-rate schedule
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "fp32"  # L-BFGS follows small differences

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        refuse_idle(self, *IDLE)
        if (self.content is None) != (self.style is None):
            raise UsageError("--content FILE and --style FILE belong together: give both")
        if self.content is not None and self.vgg is None:
            raise UsageError("--vgg FILE is missing: torchvision's weights of VGG19, vgg19-dcbb9e9d.pth")
        for key in ("flip", "pool_size", "preprocess"):
            if getattr(self, key) != getattr(StyleConfig, key):
                raise UsageError(f"{settings.flag(key)} has no effect here: leave it out")
        if self.history < 1:
            raise UsageError(f"--history must be at least 1, got {self.history}")


class Style:
    """Settings and a pure loss function; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "style"
    title: ClassVar[str] = "Neural style"
    config_class: ClassVar[type[settings.Config]] = StyleConfig
    paired: ClassVar[bool] = False
    domains: ClassVar[tuple[str, ...]] = ("A", "B")
    labelled: ClassVar[bool] = False
    noise: ClassVar[dict[str, int]] = {}
    order: ClassVar[Literal["g-first", "d-first"]] = "g-first"
    generators: ClassVar[tuple[str, ...]] = ("G",)
    discriminators: ClassVar[tuple[str, ...]] = ()
    directions: ClassVar[dict[str, Direction]] = {"AtoB": Direction("G", "A", "B")}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {"log_every": 10, "sample_every": 50, "save_every": 100},
        # alpha / beta of the paper's first figures
        "paper": {
            "weighting": "paper", "lambda_content": 1e-3, "lambda_style": 1.0, "start_from": "noise",
            "log_every": 10, "sample_every": 50, "save_every": 100,
        },
        "digits": {
            "ngf": 32, "lambda_style": 30.0, "lambda_smooth": 2.0, "epochs": 60, "log_every": 10,
            "sample_every": 20, "save_every": 20,
        },
    }  # fmt: skip

    def __init__(self, config: StyleConfig) -> None:
        self.config = config
        self._start: Tensor | None = None
        self._distance: StyleDistance | None = None

    def prepare(self, images: Batch) -> None:
        """Take the content under "A" and the style under "B", and read VGG's weights.

        Raises:
            UsageError, CheckpointError: a file that is missing or of another network.
        """
        c, content, style = self.config, images["A"], images["B"]
        taps = CONTENT, *STYLE
        if c.vgg is None:
            vgg = VGGFeatures(taps, pooling="average", output=c.output, width=c.ngf).draw(c.seed)
        else:
            state, _ = checkpoint.read_weights(c.vgg)
            try:
                vgg = VGGFeatures.load(state, taps, pooling="average", output=c.output)
            except ValueError as error:
                raise UsageError(f"--vgg {c.vgg}: {error}") from error
        sums = c.weighting == "paper"
        self._distance = StyleDistance(vgg.to(content.dtype), content, style, sums=sums)
        self._start = content[0]
        if c.start_from == "noise":
            noise = torch.randn(self._start.shape, generator=torch.Generator().manual_seed(c.seed))
            self._start = (noise / 4 + (0.0 if c.output == "tanh" else 0.5)).to(content.dtype)

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G, which is the picture."""
        if self._start is None:
            raise UsageError("a run of style is one picture, picture.png in its folder: no network to use")
        return {"G": Picture(self._start.clone())}

    def unfit(self, height: int, width: int) -> str:
        """What VGG needs where it does not take images of a size, "" where it does."""
        return "" if min(height, width) >= SMALLEST else f"VGG needs at least {SMALLEST} pixels a side"

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"B": the picture}."""
        return {"B": nets["G"](batch["A"])}

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """The picture, of any image."""
        return nets[way.net]

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Distance from the content and the style that `prepare` was given (equations 1, 5 and 7)."""
        if self._distance is None:
            raise UsageError("style: no image was given, call prepare")
        content, style = self._distance.to(fakes["B"].device)(fakes["B"])
        terms = {"content": self.config.lambda_content * content, "style": self.config.lambda_style * style}
        if self.config.lambda_smooth > 0:
            terms["smooth"] = self.config.lambda_smooth * losses.roughness(fakes["B"])
        return sum(terms.values(), start=content.new_zeros(())), {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """There is none."""
        raise ValueError("style has no discriminator")

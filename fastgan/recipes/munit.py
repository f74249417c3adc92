"""MUNIT (Huang, Liu, Belongie, Kautz, ECCV 2018, arXiv 1804.04732): unpaired translation into many styles.

An image of A becomes one of B by its content and a style drawn from N(0, 1). The losses keep what an image is
made of: it is decoded from its own content and style, and the content and the style of a translation are
found again in it. Names are those of the domains: the parts `a` and `b` of G make and take apart, those of D
judge, images of A and B.

As in the public code the discriminators come first, their losses are summed over scales without a half, and
contents are compared without stopping the gradient on either side. Unlike there the discriminators see the
images that the generators then answer for: it draws other styles, and makes the images with a graph that
nothing uses. Its perceptual loss (of one preset, weight 0 in the others) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fastgan import config as settings
from fastgan import losses
from fastgan.config import UsageError
from fastgan.models import init_weights
from fastgan.models.munit import LEAST, MUNITDiscriminator, MUNITGenerator, MUNITTranslator
from fastgan.recipes.base import Batch, Direction, Nets, Terms, refuse_idle
from fastgan.stack import run_together


@dataclass(frozen=True)
class MUNITConfig(settings.Config):
    """Settings of MUNIT, those of the public code."""

    preprocess: Literal[
        "resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "scale_shortside_and_crop", "none"
    ] = "scale_shortside_and_crop"  # what happens to an image before the random crop
    load_size: int = 256  # size in pixels an image is resized to
    style_size: int = 8  # numbers of a style
    levels: int = 2  # halvings of the content
    blocks: int = 4  # residual blocks of the content encoders, and of the decoders
    mlp_size: int = 256  # width of the perceptron between style and decoder
    levels_d: int = 4  # halvings of the discriminators
    scales: int = 3  # sizes at which the discriminators see an image, each half of the one before
    init: Literal["normal", "xavier", "kaiming", "orthogonal", "torch"] = "kaiming"  # initial weights of G
    d_real_weight: float = 1.0  # weight of the real half of D's loss
    d_fake_weight: float = 1.0  # weight of the fake half of D's loss
    pool_size: int = 0  # history of generated images that D is shown
    lambda_gan: float = 1.0  # weight of the verdicts
    lambda_recon: float = 10.0  # weight of images decoded from their own content and style
    lambda_style: float = 1.0  # weight of the styles found again in translations
    lambda_content: float = 1.0  # weight of the contents found again in translations
    lambda_cycle: float = 0.0  # weight of the way back, in the image's own style
    weight_decay: float = 1e-4  # Adam's, of all weights
    lr: float = 1e-4  # learning rate of G
    steps: int | None = 1_000_000  # train this many steps in all; the schedule is spread over them
    epochs: int = 10  # parts of the schedule
    epochs_decay: int = 0  # epochs of decay after that (linear)
    lr_policy: Literal["linear", "cosine", "step", "constant"] = "step"  # learning-rate schedule
    lr_decay_epochs: int = 1  # epochs between two falls (step)
    lr_decay_factor: float = 0.5  # of each of these falls

    def __post_init__(self) -> None:
        """Refuse values that cannot work or have no effect, naming the flag.

        Raises:
            UsageError: one line, the first rule that is broken.
        """
        super().__post_init__()
        refuse_idle(self, "generator", "patch", "norm", "padding", "dropout")
        least = dict.fromkeys(("style_size", "mlp_size", "levels_d", "scales"), 1)
        for key, low in (least | {"lambda_cycle": 0, "weight_decay": 0}).items():
            if getattr(self, key) < low:
                raise UsageError(f"{settings.flag(key)} must be at least {low}, got {getattr(self, key)}")
        if self.gan_mode == "wgan-gp":
            raise UsageError("--gan-mode wgan-gp has a penalty for one verdict, not for several scales")


class MUNIT:
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "munit"
    title: ClassVar[str] = "MUNIT"
    config_class: ClassVar[type[settings.Config]] = MUNITConfig
    paired: ClassVar[bool] = False
    domains: ClassVar[tuple[str, ...]] = ("A", "B")
    labelled: ClassVar[bool] = False
    order: ClassVar[Literal["g-first", "d-first"]] = "d-first"
    generators: ClassVar[tuple[str, ...]] = ("G",)
    discriminators: ClassVar[tuple[str, ...]] = ("D",)
    directions: ClassVar[dict[str, Direction]] = {
        "AtoB": Direction("G", "A", "B"),
        "BtoA": Direction("G", "B", "A"),
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # the public code's settings for summer and winter, with the way back
        "summer2winter": {"lambda_cycle": 10.0},
        "digits": {
            "ngf": 16, "ndf": 16, "blocks": 2, "levels_d": 3, "scales": 2, "lr": 1e-3, "batch_size": 16,
            "steps": None, "epochs": 4, "epochs_decay": 4, "lr_policy": "linear",
            "preprocess": "resize_and_crop", "load_size": 32, "crop_size": 32, "flip": False,
            "log_every": 25, "sample_every": 100, "save_every": 100,
        },
    }  # fmt: skip

    def __init__(self, config: MUNITConfig) -> None:
        self.config = config

    @property
    def noise(self) -> dict[str, int]:
        """The styles of the translations, by the domain that they are of."""
        return {"style_A": self.config.style_size, "style_B": self.config.style_size}

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G and D, each with the parts `a` and `b` for the two domains."""
        c = self.config
        g = MUNITGenerator(
            channels_a, channels_b, ngf=c.ngf, levels=c.levels, blocks=c.blocks, style_size=c.style_size,
            mlp_size=c.mlp_size, output=c.output,
        )  # fmt: skip
        d = MUNITDiscriminator(channels_a, channels_b, ndf=c.ndf, levels=c.levels_d, scales=c.scales)
        init_weights(g, c.init, c.init_gain)
        init_weights(d, "normal", c.init_gain)
        return {"G": g, "D": d}

    def unfit(self, height: int, width: int) -> str:
        """What the networks need where they do not take images of a size, "" where they do."""
        c, multiple, least = self.config, 2**self.config.levels, min(height, width)
        if height % multiple or width % multiple:
            return f"--levels {c.levels} needs multiples of {multiple}; change --crop-size or --levels"
        if least < max(LEAST, 2 * multiple):
            return f"the encoders need at least {max(LEAST, 2 * multiple)}; change --crop-size or --levels"
        # every scale rounds up, every halving needs two pixels to reflect one
        if -(-least // 2 ** (c.scales - 1)) < 2**c.levels_d:
            needed = 2 ** (c.scales - 1) * (2**c.levels_d - 1) + 1
            return f"--scales {c.scales} --levels-d {c.levels_d} needs at least {needed}; choose fewer"
        return ""

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"B": A in "style_B", "A": B in "style_A"}; with gradients also contents, own styles and the images
        decoded from these, as "content_A", "own_A", "recon_A" and so on."""
        g, a, b = cast(MUNITGenerator, nets["G"]), batch["A"], batch["B"]
        if not torch.is_grad_enabled():
            (of_a,), (of_b,) = run_together([(g.a.enc_content, [a]), (g.b.enc_content, [b])])
            return {"B": g.b.decode(of_a, batch["style_B"]), "A": g.a.decode(of_b, batch["style_A"])}
        (of_a, of_b), (own_a, own_b) = g.encode(a, b)
        fake_a, recon_a = g.a.decode_each([(of_b, batch["style_A"]), (of_a, own_a)])
        fake_b, recon_b = g.b.decode_each([(of_a, batch["style_B"]), (of_b, own_b)])
        return {
            "A": fake_a, "B": fake_b, "content_A": of_a, "content_B": of_b, "own_A": own_a, "own_B": own_b,
            "recon_A": recon_a, "recon_B": recon_b,
        }  # fmt: skip

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """The content of one domain in a style of the other."""
        return MUNITTranslator(cast(MUNITGenerator, nets["G"]), way.source, way.target)

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Verdicts, and the reconstruction of images, styles and contents (equations 1 to 5)."""
        c, (g, d), terms = self.config, (cast(Any, nets[k]) for k in "GD"), dict[str, Tensor]()
        # a translation into A has the content of an image of B
        (of_b, of_a), styles = g.encode(fakes["A"], fakes["B"])
        verdicts, parts, contents = d.judge([fakes["A"]], [fakes["B"]]), (g.a, g.b), (of_a, of_b)
        for domain, (maps,), part, content, style in zip("AB", verdicts, parts, contents, styles):
            each = [losses.generator_gan(logits, c.gan_mode) for logits in maps]
            terms |= {
                f"G_{domain}": c.lambda_gan * torch.stack(each).sum(),
                f"recon_{domain}": c.lambda_recon * losses.l1(fakes[f"recon_{domain}"], batch[domain]),
                f"style_{domain}": c.lambda_style * losses.l1(style, batch[f"style_{domain}"]),
                f"content_{domain}": c.lambda_content * losses.l1(content, fakes[f"content_{domain}"]),
            }
            if c.lambda_cycle > 0:
                again = part.decode(content, fakes[f"own_{domain}"])
                terms[f"cycle_{domain}"] = c.lambda_cycle * losses.l1(again, batch[domain])
        if c.weight_decay > 0:
            terms["decay"] = losses.weight_decay(g.parameters(), c.weight_decay)
        total = torch.stack(list(terms.values())).sum()
        return total, {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Both discriminators at all scales; "D" is the mean of what is summed."""
        c, d, terms = self.config, cast(Any, nets["D"]), dict[str, Tensor]()
        shown = [[batch[k], fakes[k].detach().to(batch[k].dtype)] for k in ("A", "B")]
        weights = {"real_label": c.real_label, "real_weight": c.d_real_weight, "fake_weight": c.d_fake_weight}
        each: list[Tensor] = []
        for domain, (real, fake) in zip("AB", d.judge(*shown)):
            found = [losses.discriminator_gan(x, y, c.gan_mode, **weights) for x, y in zip(real, fake)]
            each += found
            for name, maps in (("real", real), ("fake", fake)):
                terms[f"D_{domain}_{name}"] = torch.stack([losses.mean(x) for x in maps]).mean()
        loss = torch.stack(each).sum()
        terms["D"] = loss.detach() / len(each)
        return loss + losses.weight_decay(d.parameters(), c.weight_decay), terms

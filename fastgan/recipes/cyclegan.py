"""CycleGAN (Zhu, Park, Isola, Efros 2017, arXiv 1703.10593): two generators, two discriminators, unpaired
images.

Names are upstream's: G_A translates A to B, and D_A judges images of B. The generators are updated first; the
discriminators then see, through a history pool, the fakes from before that update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgan import config as settings
from fastgan import losses
from fastgan.recipes.base import (
    Batch,
    Direction,
    Nets,
    Terms,
    Trial,
    judge,
    make_discriminator,
    make_generator,
    unfit_translator,
)
from fastgan.stack import run_together


@dataclass(frozen=True)
class CycleGANConfig(settings.Config):
    """Settings of CycleGAN."""

    lambda_A: float = 10.0  # weight of the cycle A -> B -> A
    lambda_B: float = 10.0  # weight of the cycle B -> A -> B
    lambda_identity: float = 0.5  # weight of the identity loss, times lambda_A or _B


class CycleGAN:
    """Settings and pure loss functions; see `fastgan.recipes.base.Recipe`."""

    name: ClassVar[str] = "cyclegan"
    title: ClassVar[str] = "CycleGAN"
    config_class: ClassVar[type[settings.Config]] = CycleGANConfig
    paired: ClassVar[bool] = False
    domains: ClassVar[tuple[str, ...]] = ("A", "B")
    labelled: ClassVar[bool] = False
    noise: ClassVar[dict[str, int]] = {}
    order: ClassVar[Literal["g-first", "d-first"]] = "g-first"
    generators: ClassVar[tuple[str, ...]] = ("G_A", "G_B")
    discriminators: ClassVar[tuple[str, ...]] = ("D_A", "D_B")
    directions: ClassVar[dict[str, Direction]] = {
        "AtoB": Direction("G_A", "A", "B", "G_B"),
        "BtoA": Direction("G_B", "B", "A", "G_A"),
    }
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        # section 7.2 of the paper: 6 blocks for 128-pixel images
        "small": {"blocks": 6, "load_size": 143, "crop_size": 128},
        # instance norm would remove the colour that fills an image, so the digits use batch norm
        "digits": {
            "norm": "batch", "ngf": 32, "ndf": 32, "blocks": 6, "patch": 34, "lambda_identity": 0.0,
            "batch_size": 16, "lr": 4e-4, "epochs": 8, "epochs_decay": 6, "load_size": 32, "crop_size": 32,
            "flip": False, "log_every": 25, "sample_every": 100, "save_every": 200,
        },
    }  # fmt: skip

    def __init__(self, config: CycleGANConfig) -> None:
        self.config = config

    def networks(self, channels_a: int, channels_b: int) -> Nets:
        """G_A (A to B), G_B (B to A), D_A (judges B), D_B (judges A)."""
        c = self.config
        return {
            "G_A": make_generator(c, channels_a, channels_b),
            "G_B": make_generator(c, channels_b, channels_a),
            "D_A": make_discriminator(c, channels_b),
            "D_B": make_discriminator(c, channels_a),
        }

    def unfit(self, height: int, width: int) -> str:
        """See `unfit_translator`."""
        return unfit_translator(self.config, height, width)

    def numbers(self, step: int) -> dict[str, float]:
        """Nothing."""
        return {}

    def translate(self, nets: Nets, batch: Batch) -> Batch:
        """{"B": G_A(A), "A": G_B(B)}; with gradients also the identity images "idt_A": G_A(B), "idt_B"."""
        a, b = batch["A"], batch["B"]
        if not (torch.is_grad_enabled() and self.config.lambda_identity > 0):
            ((fake_b,), (fake_a,)) = run_together([(nets["G_A"], [a]), (nets["G_B"], [b])])
            return {"B": fake_b, "A": fake_a}
        # G_A on B should change nothing: it needs as many channels in as out
        calls = [(nets["G_A"], [a, b]), (nets["G_B"], [b, a])]
        (fake_b, idt_a), (fake_a, idt_b) = run_together(calls)
        return {"B": fake_b, "A": fake_a, "idt_A": idt_a, "idt_B": idt_b}

    def translator(self, nets: Nets, way: Direction) -> nn.Module:
        """The network of that name."""
        return nets[way.net]

    def generator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Adversarial, cycle and identity losses of both generators (equations 1 to 3 and section 5.2)."""
        c, a, b = self.config, batch["A"], batch["B"]
        verdicts = run_together([(nets["D_A"], [fakes["B"]]), (nets["D_B"], [fakes["A"]])])
        again = run_together([(nets["G_B"], [fakes["B"]]), (nets["G_A"], [fakes["A"]])])
        terms = {
            "G_A": losses.generator_gan(verdicts[0][0], c.gan_mode),
            "G_B": losses.generator_gan(verdicts[1][0], c.gan_mode),
            "cycle_A": c.lambda_A * losses.l1(again[0][0], a),
            "cycle_B": c.lambda_B * losses.l1(again[1][0], b),
        }
        if c.lambda_identity > 0:
            terms["idt_A"] = c.lambda_identity * c.lambda_B * losses.l1(fakes["idt_A"], b)
            terms["idt_B"] = c.lambda_identity * c.lambda_A * losses.l1(fakes["idt_B"], a)
        return sum(terms.values(), start=a.new_zeros(())), {k: v.detach() for k, v in terms.items()}

    def discriminator_loss(self, nets: Nets, batch: Batch, fakes: Batch) -> tuple[Tensor, Terms]:
        """Both discriminators; their parameters are disjoint, so the sum has the gradients of each alone."""
        trials = [
            Trial(nets["D_A"], batch["B"], fakes["B"], "D_A"),
            Trial(nets["D_B"], batch["A"], fakes["A"], "D_B"),
        ]
        return judge(self.config, trials)

"""CycleGAN and pix2pix are what their definitions say: losses, and every parameter after each of five steps.

The twin in reference_systems.py is written from the definitions and shares nothing with the package. Both run
in float64 from the same weights on the same images, so they differ by rounding alone: about 1e-15 of a value,
a hundred times more where Adam divides a small gradient by its own size. The smallest change of a definition
moves a parameter by a fraction of lr, which is 0.01 here; 1e-9 lies far from both. Learning rates and initial
weights are larger than in practice so that five steps go somewhere.

The bias of a convolution in front of an instance norm is the exception: it has no effect, its gradient is
zero, and what Adam makes of the rounding of that zero, lr * 1e-15 / 1e-8, is nobody's definition. There the
tolerance is 1e-6, still a ten-thousandth of a real update.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fastgan import stack
from fastgan.recipes.cyclegan import CycleGANConfig
from fastgan.recipes.pix2pix import Pix2Pix, Pix2PixConfig
from tests.system_cases import (
    CLOSE,
    CYCLE,
    PIX,
    assert_five_steps,
    double,
    make_batches,
)

CYCLEGAN_CASES: dict[str, dict[str, Any]] = {
    "plain": {"lambda_identity": 0.0},
    "identity": {"lambda_identity": 0.5},
    "weights": {"lambda_A": 3.0, "lambda_B": 11.0, "lambda_identity": 0.3},
    "weights-no-identity": {"lambda_A": 3.0, "lambda_B": 11.0, "lambda_identity": 0.0},
    "lr_d": {"lr": 0.01, "lr_d": 0.004},
    "betas": {"beta1": 0.3, "beta2": 0.9},
    "two-blocks-patch-34": {"blocks": 2, "patch": 34},
    "pixel": {"patch": 1},
    "vanilla": {"gan_mode": "vanilla"},
    "vanilla-smooth": {"gan_mode": "vanilla", "real_label": 0.8},
    "lsgan-smooth": {"real_label": 0.9, "d_real_weight": 0.7, "d_fake_weight": 0.2},
    "hinge": {"gan_mode": "hinge", "d_real_weight": 1.0, "d_fake_weight": 0.4},
    "wgan": {"gan_mode": "wgan", "clip": 0.1},
    "wgan-rmsprop": {"gan_mode": "wgan", "clip": 0.2, "optimizer": "rmsprop", "n_critic": 2, "lr": 0.002},
    "wgan-gp": {"gan_mode": "wgan-gp", "beta1": 0.0, "beta2": 0.9},
    "wgan-gp-weights": {"gan_mode": "wgan-gp", "lambda_gp": 3.0, "d_real_weight": 0.8, "d_fake_weight": 0.3},
    "n_critic": {"n_critic": 3},
    "n_critic-no-identity": {"n_critic": 2, "lambda_identity": 0.0, "lr_d": 0.02},
    "ema": {"ema": 0.9},
    "ema-n_critic": {"ema": 0.7, "n_critic": 2},
    "batch-norm": {"norm": "batch"},
    "no-norm": {"norm": "none", "lambda_A": 5.0},
    "unet": {"generator": "unet", "levels": 4},
    "encdec": {"generator": "encdec", "levels": 4, "norm": "batch"},
    "pool-not-full": {"pool_size": 50},
    "pool-not-full-n_critic": {"pool_size": 50, "n_critic": 2},
}


@pytest.mark.parametrize("case", CYCLEGAN_CASES)
def test_cyclegan_is_the_reference(case):
    assert_five_steps(CycleGANConfig(**{**CYCLE, **CYCLEGAN_CASES[case]}))


STACKED = (
    "plain",
    "identity",
    "pixel",
    "wgan-gp",
    "n_critic",
    "batch-norm",
    "no-norm",
    "unet",
    "pool-not-full",
)


@pytest.mark.parametrize("case", STACKED)
def test_two_networks_in_one_pass_are_the_reference(case, monkeypatch):
    """What a GPU runs: both generators, and both discriminators, as two weight sets of one network; real and
    identity images of both domains in one pass. Where batch norm mixes a batch, it may not be."""
    monkeypatch.setattr(stack, "runs_fused", lambda x: True)
    passes: list[tuple[int, int]] = []
    run = stack.run_layers

    def counted(lines, x, memory):
        if hasattr(lines[0][0], "line"):  # networks, not their inside
            passes.append((len(lines), len(x)))
        return run(lines, x, memory)

    monkeypatch.setattr(stack, "run_layers", counted)
    config = CycleGANConfig(**{**CYCLE, **CYCLEGAN_CASES[case]})
    assert_five_steps(config)
    if case == "identity":
        # batch 2: level one, D in the generators' step, level two, D
        assert passes == [(2, 8), (2, 4), (2, 4), (2, 8)] * 5
    if case == "batch-norm":
        assert not passes


def test_cyclegan_batch_of_one():
    assert_five_steps(CycleGANConfig(**CYCLE), n=1)


def test_cyclegan_unequal_channels():
    assert_five_steps(CycleGANConfig(**{**CYCLE, "lambda_identity": 0.0}), a=1, b=4)


PIX2PIX_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "five-levels": {"levels": 5},
    "weight": {"lambda_L1": 7.0, "lr_d": 0.003},
    "no-l1": {"lambda_L1": 0.0},
    "smooth": {"real_label": 0.9, "d_real_weight": 0.3, "d_fake_weight": 0.7},
    "lsgan": {"gan_mode": "lsgan", "real_label": 0.9},
    "hinge": {"gan_mode": "hinge", "d_real_weight": 0.2, "d_fake_weight": 0.9, "lambda_L1": 1.0},
    "wgan": {"gan_mode": "wgan", "clip": 0.1, "lambda_L1": 1.0, "n_critic": 2},
    "wgan-rmsprop": {"gan_mode": "wgan", "optimizer": "rmsprop", "clip": 0.1, "lr": 0.002, "lambda_L1": 1.0},
    "wgan-gp": {"gan_mode": "wgan-gp", "norm": "instance", "lambda_L1": 1.0, "beta1": 0.0, "beta2": 0.9},
    "n_critic": {"n_critic": 2},
    "ema": {"ema": 0.8},
    "instance-norm": {"norm": "instance", "patch": 34},
    "no-norm": {"norm": "none"},
    "pixel": {"patch": 1},
    "resnet": {"generator": "resnet", "blocks": 2},
    "encdec": {"generator": "encdec"},
    "pool-not-full": {"pool_size": 50},
}


@pytest.mark.parametrize("case", PIX2PIX_CASES)
def test_pix2pix_is_the_reference(case):
    config = Pix2PixConfig(**{**PIX, **PIX2PIX_CASES[case]})
    # one forward of G per batch: its running statistics are defined too
    buffers = ("G",) if config.norm == "batch" else ()
    assert_five_steps(
        config, size=32 if config.levels == 5 and config.generator != "resnet" else 16, buffers=buffers
    )


def test_pix2pix_unequal_channels():
    assert_five_steps(Pix2PixConfig(**PIX), a=1, b=4)


def test_pix2pix_batch_of_one():
    assert_five_steps(Pix2PixConfig(**PIX), n=1, size=32)


@pytest.mark.parametrize("patch", [1, 16])
@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_pairs_that_share_a_condition_are_judged_like_any_pair(norm, patch):
    torch.manual_seed(0)
    nets = double(Pix2Pix(Pix2PixConfig(**{**PIX, "norm": norm, "patch": patch})).networks(3, 3))
    batch = make_batches(1)[0][0]
    images = [batch["B"], batch["B"].flip(0), batch["B"] * 0.5]
    found = nets["D"].compare(batch["A"], images)
    for verdict, image in zip(found, images, strict=True):
        assert_close(verdict, nets["D"](torch.cat([batch["A"], image], 1)), **CLOSE)
    pairs = [nets["D"](torch.cat([batch["A"], image], 1)) for image in images]
    parameters = list(nets["D"].parameters())
    grads = [
        # the bias in front of an instance norm has no gradient
        torch.autograd.grad(sum((v * v).sum() for v in verdicts), parameters, allow_unused=True)
        for verdicts in (found, pairs)
    ]
    for ours, expected in zip(*grads):
        assert_close(ours, expected, **CLOSE)

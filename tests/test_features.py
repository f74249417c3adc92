"""Discriminators that show their hidden features, the loss between such features, and the two systems built
on them: DiscoGAN and PAN are what their definitions say. See test_recipes.py for the method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastgan
from fastgan import export, losses, train
from fastgan.models import (
    DiscoGANDiscriminator,
    DiscoGANGenerator,
    FeatureDiscriminator,
    PANDiscriminator,
    PANGenerator,
)
from fastgan.recipes.discogan import DiscoGAN, DiscoGANConfig
from fastgan.recipes.pan import PAN, PANConfig
from fastgan.step import Step
from tests.reference_features import disco_discriminator, pan_discriminator
from tests.system_cases import CLOSE, DISCO, PERCEPTUAL, assert_five_steps, double, make_batches

# the loss


def _rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_feature_matching_by_hand():
    real = [_rows([1.0, 2.0], [3.0, 6.0]), _rows([1.0], [1.0])]
    fake = [_rows([0.0, 2.0], [5.0, 3.0]), _rows([0.0], [4.0])]
    # |1| + 0 + |2| + |3| over 4; |1| + |3| over 2
    assert_close(losses.feature_matching(real, fake).item(), 1.5 + 2.0)
    assert_close(losses.feature_matching(real, fake, weights=[2.0, 0.5]).item(), 3.0 + 1.0)
    # means (2, 4) and (2.5, 2.5): (0.25 + 2.25) / 2; means 1 and 2
    assert_close(losses.feature_matching(real, fake, between="means").item(), 1.25 + 1.0)
    # which image is which does not matter, nor how many there are
    twice = [torch.cat([x.flip(0), x]) for x in fake]
    assert_close(losses.feature_matching(real, twice, between="means").item(), 2.25)


def test_feature_matching_reaches_both_sides_and_is_reduced_in_float32():
    real, fake = (torch.full((2, 3), v, requires_grad=True) for v in (1.0, 0.5))
    for between in ("images", "means"):
        loss = losses.feature_matching([real], [fake], between=between)
        grads = torch.autograd.grad(loss, [real, fake])
        assert_close(grads[0], -grads[1])
        assert grads[0].abs().min() > 0
    wide = [torch.full((1, 2**16), 1.0, dtype=torch.bfloat16)]
    assert losses.feature_matching(wide, [0 * wide[0]]).dtype == torch.float32


@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 1, 2), (2, 2, 1)])
def test_feature_matching_needs_a_weight_and_a_twin_for_every_layer(counts):
    real, fake = ([torch.zeros(1, 1)] * n for n in counts[:2])
    with pytest.raises(ValueError, match="equally many"):
        losses.feature_matching(real, fake, weights=[1.0] * counts[2])


# networks


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters_are_the_published_ones():
    """In millions, as counted in the public code and in the paper's tables."""
    counts = {
        5.51: DiscoGANGenerator(3, 3),
        7.15: DiscoGANGenerator(3, 3, bottleneck=100),
        2.77: DiscoGANDiscriminator(3),
        16.83: PANGenerator(3, 3),
        7.05: PANDiscriminator(3),
    }
    for millions, net in counts.items():
        assert round(parameters(net) / 1e6, 2) == millions


def test_sizes_are_the_published_ones():
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        for width in (0, 100):
            assert DiscoGANGenerator(3, 4, ngf=2, bottleneck=width)(x).shape == (2, 4, 64, 64)
        logits, hidden = DiscoGANDiscriminator(3, ndf=2)(x, hidden=True)
        assert logits.shape == (2, 1, 1, 1)
        assert [tuple(h.shape[1:]) for h in hidden] == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]
        x = torch.rand(2, 3, 256, 256)
        assert PANGenerator(3, 4, ngf=2)(x).shape == (2, 4, 256, 256)
        logits, hidden = PANDiscriminator(3, ndf=8)(x, hidden=True)
        assert logits.shape == (2, 1)
        assert [tuple(h.shape[1:]) for h in hidden] == [
            (8, 256, 256),
            (32, 64, 64),
            (64, 32, 32),
            (64, 16, 16),
        ]


DISCRIMINATORS = {
    "discogan": (DiscoGANDiscriminator(3, levels=3, ndf=4), disco_discriminator(3, 3, 4, "batch"), (1, 2)),
    "pan": (PANDiscriminator(3, side=64, ndf=8), pan_discriminator(3, 64, 8, "batch"), (0, 3, 5, 7)),
}


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_hidden_features_are_the_activated_layers(name):
    """With their gradients, and as they were: nothing behind them works in place."""
    net, twin, taps = DISCRIMINATORS[name]
    assert isinstance(net, FeatureDiscriminator)
    twin.double().load_state_dict(net.double().state_dict())
    x = torch.rand(3, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    logits, hidden = net(x, hidden=True)
    expected = twin(x)
    assert_close(logits, expected[-1], **CLOSE)
    assert_close(net(x), expected[-1], **CLOSE)
    for mine, k in zip(hidden, taps, strict=True):
        assert_close(mine, expected[k], **CLOSE)
    ours, theirs = (sum((h**2).mean() for h in found) for found in (hidden, [expected[k] for k in taps]))
    assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), **CLOSE)


def test_a_discriminator_of_one_size_refuses_another():
    with pytest.raises(ValueError, match="64x64"):
        PANDiscriminator(3, side=64, ndf=8)(torch.rand(1, 3, 96, 64))


# the systems

DISCOGAN_CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "code": {"lambda_gan": 0.1, "lambda_features": 0.9, "start_rate": 0.125, "curriculum": 2},
    "curriculum without features": {"rate": 0.75, "curriculum": 3, "start_rate": 0.0},
    "bottleneck": {"bottleneck": 6, "rate": 0.25, "output": "tanh"},
    "no norm": {"norm": "none", "bottleneck": 5, "lambda_features": 2.0},
    "instance norm": {"norm": "instance", "lambda_features": 1.0, "lr_d": 0.004},
    "decay": {"weight_decay": 0.3, "gan_mode": "lsgan", "real_label": 0.9, "ema": 0.9},
    "no decay": {"weight_decay": 0.0, "gan_mode": "hinge"},
}


@pytest.mark.parametrize("case", DISCOGAN_CASES)
def test_discogan_is_the_reference(case):
    # four images: of two, a batch norm of single pixels leaves signs
    assert_five_steps(DiscoGANConfig(**{**DISCO, **DISCOGAN_CASES[case]}), n=4, a=1, b=3)


PAN_CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "below the margin": {"margin": 50.0},
    "weights": {"lambda_gan": 0.5, "lambda_perceptual": (1.0, 2.0, 3.0, 4.0), "lambda_L1": 25.0},
    "lsgan": {"gan_mode": "lsgan", "d_real_weight": 0.5, "d_fake_weight": 0.25, "real_label": 0.9},
    "five levels": {"levels": 5, "ema": 0.8},
    "no norm": {"norm": "none", "margin": 0.5},
}


@pytest.mark.parametrize("case", PAN_CASES)
def test_pan_is_the_reference(case):
    assert_five_steps(PANConfig(**{**PERCEPTUAL, **PAN_CASES[case]}), size=64, a=1, b=3)


def test_the_margin_is_a_hinge():
    """D's features are pushed apart below the margin and left alone above it."""
    step_of = {}
    for margin in (0.0, 1e-6, 100.0):
        torch.manual_seed(0)
        recipe = PAN(PANConfig(**{**PERCEPTUAL, "margin": margin}))
        nets, batch = double(recipe.networks(3, 3)), make_batches(1, size=64)[0][0]
        loss, terms = recipe.discriminator_loss(nets, batch, recipe.translate(nets, batch))
        step_of[margin] = loss.item() - terms["D"].item(), terms["margin"].item()
    assert step_of[0.0] == step_of[1e-6] == (0.0, 0.0)
    assert step_of[100.0][0] == pytest.approx(step_of[100.0][1]) and step_of[100.0][1] > 50


def test_the_curriculum_follows_the_number_of_the_step():
    """Also in a run that goes on: the third step of a new Step has the later rate."""
    recipe = DiscoGAN(DiscoGANConfig(**{**DISCO, "start_rate": 0.0, "rate": 1.0, "curriculum": 2}))
    step = Step(recipe, double(recipe.networks(3, 3)), device=torch.device("cpu"))
    found = [step(make_batches(1, n=4)[0], index) for index in (2, 0, 1, 2)]
    assert [float(terms["cycle_A"]) > 0 for terms in found] == [True, False, False, True]
    assert [float(terms["G_A"]) > 0 for terms in found] == [False, True, True, False]


REFUSED = {
    "generator": (["discogan", "--generator", "unet"], "--generator has no effect"),
    "patch": (["pan", "--patch", "16"], "--patch has no effect"),
    "rate": (["discogan", "--rate", "1.5"], "--rate must be in [0, 1]"),
    "negative": (["discogan", "--curriculum", "-1"], "--curriculum must be at least 0"),
    "pool": (["pan", "--pool-size", "3"], "--pool-size must be 0"),
    "whole images": (["pan", "--preprocess", "none"], "--preprocess none"),
    "small": (["discogan", "--levels", "4"], "--levels 4 needs at least 64"),
    "odd": (["discogan", "--bottleneck", "9", "--levels", "4"], "multiples of 64"),
    "one pixel": (["discogan", "--levels", "3", "--bottleneck", "9", "--norm", "instance"], "another --norm"),
    "one image": (["pan", "--batch-size", "1"], "--batch-size 2 or more"),
    "one image, narrow": (
        ["discogan", "--levels", "3", "--bottleneck", "9", "--batch-size", "1"],
        "--batch-size 2 or more",
    ),
    "deep": (["pan", "--levels", "6"], "multiples of 64"),
    "another crop": (["pan", "--load-size", "64", "--crop-size", "64"], "D is made for --crop-size 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words, said = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        train.main([*words, "--device", "cpu", "--steps", "1"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said in lines[-1] and lines[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


RUNS = {
    "discogan": ["--levels", "3", "--bottleneck", "5", "--lambda-features", "1"],
    "pan": ["--levels", "3"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_loaded_and_exported(name, tmp_path: Path, monkeypatch, capsys):
    """The network is read off its keys, its output off the run; images of any size go through."""
    monkeypatch.chdir(tmp_path)
    tiny = ["--ngf", "4", "--ndf", "8", "--batch-size", "4", "--device", "cpu", "--threads", "1"]
    train.main([name, *tiny, *RUNS[name], "--steps", "2", "--max-images", "8", "--name", "r"])
    image = torch.randint(0, 255, (29, 41, 3), dtype=torch.uint8).numpy()
    ours = fastgan.load("runs/r")(image)
    assert ours.shape == image.shape
    export.main(["runs/r", "g.safetensors", "--format", "safetensors"])
    assert (fastgan.load("g.safetensors")(image) == ours).all()
    export.main(["runs/r", "g.pth", "--format", "upstream"])
    # a file without a header: the output that the system has by default
    assert (fastgan.load("g.pth")(image) == ours).all()
    capsys.readouterr()
    export.main(["runs/r", "g.pt2", "--format", "torch-export"])
    assert "from PyTorch" in capsys.readouterr().out

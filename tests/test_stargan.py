"""StarGAN is what its definition says: networks and keys of the official release, losses, five updates in
float64 beside reference_stargan.py as in test_recipes.py; and a run of it as a person meets it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan import losses, stack
from fastgan.checkpoint import CheckpointError, load_generator, load_into, read_weights
from fastgan.models import StarGANDiscriminator, StarGANGenerator, build
from fastgan.models.describe import describe
from fastgan.recipes.stargan import StarGAN, StarGANConfig
from fastgan.step import Step
from tests.reference_noise import reference_noise
from tests.reference_stargan import ReferenceStarDiscriminator, ReferenceStarGAN, ReferenceStarGenerator
from tests.system_cases import CLOSE, FACTORS, IDLE, LOSS_FIELDS, assert_same_parameters, double

# networks


def keys_of_g(blocks: int = 6) -> list[str]:
    """solver.py and model.py of the official release save these, in this order."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    found = []
    for at in (0, 3, 6):
        found += [f"main.{at}.weight", *(f"main.{at + 1}.{name}" for name in norm)]
    for at in range(9, 9 + blocks):
        for inner in (0, 3):
            found += [f"main.{at}.main.{inner}.weight"]
            found += [f"main.{at}.main.{inner + 1}.{name}" for name in norm]
    for at in (9 + blocks, 12 + blocks):
        found += [f"main.{at}.weight", *(f"main.{at + 1}.{name}" for name in norm)]
    return [*found, f"main.{15 + blocks}.weight"]


KEYS_OF_D = [f"main.{k}.{name}" for k in (0, 2, 4, 6, 8, 10) for name in ("weight", "bias")]
KEYS_OF_D += ["conv1.weight", "conv2.weight"]


def test_keys_and_parameters_are_the_official_ones() -> None:
    g, d = StarGANGenerator(), StarGANDiscriminator()
    assert list(g.state_dict()) == keys_of_g() and "main.21.weight" in g.state_dict()
    assert list(d.state_dict()) == KEYS_OF_D
    large = StarGANDiscriminator(size=256)
    counts = [sum(p.numel() for p in net.parameters()) for net in (g, d, large)]
    assert counts == [8_430_528, 44_762_048, 44_884_928]
    shapes = {k: tuple(v.shape) for k, v in d.state_dict().items()}
    assert shapes["conv1.weight"] == (1, 2048, 3, 3) and shapes["conv2.weight"] == (5, 2048, 2, 2)
    with torch.no_grad():
        verdict, label = StarGANDiscriminator(ndf=2)(torch.rand(2, 3, 128, 128))
    assert verdict.shape == (2, 1, 2, 2) and label.shape == (2, 5)


def test_official_checkpoints_are_recognised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = ReferenceStarDiscriminator(3, 4, 32, 6, 3)
    path = tmp_path / "200000-D.ckpt"
    torch.save(theirs.state_dict(), path)
    state, _ = read_weights(path)
    found = describe(state)
    assert found == {
        "network": "stargan-d", "channels": 3, "labels": 4, "size": 32, "ndf": 6, "levels": 3
    }  # fmt: skip
    net = build(found)
    load_into(net, state, str(path))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(net(x), theirs(x))
    with pytest.raises(CheckpointError, match="not a generator: it looks like stargan-d"):
        load_generator(path)
    g = ReferenceStarGenerator(3, 4, 4, 2)
    torch.save(g.state_dict(), tmp_path / "200000-G.ckpt")
    assert load_generator(tmp_path / "200000-G.ckpt", label=[0, 1, 0, 0]).channels == (3, 3)


@pytest.mark.parametrize("memory", stack.MEMORY)
@pytest.mark.parametrize("fused", [False, True])
def test_networks_are_the_twins(fused: bool, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their gradients, on both paths; statistics are those of the image whatever a file has stored."""
    monkeypatch.setattr(stack, "runs_fused", lambda x: fused)
    monkeypatch.setattr("fastgan.models.stargan.runs_fused", lambda x: fused)
    torch.manual_seed(0)
    g, d = StarGANGenerator(2, 3, ngf=2, blocks=2), StarGANDiscriminator(2, 3, size=16, ndf=2, levels=2)
    twins = ReferenceStarGenerator(2, 3, 2, 2), ReferenceStarDiscriminator(2, 3, 16, 2, 2)
    stack.set_memory([g, d], memory)
    for net, twin in zip((g, d), twins):
        for value in twin.state_dict().values():
            if value.is_floating_point():
                value.uniform_(-0.5, 0.5)
        net.double().load_state_dict(twin.double().state_dict())
        net.eval()
    x = torch.rand(2, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[1.0, 0, 0], [0, 1, 1]], dtype=torch.float64)
    ours, expected = ([y := a(x, label), *b(y)] for a, b in ((g, d), (twins[0].train(), twins[1])))
    grads = []
    for found, nets in ((ours, (g, d)), (expected, twins)):
        parameters = [p for net in nets for p in net.parameters()]
        grads.append(torch.autograd.grad(sum((y**2).sum() for y in found), [x, *parameters]))
    assert_close(ours, expected, **CLOSE)
    assert_close(grads[0], grads[1], **CLOSE)


def test_a_discriminator_of_one_size_refuses_another() -> None:
    with pytest.raises(ValueError, match="16x16"):
        StarGANDiscriminator(size=16, levels=2, ndf=2)(torch.rand(1, 3, 32, 16))
    with pytest.raises(ValueError, match="multiple of 64"):
        StarGANDiscriminator(size=32)


# the losses


def test_label_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.5]], dtype=torch.float64)
    one_hot = torch.eye(2, dtype=torch.float64)
    ahead = torch.tensor([0.0 - 2.0, -1.5 - 1.0], dtype=torch.float64)  # the true class of the other one
    expected = ahead.neg().exp().log1p().mean().item()
    assert_close(losses.label_loss(logits, one_hot, classes=True).item(), expected)
    both = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    signs = torch.tensor([[0.0, 2.0], [-1.0, -1.5]], dtype=torch.float64)
    expected = signs.neg().exp().log1p().sum().item() / 2  # of all attributes, over the images alone
    assert_close(losses.label_loss(logits, both, classes=False).item(), expected)
    assert losses.label_loss(logits.bfloat16(), both, classes=False).dtype == torch.float32


TINY: dict[str, Any] = {
    "ngf": 2, "ndf": 3, "blocks": 1, "levels": 2, "load_size": 16, "crop_size": 16, "init": "normal",
    "init_gain": 0.2, "lr": 0.01, "batch_size": 4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "one update of D": {"n_critic": 1},
    "attributes": {"attributes": ("x", "y", "z"), "n_critic": 2},
    "identity": {"n_critic": 1, "lambda_identity": 7.0},
    "weights": {"n_critic": 1, "lambda_class": 0.3, "lambda_cycle": 4.0, "lambda_gp": 2.0, "lr_d": 0.003},
    "two updates of G": {"n_critic": 2, "n_gen": 2, "ema": 0.8},
    "lsgan": {"gan_mode": "lsgan", "n_critic": 1, "real_label": 0.9, "d_real_weight": 0.7},
    "at real": {"gp_at": "real", "n_critic": 1, "levels": 3},
}


def make_batches(config: StarGANConfig, steps: int, labels: int = 3) -> list[list[dict[str, Tensor]]]:
    random, n = torch.Generator().manual_seed(5), config.batch_size
    found = []
    for _ in range(steps * config.batches):
        image = torch.rand(n, 2, config.crop_size, config.crop_size, generator=random).double() * 2 - 1
        if config.attributes:
            label = torch.randint(2, (n, labels), generator=random).double()
        else:
            label = torch.eye(labels)[torch.randint(labels, (n,), generator=random)].double()
        found.append({"A": image, "label": label})
    return [found[k : k + config.batches] for k in range(0, len(found), config.batches)]


def assert_same(net: nn.Module, twin: nn.Module, at: tuple[object, ...]) -> None:
    """All parameters; of the first convolution the middle taps of the label's planes are idle, as is a bias:
    what they add is constant over the image, borders included, and goes with the norm behind them."""
    first = net.main[0].weight
    own = twin.main[0].weight
    assert_close(first[:, 2:, 3, 3], own[:, 2:, 3, 3], **IDLE)
    with torch.no_grad():
        own[:, 2:, 3, 3] = first[:, 2:, 3, 3]
    assert_same_parameters(net, twin, at)


def assert_five_updates(config: StarGANConfig) -> None:
    torch.manual_seed(0)
    recipe = StarGAN(config)
    nets = double(recipe.networks(2, 3))
    start = copy.deepcopy({name: net.state_dict() for name, net in nets.items()})
    c = config
    twins: dict[str, nn.Module] = {
        "G": ReferenceStarGenerator(2, 3, c.ngf, c.blocks),
        "D": ReferenceStarDiscriminator(2, 3, c.crop_size, c.ndf, c.levels),
    }
    for name, net in twins.items():
        net.double().load_state_dict(nets[name].state_dict(), strict=True)
    other = {"lambda_identity"}
    settings = {name: getattr(c, name) for name in set(LOSS_FIELDS) - other if hasattr(c, name)}
    twin = ReferenceStarGAN(
        twins, **settings, n_critic=c.n_critic, lambda_class=c.lambda_class, lambda_cycle=c.lambda_cycle,
        lambda_identity=c.lambda_identity, attributes=c.attributes, gp_at=c.gp_at,
    )  # fmt: skip
    step = Step(recipe, nets, device=torch.device("cpu"))
    for index, batches in enumerate(make_batches(c, 5)):
        torch.manual_seed(100 + index)
        terms = step(batches, index, FACTORS[index])
        torch.manual_seed(100 + index)
        order = reference_noise(c.seed, index, len(batches), c.batch_size, 1)
        given = [{**batch, "order": z} for batch, z in zip(batches, order, strict=True)]
        for name, value in twin.step(given, FACTORS[index]).items():
            close = {"rtol": 1e-6, "atol": 1e-7} if name in ("D_real", "D_fake") else CLOSE
            assert_close(float(terms[name]), value, **close, msg=lambda m, at=(index, name): f"{at}: {m}")
        assert_same(nets["G"], twins["G"], (index, "G"))
        assert_same_parameters(nets["D"], twins["D"], (index, "D"))
        if c.ema:
            assert_same(step.ema["G"], twin.ema["G"], (index, "ema"))
    for name, net in nets.items():
        moved = [(p - start[name][k]).abs().max() for k, p in net.named_parameters() if p.dim() == 4]
        assert min(moved) > 1e-3, f"{name} did not train"


@pytest.mark.parametrize("case", CASES)
def test_stargan_is_the_reference(case: str) -> None:
    assert_five_updates(StarGANConfig(**{**TINY, **CASES[case]}))


@pytest.mark.parametrize("case", ["paper", "attributes"])
def test_fused_passes_are_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, by the references of the ops; the penalty needs their second derivatives."""
    monkeypatch.setattr(stack, "runs_fused", lambda x: True)
    monkeypatch.setattr("fastgan.models.stargan.runs_fused", lambda x: True)
    assert_five_updates(StarGANConfig(**{**TINY, **CASES[case]}))

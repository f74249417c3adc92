"""A step apart from its losses: gradient accumulation, states by network, wrong calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fastgan.optim import Adam
from fastgan.recipes import RECIPES
from fastgan.step import Step
from tests.system_cases import CLOSE, CYCLE, PIX, assert_same_parameters, double, make_batches


def make(name: str, memory: str = "fast", **settings: Any) -> Step:
    base = CYCLE if name == "cyclegan" else PIX
    recipe = RECIPES[name](RECIPES[name].config_class(**{**base, **settings}))
    torch.manual_seed(0)
    return Step(recipe, double(recipe.networks(3, 3)), device=torch.device("cpu"), memory=memory)


ACCUMULATED: dict[str, tuple[str, dict[str, Any]]] = {
    "cyclegan": ("cyclegan", {"pool_size": 3}),
    "cyclegan n_critic": ("cyclegan", {"n_critic": 2, "ema": 0.9}),
    "pix2pix": ("pix2pix", {"norm": "instance"}),
    "pix2pix n_critic": ("pix2pix", {"norm": "instance", "n_critic": 2, "pool_size": 4}),
}


@pytest.mark.parametrize("case", ACCUMULATED)
def test_accumulated_batches_are_one_large_batch(case):
    """Without batch norm two batches of 2 give the update, the pool and the losses of one batch of 4."""
    name, settings = ACCUMULATED[case]
    whole, parts = make(name, **settings), make(name, **settings, accumulate=2)
    critics = whole.config.n_critic
    for index, images in enumerate(make_batches(3, critics, n=4)):
        halves = [{k: v[i : i + 2] for k, v in batch.items()} for batch in images for i in (0, 2)]
        expected, found = whole(images, index), parts(halves, index)
        for key, value in expected.items():
            assert_close(found[key], value, rtol=1e-6, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")
        for key, net in whole.nets.items():
            assert_same_parameters(parts.nets[key], net, (index, key))
        mine, theirs = parts.state(), whole.state()
        for key in theirs:
            if key.startswith("pool"):
                assert_close(mine[key], theirs[key], **CLOSE)


@pytest.mark.parametrize("critics", [1, 2])
def test_accumulation_moves_running_statistics_once_a_batch(critics):
    once, parts = (make("pix2pix", lr=0.0, n_critic=critics, accumulate=m) for m in (1, 3))
    images = make_batches(1, 3 * critics)[0]
    for index in range(3):
        once(images[index * critics : (index + 1) * critics], index)
    parts(images, 0)
    for key, value in once.nets["G"].state_dict().items():
        assert_close(parts.nets["G"].state_dict()[key], value, **CLOSE)


def test_wrong_number_of_batches():
    step = make("cyclegan", n_critic=2, accumulate=3)
    with pytest.raises(ValueError, match=r"\* accumulate = 6 batches, got 1"):
        step(make_batches(1)[0], 0)


def test_a_network_is_loaded_with_its_own_optimiser_state():
    """The state of a network is named by it, so a run can go on with one network of another."""
    (images,), other = make_batches(1), make("cyclegan")
    for index in range(2):
        other(images, index)
    mine = make("cyclegan")
    mine(images, 0)
    state = other.state()
    taken = {k: v for k, v in state.items() if k.startswith("optimizer.G_A.")}
    assert {key.rsplit(".", 1)[1] for key in taken} == {"exp_avg", "exp_avg_sq", "step"}
    mine.nets["G_A"].load_state_dict(other.nets["G_A"].state_dict())
    before = mine.state()
    mine.load_state({k: v for k, v in before.items() if not k.startswith("optimizer.G_A.")} | taken)
    after = mine.state()
    assert list(after) == list(before)
    for key, value in after.items():
        expected = state if key.startswith("optimizer.G_A.") else before
        assert torch.equal(value, expected[key]), key
    mine(images, 2)


def test_a_state_that_numbers_the_parameters_is_read():
    """As the first version wrote it: the parameters of G_A, then those of G_B."""
    (images,), step, other = make_batches(1), make("cyclegan"), make("cyclegan")
    step(images, 0)
    state = step.state()
    numbered = {k: v for k, v in state.items() if not k.startswith("optimizer.")}
    for group in "GD":
        names = [f"{k}.{n}" for k in (f"{group}_A", f"{group}_B") for n, _ in step.nets[k].named_parameters()]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            found = [state.get(f"optimizer.{name}.{key}") for name in names]
            # a bias in front of instance norm has no gradient and no state
            numbered |= {f"optimizer.{group}.{i}.{key}": v for i, v in enumerate(found) if v is not None}
    other.load_state(numbered)
    found = other.state()
    assert set(found) == set(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())


COPIED: dict[str, tuple[str, dict[str, Any], str]] = {
    "cyclegan": ("cyclegan", {"ema": 0.9, "pool_size": 2}, "fast"),
    "cyclegan least": ("cyclegan", {}, "least"),
    "pix2pix": ("pix2pix", {}, "fast"),
    "pix2pix wgan": ("pix2pix", {"gan_mode": "wgan", "clip": 0.05}, "fast"),
    "pix2pix least": ("pix2pix", {"gan_mode": "wgan-gp", "norm": "instance"}, "least"),
}


@pytest.mark.parametrize("case", COPIED)
def test_copies_of_the_weights_stand_for_them(case):
    """A GPU's step reads half-precision copies that the optimiser writes. Copies in the weights' own
    precision change nothing, so every place that must use or refresh them does."""
    name, settings, memory = COPIED[case]
    plain, copied = (make(name, memory=m, **settings) for m in ("fast", memory))
    copied.optimizers = {
        group: Adam(
            optimizer.param_groups[0]["params"],
            lr=0.01,
            betas=optimizer.defaults["betas"],
            copies=torch.float64,
        )
        for group, optimizer in copied.optimizers.items()
    }
    for index, images in enumerate(make_batches(4)):
        for step in (plain, copied):
            torch.manual_seed(index)
            step(images, index, watch=True)
        if index == 1:
            # as a resumed run: networks from outside, then the state
            for key, net in copied.nets.items():
                net.load_state_dict({k: v.clone() for k, v in plain.nets[key].state_dict().items()})
            copied.load_state(plain.state())
    assert all(optimizer.has_copies for optimizer in copied.optimizers.values())
    for key, net in plain.nets.items():
        assert_same_parameters(copied.nets[key], net, (case, key))
    terms = [step(images, 9, watch=True) for step in (plain, copied) if torch.manual_seed(9)]
    assert list(terms[0]) == list(terms[1])
    for key, value in terms[0].items():
        assert_close(terms[1][key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")

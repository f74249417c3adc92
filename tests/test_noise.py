"""The systems that make images from noise are what their definitions say, and what they are made of: losses
and parameters after three steps beside reference_noise.py, in float64 as in test_recipes.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan import losses, stack, train
from fastgan.config import UsageError
from fastgan.layers import MinibatchStd, spectral_norm
from fastgan.memory import estimate
from fastgan.models.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.recipes import RECIPES
from fastgan.step import Step
from tests import reference_noise
from tests.reference_noise import ReferenceNoiseSystem
from tests.system_cases import CLOSE, FACTORS, LOSS_FIELDS, assert_same_parameters, double

TINY: dict[str, Any] = {
    "ngf": 2, "ndf": 2, "load_size": 16, "crop_size": 16, "noise_size": 5, "init_gain": 0.3, "lr": 0.01,
    "batch_size": 4,
}  # fmt: skip
FACES: dict[str, Any] = {"architecture": "faces", "load_size": 64, "crop_size": 64, "ngf": 1, "ndf": 1}
CONV: dict[str, Any] = {"architecture": "dcgan"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dcgan": ("dcgan", {"lr_d": 0.004}),
    "two updates of G": ("dcgan", {"n_gen": 2, "noise": "normal", "ema": 0.8}),
    "two of D, two of G": ("dcgan", {"n_gen": 2, "n_critic": 2, "gan_mode": "hinge"}),
    "minibatch std": ("dcgan", {"minibatch_std": True, "gan_mode": "lsgan", "real_label": 0.9}),
    "no norm": ("dcgan", {"norm": "none", "norm_d": "none", "load_size": 32, "crop_size": 32}),
    "instance norm": ("dcgan", {"norm": "instance", "norm_d": "instance", "output": "sigmoid"}),
    "faces": ("dcgan", {**FACES, "noise": "normal"}),
    # thousands of weights: their gradients must not be near the 1e-8 of Adam
    "cgan": ("cgan", {"dropout": False, "init": "xavier", "init_gain": 1.0, "lr": 1e-3}),
    "cgan conv": ("cgan", {**CONV, "output": "tanh"}),
    "cgan faces": ("cgan", {**FACES, "dropout": False}),
    "cgan wgan-gp": ("cgan", {**CONV, "gan_mode": "wgan-gp", "norm_d": "layer", "n_critic": 2}),
    "wgan": ("wgan", {"n_critic": 2, "clip": 0.1, "lr": 0.002}),
    "wgan-gp": ("wgan-gp", {"n_critic": 2}),
    "wgan-gp at real": ("wgan-gp", {"n_critic": 1, "gp_at": "real", "lambda_gp": 3.0}),
    "wgan-gp at fake": ("wgan-gp", {"n_critic": 1, "gp_at": "fake", "norm_d": "none"}),
}


def make(case: str) -> Any:
    name, settings = CASES[case]
    return RECIPES[name](RECIPES[name].config_class(**{**TINY, **settings}))


def make_batches(config: Any, steps: int, labels: int = 3) -> list[list[dict[str, Tensor]]]:
    random, n = torch.Generator().manual_seed(5), config.batch_size
    found = []
    for _ in range(steps * config.batches):
        image = torch.rand(n, 2, config.crop_size, config.crop_size, generator=random).double() * 2 - 1
        label = torch.eye(labels)[torch.randint(labels, (n,), generator=random)].double()
        found.append({"A": image, "label": label})
    return [found[k : k + config.batches] for k in range(0, len(found), config.batches)]


def assert_three_steps(recipe: Any) -> None:
    c = recipe.config
    torch.manual_seed(0)
    nets = double(recipe.networks(2, 3))
    start = copy.deepcopy({name: net.state_dict() for name, net in nets.items()})
    twins = getattr(reference_noise, c.architecture)(c, 2, 3 if recipe.labelled else 0)
    for name, net in twins.items():
        net.double().load_state_dict(nets[name].state_dict(), strict=True)
    settings = {name: getattr(c, name) for name in LOSS_FIELDS if hasattr(c, name)}
    twin = ReferenceNoiseSystem(
        twins, **settings, n_critic=c.n_critic, uniform=c.noise == "uniform", labelled=recipe.labelled,
        gp_at=c.gp_at,
    )  # fmt: skip
    step = Step(recipe, nets, device=torch.device("cpu"))
    for index, batches in enumerate(make_batches(c, 3)):
        torch.manual_seed(100 + index)
        terms = step(batches, index, FACTORS[index + 1])
        torch.manual_seed(100 + index)
        noise = reference_noise.reference_noise(c.seed, index, len(batches), c.batch_size, c.noise_size)
        given = [{**batch, "z": z} for batch, z in zip(batches, noise, strict=True)]
        for name, value in twin.step(given, FACTORS[index + 1]).items():
            close = {"rtol": 1e-6, "atol": 1e-7} if name in ("D_real", "D_fake") else CLOSE
            assert_close(float(terms[name]), value, **close, msg=lambda m, at=(index, name): f"{at}: {m}")
        for name, net in twins.items():
            assert_same_parameters(nets[name], net, (index, name))
            assert_close(dict(nets[name].named_buffers()), dict(net.named_buffers()), **CLOSE)
        if c.ema:
            assert_same_parameters(step.ema["G"], twin.ema["G"], (index, "ema"))
    for name, net in nets.items():
        assert all((p - start[name][k]).abs().max() > 1e-4 for k, p in net.named_parameters() if p.dim() > 1)


@pytest.mark.parametrize("case", CASES)
def test_a_system_is_the_reference(case: str) -> None:
    assert_three_steps(make(case))


@pytest.mark.parametrize("case", ["dcgan", "instance norm", "faces", "cgan conv", "wgan-gp"])
def test_fused_passes_are_the_reference(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, by the references of the ops."""
    monkeypatch.setattr(stack, "runs_fused", lambda x: True)
    assert_three_steps(make(case))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters_and_initial_weights() -> None:
    def made(name: str, preset: str, labels: int = 0) -> dict[str, nn.Module]:
        cls = RECIPES[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            channels = 1 if name == "cgan" else 3
            return cls(cls.config_class(**cls.presets[preset])).networks(channels, labels)

    faces = made("dcgan", "faces")
    assert (count(faces["G"]), count(faces["D"])) == (487_731, 815_569)
    # 1024, 512, 256, 128 channels: the transposed convolutions and two numbers a channel
    paper = made("dcgan", "default")
    widths = [100, 1024, 512, 256, 128, 3]
    assert count(paper["G"]) == 16 * sum(a * b for a, b in zip(widths, widths[1:])) + 2 * sum(widths[1:-1])
    for net in paper.values():
        weights = torch.cat([p.flatten() for p in net.parameters() if p.dim() == 4])
        assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    cgan = made("cgan", "default", 10)
    assert count(cgan["G"]) == 101 * 200 + 11 * 1000 + 1201 * 1200 + 1201 * 784
    assert count(cgan["D"]) == 785 * 1200 + 11 * 250 + 291 * 960 + 241


def test_keys_are_those_of_the_public_example() -> None:
    """pytorch/examples, dcgan/main.py."""
    g, d = DCGANGenerator(100, 3, ngf=64), DCGANDiscriminator(3, ndf=64)
    convs = [key for key, p in g.named_parameters() if p.dim() == 4]
    assert convs == [f"main.{k}.weight" for k in (0, 3, 6, 9, 12)]
    convs = [key for key, p in d.named_parameters() if p.dim() == 4]
    assert convs == [f"main.{k}.weight" for k in (0, 2, 5, 8, 11)]
    assert count(g) == 3_576_704 and count(d) == 2_765_568


def test_uniform_noise_is_uniform() -> None:
    seen: list[Tensor] = []

    class Look(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            seen.append(z)
            return z

    recipe = make("dcgan")
    recipe.translate({"G": Look()}, {"z": torch.randn(100_000, generator=torch.Generator().manual_seed(0))})
    quantiles = torch.linspace(0.1, 0.9, 9)
    assert_close(seen[0].quantile(quantiles), 2 * quantiles - 1, atol=0.01, rtol=0)


def test_noise_is_new_in_every_batch_and_that_of_its_step() -> None:
    recipe = make("two of D, two of G")
    step = Step(recipe, recipe.networks(2, 0), device=torch.device("cpu"))
    first, again, next_one = (step._draw(3, 4, index)["z"] for index in (7, 7, 8))
    assert first.shape == (3, 4, 5) and first.dtype == torch.float32
    assert torch.equal(first, again) and len(torch.cat([first, next_one]).flatten().unique()) == 120


# shared pieces


def test_minibatch_std_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 8.0]], dtype=torch.float64).view(2, 1, 1, 2)
    y = MinibatchStd()(x)
    assert_close(y[:, :1], x)
    assert_close(y[:, 1:], torch.full_like(x, 2.0), rtol=1e-6, atol=0)  # (1 + 3) / 2
    same = torch.ones(3, 2, 4, 4, requires_grad=True)
    MinibatchStd()(same).square().sum().backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_batches_that_are_measured_together_stay_apart() -> None:
    net = DCGANDiscriminator(1, size=8, ndf=2, norm="none", minibatch_std=True)
    x = torch.randn(2, 3, 1, 8, 8)
    ((a, b),) = stack.run_together([(net, [x[0], x[1]])])
    assert_close(torch.stack([a, b]), torch.stack([net(x[0]), net(x[1])]))


def test_spectral_norm_bounds_every_layer() -> None:
    torch.manual_seed(0)
    net = spectral_norm(DCGANDiscriminator(1, size=16, ndf=4, norm="none")).double()
    x = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    for _ in range(300):
        net(x)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 3
    for layer in layers:
        values = torch.linalg.svdvals(layer.weight.flatten(1))
        assert_close(values[0].item(), 1.0, rtol=1e-4, atol=0)
    before = copy.deepcopy(net.state_dict())
    net.eval()(x).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters() if "original" in n)


@pytest.mark.parametrize("at", ["mixed", "real", "fake"])
def test_penalty_at(at: Any) -> None:
    seen: list[Tensor] = []

    def critic(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum((1, 2, 3)) / 2  # its slope is x itself

    real, fake = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), -1.0)
    found = losses.gradient_penalty(critic, real, fake, at)
    size = seen[0].abs()[:, 0, 0, 0] * 2
    assert_close(found, (size - 1).square().mean())
    low, high = {"mixed": (-1.0, 2.0), "real": (2.0, 2.0), "fake": (-1.0, -1.0)}[at]
    assert low <= seen[0].min() and seen[0].max() <= high
    weight = torch.zeros((), requires_grad=True)
    losses.gradient_penalty(lambda x: weight * x.sum((1, 2, 3)), real, fake, at).backward()
    assert weight.grad is not None and weight.grad.isfinite()


# as a person meets them


@pytest.mark.parametrize("name", ["dcgan", "cgan", "wgan", "wgan-gp"])
def test_memory_is_estimated(name: str) -> None:
    cls = RECIPES[name]
    recipe = cls(cls.config_class(**{**cls.presets["digits"], "ngf": 4, "ndf": 4, "spectral_norm": True}))
    found = estimate(recipe, (1, 10), (32, 32), gpu=False)
    assert found.activation_bytes_per_image > 4 * 32 * 32 * 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("dcgan --generator unet", "--generator has no effect here"),
        ("dcgan --crop-size 30", "--crop-size 8, 16, 32, 64"),
        (
            "dcgan --crop-size 64 --load-size 64",
            "images of 32x32 pixels: the generated ones are of --crop-size 64",
        ),
        ("dcgan --preset faces --crop-size 32", "--architecture faces makes images of --crop-size 64"),
        ("dcgan --architecture mlp --minibatch-std", "--minibatch-std needs --architecture dcgan"),
        ("dcgan --noise-size 0", "--noise-size must be at least 1"),
        ("wgan --preprocess none", "must be cropped"),
        ("cgan --pool-size 5", "a stored image would lose its label"),
        ("cgan --attributes Smiling", "the digits have none"),
        ("dcgan --n-gen 0", "--n-gen must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    words: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(words.split())
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and error.count("\n") == 0


def test_a_setting_that_cannot_be_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="labels|label"):
        make("cgan").config.__class__(pool_size=1)

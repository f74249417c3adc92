"""Neural style: the loss is that of its definition, the steps are L-BFGS's, and a run is one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from fastgan import evaluate, losses, train, translate
from fastgan.data.images import read_images
from fastgan.memory import estimate
from fastgan.models import SRCNN
from fastgan.optim import LBFGS
from fastgan.recipes.style import Style, StyleConfig
from fastgan.step import Step
from tests.reference_enlarging import ReferenceStyle, reference_lbfgs, reference_vgg


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_gram_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64).view(1, 2, 1, 2)
    assert_close(losses.gram(x), torch.tensor([[[2.5, 1.5], [1.5, 4.5]]], dtype=torch.float64))
    # positions do not matter, nor how often all of them occur
    assert_close(losses.gram(torch.cat([x.flip(3), x], 2)), losses.gram(x))
    assert losses.gram(torch.full((1, 2, 64, 64), 1.0, dtype=torch.bfloat16)).dtype == torch.float32


def started(**settings: Any) -> tuple[Style, dict[str, Tensor], ReferenceStyle]:
    """A recipe of random features of width 4 with two images of two sizes, and its twin."""
    recipe = Style(StyleConfig(**{"ngf": 4, **settings}))
    images = {"A": noise(1, 3, 32, 48), "B": noise(1, 3, 40, 24, seed=2) ** 3}
    recipe.prepare(images)
    distance = recipe._distance
    assert distance is not None
    vgg = reference_vgg("vgg19", 4).double()
    own = distance.vgg.features.state_dict()
    vgg.load_state_dict({key: own.get(key, value) for key, value in vgg.state_dict().items()})
    c = recipe.config
    weights = c.lambda_content, c.lambda_style, c.lambda_smooth
    return recipe, images, ReferenceStyle(vgg, images["A"], images["B"], *weights, c.weighting == "paper")


@pytest.mark.parametrize("weighting", ["code", "paper"])
def test_the_loss_is_the_reference(weighting):
    recipe, images, twin = started(
        lambda_content=2.0, lambda_style=30.0, lambda_smooth=3.0, start_from="noise", weighting=weighting
    )
    nets = recipe.networks(3, 3)
    fakes = recipe.translate(nets, images)
    loss, terms = recipe.generator_loss(nets, images, fakes)
    expected = twin.terms(fakes["B"])
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-6) and value > 0.01
    gradient = torch.autograd.grad(sum(expected.values(), torch.zeros(())), nets["G"].image)
    loss.backward()
    # mean and spread of ImageNet are float32
    largest = gradient[0].abs().max().item()
    assert_close(nets["G"].image.grad, gradient[0], rtol=0, atol=1e-6 * largest)
    # the content alone is at no distance from itself
    same, images, _ = started()
    assert same.generator_loss({}, images, {"B": images["A"]})[1]["content"].item() == pytest.approx(
        0, abs=1e-12
    )


def test_steps_are_those_of_lbfgs():
    """Five steps with a memory of two, beside the two-loop recursion written out."""
    recipe, images, twin = started(history=2, lr=0.8)
    nets = recipe.networks(3, 3)
    step = Step(recipe, nets, device=torch.device("cpu"))
    start = images["A"].clone()

    def loss(x: Tensor) -> Tensor:
        return start.numel() * sum(twin.terms(x).values(), torch.zeros(()))

    expected = reference_lbfgs(loss, start, 5, 0.8, 2)
    for index, point in enumerate(expected):
        step([images], index)
        # relative to how far the picture has come
        moved = (point - start).abs().max().item()
        assert_close(
            nets["G"].image[None], point, rtol=0, atol=1e-4 * moved, msg=lambda m, k=index: f"{k}: {m}"
        )
    assert moved > 0.01


def test_one_iteration_a_step_is_torchs_loop():
    def loss(x: Tensor) -> Tensor:
        return ((x - torch.arange(8.0)).square() * torch.arange(1.0, 9)).sum() + x.pow(4).sum() / 50

    mine, theirs = (torch.nn.Parameter(torch.full((8,), 0.5)) for _ in range(2))
    ours = LBFGS([mine], lr=0.5, history_size=3)
    torchs = torch.optim.LBFGS([theirs], lr=0.5, max_iter=12, history_size=3, max_eval=99)

    def closure() -> Tensor:
        torchs.zero_grad()
        value = 8 * loss(theirs)
        value.backward()
        return value

    torchs.step(closure)
    for k in range(12):
        if k == 7:
            # taken apart and put together again
            state = {"state": {0: {k: v.clone() for k, v in ours.state_dict()["state"][0].items()}}}
            state["param_groups"] = ours.state_dict()["param_groups"]
            ours = LBFGS([mine], lr=0.5, history_size=3)
            ours.load_state_dict(state)
        ours.zero_grad()
        loss(mine).backward()
        ours.step()
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("count", [200, 1_000_000])
def test_a_mean_over_many_values_is_followed_as_one_over_few(count):
    """Although each of its slopes is small."""
    x = torch.nn.Parameter(torch.zeros(count))
    goal, weights = torch.linspace(-1, 1, count), torch.linspace(1, 3, count)
    optimizer = LBFGS([x])
    for _ in range(25):
        optimizer.zero_grad()
        (weights * (x - goal).square() / 100).mean().backward()
        optimizer.step()
    assert (x - goal).abs().max() < 1e-3


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two images, a 16-bit one and a larger grey one, and weights of VGG19."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 36, 3), np.uint8)).save("photo.png")
    Image.fromarray(rng.integers(0, 256, (80, 40), np.uint8)).save("painting.png")
    torch.manual_seed(0)
    torch.save({f"features.{k}": v for k, v in reference_vgg("vgg19").state_dict().items()}, "vgg.pth")
    torch.save(SRCNN().state_dict(), "other.pth")
    return [
        "style",
        "--content",
        "photo.png",
        "--style",
        "painting.png",
        "--vgg",
        "vgg.pth",
        "--device",
        "cpu",
    ]


def test_a_run_is_one_picture(pictures, capsys):
    """Of the content's size, in the run's folder; it goes on where it was, and no command mistakes it."""
    words = [*pictures, "--threads", "1", "--save-every", "3", "--load-size", "48"]
    train.main([*words, "--steps", "6"])
    run = Path("runs/style-photo-painting")
    (whole,) = read_images(run / "picture.png")
    assert whole.shape == (24, 36, 3) and np.abs(whole.astype(int) - read_images("photo.png")[0]).max() > 0
    assert len(list((run / "samples").glob("*.png"))) == 2
    train.main([*words, "--steps", "3", "--name", "again"])
    train.main([*words, "--steps", "6", "--name", "again"])
    assert np.array_equal(read_images("runs/again/picture.png")[0], whole)
    capsys.readouterr()
    for main, args in ((translate.main, [run, "photo.png", "x.png"]), (evaluate.main, [run])):
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and "picture" in line
    assert not Path("x.png").exists()


REFUSED = {
    "one alone": ({"--style": None}, "--content FILE and --style FILE belong together"),
    "no weights": ({"--vgg": None}, "--vgg FILE is missing"),
    "other weights": ({"--vgg": "other.pth"}, "--vgg other.pth: it is not torchvision's VGG19"),
    "missing": ({"--content": "nothing.png"}, "nothing.png"),
    "data": ({"--data": "."}, "--data has no effect here"),
    "batch": ({"--batch-size": "2"}, "--batch-size has no effect here"),
    "small": ({"--load-size": "20"}, "VGG needs at least 16 pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(case, pictures, capsys):
    changes, said = REFUSED[case]
    given = {**dict(zip(pictures[1::2], pictures[2::2])), **changes, "--steps": "1"}
    words = [word for pair in given.items() if pair[1] is not None for word in pair]
    with pytest.raises(SystemExit) as stop:
        train.main(["style", *words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said in lines[-1] and lines[-1].startswith("error: ")
    assert not Path("runs").exists()


def test_the_estimate_knows_what_lbfgs_remembers():
    """Although it cannot run on tensors without data."""
    found = {}
    for history in (10, 30):
        recipe = Style(StyleConfig(ngf=4, history=history))
        recipe.prepare({"A": noise(1, 3, 32, 48).float(), "B": noise(1, 3, 32, 32).float()})
        found[history] = estimate(recipe, (3, 3), (32, 48), gpu=False).fixed_bytes
    assert found[30] - found[10] == 20 * 2 * 3 * 32 * 48 * 4

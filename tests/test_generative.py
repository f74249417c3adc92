"""Images drawn from noise, the measures of them by hand, and a run from the command line to its figures."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from fastgan import evaluate, metrics, train
from fastgan.data.augment import Geometry
from fastgan.data.labelled import open_labelled
from fastgan.generative import draw
from fastgan.measure import Found, System, Tools, drawn
from fastgan.measure.drawn import class_score, measure_generated
from fastgan.recipes import RECIPES
from fastgan.samples import KEY, sample_columns

CPU = torch.device("cpu")


def make(name: str, **settings: Any) -> tuple[Any, dict[str, nn.Module]]:
    cls = RECIPES[name]
    recipe = cls(cls.config_class(**{**cls.presets["digits"], "ngf": 2, "ndf": 2, **settings}))
    torch.manual_seed(0)
    return recipe, {"G": recipe.networks(1, 10)["G"].eval()}


def test_class_score_by_hand() -> None:
    sure, unsure = torch.eye(4).repeat(5, 1).double(), torch.full((20, 4), 0.25).double()
    assert_close(class_score(sure, 1), 4.0)
    assert_close(class_score(unsure, 1), 1.0)
    assert_close(class_score(sure[:1].repeat(20, 1), 2), 1.0)
    # half of the images sure of one class, half of no class: KL(p | mean) with the mean (5, 1, 1, 1) / 8
    mixed = torch.cat([sure[:1].repeat(10, 1), unsure[:10]])
    mean = [0.625, 0.125, 0.125, 0.125]
    other = sum(0.25 * math.log(0.25 / q) for q in mean)
    assert_close(class_score(mixed, 1), math.exp((math.log(1 / mean[0]) + other) / 2))


def test_a_draw_depends_on_seed_and_key_alone() -> None:
    recipe, nets = make("dcgan")
    torch.manual_seed(1)
    first = draw(recipe, nets, 150, key=KEY, device=CPU)
    torch.manual_seed(2)
    assert torch.equal(first, draw(recipe, nets, 150, key=KEY, device=CPU))
    assert first.shape == (150, 1, 32, 32) and first.abs().max() <= 1
    assert not torch.equal(first[:100], draw(recipe, nets, 100, key=KEY + 1, device=CPU))
    other, _ = make("dcgan", seed=1)
    assert not torch.equal(first[:100], draw(other, nets, 100, key=KEY, device=CPU))


class Show(nn.Module):
    """An image of the first number of noise, and of the class in its first row."""

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        image = z[:, :1, None, None].tanh().repeat(1, 1, 32, 32)
        image[:, 0, 0, :10] = label
        return image


def test_a_grid_has_a_label_a_column_and_one_noise_a_row() -> None:
    recipe, _ = make("cgan")
    data = open_labelled(None, labelled=True, geometry=Geometry("none", 32, 32))
    columns = sample_columns(recipe, {"G": Show()}, data, device=CPU)
    assert list(columns) == [*"0123456789", "real"]
    for k, name in enumerate("0123456789"):
        assert (columns[name][:, 0, 0, :10].argmax(1) == k).all()
        assert torch.equal(columns[name][:, 0, 1], columns["0"][:, 0, 1])
    assert len(columns["0"][:, 0, 1, 0].unique()) == len(columns["0"])
    assert torch.equal(columns["real"], data.test.images("A", 0, len(columns["0"])))
    plain, nets = make("dcgan")
    columns = sample_columns(plain, nets, data, device=CPU)
    assert len(columns) == 10 and len(torch.cat(list(columns.values())[:-1]).flatten(1).unique(dim=0)) == 54


class Real(nn.Module):
    """Gives back real training images: of the label, or always the same few."""

    def __init__(self, split: Any, labelled: bool) -> None:
        super().__init__()
        self.images, self.classes = split.images("A", 0, 10_000), torch.from_numpy(split.labels.argmax(1))
        self.labelled, self.at = labelled, [0] * 10

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return self.images[torch.arange(len(z)) % 2]
        found = []
        for k in label.argmax(1).tolist():
            mine = (self.classes == k).nonzero()[:, 0]
            found.append(self.images[mine[self.at[k] % len(mine)]])
            self.at[k] += 1
        return torch.stack(found)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images and passes than a person gets."""
    monkeypatch.setattr(drawn, "IMAGES", 500)
    monkeypatch.setattr(metrics, "train_classifier", partial(metrics.train_classifier, epochs=6))


@pytest.mark.usefixtures("quick")
def test_measures_of_a_perfect_and_of_a_collapsed_generator() -> None:
    data = open_labelled(None, labelled=True, geometry=Geometry("none", 32, 32))
    recipe, _ = make("cgan")
    good = measure_generated(recipe, {"G": Real(data.train, True)}, data, CPU)
    assert good["label_accuracy"] > 0.99 and good["tstr"] > 0.9
    assert good["class_score"] > 8 and good["class_score_real"] > 7.5
    assert good["class_share_min"] > 0.09 and good["class_share_max"] < 0.11
    recipe, _ = make("dcgan")
    bad = measure_generated(recipe, {"G": Real(data.train, False)}, data, CPU)
    assert bad["class_share_min"] == 0 and bad["class_share_max"] >= 0.5 and bad["class_score"] < 2.1
    assert "label_accuracy" not in bad


def test_images_for_fid_have_the_labels_of_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[metrics.Spool] = []
    monkeypatch.setattr(drawn, "inception", lambda fake, real, *_: taken.extend((fake, real)))
    monkeypatch.setattr(drawn, "FEWEST", 0)
    monkeypatch.setattr(drawn, "AT_ONCE", 7)
    data = open_labelled(None, labelled=True, geometry=Geometry("none", 32, 32), max_images=25)
    recipe, _ = make("cgan")
    system = System.of(recipe, {"G": Real(data.train, True)}, data, CPU)
    assert system.has() == {"inception", "drawn", "labels"}
    drawn.measure_drawn(system, Tools({"fid"}, inception={}), found := Found())
    fake, real = taken
    assert len(fake) == len(real) == data.train.len_A and not found.values
    # images of a class come round: the two sets are one where the labels are those of training
    sets = [sorted(spool[k].numpy().tobytes() for k in range(len(spool))) for spool in taken]
    assert sets[0] == sets[1]


@pytest.mark.usefixtures("quick")
def test_a_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class folders, a picture of samples, a page, a checkpoint, and figures."""
    noise = torch.Generator().manual_seed(0)
    for k in range(8):
        path = tmp_path / f"data/train/{'ab'[k % 2]}/{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = torch.randint(255, (20, 20), generator=noise, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(path)
    monkeypatch.chdir(tmp_path)
    words = "cgan --preset conv --data data --load-size 20 --crop-size 16 --ngf 2 --ndf 2 --batch-size 2"
    train.main([*words.split(), "--steps", "2", "--threads", "1", "--device", "cpu"])
    run = tmp_path / "runs/cgan-data"
    assert json.loads((run / "config.json").read_text())["labels"] == ["a", "b"]
    with Image.open(run / "samples/step_00000002.png") as picture:
        assert picture.size[0] > 3 * 96  # two classes and real images
    assert "step_00000002" in (run / "index.html").read_text() or (run / "index.html").stat().st_size > 10_000
    evaluate.main([str(run), "--device", "cpu"])
    assert "tstr" in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["class_share_max"] >= 0.5

"""Measures against hand-worked values, and the command that prints them."""

import json
from pathlib import Path

import pytest
import torch

from fastgan import evaluate, metrics, train
from fastgan.data.digits import make_digits


def test_l1_and_psnr_of_known_images() -> None:
    x, y = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)
    assert metrics.l1(x, y) == pytest.approx(0.1)
    assert metrics.psnr(x, y) == pytest.approx(20.0, abs=1e-4)  # -10 log10(0.01)
    assert metrics.psnr(x, x) == pytest.approx(100.0)


def test_background_distance_looks_only_where_there_is_no_ink() -> None:
    ink = torch.zeros(1, 2, 2)
    ink[0, 0, 0] = 1
    x = torch.full((1, 3, 2, 2), 0.75)
    x[..., 0, 0] = 0
    assert metrics.background_distance(x, ink) == pytest.approx(0.25)


def test_the_classifier_reads_real_digits_and_leaves_the_generator_alone() -> None:
    data, held_out = (make_digits(split, paired=False) for split in ("train", "test"))
    x = torch.from_numpy(data.B).permute(0, 3, 1, 2) / 255
    before = torch.get_rng_state()
    net = metrics.train_classifier(x, torch.from_numpy(data.labels_B), epochs=15)
    assert torch.equal(before, torch.get_rng_state())
    y = torch.from_numpy(held_out.B).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(held_out.labels_B)
    assert metrics.accuracy(net, y, labels) > 0.9
    assert metrics.accuracy(net, y, (labels + 1) % 10) < 0.1


@pytest.mark.parametrize("recipe", ["cyclegan", "pix2pix"])
def test_evaluate_prints_and_writes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--ngf", "4", "--ndf", "4", "--blocks", "1", "--levels", "3", "--steps", "2", "--name", "r"]
    train.main([recipe, *small, "--device", "cpu"])
    evaluate.main(["runs/r", "--device", "cpu"])
    found = json.loads((tmp_path / "runs/r/evaluation.json").read_text())
    assert found.pop("step") == 2
    own = {"cyclegan": {"cycle_l1_A", "cycle_l1_B"}, "pix2pix": {"l1", "psnr_db"}}[recipe]
    assert own | {"digit_accuracy_real_B", "digit_accuracy_fake_B", "background_distance"} == set(found)
    assert found["digit_accuracy_real_B"] > 0.9 > found["digit_accuracy_fake_B"]
    printed = capsys.readouterr().out
    assert all(f"{key:24} {value:.4f}" in printed for key, value in found.items())


def test_evaluate_of_few_grey_digits_and_the_other_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--ngf",
        "4",
        "--ndf",
        "4",
        "--levels",
        "3",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--max-images",
        "40",
    ]
    train.main(["pix2pix", *small, "--channels", "1", "--name", "grey"])
    train.main(["pix2pix", *small, "--direction", "BtoA", "--name", "back"])
    evaluate.main(["runs/grey"])
    assert "background_distance" in capsys.readouterr().out
    evaluate.main(["runs/back"])
    printed = capsys.readouterr().out
    assert "psnr_db" in printed and "digit" not in printed


def test_evaluate_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([str(tmp_path)])
    assert stop.value.code == 2
    assert "config.json is missing" in capsys.readouterr().err

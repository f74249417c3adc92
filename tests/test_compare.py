"""The comparison of the fast step with eager float32: its verdict, what it writes, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("trainA", (40, 60, 3)), ("trainB", (30, 28, 3))):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(tmp_path / name / "image.png")
    return tmp_path


def arguments(folder, *more: str) -> list[str]:
    small = ["--steps", "8", "--size", "24", "--ngf", "2", "--blocks", "1"]
    return [str(folder), *small, "--out", str(folder / "out"), *more]


def test_four_runs_and_a_verdict(folder, monkeypatch):
    monkeypatch.setattr(compare, "WINDOW", 4)
    code = compare.main(arguments(folder))
    (path,) = (folder / "out").glob("*.json")
    run = json.loads(path.read_text(encoding="utf-8"))
    assert str(folder.parent) not in run["command"], "no paths of this machine"
    losses = {name: found["losses"] for name, found in run["runs"].items()}
    first, fast, other, order = (losses[name] for name in compare.RUNS)
    assert all(len(curve) == 8 for found in losses.values() for curve in found.values())
    # the same weights and crops, rounded to eight bits; other weights are something else
    assert fast["cycle"][0] == pytest.approx(first["cycle"][0], rel=0.02)
    assert fast != first and other["cycle"][0] != pytest.approx(first["cycle"][0], rel=1e-4)
    # float32 in another order: nearly the same numbers, and not the same
    assert order["cycle"] == pytest.approx(first["cycle"], rel=0.02) and order != first
    assert code == int(not all(found["inside"] for found in run["verdict"].values()))
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {key} |" in text for key in compare.LOSSES)
    for picture in (path.with_suffix(".png"), path.with_name(path.stem + "_samples.png")):
        with Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50


def test_what_a_cut_off_run_has_is_not_trained_again(folder, monkeypatch):
    monkeypatch.setattr(compare, "WINDOW", 4)
    compare.main(arguments(folder))
    (path,) = (folder / "out").glob("*.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    cut = {**whole, "runs": {k: v for k, v in whole["runs"].items() if not k.endswith("order")}}
    path.write_text(json.dumps(cut), encoding="utf-8")
    trained = []
    train = compare.train
    monkeypatch.setattr(compare, "train", lambda *given: trained.append(given[-1]) or train(*given))
    compare.main(arguments(folder, "--resume", str(path)))
    again = json.loads(path.read_text(encoding="utf-8"))
    assert trained == ["eager fp32, other order"] and again["verdict"] == whole["verdict"]
    with pytest.raises(SystemExit):
        compare.main(arguments(folder, "--resume", str(path), "--steps", "9"))


def curves(offset: float) -> dict[str, list[float]]:
    """Losses that fall in 100 steps, some way off those of the first run."""
    return {key: list(np.linspace(2, 1, 100) + offset) for key in compare.LOSSES}


@pytest.mark.parametrize(("offset", "inside"), [(0.1, True), (-0.19, True), (0.21, False), (np.nan, False)])
def test_the_band_is_as_wide_as_other_weights_come_away(offset, inside):
    verdict = compare.judge(dict(zip(compare.RUNS, (curves(0), curves(offset), curves(0.2), curves(0)))))
    assert all(found["inside"] is inside for found in verdict.values())
    assert verdict["cycle"]["band"] == pytest.approx(0.2)


def test_one_loss_that_leaves_its_band_for_a_while_is_enough():
    fast = curves(0.0)
    fast["D_B"][94:98] = [5.0] * 4
    verdict = compare.judge(dict(zip(compare.RUNS, (curves(0), fast, curves(0.2), curves(0)))))
    assert [key for key, found in verdict.items() if not found["inside"]] == ["D_B"]
    assert verdict["D_B"]["at_step"] == 98


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "20"], "--steps must be at least 100, got 20"),
        (["--steps", "100", "--size", "30"], "--size must be a multiple of 4 from 24 on, got 30"),
        (["--steps", "100", "--size", "32"], "is smaller than --size 32"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, more, words):
    with pytest.raises(SystemExit) as exit:
        compare.main(arguments(folder, *more))
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_crops_are_the_same_for_every_run(folder):
    images = [compare.read(folder / name, 24) for name in ("trainA", "trainB")]
    one, two = (compare.crops(images, 24, seed=0) for _ in range(2))
    for _ in range(3):
        a, b = next(one), next(two)
        assert torch.equal(a["A"], b["A"]) and torch.equal(a["B"], b["B"])
        assert a["A"].shape == (1, 3, 24, 24) and a["A"].min() >= -1 and a["A"].max() <= 1

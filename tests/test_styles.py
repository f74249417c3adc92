"""What a person does with styles: sample pictures, translations, demo, measures; by a short run of MUNIT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import fastgan
from fastgan import checkpoint, demo, evaluate, export, train, translate
from fastgan.data.digits import make_digits
from fastgan.gallery.grid import KEYWORD
from fastgan.measure import styles
from fastgan.models.munit import MUNITTranslator
from fastgan.recipes.munit import MUNIT, MUNITConfig
from tests.run_cases import TINY, picture

WORDS = "--blocks 1 --mlp-size 8 --steps 2 --max-images 20 --name r --sample-every 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("munit")
    train.main(["munit", *TINY, *WORDS.split(), "--runs", str(folder)])
    picture(folder / "in/one.png"), picture(folder / "in/two.png", (30, 50), seed=1)
    return folder / "r"


def columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a grid, (rows, H, W, C), by their captions."""
    with Image.open(path) as page:
        about, pixels = json.loads(page.text[KEYWORD]), np.asarray(page)  # type: ignore[attr-defined]
    found = {}
    for name, left, top, width, height, count in about["columns"]:
        tops = [top + k * about["pitch"] for k in range(count)]
        found[name] = np.stack([pixels[y : y + height, left : left + width] for y in tops])
    return found


def test_a_translator_goes_its_way() -> None:
    recipe = MUNIT(MUNITConfig(ngf=2, ndf=2, blocks=1, mlp_size=4, levels_d=1, scales=1))
    nets = recipe.networks(1, 3)
    batch = {"A": torch.rand(2, 1, 16, 16), "B": torch.rand(2, 3, 16, 16)}
    batch |= {name: torch.randn(2, numbers) for name, numbers in recipe.noise.items()}
    with torch.no_grad():
        fakes = recipe.translate(nets, batch)
        for way in recipe.directions.values():
            net = recipe.translator(nets, way)
            for k in range(2):
                net.style = batch[f"style_{way.target}"][k]
                assert_close(net(batch[way.source][k : k + 1]), fakes[way.target][k : k + 1])


@pytest.mark.parametrize("inside", [{"x": 1}, {"x": {"y": torch.zeros(1)}}, {"x": "os.system"}])
def test_a_nested_file_of_other_things_is_refused(inside: dict[str, object], tmp_path: Path) -> None:
    torch.save({"a": inside, "b": {"x": torch.zeros(1)}}, tmp_path / "gen_1.pt")
    with pytest.raises(checkpoint.CheckpointError, match="not the state dict of one network"):
        checkpoint.read_weights(tmp_path / "gen_1.pt")


def test_sample_pictures_have_a_column_for_each_style(run: Path) -> None:
    grids = [columns(run / f"samples/step_{k:08d}.png") for k in (0, 1, 2)]
    names = ["A", *(f"B style {k}" for k in (1, 2, 3, 4)), "B", *(f"A style {k}" for k in (1, 2, 3, 4))]
    assert all(list(grid) == names for grid in grids)
    assert len({grids[-1][f"B style {k}"].tobytes() for k in (1, 2, 3, 4)}) == 4
    # a style is the same in every grid: that of the last step again from the checkpoint
    nets, _, header = checkpoint.load(checkpoint.checkpoints(run / "checkpoints")[-1])
    assert header["recipe"] == "munit"
    assert "B style 2" in (run / "index.html").read_text(encoding="utf-8")
    from fastgan.samples import sample_columns

    recipe, found, _ = evaluate.load_run(run, torch.device("cpu"))
    data = evaluate.open_images(recipe, run, progress=False)
    again = sample_columns(recipe, found, data, device=torch.device("cpu"))["B style 2"]
    shown = grids[-1]["B style 2"]
    factor = shown.shape[1] // again.shape[2]
    small = shown[:, factor // 2 :: factor, factor // 2 :: factor].astype(float)
    # the run may have computed in half precision
    assert np.abs(small - ((again + 1) * 127.5).permute(0, 2, 3, 1).numpy()).mean() < 3


def test_translate_in_styles(run: Path, tmp_path: Path) -> None:
    def made(name: str, *words: str) -> dict[str, bytes]:
        out = tmp_path / name
        translate.main([str(run), str(run.parent / "in"), str(out), "--device", "cpu", *words])
        return {file.name: file.read_bytes() for file in sorted(out.iterdir())}

    three = made("three", "--style", "3")
    assert list(three) == [f"{name}_{k:03d}.png" for name in ("one", "two") for k in range(3)]
    assert len(set(three.values())) == 6
    assert made("again", "--style", "3") == three != made("other", "--style", "3", "--seed", "1")
    # an image keeps its styles whatever is translated beside it, and the first one is that without a number
    one = made("one")
    assert list(one) == ["one.png", "two.png"] and one["two.png"] == three["two_000.png"]
    assert made("single", "--style", "1") == one
    assert made("back", "--direction", "BtoA") != one
    reference = picture(tmp_path / "reference.png", (64, 48), seed=5)
    given = made("given", "--reference", str(reference))
    assert given != one and made("given2", "--reference", str(reference), "--seed", "1") == given


REFUSED = {
    "tile": (["--tile", "32"], "a MUNITTranslator cannot run in tiles"),
    "label": (["--label", "1"], "takes no --label"),
    "dropout": (["--dropout-at-test"], "has no dropout"),
    "none": (["--style", "0"], "must be at least 1"),
    "both": (["--style", "2", "--reference", "in/one.png"], "leave one of them out"),
    "twice": (["--style", "2", "--samples", "3"], "leave --samples out"),
    "several": (["--samples", "3", "--reference", "in/one.png"], "the same result every time"),
    "small": (["--reference", "small.png"], "16 pixels or more"),
    "missing": (["--reference", "nothing.png"], "nothing.png"),
    "no image": (["--reference", "r/config.json"], "config.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(
    case: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    picture(run.parent / "small.png", (12, 40))
    words, said = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        translate.main(["r", "in", str(tmp_path / "out"), "--device", "cpu", *words])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in error and error.count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_networks_without_styles_refuse_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastgan.models import ResnetGenerator

    torch.save(ResnetGenerator(3, 3, ngf=2, blocks=1).state_dict(), tmp_path / "latest_net_G.pth")
    image = picture(tmp_path / "in.png")
    for words in (["--style", "2"], ["--reference", str(image)]):
        with pytest.raises(SystemExit) as stop:
            translate.main(
                [str(tmp_path / "latest_net_G.pth"), str(image), str(tmp_path / "out.png"), *words]
            )
        assert stop.value.code == 2 and "has no styles" in capsys.readouterr().err


def test_pages_of_a_file_get_one_style(run: Path, tmp_path: Path) -> None:
    page = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.save(tmp_path / "stack.npy", np.stack([page, page]))
    translate.main([str(run), str(tmp_path / "stack.npy"), str(tmp_path / "out.npy"), "--device", "cpu"])
    first, second = np.load(tmp_path / "out.npy")
    assert np.array_equal(first, second) and first.std() > 0


def test_an_exported_function_has_its_style(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), str(tmp_path / "g.pt2"), "--format", "torch-export"]
    with pytest.raises(SystemExit):
        export.main(words)
    assert "a style of 8 numbers, got 0: give --style" in capsys.readouterr().err
    style = [0.5, -1.0, 0.0, 2.0, 1.0, 0.0, -0.5, 1.0]
    export.main([*words, "--style", *map(str, style)])
    function = torch.export.load(tmp_path / "g.pt2").module()
    x = np.random.default_rng(2).integers(0, 256, (36, 40, 3), np.uint8)
    y = function(torch.from_numpy(x).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0)
    mine = fastgan.load(run, style=style, device="cpu", precision="fp32")(x)
    assert np.abs(y.numpy() - mine).max() <= 0.51


def test_every_translation_of_the_demo_draws_a_style(run: Path) -> None:
    folder = run.parent / "in"
    desk = demo.Desk(demo.Arguments(run, device="cpu"), folder)
    assert desk.directions == ("AtoB", "BtoA") and not desk.tiles
    first, second = (desk.translate(str(folder / "one.png"), "BtoA", [], 0) for _ in range(2))
    assert first[1][0].read_bytes() != second[1][0].read_bytes() and "random style" in first[2]


# measures


def test_distance_of_styles_by_hand() -> None:
    points = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], [[1.0, 1.0]] * 3])
    # 5, 1 and the root of 18; and none
    assert styles.apart(points) == pytest.approx((5 + 1 + 18**0.5) / 3 / 2)
    image, ink = torch.zeros(1, 3, 2, 2), torch.tensor([[[1.0, 0.5], [0.0, 0.0]]])
    image[0, :, 0, 0], image[0, :, 1] = torch.tensor([0.9, 0.6, 0.0]), 0.7
    assert_close(styles.ink_colours(image, ink), torch.tensor([[0.6, 0.4, 0.0]]))


def test_styles_are_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*words: str) -> dict[str, float]:
        evaluate.main([str(run), "--device", "cpu", "--output", str(run / "found.json"), *words])
        return json.loads((run / "found.json").read_text(encoding="utf-8"))

    found = measured("--samples", "3")
    assert {"digit_accuracy_fake_B", "style_distance", "tstr_B"} <= found.keys() and "cycle_l1_A" not in found
    assert found["diversity_A"] > 0 and found["diversity_B"] > 0
    again = measured("--measures", "style_distance", "diversity", "--samples", "3")
    assert [again[key] for key in ("style_distance", "diversity_B")] == [
        found[key] for key in ("style_distance", "diversity_B")
    ]
    # one grey for every call: image k of A gets its own style, then eight
    greys = np.random.default_rng(0).uniform(-1, 1, 9 * 20)
    calls = iter(greys)
    monkeypatch.setattr(MUNITTranslator, "forward", lambda self, x, style=None: 0 * x + next(calls, 0.0))
    ours = [[abs(a - b) for a in row for b in row] for row in greys.reshape(20, 9)[:, 1:]]
    digits = make_digits("test", paired=False)
    images, ink = digits.B.astype(np.float64) / 255, digits.ink_B.astype(np.float64)[..., None]
    inks = (images * ink).sum((1, 2)) / ink.sum((1, 2))
    theirs = [float(np.linalg.norm(a - b)) for k, a in enumerate(inks) for b in inks[:k]]
    # 56 of the 64 pairs are of two different ones; a step of grey is one of three channels, in [-1, 1]
    expected = np.sum(ours) / 20 / 56 * 3**0.5 / 2 / np.mean(theirs)
    assert measured("--measures", "style_distance")["style_distance"] == pytest.approx(expected, rel=1e-4)


SAID = {
    "penalty": (["--gan-mode", "wgan-gp"], "--gan-mode wgan-gp"),
    "idle": (["--norm", "batch"], "--norm has no effect"),
    "style": (["--style-size", "0"], "--style-size must be at least 1"),
    "decay": (["--weight-decay", "-1"], "--weight-decay must be at least 0"),
    "scales": (["--scales", "4"], "--scales 4 --levels-d 3 needs at least 57"),
}


@pytest.mark.parametrize("case", SAID)
def test_settings_that_cannot_work_are_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, said = SAID[case]
    with pytest.raises(SystemExit) as stop:
        train.main(["munit", *words, "--device", "cpu", "--steps", "1"])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in error and error.count("\n") == 0
    assert not list(tmp_path.iterdir())

"""Images from noise: which files appear, what they depend on, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastgan import export, sample, train, translate
from fastgan.data import read_images
from tests.run_cases import PIX

SMALL = "--init-gain 0.5 --ngf 2 --ndf 2 --batch-size 2 --device cpu --threads 1 --steps 2"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("cgan", "dcgan"):
        train.main([name, *SMALL.split(), "--runs", str(folder), "--name", name])
    train.main([*PIX, "--steps", "1", "--runs", str(folder), "--name", "pix2pix"])
    return folder


@pytest.fixture(autouse=True)
def here(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, "runs")
    return tmp_path


def names(folder: str) -> list[str]:
    return sorted(p.name for p in Path(folder).iterdir())


def test_images_by_label(capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(["runs/cgan", "out", "--count", "3", "--to", "7", "0", "3+5"])
    assert names("out") == [f"{label}_0000{k}.png" for label in ("0", "3+5", "7") for k in range(3)]
    assert capsys.readouterr().out == "9 images to out\n"
    image = read_images(Path("out/7_00000.png"))[0]
    assert image.shape == (32, 32, 1) and image.dtype == np.uint8
    # the label is all that differs, and two labels in one are neither of them
    sample.main(["runs/cgan", "all", "--count", "3"])
    assert len(names("all")) == 30
    for file in names("out"):
        if "+" not in file:
            assert Path("out", file).read_bytes() == Path("all", file).read_bytes()
    several = [read_images(Path("out", f"{label}_00000.png"))[0] for label in ("0", "7", "3+5")]
    assert len({x.tobytes() for x in several}) == 3


def test_an_image_depends_on_its_number_and_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sample.main(["runs/dcgan", "one", "--count", "5"])
    monkeypatch.setattr(sample, "AT_ONCE", 2)
    sample.main(["runs/dcgan", "two", "--count", "7"])
    sample.main(["runs/dcgan", "three", "--count", "2", "--seed", "1"])
    one, two, three = (
        [read_images(Path(folder, name))[0].astype(int) for name in names(folder)]
        for folder in ("one", "two", "three")
    )
    assert len(one) == 5 and len(two) == 7
    for x, y in zip(one, two):
        # another batch, another order of sums
        assert np.abs(x - y).max() <= 1
    assert all(np.abs(one[0] - other).max() > 1 for other in (*one[1:], three[0]))


def test_formats_and_a_grid() -> None:
    sample.main(
        ["runs/dcgan", "out", "--count", "2", "--format", "tif", "--depth", "float", "--grid", "g.png"]
    )
    image = read_images(Path("out/00001.tif"))[0]
    assert image.dtype == np.float32 and 0 <= image.min() < image.max() <= 1
    sample.main(["runs/dcgan", "out", "--count", "2"])
    eight = read_images(Path("out/00001.png"))[0]
    assert np.abs(image * 255 - eight).max() <= 0.5 + 1e-3
    assert read_images(Path("g.png"))[0].shape[1] > 64


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("runs/cgan out --to x", "--to x is not a label of this run: choose of 0, 1, 2"),
        ("runs/dcgan out --to 1", "--to has no effect: this system has no labels"),
        ("runs/pix2pix out", "runs/pix2pix translates images: python -m fastgan.translate runs/pix2pix"),
        ("runs/none out", "runs/none is not a run folder"),
        ("runs/dcgan out --count 0", "--count must be at least 1, got 0"),
        ("runs/dcgan runs/dcgan/config.json", "config.json is a file: give a folder"),
        ("runs/dcgan out --format webp --depth 16", "uint16"),
        ("runs/dcgan out --quality 0 --format jpg", "--quality must be in 1..100"),
    ],
)
def test_what_cannot_be_is_one_line(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sample.main(words.split())
    line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(line) == 1 and says in line[0]
    assert not Path("out").exists() or not names("out")


@pytest.mark.parametrize(
    "command",
    [
        lambda: translate.main(["runs/dcgan", "runs/dcgan/samples", "out"]),
        lambda: export.main(["runs/dcgan", "g.pth", "--format", "upstream"]),
    ],
)
def test_other_commands_name_this_one(command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2 and "python -m fastgan.sample RUN OUTPUT" in capsys.readouterr().err

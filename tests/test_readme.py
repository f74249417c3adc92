"""The commands of README's answers to what people ask about upstream, run as they stand there."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastgan import export, train, translate
from fastgan.data.images import read_images, write_image
from fastgan.models import ResnetGenerator

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"\n## Coming from upstream\n(.*?)\n## ", README, re.DOTALL)
MAINS = {"fastgan.train": train.main, "fastgan.translate": translate.main, "fastgan.export": export.main}
# networks and images of a size for a test; what the commands say is left as it is
SMALL = ["--steps", "1", "--ngf", "2", "--ndf", "2", "--device", "cpu"]
SMALL += ["--load-size", "32", "--crop-size", "32", "--patch", "16"]
EXTRA = {"cyclegan": ["--blocks", "1"], "pix2pix": ["--levels", "3"]}


def commands(about: str) -> list[list[str]]:
    """The commands below the question that holds the words `about`."""
    assert SECTION
    (block,) = (part for part in SECTION[1].split("\n**")[1:] if about in part)
    (shell,) = re.findall(r"```sh\n(.*?)```", block, re.DOTALL)
    lines = [shlex.split(line, comments=True) for line in shell.splitlines()]
    # what follows an installation
    return [words[words.index("python") :] for words in lines]


def run(words: list[str]) -> None:
    assert words[:2] == ["python", "-m"]
    more = [*SMALL, *EXTRA[words[3]]] if words[2] == "fastgan.train" else []
    MAINS[words[2]]([*words[3:], *more])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("FOLDER/trainA", "FOLDER/trainB", "INPUT"):
        Path(folder).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(f"{folder}/{k}.png")
    torch.manual_seed(0)
    for name in ("checkpoints/NAME/latest_net_G.pth", "latest_net_G.pth"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {f"module.{k}": v for k, v in ResnetGenerator(3, 3, ngf=2, blocks=1).state_dict().items()}, name
        )
    return tmp_path


def test_resume() -> None:
    (command,) = commands("resume")
    run(command)
    run(command)
    assert Path("runs/cyclegan-FOLDER/checkpoints/step_00000001/state.safetensors").is_file()


def test_load_errors() -> None:
    (command,) = commands("does not load")
    run(command)
    assert sorted(p.name for p in Path("OUTPUT").iterdir()) == ["0.png", "1.png"]


def test_sixteen_bits_and_channels() -> None:
    rng = np.random.default_rng(1)
    for k in range(2):
        write_image(f"FOLDER/trainA/{k}.png", rng.integers(0, 65536, (40, 36, 1)).astype(np.uint16))
        Path(f"FOLDER/trainB/{k}.png").unlink()
        write_image(f"FOLDER/trainB/{k}.tif", rng.integers(0, 65536, (40, 36, 4)).astype(np.uint16))
    with tifffile.TiffWriter("stack.tif") as file:
        for page in rng.integers(0, 65536, (3, 32, 32)).astype(np.uint16):
            file.write(page, photometric="minisblack", metadata=None)
    for command in commands("16-bit"):
        run(command)
    found = read_images("result.tif")
    assert [(x.shape, x.dtype) for x in found] == [((32, 32, 4), np.uint16)] * 3
    assert len(np.unique(found[0])) > 256


def test_large_images() -> None:
    Path("latest_net_G.pth").rename("RUN.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 520, 3), np.uint8)).save("photo.jpg")
    (command,) = commands("too large")
    assert command[-2:] == ["--tile", "512"]
    # JPEG would make more of a rounded grey level
    words = [word.replace("RUN", "RUN.pth").replace("result.jpg", "result.png") for word in command]
    run(words)
    run([*words[:-3], "whole.png", "--tile", "off"])
    tiles, plain = (read_images(name)[0].astype(int) for name in ("result.png", "whole.png"))
    assert tiles.std() > 0 and np.abs(tiles - plain).max() <= 1


def test_onnx() -> None:
    (command,) = commands("ONNX")
    run(command)
    assert Path("g.onnx").is_file()

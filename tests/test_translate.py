"""Translating files and folders: names, depths, sizes, directions and what can be wrong with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import train, translate
from fastgan.checkpoint import CheckpointError
from fastgan.config import UsageError
from fastgan.data.images import read_images, write_image
from fastgan.inference import load_generator
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator, translate_any_size

NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translate")
    small = ["--ngf", "4", "--ndf", "4", "--steps", "2"]
    tiny = [*small, "--device", "cpu", "--precision", "fp32", "--runs", str(folder)]
    train.main(["cyclegan", *tiny, "--blocks", "1", "--name", "c", "--ema", "0.5", "--batch-size", "2"])
    train.main(["pix2pix", *tiny, "--levels", "3", "--name", "p", "--batch-size", "2"])
    train.main(["pix2pix", *tiny, "--levels", "3", "--name", "q", "--batch-size", "2", "--direction", "BtoA"])
    return folder


def fails(args: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        translate.main([str(a) for a in args])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("size", [(8, 8), (9, 30), (37, 53), (3, 5), (1, 1)])
def test_any_size_is_padded_and_cropped_back(size: tuple[int, int]) -> None:
    for net in (ResnetGenerator(3, 2, ngf=4, blocks=1), UnetGenerator(3, 2, ngf=2, levels=4)):
        x = torch.rand(1, 3, *size)
        with torch.no_grad():
            y = translate_any_size(net.eval(), x)
            assert y.shape == (1, 2, *size)
            if not (size[0] % net.multiple or size[1] % net.multiple) and min(size) >= 8:
                assert torch.equal(y, net(x))


def test_the_array_interface_is_the_network(runs: Path) -> None:
    generator = load_generator(runs / "p", device="cpu", precision="fp32")
    x = torch.from_numpy(NOISE[:32, :48]).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        y = (generator.net(x)[0].permute(1, 2, 0) / 2 + 0.5) * 255
    expected = y.clamp(0, 255).round().to(torch.uint8).numpy()
    # one grey level: rounding at the edge of a half
    assert np.abs(generator(NOISE[:32, :48]).astype(int) - expected).max() <= 1
    assert generator(NOISE).shape == (37, 53, 3)


def test_folders_keep_names_depth_and_nesting(runs: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    Image.fromarray(NOISE).save(source / "a.png")
    Image.fromarray(NOISE[..., 0]).save(source / "grey.jpg")
    write_image(source / "deep/b.tif", NOISE.astype(np.uint16) * 257)
    write_image(source / "deep/c.npy", NOISE.astype(np.float32) / 255)
    translate.main([str(runs / "p"), str(source), str(target), "--precision", "fp32"])
    found = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert found == {"a.png", "grey.jpg", "deep/b.tif", "deep/c.npy"}
    eight = read_images(target / "a.png")[0]
    sixteen, real = read_images(target / "deep/b.tif")[0], read_images(target / "deep/c.npy")[0]
    assert eight.dtype == np.uint8 and sixteen.dtype == np.uint16 and real.dtype == np.float32
    # the same picture in three depths is the same translation
    np.testing.assert_allclose(sixteen / 65535, eight / 255, atol=0.6 / 255)
    np.testing.assert_allclose(real, eight / 255, atol=0.6 / 255)


def test_directions_are_those_of_the_data_folder(runs: Path) -> None:
    forth, back = (load_generator(runs / "c", d, device="cpu") for d in ("AtoB", "BtoA"))
    assert forth.name.endswith("G_A_ema.safetensors") and back.name.endswith("G_B_ema.safetensors")
    assert load_generator(runs / "c", device="cpu").name == forth.name
    # trained BtoA, the only generator goes from B to A, and asking for the other way is an error
    assert (
        load_generator(runs / "q", "BtoA", device="cpu").name == load_generator(runs / "q", device="cpu").name
    )
    for run, direction in (("p", "BtoA"), ("q", "AtoB")):
        with pytest.raises(UsageError, match=f"--direction {direction}"):
            load_generator(runs / run, direction, device="cpu")  # type: ignore[arg-type]


def test_every_way_to_name_a_generator(runs: Path, tmp_path: Path) -> None:
    folder = runs / "p/checkpoints/step_00000002"
    results = [
        load_generator(p, device="cpu", precision="fp32")(NOISE)
        for p in (runs / "p", folder, folder / "G.safetensors")
    ]
    torch.save(load_generator(runs / "p", device="cpu").net.state_dict(), tmp_path / "latest_net_G.pth")
    results.append(load_generator(tmp_path / "latest_net_G.pth", device="cpu", precision="fp32")(NOISE))
    assert all(np.array_equal(r, results[0]) for r in results)


def test_what_is_not_a_generator(runs: Path, tmp_path: Path) -> None:
    torch.save(PatchDiscriminator(6, ndf=2).state_dict(), tmp_path / "latest_net_D.pth")
    with pytest.raises(CheckpointError, match="patchgan"):
        load_generator(tmp_path / "latest_net_D.pth")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_generator(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_generator(tmp_path / "gone")


def test_bad_input_gets_one_line_and_the_rest_is_done(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    assert "holds no images" in fails([runs / "p", source, target], capsys)
    assert "does not exist" in fails([runs / "p", source / "x.png", target], capsys)
    assert "--directoin" in fails([runs / "p", source, target, "--directoin", "AtoB"], capsys)
    Image.fromarray(NOISE).save(source / "good.png")
    (source / "bad.png").write_bytes((source / "good.png").read_bytes()[:200])
    write_image(source / "five.npy", np.zeros((16, 16, 5), np.float32))
    with pytest.raises(SystemExit) as stop:
        translate.main([str(runs / "p"), str(source), str(target)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 3 and "2 of 3 files" in lines[2]
    assert all(x.startswith("skipped: ") and name in x for x, name in zip(lines, ("bad.png", "five.npy")))
    assert [p.name for p in target.iterdir()] == ["good.png"]
    assert "would overwrite" in fails([runs / "p", source, source], capsys)
    assert np.array_equal(read_images(source / "good.png")[0], NOISE)


def test_a_file_to_a_file_and_to_a_folder(runs: Path, tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "x.png")
    translate.main([str(runs / "p"), str(tmp_path / "x.png"), str(tmp_path / "y.tif")])
    translate.main([str(runs / "p"), str(tmp_path / "x.png"), str(tmp_path / "folder")])
    assert np.array_equal(read_images(tmp_path / "y.tif")[0], read_images(tmp_path / "folder/x.png")[0])

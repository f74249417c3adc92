"""What a file has besides its colours goes through a translation: alpha, profile, pages, depth, format; and
folders: what is there is kept, what fails is said, nothing appears half-written."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastgan import files, inference
from fastgan.config import UsageError
from fastgan.data.images import DataError, read_images, read_picture, write_image
from fastgan.files import Output
from fastgan.inference import load_generator
from fastgan.models import ResnetGenerator, UnetGenerator
from fastgan.translate import main, translate

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (20, 28, 4), np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save(ResnetGenerator(3, 3, ngf=4, blocks=1).state_dict(), folder / "latest_net_G_A.pth")
    torch.save(UnetGenerator(3, 3, ngf=4, levels=6).state_dict(), folder / "unet.pth")
    torch.save(ResnetGenerator(3, 1, ngf=4, blocks=1).state_dict(), folder / "grey.pth")
    return folder


@pytest.fixture(scope="module")
def generator(weights: Path) -> inference.Generator:
    return load_generator(weights / "latest_net_G_A.pth", device="cpu", precision="fp32")


def run(generator: inference.Generator, source: Path, target: Path, **how: object) -> Path:
    report = translate(generator, source, target, Output(**how))  # type: ignore[arg-type]
    assert not report.bad, report.bad
    return target


@pytest.mark.parametrize(
    "suffix, dtype",
    [(".png", "uint8"), (".png", "uint16"), (".webp", "uint8"), (".tif", "uint8"), (".tif", "uint16")],
)
def test_alpha_is_kept_aside(generator: inference.Generator, tmp_path: Path, suffix: str, dtype: str) -> None:
    colours = RGBA.astype(dtype) * (257 if dtype == "uint16" else 1)
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    write_image(source, colours[..., :3], alpha=colours[..., 3:])
    (found,), (alpha,), *_ = read_picture(run(generator, source, target))
    np.testing.assert_array_equal(alpha, colours[..., 3:], strict=True)
    # transparent or not, the colours are translated as they are
    np.testing.assert_array_equal(found, generator(np.ascontiguousarray(colours[..., :3])), strict=True)


def test_alpha_follows_the_depth_and_is_missed_where_a_format_has_none(
    generator: inference.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Path
) -> None:
    write_image(tmp_path / "in.png", RGBA[..., :3], alpha=RGBA[..., 3:])
    run(generator, tmp_path / "in.png", tmp_path / "out.png", depth="16")
    (image,), (alpha,), *_ = read_picture(tmp_path / "out.png")
    assert image.dtype == np.uint16
    assert alpha is not None
    np.testing.assert_array_equal(alpha, RGBA[..., 3:].astype(np.uint16) * 257, strict=True)
    main([str(weights / "latest_net_G_A.pth"), str(tmp_path / "in.png"), str(tmp_path / "out.jpg")])
    assert capsys.readouterr().err == "note: alpha is left out, .jpg cannot hold it\n"


def test_colours_of_another_profile_become_srgb(tmp_path: Path) -> None:
    """Against the published formulas of Adobe RGB (1998) and sRGB (IEC 61966-2-1)."""
    wide = RNG.integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    to_xyz = [
        [0.5767309, 0.1855540, 0.1881852],
        [0.2973769, 0.6273491, 0.0752741],
        [0.0270343, 0.0706872, 0.9911085],
    ]
    of_srgb = [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
    light = (wide / 65535) ** (563 / 256) @ np.array(to_xyz).T @ np.linalg.inv(of_srgb).T
    light = light.clip(0, 1)
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    adobe = bytes(imagecodecs.cms_profile("adobergb"))
    narrow = (wide >> 8).astype(np.uint8)
    write_image(tmp_path / "16.png", wide, profile=adobe)
    write_image(tmp_path / "16.tif", wide, profile=adobe)
    for name in ("16.png", "16.tif"):
        assert np.abs(read_images(tmp_path / name)[0] / 65535 - expected).max() < 0.3 / 255
    for suffix in (".png", ".tif", ".webp", ".jpg"):
        write_image(tmp_path / f"8{suffix}", narrow, profile=adobe, quality=100)
        write_image(tmp_path / f"none{suffix}", narrow, quality=100)
        tagged, plain = (read_picture(tmp_path / f"{name}{suffix}") for name in ("8", "none"))
        # the tag says what the values are now, so that a viewer does not convert them again
        srgb = bytes(imagecodecs.cms_profile("srgb"))
        assert tagged.profile == srgb[:24] + bytes(12) + srgb[36:] and plain.profile is None
        # Adobe RGB's colours are stronger than the same numbers in sRGB
        assert tagged.images[0].std() > plain.images[0].std() + 1


@pytest.mark.parametrize("profile", [b"", b"garbage" * 40])
def test_a_broken_profile_does_not_cost_the_picture(tmp_path: Path, profile: bytes) -> None:
    image = Image.fromarray(RGBA[..., :3])
    image.save(tmp_path / "x.png", icc_profile=profile)
    picture = read_picture(tmp_path / "x.png")
    np.testing.assert_array_equal(picture.images[0], RGBA[..., :3])
    assert picture.profile is None


def test_srgb_stays_bit_for_bit_and_is_carried(
    generator: inference.Generator, weights: Path, tmp_path: Path
) -> None:
    srgb = bytes(imagecodecs.cms_profile("srgb"))
    write_image(tmp_path / "in.png", RGBA[..., :3], profile=srgb)
    np.testing.assert_array_equal(read_images(tmp_path / "in.png")[0], RGBA[..., :3])
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        assert read_picture(run(generator, tmp_path / "in.png", tmp_path / f"out{suffix}")).profile == srgb
    run(generator, tmp_path / "in.png", tmp_path / "16.png", depth="16")
    with Image.open(tmp_path / "16.png") as file:
        assert file.info["icc_profile"] == srgb
    # a profile of three colours says nothing about a grey result
    grey = load_generator(weights / "grey.pth", device="cpu")
    # not by our reader, which would leave it out
    with Image.open(run(grey, tmp_path / "in.png", tmp_path / "grey.png")) as file:
        assert file.mode == "L" and "icc_profile" not in file.info


def test_pages_stay_pages(generator: inference.Generator, tmp_path: Path) -> None:
    pages = [RGBA[..., :3], RGBA[:12, :, :3].astype(np.uint16) * 257]
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb")
    found = read_images(run(generator, tmp_path / "in.tif", tmp_path / "out.tif"))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in pages]
    for page, x in zip(pages, found):
        np.testing.assert_array_equal(x, generator(page))
    out = tmp_path / "out"
    run(generator, tmp_path / "in.tif", out, format="png")
    assert sorted(p.name for p in out.iterdir()) == ["in_page000.png", "in_page001.png"]


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3), (3, 20, 24), (2, 20, 24, 3), (2, 3, 20, 24)])
def test_arrays_keep_their_axes(
    generator: inference.Generator, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    np.save(tmp_path / "in.npy", RNG.random(shape, np.float32))
    found = np.load(run(generator, tmp_path / "in.npy", tmp_path / "out.npy"))
    assert found.dtype == np.float32 and found.shape == (shape if len(shape) > 2 else (20, 24, 3))


def test_pages_that_are_channels_stay_pages(tmp_path: Path) -> None:
    net = ResnetGenerator(4, 4, ngf=4, blocks=1)
    full = ((0.0, 65535.0),) * 2
    kinds = (np.dtype(np.uint16),) * 2
    generator = inference.Generator(
        net.eval(), (4, 4), full, kinds, "tanh", torch.device("cpu"), None, __file__, pages="channels"
    )
    stack = RNG.integers(0, 65536, (4, 20, 24)).astype(np.uint16)
    with tifffile.TiffWriter(tmp_path / "in.tif") as file:
        for page in stack:
            file.write(page, photometric="minisblack", metadata=None)
    found = read_images(run(generator, tmp_path / "in.tif", tmp_path / "out.tif"))
    expected = generator(np.ascontiguousarray(stack.transpose(1, 2, 0)))
    np.testing.assert_array_equal(np.concatenate(found, 2), expected, strict=True)


@pytest.mark.parametrize("depth, dtype", [("8", np.uint8), ("16", np.uint16), ("float", np.float32)])
def test_another_depth_and_format(
    generator: inference.Generator, tmp_path: Path, depth: str, dtype: type
) -> None:
    image = RGBA[..., :3]
    write_image(tmp_path / "a.jpg", image)
    run(generator, tmp_path, tmp_path / "out", format="tif", depth=depth)
    (found,) = read_images(tmp_path / "out/a.tif")
    assert found.dtype == dtype
    exact = generator(read_images(tmp_path / "a.jpg")[0], dtype=np.float32)
    full = 1 if depth == "float" else np.iinfo(dtype).max
    # deeper than the input: nothing is rounded to 8 bits on the way
    np.testing.assert_allclose(found / full, exact, atol=0.51 / full if depth != "float" else 0)


def test_dropout_at_test_and_statistics_of_the_image(weights: Path, tmp_path: Path) -> None:
    image = RGBA[..., :3]
    write_image(tmp_path / "a.png", image)
    torch.manual_seed(1)
    net = UnetGenerator(3, 3, ngf=4, levels=6, dropout=True)
    net.load_state_dict(torch.load(weights / "unet.pth", weights_only=True))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    # upstream's test.py without --eval: the network as it was trained
    net.train()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    padded = torch.nn.functional.pad(x, (0, 36, 0, 44), "replicate")
    with torch.no_grad():
        y = net(padded)[0, :, :20, :28].permute(1, 2, 0)
    batch = load_generator(weights / "unet.pth", device="cpu", precision="fp32", bn_stats="batch")
    expected = ((y / 2 + 0.5) * 255).numpy()
    assert np.abs(batch(image) - expected).max() <= 0.51
    running = load_generator(weights / "unet.pth", device="cpu", precision="fp32")
    assert np.abs(running(image) - expected).max() > 5
    # the statistics of training are neither used nor changed
    np.testing.assert_array_equal(batch(image), batch(image))
    drop = load_generator(weights / "unet.pth", device="cpu", precision="fp32", dropout_at_test=True)
    exact = {"format": "tif", "depth": "float"}
    for folder in ("one", "two"):
        run(drop, tmp_path / "a.png", tmp_path / folder, samples=3, seed=5, **exact)
    run(drop, tmp_path / "a.png", tmp_path / "three", samples=3, seed=6, **exact)
    one, two, three = (
        [read_images(p)[0] for p in sorted((tmp_path / name).iterdir())] for name in ("one", "two", "three")
    )
    assert [p.name for p in sorted((tmp_path / "one").iterdir())] == ["a_000.tif", "a_001.tif", "a_002.tif"]
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    assert not any(np.array_equal(a, b) for a, b in [*zip(one, three), (one[0], one[1]), (one[1], one[2])])


def test_settings_that_a_network_has_not(
    weights: Path, generator: inference.Generator, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no dropout"):
        load_generator(weights / "latest_net_G_A.pth", dropout_at_test=True)
    with pytest.raises(UsageError, match="no batch norm"):
        load_generator(weights / "latest_net_G_A.pth", bn_stats="batch")
    write_image(tmp_path / "a.png", RGBA[..., :3])
    for how, words in (
        ({"samples": 2}, "same result"),
        ({"samples": 0}, "--samples"),
        ({"quality": 0}, "--quality"),
    ):
        with pytest.raises(UsageError, match=words):
            translate(generator, tmp_path, tmp_path / "out", Output(**how))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_upstream_does_with_batch_norm_is_said(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png", RGBA[..., :3])
    for flags, said in (([], True), (["--bn-stats", "running"], False), (["--dropout-at-test"], False)):
        main(
            [
                str(weights / "unet.pth"),
                str(tmp_path / "a.png"),
                str(tmp_path / "b.png"),
                "--overwrite",
                *flags,
            ]
        )
        assert ("--bn-stats batch --dropout-at-test" in capsys.readouterr().err) == said


def test_only_what_is_missing_is_done(
    generator: inference.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "in/out"
    for name in ("a.png", "b.png", "deep/c.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(source / name, RGBA[..., :3])
    with tifffile.TiffWriter(source / "d.tif") as file:
        for _ in range(2):
            file.write(RGBA[..., :3], photometric="rgb", metadata=None)
    how = Output(format="png")
    first = translate(generator, source, out, how)
    assert (first.done, first.kept) == (4, 0)
    # results below the input are no input, and nothing is done twice
    again = translate(generator, source, out, how)
    assert (again.done, again.kept) == (0, 4)
    (out / "deep/c.png").unlink()
    # pages are written from the last to the first: without the first one they are not all there
    (out / "d_page000.png").unlink()
    late = (out / "a.png").stat().st_mtime + 10
    os.utime(source / "a.png", (late, late))
    third = translate(generator, source, out, how)
    assert (third.done, third.kept) == (3, 1)
    assert translate(generator, source, tmp_path / "in/out", Output(format="png", overwrite=True)).done == 4
    assert not [p for p in source.rglob("*") if ".tmp" in p.name]


def test_names_that_collide_or_are_the_source(generator: inference.Generator, tmp_path: Path) -> None:
    for name in ("a.png", "a.bmp"):
        write_image(tmp_path / name, RGBA[..., :3])
    with pytest.raises(DataError, match="would both become"):
        translate(generator, tmp_path, tmp_path / "out", Output(format="tif"))
    with pytest.raises(DataError, match="overwrite its source"):
        translate(generator, tmp_path, tmp_path)
    with pytest.raises(DataError, match="--format tif is not"):
        translate(generator, tmp_path / "a.png", tmp_path / "b.png", Output(format="tif"))
    assert not (tmp_path / "out").exists()


def test_reading_and_writing_go_on_while_an_image_is_computed(
    generator: inference.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first computation waits until others have been read, the last until others have been written."""
    for k in range(4):
        write_image(tmp_path / f"{k}.png", RGBA[..., :3])
    read, written, computed = threading.Semaphore(0), threading.Semaphore(0), []
    reading, writing, computing = files._read, files._write, files._compute
    main_thread = threading.current_thread()

    def compute(*args: object) -> object:
        if not computed:
            assert all(read.acquire(timeout=20) for _ in range(2)), "nothing is read ahead"
        if len(computed) == 3:
            assert written.acquire(timeout=20), "nothing is written meanwhile"
        computed.append(threading.current_thread() is main_thread)
        return computing(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "READERS", 2)
    monkeypatch.setattr(files, "AHEAD", 3)
    monkeypatch.setattr(files, "_read", lambda *a: (reading(*a), read.release())[0])
    monkeypatch.setattr(files, "_write", lambda *a: (writing(*a), written.release())[0])
    monkeypatch.setattr(files, "_compute", compute)
    assert translate(generator, tmp_path, tmp_path / "out").done == 4
    assert computed == [True] * 4


def test_a_full_disk_ends_the_work_at_once(
    generator: inference.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(4):
        write_image(tmp_path / f"{k}.png", RGBA[..., :3])
    seen = []

    def full(path: Path, data: bytes) -> int:
        seen.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="No space left.*make room"):
        translate(generator, tmp_path, tmp_path / "out")
    assert len(seen) <= 4 and not list((tmp_path / "out").iterdir())


def test_too_large_for_the_memory(
    weights: Path, generator: inference.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "a.png", np.zeros((1600, 1600, 3), np.uint8))
    unet = load_generator(weights / "unet.pth", device="cpu")
    monkeypatch.setattr(inference, "free_bytes", lambda device: 10**7)
    (line,) = translate(unet, tmp_path / "a.png", tmp_path / "b.png").bad
    assert "a.png" in line and "1600x1600" in line and "GB" in line
    # what an allocator says becomes a line, too
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(inference, "translate_any_size", lambda *_, e=error: (_ for _ in ()).throw(e))
        (line,) = translate(generator, tmp_path / "a.png", tmp_path / "b.png", Output(tile="off")).bad
        assert "more memory" in line
    (line,) = translate(generator, tmp_path / "a.png", tmp_path / "b.png", Output(max_pixels=1000)).bad
    assert "2,560,000 pixels are more than the limit" in line
    assert not (tmp_path / "b.png").exists()


def test_processes_share_the_files(weights: Path, tmp_path: Path) -> None:
    """Two processes of torchrun: each file once, one report, and a bad file ends neither."""
    for k in range(5):
        write_image(tmp_path / f"in/{k}.png", RGBA[..., :3]) if k else (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "fastgan.translate",
        str(weights / "latest_net_G_A.pth"),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--device", "cpu"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.png", "2.png", "3.png", "4.png"]
    assert done.returncode != 0
    assert done.stdout.startswith("4 images to ") and done.stdout.count("images to") == 1
    assert done.stderr.count("skipped: ") == 1 and "1 of 5 files could not be translated" in done.stderr

"""Pairs joined, edges drawn, folders looked at: what comes out, what is left alone, what is said."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan.data import __main__ as tools
from fastgan.data.augment import resize
from fastgan.data.check import Checked, check
from fastgan.data.edges import Canny, edge_map, make_edges
from fastgan.data.folders import find_layout
from fastgan.data.images import read_images, write_image
from fastgan.data.look import Place, find_twins, look
from fastgan.data.pair import Shape, make_pairs

RNG = np.random.default_rng(0)


def noise(channels: int = 3, dtype: str = "uint8", height: int = 24, width: int = 32) -> np.ndarray:
    if dtype == "float32":
        return RNG.normal(size=(height, width, channels)).astype(np.float32)
    return RNG.integers(0, np.iinfo(dtype).max, (height, width, channels), endpoint=True).astype(dtype)


def scene(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A smooth picture, as photographs are at a small size; unlike for each seed."""
    rng = np.random.default_rng(seed)
    layers = [rng.integers(0, 256, (side, side, 3)).astype(np.uint8) for side in (2, 4, 8)]
    return sum(resize(layer, (height, width)) // share for layer, share in zip(layers, (2, 4, 4)))  # type: ignore


def put(root: Path, **images: np.ndarray | bytes) -> Path:
    """Write images; in the names __ stands for / and the suffix follows a single _."""
    for name, image in images.items():
        stem, _, suffix = name.replace("__", "/").rpartition("_")
        path = root / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            write_image(path, image)
    return root


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def main(words: list[object], code: int, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    with pytest.raises(SystemExit) as stop:
        tools.main([str(word) for word in words])
    said = capsys.readouterr()
    assert stop.value.code == code, said
    return said.out, said.err


PAIRS = {
    "rgb": (noise(), noise(), "png"),
    "grey and rgb": (noise(1), noise(), "png"),
    "16 bit": (noise(1, "uint16"), noise(1, "uint16"), "png"),
    "8 and 16 bit": (noise(3), noise(1, "uint16"), "png"),
    "float": (noise(1, "float32"), noise(1, "float32"), "tif"),
    "5 channels": (noise(5, "uint16"), noise(1, "uint16"), "tif"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_keep_every_value(tmp_path: Path, case: str) -> None:
    a, b, suffix = PAIRS[case]
    put(tmp_path, A__train__x_tif=a, B__train__x_npy=b)
    report = make_pairs(tmp_path / "A", tmp_path / "B", tmp_path / "out")
    assert report.written == 1 and not report.bad
    (joined,) = read_images(tmp_path / f"out/train/x.{suffix}")
    kind = max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    for half, image in ((joined[:, :32], a), (joined[:, 32:], b)):
        wide = image * np.uint16(257) if image.dtype != kind else image
        np.testing.assert_array_equal(half, np.broadcast_to(wide, half.shape), strict=True)


def test_pairs_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = put(
        tmp_path,
        A__train__2_png=noise(), B__train__2_jpg=noise(), A__val__d__3_png=noise(), B__val__d__3_png=noise(),
        A__lonely_png=noise(), B__alone_png=noise(), B__single_png=noise(),
        A__small_png=noise(height=8), B__small_png=noise(),
        A__bad_png=b"\x89PNG nonsense", B__bad_png=noise(),
        A__type_tif=noise(), B__type_tif=noise(dtype="float32"),
    )  # fmt: skip
    words = ["pair", root / "A", root / "B", root / "out"]
    out, err = main(words, 2, capsys)
    assert files(root / "out") == ["train/2.png", "val/d/3.png"]
    assert "1 in" in out and "no partner in" in out and ": lonely\n" in out and ": alone, single\n" in out
    assert "2 pairs written" in out and "error: 3 could not be made" in err and err.count("skipped: ") == 3
    assert "32x8 pixels, but its partner" in err and "A/bad.png" in err and "do not fit into one file" in err
    # nothing is overwritten unasked
    before = (root / "out/train/2.png").read_bytes()
    put(root, A__train__2_png=noise())
    out, _ = main(words, 2, capsys)
    assert "0 pairs written" in out and "2 were there already" in out
    assert (root / "out/train/2.png").read_bytes() == before
    main([*words, "--overwrite"], 2, capsys)
    assert (root / "out/train/2.png").read_bytes() != before
    layout = find_layout(root / "out", paired=True)
    assert layout.side_by_side and len(layout.train.A) == len(layout.test.B) == 1


def test_pairs_of_unequal_size(tmp_path: Path) -> None:
    a, b = noise(), noise(height=12, width=64)
    put(tmp_path, A__x_png=a, B__x_png=b)

    def joined(shape: Shape) -> np.ndarray:
        report = make_pairs(tmp_path / "A", tmp_path / "B", tmp_path / "out", shape=shape, overwrite=True)
        assert not report.bad
        return read_images(tmp_path / "out/x.png")[0]

    like_a = joined(Shape("A"))
    np.testing.assert_array_equal(like_a, np.concatenate([a, resize(b, (24, 32))], axis=1))
    assert joined(Shape("B")).shape == (12, 128, 3)
    assert joined(Shape(size=(10, 6))).shape == (6, 20, 3)
    near = joined(Shape("A", nearest=True))[:, 32:]
    np.testing.assert_array_equal(near, b.repeat(2, axis=0)[:, 1::2])


@pytest.mark.parametrize("ends", [("", ""), ("_A", "_B")])
def test_pairs_whose_names_end_differently(tmp_path: Path, ends: tuple[str, str]) -> None:
    for name in ("A/1_A.png", "B/1_B.png"):
        (tmp_path / name).parent.mkdir()
        write_image(tmp_path / name, noise())
    report = make_pairs(tmp_path / "A", tmp_path / "B", tmp_path / "out", ends=ends)
    assert report.written == 1 and files(tmp_path / "out") == ["1.png"]


@pytest.mark.parametrize(
    "words, text",
    [
        (["pair", "A", "nowhere", "out"], "nowhere: no such folder"),
        (["pair", "A", "B", "B/out"], "lies in B"),
        (["pair", "A", "C", "out"], "no two images have the same name"),
        (["pair", "A", "B", "out", "--size", "0", "4"], "--size must be two positive"),
        (["pair", "A", "B", "out", "--size", "4", "4", "--resize", "A"], "exclude each other"),
        (["pair", "twins", "B", "out"], "x.jpg and x.png have the same name"),
        (["edges", "A", "out", "--low", "0.5", "--high", "0.1"], "--low 0.5 is above --high 0.1"),
        (["edges", "A", "out", "--sigma", "-1"], "--sigma must be between"),
        (["edges", "empty", "out"], "holds no images"),
        (["check", "nowhere"], "nowhere: no such folder"),
        (["check", "empty"], "empty: holds no images"),
        (["check", "A", "--sheet", "x.gif"], "is a .png, .jpg or .webp file"),
        (["check", "A", "--shet", "x.png"], "did you mean --sheet?"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = noise()
    put(tmp_path, A__x_png=image, B__x_png=image, C__y_png=image, twins__x_png=image, twins__x_jpg=image)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    _, err = main(words, 2, capsys)
    assert text in err and err.count("\n") == 1 and err.startswith("error: ")
    assert files(tmp_path) == before


def square(low: float = 0.2, high: float = 0.7, dtype: str = "uint8", channels: int = 3) -> np.ndarray:
    """A bright square from row and column 16 to 47, with a speck beside it."""
    plane = np.full((64, 64, channels), low)
    plane[16:48, 16:48] = high
    plane[4:7, 4:7] = high
    scale = 1.0 if dtype == "float32" else np.iinfo(dtype).max
    return (plane * scale).astype(dtype)


def test_edges_lie_on_the_border_of_a_square() -> None:
    edges = edge_map(square(), Canny(sigma=1, min_length=20))
    rows, columns = np.nonzero(edges)
    off = np.stack([abs(rows - 15.5), abs(rows - 47.5), abs(columns - 15.5), abs(columns - 47.5)]).min(axis=0)
    assert off.max() <= 1 and 100 <= edges.sum() <= 140
    assert edge_map(square(), Canny(sigma=1, min_length=1))[:10, :10].any(), "the speck is an edge, too"
    assert edge_map(square(), Canny(sigma=1, min_length=20, width=3)).sum() > 2.5 * edges.sum()
    assert not edge_map(square(), Canny(sigma=1, low=0.9, high=0.9)).any()
    assert not edge_map(square(0.5, 0.5)).any() and not edge_map(square()[:2]).any()


def test_edges_depend_neither_on_depth_nor_on_contrast() -> None:
    eight = scene(1)[..., :1]
    reference = edge_map(eight)
    floats = eight.astype(np.float32)
    assert 100 < reference.sum() < 1000
    for image in (
        eight.astype(np.uint16) * np.uint16(257), eight.astype(np.uint16) * np.uint16(16), floats,
        100 * floats - 7, eight.repeat(3, axis=2), eight.repeat(5, axis=2),
        (0.4 + floats / 5000).astype(np.float32),
    ):  # fmt: skip
        # a threshold or a tie between two pixels may fall the other way by rounding
        assert (edge_map(image) != reference).sum() <= 0.05 * reference.sum()


def test_edges_with_thresholds_of_ones_own() -> None:
    # black and white of a float image are its smallest and largest value
    for image in (square(0.0, 1.0), square(0.0, 1.0, "uint16"), 9 * square(0.0, 1.0, "float32") - 4):
        assert edge_map(image, Canny(sigma=1, low=0.05, high=0.3)).any()
        assert not edge_map(image, Canny(sigma=1, low=0.05, high=0.9)).any()


@pytest.mark.parametrize("dtype, suffix", [("uint8", "png"), ("uint16", "png"), ("float32", "tif")])
def test_edge_pairs_are_a_training_folder(tmp_path: Path, dtype: str, suffix: str) -> None:
    photo = square(dtype=dtype)
    put(tmp_path, p__train__1_tif=photo, p__test__2_tif=photo, p__other__3_tif=photo, p__4_tif=b"II*\0broken")
    report = make_edges(tmp_path / "p", tmp_path / "out", Canny(), pairs=True)
    assert report.written == 3 and len(report.bad) == 1 and "4.tif" in report.bad[0]
    expected = [f"test/2.{suffix}", f"train/1.{suffix}", f"train/other/3.{suffix}"]
    assert files(tmp_path / "out") == expected
    layout = find_layout(tmp_path / "out", paired=True)
    assert layout.side_by_side and len(layout.train.A) == 2 and len(layout.test.A) == 1
    (joined,) = read_images(tmp_path / "out" / expected[0])
    np.testing.assert_array_equal(joined[:, 64:], photo, strict=True)
    white = 1 if dtype == "float32" else np.iinfo(dtype).max
    np.testing.assert_array_equal(joined[:, :64] == white, ~edge_map(photo)[..., None].repeat(3, axis=2))


def test_edges_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, p__a__1_jpg=square(), p__2_png=square())
    out, _ = main(["edges", tmp_path / "p", tmp_path / "out"], 0, capsys)
    assert files(tmp_path / "out") == ["2.png", "a/1.png"] and "2 edge maps written" in out
    (edges,) = read_images(tmp_path / "out/2.png")
    assert edges.shape == (64, 64, 1) and set(np.unique(edges)) == {0, 255} and edges.mean() > 200
    out, _ = main(["edges", tmp_path / "p", tmp_path / "pairs", "--pairs"], 0, capsys)
    assert f"next: python -m fastgan.train pix2pix --data {tmp_path / 'pairs'}" in out
    monkeypatch.setitem(sys.modules, "skimage", None)
    _, err = main(["edges", tmp_path / "p", tmp_path / "new"], 2, capsys)
    assert "pip install -e '.[data]'" in err and not (tmp_path / "new").exists()


def titles(checked: Checked) -> dict[str, bool]:
    return {finding.title: finding.problem for finding in checked.findings}


def test_check_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leak, twin = scene(1), scene(2)
    grey = scene(3)[..., :1].repeat(3, axis=2)
    clear = np.concatenate([scene(4), np.full((64, 64, 1), 9, np.uint8)], axis=2)
    root = put(
        tmp_path / "set",
        trainA__leak_png=leak, testA__again_png=leak, trainA__t1_png=twin, trainA__t2_bmp=twin,
        trainB__both_png=twin, trainA__grey_png=grey, trainA__one_png=np.full((64, 64, 3), 7, np.uint8),
        trainB__black_png=np.where(np.arange(4096).reshape(64, 64, 1) == 9, 255, 0).astype(np.uint8),
        trainB__white_png=np.where(np.arange(4096).reshape(64, 64, 1) == 9, 0, 255).astype(np.uint8),
        trainB__wide_png=scene(5, 32, 300), trainB__near_jpg=scene(6), testB__near_webp=scene(6, 100, 90),
        extra__x_png=scene(7), trainA__deep_tif=noise(2),
    )  # fmt: skip
    Image.fromarray(clear, "RGBA").save(root / "trainA/clear.png")
    whole = (root / "trainA/t1.png").read_bytes()
    put(root, trainA__cut_png=whole[: len(whole) // 2], trainB__empty_jpg=b"")
    before = files(tmp_path)
    out, _ = main(["check", root], 1, capsys)
    found = titles(check(root))
    assert found == {
        "files that cannot be read: 2": True,
        "images both in the training set and outside it: 1": True,
        "A mixes numbers of channels: 7 with 3, 1 with 2": True,
        "images that training does not use: 1": False,
        "few training images (A 8, B 6)": False,
        "images both in the training set and outside it, nearly the same: 1": False,
        "images both in A and in B: 1": False,
        "images that occur twice: 1": False,
        "B mixes grey and RGB: 4 with 3, 2 with 1": False,
        "images of one colour: 1": False,
        "images almost all black: 1": False,
        "images almost all white: 1": False,
        "images with transparency: 1": False,
        "grey images stored as RGB in A: 1": False,
        "images smaller than 256 pixels: 15": False,
        "images far from square: 2": False,
    }
    assert all(title in out for title in found) and "trainA/leak.png = testA/again.png" in out
    assert "--load-size 35 --crop-size 32" in out and files(tmp_path) == before, "nothing is written unasked"

    out, _ = main(["check", root, "--json", "--sheet", tmp_path / "sheet.png"], 1, capsys)
    about = json.loads(out)
    assert about["groups"]["train A"]["images"] == 7 and len(about["bad_files"]) == 2
    assert about["groups"]["train B"]["width"] == [64, 64.0, 300] and len(about["findings"]) == len(found)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 1224 and sheet.height > 1500
    assert files(tmp_path) == sorted([*before, "sheet.png"])


def test_check_of_a_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(20):
        for split in ("train", "test"):
            half = scene(2 * n + (split == "test"), 256, 256)
            # a pair may look alike: B is A in other colours
            put(tmp_path, **{f"{split}__{n}_bmp": np.concatenate([half, half[..., ::-1]], axis=1)})
    # the same label map is no leak, nearly the same pair is one
    label = scene(0, 256, 256)[..., ::-1]
    put(tmp_path, test__label_jpg=np.concatenate([scene(99, 256, 256), label], axis=1))
    out, _ = main(["check", tmp_path], 0, capsys)
    assert ": side by side\n" in out and "nothing to remark" in out
    put(tmp_path, test__pair_jpg=np.concatenate([scene(0, 256, 256), label], axis=1))
    assert "images both in the training set and outside it, nearly the same: 2" in titles(check(tmp_path))


def test_check_of_pairs_and_depths(tmp_path: Path) -> None:
    dim = (noise(1, "uint16") % 4096).astype(np.uint16)
    root = put(tmp_path, trainA__1_png=dim, trainB__1_png=scene(1, 30, 40), trainA__2_png=dim[::-1].copy())
    put(root, trainB__2_png=scene(2, 24, 32))
    found = titles(check(root))
    assert "pairs of different size: 1" in found
    assert any(title.startswith("the 16-bit images of A only reach 409") for title in found)
    put(root, trainA__3_png=dim[:, ::-1].copy())
    assert "names in A or in B alone, though most are in both: 1" in titles(check(root))
    (root / "trainA/odd.tif").write_bytes(b"")
    assert titles(check(root))["files that cannot be read: 1"]


def test_near_duplicates(tmp_path: Path) -> None:
    for n in range(40):
        write_image(tmp_path / f"{n:02}.png", scene(n))
    brighter = np.clip(scene(3).astype(int) * 0.8 + 30, 0, 255).astype(np.uint8)
    put(tmp_path, a_jpg=scene(1), b_png=scene(2, 90, 80), c_png=brighter, d_png=scene(4)[:, ::-1].copy())
    paths = sorted(tmp_path.iterdir())
    seen = []
    for path in paths:
        found = look(path, [Place(path, "", "")])
        assert isinstance(found, list)
        seen += found
    pairs = {(paths[i].name, paths[j].name) for i, j, _ in find_twins(seen)}
    assert pairs == {("01.png", "a.jpg"), ("02.png", "b.png"), ("03.png", "c.png")}


def test_near_duplicates_agree_in_hash_and_in_thumbnail(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    basis = np.cos(np.pi * np.outer(np.arange(8), np.arange(64) + 0.5) / 64)
    signs = rng.permutation(np.repeat([-1.0, 1.0], 32)).reshape(8, 8)
    signs[0, 0] = 0

    def picture(waves: np.ndarray) -> np.ndarray:
        plane = basis.T @ waves @ basis
        return np.rint((plane - plane.min()) * (255 / np.ptp(plane))).astype(np.uint8)

    # equal signs of other sizes; then a common slope under unlike details
    slope = np.zeros((8, 8))
    slope[1, 0] = 80
    pairs = {
        "signs": (
            picture(signs * rng.uniform(0.2, 1, (8, 8))),
            picture(signs * rng.uniform(0.2, 9, (8, 8)) ** 2),
        ),
        "slope": (picture(slope + signs), picture(slope - signs)),
    }
    for name, images in pairs.items():
        seen = []
        for number, image in enumerate(images):
            write_image(tmp_path / f"{name}{number}.png", image)
            seen += look(tmp_path / f"{name}{number}.png", [Place(tmp_path, "", "")])  # type: ignore[operator]
        differ = int((seen[0].signs != seen[1].signs).sum())
        x, y = (image.small.astype(float).ravel() for image in seen)
        alike = float(np.corrcoef(x, y)[0, 1])
        assert (differ <= 6, alike >= 0.98) == (name == "signs", name == "slope"), (name, differ, alike)
        assert not find_twins(seen)

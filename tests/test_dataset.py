"""Batches depend on number and seed alone; pairs share crop and flip; options, notes, digits, loader."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgan.data.augment import from_tensor
from fastgan.data.dataset import Data, open_data
from fastgan.data.digits import make_digits
from fastgan.data.feed import Loader
from fastgan.data.images import DataError, write_image


def _random(height: int, width: int, channels: int = 3, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), endpoint=True).astype(dtype)


def _coordinates(height: int, width: int, number: int) -> np.ndarray:
    """Every pixel holds its row, its column and the number of its image."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, number)], axis=2).astype(np.uint16)


def _write(root: Path, images: dict[str, np.ndarray]) -> Path:
    for name, image in images.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)
    return root


def _unpaired(root: Path, count_a: int = 5, count_b: int = 3, size: tuple[int, int] = (20, 24)) -> Path:
    images = {f"trainA/{i}.tif": _coordinates(*size, i) for i in range(count_a)}
    images |= {f"trainB/{i}.tif": _coordinates(*size, 100 + i) for i in range(count_b)}
    return _write(
        root, images | {"testA/7.tif": _coordinates(*size, 7), "testB/8.tif": _coordinates(*size, 108)}
    )


def _paired(root: Path, count: int = 4, size: tuple[int, int] = (20, 24)) -> Path:
    images = {f"A/train/{i}.tif": _coordinates(*size, i) for i in range(count)}
    return _write(root, images | {f"B/train/{i}.tif": _coordinates(*size, 100 + i) for i in range(count)})


def _values(data: Data, batch: dict[str, torch.Tensor], domain: str = "A") -> np.ndarray:
    number = "AB".index(domain)
    return from_tensor(batch[domain], data.ranges[number], data.dtypes[number])


def _stream(data: Data, steps: int, batch_size: int, seed: int, domain: str) -> list[int]:
    batches = (data.train.batch(k, batch_size, seed=seed) for k in range(steps))
    return [int(image[0, 0, 2]) for batch in batches for image in _values(data, batch, domain)]


CROP: dict[str, Any] = {"preprocess": "crop", "crop_size": 16}


def test_batches_depend_on_number_and_seed_alone(tmp_path: Path) -> None:
    _unpaired(tmp_path)
    one, two = (open_data(tmp_path, paired=False, **CROP) for _ in range(2))
    for k in (11, 0, 3, 11):
        a, b = one.train.batch(k, 2, seed=5), two.train.batch(k, 2, seed=5)
        assert torch.equal(a["A"], b["A"]) and torch.equal(a["B"], b["B"])
    others = [one.train.batch(11, 2, seed=6), one.train.batch(12, 2, seed=5)]
    first = one.train.batch(11, 2, seed=5)
    assert not any(torch.equal(first["A"], other["A"]) for other in others)


def test_the_numbers_never_change() -> None:
    """A run of today must resume tomorrow: the stream of a seed is part of the interface."""
    data = open_data(None, paired=False)
    split = data.train
    host = [split.host_batch(k, 3, seed=42) for k in (0, 500)]
    order = [[split._number(d, position, 42) for position in (0, 1, 720, 5000)] for d in (0, 1)]
    assert order == ORDER
    assert [images.flips for pair in host for images in pair] == [[]] * 4


ORDER = [[646, 422, 409, 82], [536, 679, 370, 227]]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_pass_shows_every_image_once_in_a_new_order(tmp_path: Path, batch_size: int) -> None:
    data = open_data(_unpaired(tmp_path), paired=False, **CROP)
    stream_a = _stream(data, 20, batch_size, 0, "A")
    stream_b = _stream(data, 20, batch_size, 0, "B")
    passes_a = [stream_a[i : i + 5] for i in range(0, len(stream_a) - 4, 5)]
    passes_b = [stream_b[i : i + 3] for i in range(0, len(stream_b) - 2, 3)]
    assert all(sorted(p) == [0, 1, 2, 3, 4] for p in passes_a)
    assert all(sorted(p) == [100, 101, 102] for p in passes_b)
    assert len({tuple(p) for p in passes_a}) > 1 and len({tuple(p) for p in passes_b}) > 1


def test_epoch_length_and_names(tmp_path: Path) -> None:
    data = open_data(_unpaired(tmp_path), paired=False, **CROP)
    assert (data.train.len_A, data.train.len_B, data.test.len_A, data.test.len_B) == (5, 3, 1, 1)
    assert [data.train.steps_per_epoch(n) for n in (1, 2, 5, 8)] == [5, 3, 1, 1]
    assert data.train.names_A == ["0", "1", "2", "3", "4"] and data.test.names_B == ["8"]
    assert data.shown is data.test and data.size == 16 and data.name == tmp_path.name
    assert data.channels == (3, 3) and data.dtypes == (np.uint16, np.uint16)


def test_serial_order_is_that_of_the_original_release(tmp_path: Path) -> None:
    data = open_data(_unpaired(tmp_path), paired=False, serial=True, **CROP)
    assert _stream(data, 4, 3, 0, "A") == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert _stream(data, 4, 3, 0, "B") == [100, 101, 102, 100, 101, 100, 101, 102, 100, 101, 100, 101]


def test_a_pair_shares_image_crop_and_flip(tmp_path: Path) -> None:
    data = open_data(_paired(tmp_path), paired=True, **CROP)
    places, flips = set(), 0
    for k in range(40):
        batch = data.train.batch(k, 2, seed=1)
        a, b = _values(data, batch, "A").astype(int), _values(data, batch, "B").astype(int)
        np.testing.assert_array_equal(a[..., :2], b[..., :2])
        np.testing.assert_array_equal(a[..., 2] + 100, b[..., 2])
        for image in a:
            flipped = image[0, 0, 1] > image[0, -1, 1]
            straight = image[:, ::-1] if flipped else image
            top, left = straight[0, 0, :2]
            np.testing.assert_array_equal(
                straight, _coordinates(20, 24, image[0, 0, 2])[top:, left:][:16, :16]
            )
            places.add((top, left))
            flips += flipped
    assert {top for top, _ in places} == set(range(5)) and {left for _, left in places} == set(range(9))
    assert 22 <= flips <= 58  # 80 fair draws, four standard deviations


def test_unpaired_crops_and_flips_are_independent(tmp_path: Path) -> None:
    data = open_data(_unpaired(tmp_path), paired=False, **CROP)
    corners = []
    for k in range(60):
        batch = data.train.batch(k, 1, seed=1)
        corners.append([tuple(_values(data, batch, d)[0, 0, (0, -1), 1]) for d in "AB"])
    assert {(a[0] > a[1], b[0] > b[1]) for a, b in corners} == {(x, y) for x in (0, 1) for y in (0, 1)}
    assert sum(a == b for a, b in corners) < 15


def test_no_flip(tmp_path: Path) -> None:
    data = open_data(_paired(tmp_path), paired=True, flip=False, **CROP)
    for k in range(10):
        values = _values(data, data.train.batch(k, 4, seed=0)).astype(int)
        assert (values[:, 0, 0, 1] < values[:, 0, -1, 1]).all()


def test_direction_swaps_everything(tmp_path: Path) -> None:
    _write(tmp_path, {f"trainA/{i}.png": _random(20, 20, 1, "uint16", i) for i in range(3)})
    _write(tmp_path, {f"trainB/{i}.png": _random(20, 20, 3, "uint8", i) for i in range(4)})
    _write(tmp_path, {"testA/0.png": _random(20, 20, 1, "uint16"), "testB/1.png": _random(20, 20, 3)})
    options: dict[str, Any] = {"paired": False, "range_a": (0, 4095), **CROP}
    there, back = open_data(tmp_path, **options), open_data(tmp_path, direction="BtoA", **options)
    assert there.channels == (1, 3) and back.channels == (3, 1)
    assert there.ranges == ((0, 4095), (0, 255)) and back.ranges == ((0, 255), (0, 4095))
    assert there.dtypes == back.dtypes[::-1]
    assert (back.train.len_A, back.train.len_B) == (4, 3) and back.train.names_A == there.train.names_B
    for x, y in (("A", "B"), ("B", "A")):
        assert torch.equal(there.test.images(x, 0, 1), back.test.images(y, 0, 1))  # type: ignore[arg-type]
    _paired(tmp_path / "pairs")
    there, back = (
        open_data(tmp_path / "pairs", paired=True, direction=d, **CROP)  # type: ignore[arg-type]
        for d in ("AtoB", "BtoA")
    )
    one, two = there.train.batch(3, 2, seed=0), back.train.batch(3, 2, seed=0)
    assert torch.equal(one["A"], two["B"]) and torch.equal(one["B"], two["A"])


def test_side_by_side(tmp_path: Path) -> None:
    for i in range(3):
        both = np.concatenate([_coordinates(20, 24, i), _coordinates(20, 24, 100 + i)], axis=1)
        _write(tmp_path, {f"train/{i}.png": both, f"val/{i}.png": both})
    data = open_data(tmp_path, paired=True, **CROP)
    batch = data.train.batch(0, 3, seed=0)
    a, b = _values(data, batch, "A").astype(int), _values(data, batch, "B").astype(int)
    np.testing.assert_array_equal(a[..., :2], b[..., :2])
    np.testing.assert_array_equal(a[..., 2] + 100, b[..., 2])
    assert data.test.len_A == 3
    unpaired = open_data(tmp_path, paired=False, **CROP)
    assert any("left halves are A" in note for note in unpaired.notes)
    pairs = zip(_stream(unpaired, 30, 1, 0, "A"), _stream(unpaired, 30, 1, 0, "B"))
    assert len(set(pairs)) > 3
    _write(tmp_path, {"train/9.png": _random(20, 31)})
    with pytest.raises(
        DataError, match=r"9\.png: 31 pixels wide; two images side by side need an even width"
    ):
        open_data(tmp_path, paired=True, **CROP)


def _open_counts(root: Path, counts: tuple[int, ...], **options: Any) -> Data:
    _write(root, {f"trainA/{i}.tif": _random(20, 20, n, seed=i) for i, n in enumerate(counts)})
    _write(root, {"trainB/0.png": _random(20, 20)})
    return open_data(root, paired=False, **CROP, **options)


def test_channels(tmp_path: Path) -> None:
    assert _open_counts(tmp_path / "a", (1, 1)).channels == (1, 3)
    assert _open_counts(tmp_path / "b", (6, 6)).channels == (6, 3)
    mixed = _open_counts(tmp_path / "c", (3, 1, 1))
    assert mixed.channels == (3, 3)
    (grey,) = _values(mixed, {"A": mixed.train.images("A", 1, 2)})
    np.testing.assert_array_equal(grey, _random(20, 20, 1, seed=1).repeat(3, axis=2)[2:18, 2:18])
    assert _open_counts(tmp_path / "d", (1, 1), channels=3).channels == (3, 3)
    assert _open_counts(tmp_path / "e", (3, 3), channels=1).channels == (1, 1)
    assert _open_counts(tmp_path / "f", (4, 4), channels=4, channels_b=3).channels == (4, 3)
    with pytest.raises(DataError, match=r"0\.tif has 3 channels, .*1\.tif has 4: .*--channels "):
        _open_counts(tmp_path / "g", (3, 4))
    with pytest.raises(DataError, match=r"1 of 2 files.*0\.png: has 3 channels and --channels-b is 4"):
        _open_counts(tmp_path / "h", (4,), channels=4)
    skipped = _open_counts(tmp_path / "i", (3, 4, 3), channels=3, skip_bad=True)
    assert skipped.train.len_A == 2 and "skipped 1 bad files" in skipped.notes[0]


def test_types_and_ranges(tmp_path: Path) -> None:
    ramp = np.linspace(-1000, 3000, 400, dtype=np.float32).reshape(20, 20)
    _write(
        tmp_path,
        {
            "trainA/0.npy": ramp,
            "trainA/1.tif": ramp / 2,
            "testA/0.npy": ramp * 2,
            "testB/0.png": _random(20, 20),
        },
    )
    _write(tmp_path, {"trainB/0.png": _random(20, 20), "trainB/1.png": _random(20, 20, dtype="uint16")})
    data = open_data(tmp_path, paired=False, **CROP)
    assert data.ranges == ((-1000, 3000), (0, 65535)) and data.dtypes == (np.float32, np.uint16)
    (first,) = _values(data, {"B": data.train.images("B", 0, 1)}, "B")
    np.testing.assert_array_equal(first, _random(20, 20)[2:18, 2:18].astype(np.uint16) * 257)
    expected = torch.from_numpy((ramp[2:18, 2:18] + 1000) / 2000 - 1)
    torch.testing.assert_close(data.train.images("A", 0, 1)[0, 0], expected)
    # twice the training range: cut off, not stretched
    torch.testing.assert_close(data.test.images("A", 0, 1)[0, 0], (expected * 2 + 0.5).clamp(-1, 1))
    window = open_data(tmp_path, paired=False, range_a=(0, 1000), **CROP)
    got = window.train.images("A", 0, 1, output_range="sigmoid")[0, 0]
    torch.testing.assert_close(got, torch.from_numpy(ramp[2:18, 2:18] / 1000).clamp(0, 1))


def test_types_that_do_not_mix(tmp_path: Path) -> None:
    _write(tmp_path, {"trainA/0.npy": np.ones((20, 20), np.float32), "trainB/0.png": _random(20, 20)})
    with pytest.raises(DataError, match="domain A: all values are 1; give --range-a"):
        open_data(tmp_path, paired=False, **CROP)
    _write(tmp_path, {"trainA/1.png": _random(20, 20, 1)})
    with pytest.raises(DataError, match=r"0\.npy holds float values, .*1\.png uint8: save"):
        open_data(tmp_path, paired=False, **CROP)


def test_output_ranges_and_layout(tmp_path: Path) -> None:
    image = np.array([0, 255, 51, 204], np.uint8).reshape(2, 2).repeat(8, 0).repeat(8, 1)
    _write(tmp_path, {"A/0.png": image, "B/0.png": image})
    data = open_data(tmp_path, paired=True, **CROP)
    for output_range, low in (("tanh", -1.0), ("sigmoid", 0.0)):
        batch = data.train.batch(0, 2, seed=0, output_range=output_range)["A"]  # type: ignore[arg-type]
        assert batch.dtype == torch.float32 and batch.shape == (2, 1, 16, 16)
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert sorted(batch.unique().tolist()) == pytest.approx(
            [low, low + 0.2 * (1 - low), 1 - 0.2 * (1 - low), 1]
        )
        assert batch.min() == low and batch.max() == 1


def test_whole_images_of_unequal_size_need_batch_one(tmp_path: Path) -> None:
    _write(tmp_path, {"A/0.png": _random(20, 24), "A/1.png": _random(26, 30), "B/0.png": _random(21, 23)})
    data = open_data(tmp_path, paired=False, preprocess="none", serial=True)
    shapes = [tuple(data.train.batch(k, 1, seed=0)["A"].shape) for k in (0, 1)]
    assert shapes == [(1, 3, 20, 24), (1, 3, 24, 32)] and data.size is None
    with pytest.raises(
        DataError, match="domain A: images of 24x20 and 32x24 pixels make no batch; use --batch-size 1"
    ):
        data.train.batch(0, 2, seed=0)
    with pytest.raises(DataError, match="use --batch-size 1"):
        data.train.images("A", 0, 2)


def test_test_batches_and_empty_ranges(tmp_path: Path) -> None:
    images = {
        f"{name}/{i}.png": _random(20, 20, seed=i) for name in ("trainA", "trainB", "testA") for i in range(4)
    }
    _write(tmp_path, images)
    data = open_data(tmp_path, paired=False, **CROP)
    assert (data.test.len_A, data.test.len_B) == (4, 0)
    assert data.shown is data.train and "no test images: samples show training images" in data.notes
    batch = data.test.test_batch(1, 9)
    assert batch["A"].shape == (3, 3, 16, 16) and batch["B"].shape == (0, 3, 16, 16)
    (second,) = _values(data, {"A": data.shown.images("A", 2, 3)})
    np.testing.assert_array_equal(second, _random(20, 20, seed=2)[2:18, 2:18])


def test_pages_are_images_or_channels(tmp_path: Path) -> None:
    import tifffile

    _write(tmp_path, {"trainB/0.png": _random(20, 20)})
    (tmp_path / "trainA").mkdir()
    stack = _random(20, 20, 6, "uint16").transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "trainA/x.tif", stack, photometric="minisblack")
    data = open_data(tmp_path, paired=False, **CROP)
    assert data.channels == (1, 3) and data.train.names_A == [f"x_{i}" for i in range(6)]
    assert open_data(tmp_path, paired=False, max_images=4, **CROP).train.len_A == 4
    data = open_data(tmp_path, paired=False, pages="channels", **CROP)
    assert data.channels == (6, 3) and data.train.names_A == ["x"]


def test_notes(tmp_path: Path) -> None:
    _write(tmp_path, {"trainA/0.png": np.full((20, 20, 1), 4000, np.uint16)})
    _write(tmp_path, {f"trainB/{i}.png": _random(20, 20) for i in range(12)})
    notes = open_data(tmp_path, paired=False, **CROP).notes
    assert notes == [
        "the 16-bit images of A only reach 4000 of 65535, nearly black; see --range-a 0 4095",
        "only 1 training image in A",
        "A has 1 images, B has 12: very unequal",
        "no test images: samples show training images",
    ]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"crop_size": 300}, "--load-size 286 is smaller than --crop-size 300"),
        ({"preprocess": "zoom"}, "--preprocess zoom: must be one of resize_and_crop, crop"),
        ({"crop_size": 0}, "must be at least 1"),
        ({"channels": 0}, "--channels 0: must be at least 1"),
        ({"max_images": 0}, "--max-images 0: must be at least 1"),
        ({"range_a": (5.0, 5.0)}, "--range-a 5 5: the second value must be the larger one"),
        ({"direction": "AB"}, "--direction AB: must be AtoB or BtoA"),
        ({"preprocess": "crop", "crop_size": 64}, "24x20 pixels are smaller than --crop-size 64"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    _unpaired(tmp_path)
    with pytest.raises(DataError, match=re.escape(text)) as caught:
        open_data(tmp_path, paired=False, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("paired", [False, True])
def test_digits(paired: bool) -> None:
    data = open_data(None, paired=paired)
    digits = make_digits("train", paired=paired)
    assert data.name == "digits" and data.size == 32 and data.channels == (3, 3) and data.notes == []
    assert (data.train.len_A, data.train.len_B) == (len(digits.A), len(digits.B))
    np.testing.assert_array_equal(_values(data, {"A": data.train.images("A", 3, 9)}), digits.A[3:9])
    np.testing.assert_array_equal(
        _values(data, {"B": data.test.images("B", 0, 5)}, "B"), make_digits("test", paired=paired).B[:5]
    )
    batch = data.train.batch(0, 64, seed=0)
    assert batch["A"].shape == batch["B"].shape == (64, 3, 32, 32)
    if paired:  # A + B is one colour per pair (see the digits), so the ink is in the same place
        total = _values(data, batch, "A").astype(int) + _values(data, batch, "B").astype(int)
        assert (total.max(axis=(1, 2)) - total.min(axis=(1, 2))).max() <= 1
    grey = open_data(None, paired=paired, channels=1, channels_b=3, max_images=10, direction="BtoA")
    assert grey.channels == (3, 1) and grey.train.len_A == 10
    with pytest.raises(DataError, match="--channels 4: the digits have 3"):
        open_data(None, paired=paired, channels=4)


def test_loader_gives_the_batches_in_order(tmp_path: Path) -> None:
    data = open_data(_unpaired(tmp_path), paired=False, **CROP)
    with Loader(data.train, 2, seed=9, start=4, output_range="sigmoid") as loader:
        for k, batch in zip(range(4, 14), loader):
            expected = data.train.batch(k, 2, seed=9, output_range="sigmoid")
            assert torch.equal(batch["A"], expected["A"]) and torch.equal(batch["B"], expected["B"])
        assert 0 <= loader.wait < 5
    assert next(loader, None) is None
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_loader_raises_in_the_consumer_and_closes_when_full(tmp_path: Path) -> None:
    _write(tmp_path, {"A/0.png": _random(20, 24), "A/1.png": _random(28, 32), "B/0.png": _random(20, 24)})
    data = open_data(tmp_path, paired=False, preprocess="none")
    with Loader(data.train, 2, seed=0) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match="use --batch-size 1"):
                next(loader)
    loader = Loader(data.train, 1, seed=0, depth=1)
    time.sleep(0.05)  # the thread now waits for room
    loader.close()
    assert not loader._thread.is_alive()

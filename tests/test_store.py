"""Files become stores: bad ones are reported or skipped, the cache is used again, and only when whole."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgan.data import store as store_module
from fastgan.data.augment import from_tensor
from fastgan.data.dataset import Data, open_data
from fastgan.data.images import DataError, write_image


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


CROP: dict[str, Any] = {"preprocess": "crop", "crop_size": 16}


def _values(data: Data, batch: dict[str, torch.Tensor], domain: str = "A") -> np.ndarray:
    number = "AB".index(domain)
    return from_tensor(batch[domain], data.ranges[number], data.dtypes[number])


def _stream(data: Data, steps: int, batch_size: int, seed: int, domain: str) -> list[int]:
    batches = (data.train.batch(k, batch_size, seed=seed) for k in range(steps))
    return [int(image[0, 0, 2]) for batch in batches for image in _values(data, batch, domain)]


def test_bad_files(tmp_path: Path) -> None:
    _unpaired(tmp_path)
    (tmp_path / "trainA/3.tif").write_bytes((tmp_path / "trainA/3.tif").read_bytes()[:-500])
    (tmp_path / "trainB/text.png").write_text("nothing")
    write_image(tmp_path / "trainB/small.tif", _coordinates(10, 40, 1))
    with pytest.raises(
        DataError, match=r"2 of 12 files cannot be used \(--skip-bad .*the first: .*3\.tif: cut short"
    ):
        open_data(tmp_path, paired=False, **CROP)
    data = open_data(tmp_path, paired=False, skip_bad=True, **CROP)
    assert data.train.names_A == ["0", "1", "2", "4"] and data.train.names_B == ["0", "1", "2"]
    assert "\n" not in data.notes[0]
    assert data.notes[0].startswith("skipped 3 bad files: ")
    for text in (
        "3.tif: cut short",
        "text.png: not an image",
        "small.tif: 40x10 pixels are smaller than --crop-size 16",
    ):
        assert text in data.notes[0]
    for path in (tmp_path / "trainB").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no training image of domain B can be used; 6 faults"):
        open_data(tmp_path, paired=False, skip_bad=True, **CROP)


def test_a_bad_file_takes_its_partner_along(tmp_path: Path) -> None:
    _paired(tmp_path)
    (tmp_path / "A/train/1.tif").write_bytes((tmp_path / "A/train/1.tif").read_bytes()[:-500])
    write_image(tmp_path / "B/train/2.tif", _coordinates(20, 26, 0))
    with pytest.raises(DataError, match=r"1\.tif: cut short"):
        open_data(tmp_path, paired=True, **CROP)
    data = open_data(tmp_path, paired=True, skip_bad=True, **CROP)
    assert data.train.names_A == data.train.names_B == ["0", "3"]
    assert re.search(r"2\.tif: 24x20 pixels, but its partner .*2\.tif has 26x20", data.notes[0])
    assert data.train.batch(0, 2, seed=0)["B"].shape == (2, 3, 16, 16)


def test_cache_gives_the_same_batches_and_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = _unpaired(tmp_path / "data"), tmp_path / "run" / "cache"
    plain = open_data(root, paired=False, **CROP)
    first = open_data(root, paired=False, cache=cache, **CROP)
    files = sorted(path.name for path in cache.iterdir())
    assert len(files) == 5 and not any(name.endswith(".tmp") for name in files)
    assert not [path for path in root.rglob("*") if path.is_file() and path.suffix != ".tif"]

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("fastgan.data.reading.read_images", decoded)
    monkeypatch.setattr("fastgan.data.reading.probe", decoded)
    again = open_data(root, paired=False, cache=cache, **CROP)
    for k in range(6):
        batches = [data.train.batch(k, 2, seed=3) for data in (plain, first, again)]
        for domain in "AB":
            assert torch.equal(batches[0][domain], batches[1][domain])
            assert torch.equal(batches[0][domain], batches[2][domain])
    assert plain.notes == first.notes == again.notes and plain.ranges == again.ranges
    assert torch.equal(plain.test.images("B", 0, 1), again.test.images("B", 0, 1))


def test_cache_is_rebuilt_when_anything_changes(tmp_path: Path) -> None:
    root, cache = _unpaired(tmp_path / "data"), tmp_path / "cache"

    def key(**options: Any) -> str:
        open_data(root, paired=False, cache=cache, **(CROP | options))
        (path,) = cache.glob("*.json")
        assert len(list(cache.iterdir())) == 5  # the files of the former key are gone
        return path.name

    keys = [key(), key(crop_size=12), key(channels=1), key(max_images=2), key(skip_bad=True)]
    assert len(set(keys)) == 5 and key() == keys[0]
    path = root / "trainA" / "2.tif"
    write_image(path, _coordinates(20, 24, 77))
    os.utime(path, (1, 1))
    assert key() != keys[0]
    assert 77 in _stream(open_data(root, paired=False, cache=cache, **CROP), 5, 1, 0, "A")
    before = key()
    write_image(root / "trainB" / "new.tif", _coordinates(20, 24, 1))
    assert key() != before
    assert open_data(root, paired=False, cache=cache, **CROP).train.len_B == 4


def test_a_cache_cut_off_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = _unpaired(tmp_path / "data"), tmp_path / "cache"
    expected = open_data(root, paired=False, **CROP).train.batch(0, 4, seed=0)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fastgan.data.reading.save_index", killed)
        with pytest.raises(Killed):
            open_data(root, paired=False, cache=cache, **CROP)
    assert list(cache.glob("*.npy")) and not list(cache.glob("*.json"))
    assert torch.equal(
        open_data(root, paired=False, cache=cache, **CROP).train.batch(0, 4, seed=0)["A"], expected["A"]
    )
    # a file of pixels that lost its end, one that vanished, an index that is no JSON
    for damage in ("short", "gone", "index"):
        path = next(cache.glob("*train_A.npy"))
        if damage == "short":
            path.write_bytes(path.read_bytes()[:-100])
        elif damage == "gone":
            path.unlink()
        else:
            next(cache.glob("*.json")).write_text('{"stores": {')
        data = open_data(root, paired=False, cache=cache, **CROP)
        assert torch.equal(data.train.batch(0, 4, seed=0)["A"], expected["A"])
        json.loads(next(cache.glob("*.json")).read_text())
        del data


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = _unpaired(tmp_path / "data"), tmp_path / "cache"
    original = store_module.Writer.append

    def full(self: store_module.Writer, name: str, image: np.ndarray) -> None:
        if len(self) == 2:
            assert self._temporary is not None
            with store_module.writing(self._temporary):
                raise OSError(28, "No space left on device")
        original(self, name, image)

    monkeypatch.setattr(store_module.Writer, "append", full)
    with pytest.raises(DataError, match="disk full while writing the cache; free some space"):
        open_data(root, paired=False, cache=cache, **CROP)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the cache cannot be written"):
        open_data(root, paired=False, cache=tmp_path / "file", **CROP)

"""Images of one domain with labels: class folders, attribute lists, the digits; batches bit by bit, one line
for what is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan.data import Loader, Resident
from fastgan.data.augment import Geometry
from fastgan.data.dataset import Data
from fastgan.data.digits import COLOURS, make_colours, make_digits
from fastgan.data.images import DataError
from fastgan.data.labelled import open_labelled

SQUARE = Geometry("resize_and_crop", 12, 8)
HEADER = "3\nBald Black_Hair Young\n"


def picture(path: Path, grey: int = 0, size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def classes(root: Path, *folders: str, count: int = 3) -> Path:
    """Images of one grey value a folder: 10, 20 ..."""
    for k, folder in enumerate(folders):
        for i in range(count):
            picture(root / folder / f"{i}.png", 10 * (k + 1))
    return root


def attributes(root: Path, lines: Sequence[str], folder: str = "images", header: str = HEADER) -> Path:
    """An attribute list, and an image of the grey value k for its line k."""
    for k, line in enumerate(lines):
        picture(root / folder / line.split()[0], k)
    (root / "list_attr_celeba.txt").write_text(header + "\n".join(lines) + "\n")
    return root


def opened(root: Path | None, **options: Any) -> Data:
    return open_labelled(root, **{"labelled": True, "geometry": SQUARE, **options})


def of_grey(data: Data, batch: dict[str, torch.Tensor]) -> list[int]:
    """The grey value of each image of a batch; they are flat."""
    return ((batch["A"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("test", ["test", "val", ""])
def test_class_folders(tmp_path: Path, test: str) -> None:
    classes(tmp_path, *(f"train/{name}" for name in ("10", "9", "happy/more")))
    if test:
        picture(tmp_path / test / "9/x.png", 20)
    data = opened(tmp_path)
    assert data.labels == ["9", "10", "happy"] and data.channels == (3, 3) and data.paired is False
    assert (data.train.len_A, data.train.len_B, data.test.len_A) == (9, 0, 1 if test else 0)
    assert data.shown is (data.test if test else data.train)
    batch = data.train.batch(2, 4, seed=1)
    assert set(batch) == {"A", "label"} and batch["A"].shape == (4, 3, 8, 8)
    wanted = {10: [0, 1, 0], 20: [1, 0, 0], 30: [0, 0, 1]}
    assert batch["label"].tolist() == [wanted[grey] for grey in of_grey(data, batch)]
    if test:
        assert data.test.labels is not None and data.test.labels.tolist() == [[1, 0, 0]]


def test_folders_without_train(tmp_path: Path) -> None:
    data = opened(classes(tmp_path, "cats", "dogs"), max_images=2)
    assert data.labels == ["cats", "dogs"] and data.train.len_A == 4  # two of each
    assert "no test images" in data.notes


def test_images_without_labels(tmp_path: Path) -> None:
    data = opened(classes(tmp_path, "train", "train/more"), labelled=False, max_images=5)
    assert data.labels == [] and data.channels == (3, 0) and data.train.len_A == 5
    assert set(data.train.batch(0, 2, seed=0)) == {"A"}


def test_an_attribute_list(tmp_path: Path) -> None:
    lines = [f"{k:06d}.jpg {1 if k % 2 else -1} {1 if k % 3 else -1} -1" for k in range(30)]
    data = opened(attributes(tmp_path, lines), attributes=("Black_Hair", "Bald"))
    assert data.labels == ["Black_Hair", "Bald"] and (data.train.len_A, data.test.len_A) == (27, 3)
    for split in (data.train, data.test):
        assert split.labels is not None
        for name, label in zip(split.names_A, split.labels.tolist()):
            k = int(name.rpartition("/")[2])
            assert label == [float(k % 3 > 0), float(k % 2 > 0)]
    # the images that StarGAN's code would hold back
    import random

    order = sorted(data.train.names_A + data.test.names_A)
    random.Random(1234).shuffle(order)
    assert sorted(order[:3]) == sorted(data.test.names_A)
    everything = opened(tmp_path)
    assert everything.labels == ["Bald", "Black_Hair", "Young"]


def test_a_list_without_a_count_and_an_image_it_does_not_name(tmp_path: Path) -> None:
    attributes(tmp_path, ["a.png 1 -1 0", "b.png -1 1 1"], header="Bald Black_Hair Young\n")
    picture(tmp_path / "images/c.png")
    data = opened(tmp_path, skip_bad=True)
    assert data.train.labels is not None and data.train.labels.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert any("c.png" in note for note in data.notes)
    with pytest.raises(DataError, match=r"does not name c.png \(1 such\); --skip-bad"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        (["a.png 1 1"], {}, "line 3: must be a file name and 3 times 1 or -1, got 2"),
        (["a.png 1 1 yes"], {}, "line 3"),
        (["a.png 1 1 1"], {"attributes": ("Smiling",)}, "no attribute Smiling; it has Bald, Black_Hair"),
    ],
)
def test_what_is_wrong_with_a_list(
    tmp_path: Path, lines: list[str], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError) as error:
        opened(attributes(tmp_path, lines), **options)
    assert says in str(error.value)


def test_what_is_wrong_with_folders(tmp_path: Path) -> None:
    classes(tmp_path / "one", "train/cats")
    classes(tmp_path / "more", "train/cats", "train/dogs", "test/cows")
    (tmp_path / "none").mkdir()
    for root, options, says in (
        ("one", {}, "no labels"),
        ("more", {}, "class cows is not in the training folder"),
        ("more/train", {"attributes": ("Bald",)}, "needs a list_attr"),
        ("none", {}, "holds no images"),
        ("nowhere", {}, "no such folder"),
    ):
        with pytest.raises(DataError, match=says):
            opened(tmp_path / root, **options)
    assert opened(tmp_path / "one", labelled=False).labels == []
    for options in ({"channels": 2}, {"attributes": ("Bald",)}, {"channels": 2, "digits": "colours"}):
        with pytest.raises(DataError, match="digits have"):
            opened(None, **options)


def test_a_cache_is_used_and_follows_the_labels(tmp_path: Path) -> None:
    root, cache = classes(tmp_path / "data", "a", "b"), tmp_path / "cache"
    first = opened(root, cache=cache)
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    again = opened(root, cache=cache)
    assert written == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    (root / "b").rename(root / "0")
    other = opened(root, cache=cache)
    assert other.labels == ["0", "a"] and first.labels == again.labels == ["a", "b"]
    for data in (first, again, other):
        batch = data.train.batch(0, 6, seed=0)
        named = [data.labels[k] for k in batch["label"].argmax(1)]
        assert named == ["a" if grey == 10 else data.labels[1 - data.labels.index("a")]
                         for grey in of_grey(data, batch)]  # fmt: skip


def test_batches_are_a_function_of_number_seed_and_rank(tmp_path: Path) -> None:
    data = opened(classes(tmp_path, "a", "b", "c"), flip=True)
    whole = data.train.batch(3, 4, seed=5)
    parts = [data.train.batch(3, 2, seed=5, rank=rank, ranks=2) for rank in (0, 1)]
    assert all(torch.equal(torch.cat([part[k] for part in parts]), whole[k]) for k in whole)
    assert not torch.equal(whole["label"], data.train.batch(4, 4, seed=5)["label"])
    for kind in (Loader, Resident):
        with kind(data.train, 4, seed=5, start=2, device="cpu") as feed:
            for k, batch in zip(range(2, 9), feed):
                expected = data.train.batch(k, 4, seed=5)
                assert set(batch) == set(expected)
                assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_digits() -> None:
    data, truth = opened(None), make_digits("test", paired=True)
    assert data.labels == list("0123456789") and data.channels == (1, 10) and data.size == 32
    assert (data.train.len_A, data.test.len_A) == (1438, 359)
    images = data.test.images("A", 0, 5)[:, 0].numpy()
    np.testing.assert_allclose((images + 1) / 2, truth.ink_A[:5], atol=1e-6)
    assert data.test.labels is not None and (data.test.labels.argmax(1) == truth.labels_A).all()
    colours = opened(None, digits="colours")
    assert colours.labels == list(COLOURS) and colours.channels == (3, 5)
    assert colours.test.labels is not None
    assert (colours.test.labels.argmax(1) == make_colours("test").colours).all()
    shown = ((colours.test.images("A", 0, 9) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert (shown == make_colours("test").images[:9]).all()
    assert opened(None, digits="colours", channels=1).train.batch(0, 2, seed=0)["A"].shape[1] == 1
    assert opened(None, channels=3, max_images=7).train.batch(0, 2, seed=0)["A"].shape == (2, 3, 32, 32)

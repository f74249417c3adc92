"""Every folder layout found, pairs matched by name, one clear line for the rest."""

import re
from pathlib import Path

import pytest

from fastgan.data.folders import Files, find_layout
from fastgan.data.images import DataError


def _make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def _paths(root: Path, files: Files) -> tuple[list[str], list[str]]:
    a, b = (
        [source.path.relative_to(root).as_posix() + source.half[:1] for source in s]
        for s in (files.A, files.B)
    )
    return a, b


LAYOUTS = {
    "trainA": ("trainA/{}", "trainB/{}", "testA/{}", "testB/{}"),
    "train_A": ("train_A/{}", "train_B/{}", "test_A/{}", "test_B/{}"),
    "Train-a": ("Train-a/{}", "Train-b/{}", "TEST-A/{}", "TEST-B/{}"),
    "valA": ("trainA/{}", "trainB/{}", "valA/{}", "valB/{}"),
    "train/A": ("train/A/{}", "train/B/{}", "test/A/{}", "test/B/{}"),
    "A/train": ("A/train/{}", "B/train/{}", "A/test/{}", "B/test/{}"),
    "nested": ("trainA/x/{}", "trainB/x/{}", "testA/x/{}", "testB/x/{}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("paired", [False, True])
def test_separate_folders(tmp_path: Path, layout: str, paired: bool) -> None:
    folders = LAYOUTS[layout]
    for folder, names in zip(folders, (("10", "9", "1"), ("1", "9", "10"), ("7", "8"), ("8", "7"))):
        _make(tmp_path, *(folder.format(f"img{name}.png") for name in names))
    found = find_layout(tmp_path, paired=paired)
    order = [f"img{n}.png" for n in (1, 9, 10)]
    assert _paths(tmp_path, found.train) == (
        [folders[0].format(name) for name in order],
        [folders[1].format(name) for name in order],
    )
    order = ["img7.png", "img8.png"]
    assert _paths(tmp_path, found.test) == (
        [folders[2].format(name) for name in order],
        [folders[3].format(name) for name in order],
    )
    assert found.test_name == ("val" if layout == "valA" else "test")
    assert not found.side_by_side


def test_test_goes_before_val(tmp_path: Path) -> None:
    _make(tmp_path, *(f"{s}{d}/1.png" for s in ("train", "val", "test") for d in "AB"))
    assert find_layout(tmp_path, paired=False).test_name == "test"


def test_flat_folders(tmp_path: Path) -> None:
    _make(tmp_path, "A/1.png", "A/2.png", "B/1.jpg", "B/2.jpg")
    found = find_layout(tmp_path, paired=True)
    assert _paths(tmp_path, found.train) == (["A/1.png", "A/2.png"], ["B/1.jpg", "B/2.jpg"])
    assert found.test == Files() and found.test_name == ""


@pytest.mark.parametrize("paired", [False, True])
def test_side_by_side(tmp_path: Path, paired: bool) -> None:
    _make(tmp_path, "train/2.jpg", "train/1.jpg", "val/a/3.jpg")
    found = find_layout(tmp_path, paired=paired)
    assert found.side_by_side and found.test_name == "val"
    assert _paths(tmp_path, found.train) == (
        ["train/1.jpgl", "train/2.jpgl"],
        ["train/1.jpgr", "train/2.jpgr"],
    )
    assert _paths(tmp_path, found.test) == (["val/a/3.jpgl"], ["val/a/3.jpgr"])


def test_pairs_match_by_name_and_not_by_order(tmp_path: Path) -> None:
    _make(tmp_path, "trainA/x/b.png", "trainA/a.png", "trainB/a.tif", "trainB/x/b.npy")
    found = find_layout(tmp_path, paired=True)
    assert (
        [source.name for source in found.train.A] == [source.name for source in found.train.B] == ["a", "x/b"]
    )


def test_unpaired_counts_and_one_sided_tests_are_fine(tmp_path: Path) -> None:
    _make(tmp_path, "trainA/1.png", "trainB/5.png", "trainB/6.png", "testA/9.png")
    found = find_layout(tmp_path, paired=False)
    assert (len(found.train.A), len(found.train.B), len(found.test.A), len(found.test.B)) == (1, 2, 1, 0)


ERRORS = {
    "no such folder": ((), "nowhere", "no such folder"),
    "a file": (("x.png",), "x.png", "is not a folder"),
    "empty": ((), "", "it holds no folders); looked for trainA/ + trainB/"),
    "images only": (("1.png",), "", "it holds images but no folders"),
    "other folders": (("horses/1.png", "zebras/1.png"), "", "it holds horses/, zebras/); looked for"),
    "no trainB": (("trainA/1.png",), "", "found trainA but not the same folder of domain B"),
    "no B": (("B/train/1.png",), "", "not the same folder of domain A"),
    "no testB": (("trainA/1.png", "trainB/1.png", "testA/1.png"), "", "found testA but not"),
    "no images": (("trainA/1.png", "trainB/1.gif"), "", "trainB: holds no images (1 other files); put files"),
    "empty train": (("train/readme.txt",), "", "train: holds no images"),
    "lonely": (
        ("trainA/1.png", "trainA/2.png", "trainB/1.png", *(f"trainB/{n}.png" for n in range(3, 9))),
        "",
        "do not match: 1 only in A (2), 6 only in B (3, 4, 5, ...); paired training needs",
    ),
    "twins": (("trainA/1.png", "trainA/1.jpg", "trainB/1.png"), "", "1.jpg and 1.png have the same name"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_that_names_the_folder(tmp_path: Path, case: str) -> None:
    names, below, text = ERRORS[case]
    _make(tmp_path, *names)
    with pytest.raises(DataError, match=re.escape(text)) as caught:
        find_layout(tmp_path / below, paired=True)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)

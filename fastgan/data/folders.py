"""Find the images of two domains in a folder, for training and for testing.

Layouts, in the order in which they are looked for (names in any case):

    trainA/ trainB/ [testA/ testB/]          also train_A, train-A
    train/A/ train/B/ [test/A/ test/B/]
    A/train/ B/train/ [A/test/ B/test/]
    A/ B/                                    no test images
    train/*.jpg [test/*.jpg]                 A and B side by side in one picture, A on the left

One domain, with labels where there are some (`find_labelled`):

    [train/]CLASS/*.jpg [test/CLASS/*.jpg]   the folder of an image is its class
    list_attr*.txt + *.jpg in any folder     CelebA's list: a line of names, then a line of 1 and -1 an image
    [train/]*.jpg [test/*.jpg]               no labels

Each folder may hold further folders. Test images are those of "test", without them those of "val". Pairs in
separate folders belong together by their path below it without the suffix; unpaired training on pairs is
fine.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastgan.data.images import IMAGE_SUFFIXES, DataError, list_images

_LOOKED_FOR = (
    "trainA/ + trainB/, train/A/ + train/B/, A/train/ + B/train/, A/ + B/, or side-by-side images in train/"
)


@dataclass(frozen=True)
class Source:
    """One image file or one half of it; its name is the path below its folder without the suffix."""

    path: Path
    name: str
    half: Literal["", "left", "right"] = ""


@dataclass(frozen=True)
class Files:
    """The images of both domains in natural order; entry i of A and B belong together if paired."""

    A: tuple[Source, ...] = ()
    B: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What was found: name of the layout, training and test images, name of the test folder or ""."""

    kind: str
    train: Files
    test: Files
    test_name: str = ""

    @property
    def side_by_side(self) -> bool:
        """Whether every file holds A on its left and B on its right half."""
        return any(source.half for source in self.train.A)


def find_layout(root: Path | str, *, paired: bool) -> Layout:
    """Find the images below a folder; paired: entry i of A and B must be two views of one thing.

    Unpaired test images may exist for one domain only. Raises DataError, naming the folder, if it is missing
    or empty, holds none of the layouts, or if the names of pairs do not match.
    """
    root = Path(root)
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {kind}; --data takes the folder that holds {_LOOKED_FOR}")
    for kind, pattern in (("trainA", "{}{}"), ("train/A", "{}/{}"), ("A/train", "{1}/{0}")):
        folders = _pair_of_folders(root, pattern, "train")
        if folders:
            test, test_name = Files(), ""
            for name in ("test", "val"):
                found = _pair_of_folders(root, pattern, name, need_both=paired)
                if found and not test_name:
                    test, test_name = _files(found, paired, may_be_empty=not paired), name
            return Layout(kind, _files(folders, paired), test, test_name)
    folders = _pair_of_folders(root, "{1}", "")
    if folders:
        return Layout("A + B", _files(folders, paired), Files())
    train = _child(root, "train")
    if train is not None:
        test_folder = _child(root, "test") or _child(root, "val")
        test_name = test_folder.name if test_folder is not None else ""
        test = _halves(test_folder) if test_folder is not None else Files()
        return Layout("side by side", _halves(train), test, test_name)
    present = sorted(path.name + "/" for path in root.iterdir() if path.is_dir())[:8]
    holds = f"it holds {', '.join(present)}" if present else "it holds no folders"
    if list_images(root) and not present:
        holds = "it holds images but no folders"
    raise DataError(f"{root}: no training images found ({holds}); looked for {_LOOKED_FOR}")


def _child(folder: Path, name: str) -> Path | None:
    """Find a folder by its name, in any case where the exact one is missing."""
    exact = folder / name
    if exact.is_dir():
        return exact
    same = sorted(path for path in folder.iterdir() if path.name.lower() == name.lower() and path.is_dir())
    return same[0] if same else None


def _find(root: Path, pattern: str, split: str, domain: str) -> Path | None:
    if pattern == "{}{}":
        options = (_child(root, split + between + domain) for between in ("", "_", "-"))
        return next((path for path in options if path is not None), None)
    folder: Path | None = root
    for part in pattern.format(split, domain).split("/"):
        folder = _child(folder, part) if folder is not None else None
    return folder


def _pair_of_folders(
    root: Path, pattern: str, split: str, need_both: bool = True
) -> tuple[Path | None, Path | None] | None:
    a, b = (_find(root, pattern, split, domain) for domain in "AB")
    if a is None and b is None:
        return None
    if need_both and (a is None or b is None):
        present, missing = (a, "B") if a is not None else (b, "A")
        assert present is not None
        found = present.relative_to(root).as_posix()
        raise DataError(f"{root}: found {found} but not the same folder of domain {missing}")
    return a, b


def _files(folders: tuple[Path | None, Path | None], paired: bool, may_be_empty: bool = False) -> Files:
    a, b = (_sources(folder, may_be_empty) if folder is not None else () for folder in folders)
    return _matched(a, b, folders) if paired else Files(a, b)


def _sources(folder: Path, may_be_empty: bool = False) -> tuple[Source, ...]:
    paths = list_images(folder)
    if not paths and not may_be_empty:
        others = sum(path.is_file() for path in folder.rglob("*"))
        raise DataError(
            f"{folder}: holds no images ({others} other files); "
            f"put files ending in {', '.join(IMAGE_SUFFIXES)} there"
        )
    return tuple(Source(path, path.relative_to(folder).with_suffix("").as_posix()) for path in paths)


def _halves(folder: Path) -> Files:
    sources = _sources(folder)
    left = tuple(Source(source.path, source.name, "left") for source in sources)
    return Files(left, tuple(Source(source.path, source.name, "right") for source in sources))


def _matched(a: tuple[Source, ...], b: tuple[Source, ...], folders: tuple[Path | None, Path | None]) -> Files:
    """Order B like A by name; every image must have its partner."""
    by_name: list[dict[str, Source]] = []
    for sources, folder in zip((a, b), folders):
        names: dict[str, Source] = {}
        for source in sources:
            if source.name in names:
                twins = f"{names[source.name].path.name} and {source.path.name}"
                raise DataError(
                    f"{folder}: {twins} have the same name, so their pair is not clear; remove one"
                )
            names[source.name] = source
        by_name.append(names)
    lonely_a = [name for name in by_name[0] if name not in by_name[1]]
    lonely_b = [name for name in by_name[1] if name not in by_name[0]]
    if lonely_a or lonely_b:
        raise DataError(
            f"{folders[0]} and {folders[1]} do not match: {_some(lonely_a, 'A')}, {_some(lonely_b, 'B')}; "
            "paired training needs two files of the same name (for unpaired images use cyclegan)"
        )
    return Files(a, tuple(by_name[1][source.name] for source in a))


def _some(names: list[str], domain: str) -> str:
    if not names:
        return f"0 only in {domain}"
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} only in {domain} ({', '.join(names[:3])}{more})"


@dataclass(frozen=True)
class Labels:
    """names: what the numbers of a label mean; table: the label (names,) float32 of an image by its name;
    classes: exactly one number is 1."""

    names: tuple[str, ...]
    table: Mapping[str, np.ndarray]
    classes: bool = True

    def of(self, names: Sequence[str]) -> np.ndarray:
        """Labels (N, names) of images; those of a multi-page file are its own."""
        table = self.table
        rows = [table[name] if name in table else table[name.rpartition("_")[0]] for name in names]
        return np.array(rows, np.float32).reshape(-1, len(self.names))


def find_labelled(
    root: Path, *, attributes: Sequence[str] = (), skip_bad: bool = False, notes: list[str]
) -> tuple[Layout, Labels]:
    """Find the images of one domain, as A, and their labels; without labels `names` is empty.

    Of a list without test folders a tenth, at most 1,999 images, are test images: the first ones in the order
    of StarGAN's code (Python's generator, seed 1234). attributes: names of the list to use, in that order.
    skip_bad: leave out images that the list does not name. Raises DataError for everything that is wrong.
    """
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "no such folder"
        raise DataError(f"{root}: {kind}; --data takes the folder that holds the images")
    train = _child(root, "train")
    folder = (_child(root, "test") or _child(root, "val")) if train is not None else None
    a = _sources(train or root)
    b = _sources(folder, may_be_empty=True) if folder is not None else ()
    name = folder.name if folder is not None else ""
    lists = sorted(root.glob("list_attr*.txt"))
    if lists:
        names, table = _read_list(lists[0], attributes)
        unknown = [source.path.name for source in a + b if source.path.name not in table]
        if unknown and not skip_bad:
            raise DataError(
                f"{lists[0]}: does not name {unknown[0]} ({len(unknown)} such); --skip-bad leaves it out"
            )
        if unknown:
            notes.append(
                f"left out {len(unknown)} images that {lists[0].name} does not name: {unknown[0]}, ..."
            )
        a, b = (tuple(s for s in sources if s.path.name in table) for sources in (a, b))
        if not a:
            raise DataError(f"{lists[0]}: names none of the images below {root}")
        if folder is None:
            order = list(a)
            random.Random(1234).shuffle(order)
            held = set(order[: min(1999, len(a) // 10)])
            a, b = tuple(s for s in a if s not in held), tuple(s for s in a if s in held)
        labels = Labels(names, {s.name: table[s.path.name] for s in a + b}, classes=False)
        return Layout("attribute list", Files(a), Files(b), name), labels
    if attributes:
        raise DataError(f"{root}: --attributes needs a list_attr*.txt there, as CelebA has")
    groups = {source.name: source.name.partition("/")[0] for source in a + b if "/" in source.name}
    classes = sorted({groups[source.name] for source in a if source.name in groups}, key=_natural)
    if len(groups) < len({source.name for source in a + b}) or len(classes) < 2:
        return Layout("images", Files(a), Files(b), name), Labels((), {}, classes=False)
    strange = sorted(set(groups.values()) - set(classes))
    if strange:
        raise DataError(f"{folder}: class {strange[0]} is not in the training folder")
    rows = dict(zip(classes, np.eye(len(classes), dtype=np.float32)))
    table = {name: rows[group] for name, group in groups.items()}
    return Layout("class folders", Files(a), Files(b), name), Labels(tuple(classes), table)


def _natural(name: str) -> tuple[int, str]:
    """Numbers in their order, before words."""
    return (int(name), name) if name.isdecimal() else (2**63, name)


def _read_list(path: Path, attributes: Sequence[str]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The wanted names of an attribute list, and 0 or 1 for each by file name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    first = 1 if lines and lines[0].strip().isdecimal() else 0  # CelebA begins with the number of images
    names = lines[first].split() if len(lines) > first else []
    wanted = tuple(attributes) or tuple(names)
    missing = [name for name in wanted if name not in names]
    if not names or missing:
        has = f"it has {', '.join(names[:40])}" if names else "it has no line of names"
        raise DataError(f"{path}: no attribute {missing[0] if missing else 'names'}; {has}")
    columns = [names.index(name) for name in wanted]
    table = {}
    for number, line in enumerate(lines[first + 1 :], first + 2):
        file, *values = line.split() or [""]
        if not file:
            continue
        if len(values) != len(names) or not set(values) <= {"1", "-1", "0"}:
            raise DataError(
                f"{path}, line {number}: must be a file name and {len(names)} times 1 or -1, got "
                f"{len(values)}: {' '.join(values[:4])}"
            )
        table[file] = np.array([values[k] == "1" for k in columns], np.float32)
    return wanted, table

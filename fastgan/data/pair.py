"""Join two folders of images of the same names into files that hold A on the left and B on the right."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fastgan.data.augment import match_dtype, resize
from fastgan.data.images import DataError, list_images, read_images, write_image
from fastgan.data.store import in_order

Format = Literal["auto", "png", "jpg", "webp", "tif", "npy"]
Size = tuple[int, int]


@dataclass
class Report:
    """What became of the files: counts, names without a partner, and a line for each one that failed."""

    written: int = 0
    kept: int = 0
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shape:
    """How sizes are made equal: `like` takes the size of A or B, `size` is (width, height) for both."""

    like: Literal["A", "B"] | None = None
    size: Size | None = None
    nearest: bool = False


def make_pairs(
    a: Path,
    b: Path,
    out: Path,
    *,
    ends: tuple[str, str] = ("", ""),
    shape: Shape = Shape(),  # noqa: B008, it is frozen
    kind: Format = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Write OUT/name for every name below both folders; folders inside (train, test, val) are kept.

    ends: what the names of A and of B end in (before the suffix) and what is left out to compare them;
    files that do not end so are not looked at. Without it names that differ in a final _A and _B alone
    match, too. kind: "auto" is .png where that can hold the values, else .tif. Files that exist are kept
    unless overwrite. Raises DataError if a folder is missing, holds OUT, or no names match; a fault of one
    pair is a line of the report.
    """
    check_folders((a, b), out)
    names = _matched(a, b, ends)
    both = [name for name in names[0] if name in names[1]]
    if not both:
        raise DataError(
            f"{a} and {b}: no two images have the same name ({_first(names[0])} and "
            f"{_first(names[1])}); rename "
            "them, or say with --end-a and --end-b what the names end in"
        )
    report = Report(
        only_a=[name for name in names[0] if name not in names[1]],
        only_b=[name for name in names[1] if name not in names[0]],
    )

    def join(name: str) -> str | None:
        paths = names[0][name], names[1][name]
        try:
            if not overwrite and exists(out / name, kind):
                return None
            left, right = (read_one(path) for path in paths)
            left, right = _equal_sizes(paths, left, right, shape)
            write(out / name, side_by_side(left, right), kind)
            return ""
        except (DataError, OSError) as error:
            return str(error) if str(paths[0].parent) in str(error) else f"{paths[0]}: {error}"

    for result in in_order(join, both, total=len(both), label="pair", progress=progress):
        count(report, result)
    return report


def count(report: Report, result: str | None) -> None:
    """Enter the outcome of one file: None it was there, "" it was written, else what went wrong."""
    if result is None:
        report.kept += 1
    elif result:
        report.bad.append(result)
    else:
        report.written += 1


def check_folders(sources: tuple[Path, ...], out: Path) -> None:
    """Raise DataError if a folder is missing or a second run would read what the first one wrote."""
    for folder in sources:
        if not folder.is_dir():
            raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
        if out.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{out}: lies in {folder}, which is read; choose another OUT")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is not a folder")


def read_one(path: Path) -> np.ndarray:
    """Read a file of one image, (H, W, C); raises DataError, also for several pages."""
    images = read_images(path)
    if len(images) > 1:
        raise DataError(f"{path}: holds {len(images)} pages; save them as one file each")
    return images[0]


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join two (H, W, C) images of equal height; 8 bits are widened to 16 and grey repeated where the other
    needs it. Raises DataError for types and channels that cannot lie in one file."""
    channels = max(left.shape[2], right.shape[2])
    dtype = max(left.dtype, right.dtype, key=lambda kind: kind.itemsize)
    halves = []
    for image in (left, right):
        typed = match_dtype(image, dtype)
        if typed is None or image.shape[2] not in (1, channels):
            raise DataError(
                f"{left.shape[2]} channels of {left.dtype} and {right.shape[2]} of {right.dtype} do "
                "not fit into "
                "one file; train on two folders instead"
            )
        halves.append(typed if typed.shape[2] == channels else typed.repeat(channels, axis=2))
    return np.concatenate(halves, axis=1)


def exists(goal: Path, kind: Format) -> bool:
    """Whether a file is there that `write` would replace."""
    suffixes = (".png", ".tif") if kind == "auto" else (f".{kind}",)
    return any(_named(goal, suffix).exists() for suffix in suffixes)


def write(goal: Path, image: np.ndarray, kind: Format) -> None:
    """Write (H, W, C) as goal with the suffix of its kind."""
    if kind == "auto":
        kind = "png" if image.dtype != np.float32 and image.shape[2] in (1, 3) else "tif"
    goal.parent.mkdir(parents=True, exist_ok=True)
    write_image(_named(goal, f".{kind}"), image)


def _named(goal: Path, suffix: str) -> Path:
    # not with_suffix: names may hold dots
    return goal.with_name(goal.name + suffix)


def _matched(a: Path, b: Path, ends: tuple[str, str]) -> tuple[dict[str, Path], dict[str, Path]]:
    found = _by_name(a, ends[0]), _by_name(b, ends[1])
    if ends == ("", "") and not found[0].keys() & found[1].keys():
        marked = _by_name(a, "_A"), _by_name(b, "_B")
        if marked[0].keys() & marked[1].keys():
            return marked
    return found


def _by_name(folder: Path, end: str) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in list_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(end):
            continue
        name = name.removesuffix(end)
        if name in names:
            raise DataError(
                f"{folder}: {names[name].name} and {path.name} have the same name, so their pair is "
                "not clear; "
                "remove one"
            )
        names[name] = path
    return names


def _first(names: dict[str, Path]) -> str:
    return f"{next(iter(names.values())).name}, ..." if names else "no images"


def _equal_sizes(
    paths: tuple[Path, Path], left: np.ndarray, right: np.ndarray, shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    goal = shape.size[::-1] if shape.size else (right if shape.like == "B" else left).shape[:2]
    if not shape.size and not shape.like and left.shape[:2] != right.shape[:2]:
        (h, w), (h2, w2) = left.shape[:2], right.shape[:2]
        raise DataError(
            f"{paths[0]}: {w}x{h} pixels, but its partner {paths[1]} has {w2}x{h2}; --resize A "
            "gives both the "
            "size of A"
        )
    change = _nearest if shape.nearest else resize
    return change(left, (goal[0], goal[1])), change(right, (goal[0], goal[1]))


def _nearest(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.intp) for new, old in zip(size, image.shape[:2])
    )
    return image[rows][:, columns]

"""Images of one domain, with labels where there are some: class folders, an attribute list, or the digits.

A label is a row of float32: one-hot for classes, 0 or 1 an attribute. Layouts: `folders.find_labelled`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from fastgan.data.augment import Geometry, match_channels
from fastgan.data.dataset import Data, Range, Split, ranges_of
from fastgan.data.digits import make_digits
from fastgan.data.folders import Files, Labels, Layout, find_labelled
from fastgan.data.images import DataError, Pages
from fastgan.data.reading import Wanted, read_folder
from fastgan.data.store import Images


def open_labelled(
    root: Path | None,
    *,
    labelled: bool,
    geometry: Geometry,
    attributes: tuple[str, ...] = (),
    channels: int | None = None,
    flip: bool = True,
    serial: bool = False,
    limits: Range | None = None,
    pages: Pages = "images",
    max_images: int | None = None,
    skip_bad: bool = False,
    cache: Path | None = None,
    progress: bool = False,
    whole_tests: bool = False,
) -> Data:
    """Find, check and decode the images below a folder as domain A, or draw the embedded digits, white on
    black, where root is None.

    Args:
        labelled: whether there must be labels; where there are some they come along in any case.
        attributes: names of the numbers of a label, in order; default: all. For attribute lists alone.
        max_images: the first ones of every class.
        whole_tests: test images are not cropped, and may be smaller than a crop.
        limits: `range_a` of `open_data`, whose other arguments are these.

    Raises:
        DataError: everything wrong with files, folders or options.
    """
    notes: list[str] = []
    if root is None:
        if attributes:
            raise DataError("--attributes: the digits have none; give --data with an attribute list")
        stores, table = _digits(channels, max_images)
        labels = Labels(tuple("0123456789"), table)
    else:
        layout, labels = find_labelled(root, attributes=attributes, skip_bad=skip_bad, notes=notes)
        if labelled and not labels.names:
            raise DataError(
                f"{root}: no labels; put the images into a folder per class, train/CLASS/*.png, or a "
                "list_attr*.txt beside them"
            )
        layout = _first(layout, labels, max_images)
        wanted = Wanted(False, (channels, channels), geometry, pages, None, skip_bad, whole_tests)
        stores = read_folder(root, wanted, cache, progress, notes, layout)
    train, test = stores["train_A"], stores["test_A"]
    own: list[str] = []
    ranges = ranges_of((train, train), (limits, limits), own)
    notes += own[: len(own) // 2]  # each was said of A and of B
    crop = geometry.crop if root is not None else None
    splits = [
        Split(
            (store,), ranges, crop=side, flip=flip and root is not None, paired=False, serial=serial,
            labels=labels.of(store.names) if labels.names else None,
        )
        for store, side in ((train, crop), (test, None if whole_tests else crop))
    ]  # fmt: skip
    if not len(test):
        notes.append("no test images")
    return Data(
        name=root.resolve().name if root else "digits", train=splits[0], test=splits[1],
        channels=(train.channels, len(labels.names)), ranges=ranges, dtypes=(train.dtype, train.dtype),
        paired=False, size=crop if root is not None else 32, notes=notes, labels=list(labels.names),
    )  # fmt: skip


def _first(layout: Layout, labels: Labels, count: int | None) -> Layout:
    """The first images of every class, of all images where they have none."""
    if count is None:
        return layout
    splits = []
    for files in (layout.train, layout.test):
        seen: dict[str, int] = {}
        kept = []
        for source in files.A:
            group = source.name.partition("/")[0] if labels.classes else ""
            seen[group] = seen.get(group, 0) + 1
            kept += [source] if seen[group] <= count else []
        splits.append(Files(tuple(kept)))
    return Layout(layout.kind, splits[0], splits[1], layout.test_name)


def _digits(channels: int | None, max_images: int | None) -> tuple[dict[str, Images], dict[str, np.ndarray]]:
    """The ink of all digits of a split, and their classes by name."""
    stores: dict[str, Images] = {}
    table: dict[str, np.ndarray] = {}
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        digits = make_digits(split, paired=True)
        ink = np.rint(digits.ink_A[:max_images, ..., None] * 255).astype(np.uint8)
        images = [match_channels(image, channels or 1) for image in ink]
        if images[0] is None:
            raise DataError(f"--channels {channels}: the digits have 1 channel, or 3 as RGB")
        names = [f"{split}/{i:04d}" for i in range(len(ink))]
        about = {"names": names, "channels": channels or 1, "dtype": "|u1", "low": 0.0, "high": 255.0}
        index = np.array([(i, 32, 32) for i in range(len(ink))], np.int64)
        stores[f"{split}_A"] = Images([image for image in images if image is not None], index, about)
        table |= dict(zip(names, np.eye(10, dtype=np.float32)[digits.labels_A]))
    return stores, table

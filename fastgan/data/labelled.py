"""Images of one domain, with labels where there are some: class folders, an attribute list, or the digits,
labelled by what they are or by their colours.

A label is a row of float32: one-hot for classes, 0 or 1 an attribute. Layouts: `folders.find_labelled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fastgan.data.augment import Geometry, match_channels
from fastgan.data.dataset import Data, Range, Split, ranges_of
from fastgan.data.digits import COLOURS, make_colours, make_digits
from fastgan.data.folders import Files, Labels, Layout, find_labelled
from fastgan.data.images import DataError, Pages
from fastgan.data.reading import Wanted, read_folder
from fastgan.data.store import Images

HAIR = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")  # attributes that exclude each other


def open_labelled(
    root: Path | None,
    *,
    labelled: bool,
    geometry: Geometry,
    digits: Literal["ink", "colours"] = "ink",
    classes: bool = False,
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
    """Find, check and decode the images below a folder as domain A, or draw the embedded digits where root is
    None.

    Args:
        labelled: whether there must be labels; where there are some they come along in any case.
        digits: "ink": white on black, labels "0" to "9"; "colours": see `fastgan.data.digits.make_colours`.
        classes: whether an attribute list must have `attributes`, as a label without them is a class.
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
        stores, labels = _digits(digits, channels, max_images)
    else:
        layout, labels = find_labelled(root, attributes=attributes, skip_bad=skip_bad, notes=notes)
        if labelled and not labels.names:
            raise DataError(
                f"{root}: no labels; put the images into a folder per class, train/CLASS/*.png, or a "
                "list_attr*.txt beside them"
            )
        if classes and not labels.classes and not attributes:
            some = ", ".join(labels.names[:40])
            raise DataError(f"{root}: an attribute list: choose with --attributes NAME NAME ... of {some}")
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


def has_classes(data: Data) -> bool:
    """Whether every image has exactly one label."""
    labels = data.train.labels
    return labels is not None and labels.shape[1] > 1 and bool((labels.sum(1) == 1).all())


def other_labels(own: np.ndarray, names: Sequence[str], *, classes: bool) -> np.ndarray:
    """The labels (names, names) that an image may be translated to, one a name, as StarGAN's code has them.

    Of classes row k is class k. Of attributes it is the image's own label with number k changed; a colour of
    the hair takes the place of the others, and stays where it is the image's own.

    Args:
        own: the label of the image, (names,).
        names: what its numbers mean.
        classes: exactly one number is 1.
    """
    if classes:
        return np.eye(len(names), dtype=np.float32)
    hair = np.array([name in HAIR for name in names])
    rows = np.repeat(own[None], len(names), 0).astype(np.float32)
    for k, row in enumerate(rows):
        if hair[k]:
            row[hair] = 0
            row[k] = 1
        else:
            row[k] = 1 - row[k]
    return rows


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


def _digits(
    kind: Literal["ink", "colours"], channels: int | None, max_images: int | None
) -> tuple[dict[str, Images], Labels]:
    """All digits of both splits, and their labels."""
    stores: dict[str, Images] = {}
    table: dict[str, np.ndarray] = {}
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    names = tuple("0123456789") if kind == "ink" else tuple(COLOURS)
    for split in splits:
        if kind == "ink":
            plain = make_digits(split, paired=True)
            pixels = np.rint(plain.ink_A[..., None] * 255).astype(np.uint8)
            numbers = plain.labels_A
        else:
            coloured = make_colours(split)
            pixels, numbers = coloured.images, coloured.colours
        own = pixels.shape[3]
        images = [match_channels(image, channels or own) for image in pixels[:max_images]]
        if images[0] is None:
            other = "3 as RGB" if own == 1 else "1 as grey"
            has = f"{own} channel{'s' if own > 1 else ''}, or {other}"
            raise DataError(f"--channels {channels}: the digits have {has}")
        keys = [f"{split}/{i:04d}" for i in range(len(images))]
        about = {"names": keys, "channels": channels or own, "dtype": "|u1", "low": 0.0, "high": 255.0}
        index = np.array([(i, 32, 32) for i in range(len(images))], np.int64)
        stores[f"{split}_A"] = Images([image for image in images if image is not None], index, about)
        table |= dict(zip(keys, np.eye(len(names), dtype=np.float32)[numbers]))
    return stores, Labels(names, table)

"""Two images, each a domain of its own: the content and the style of a picture, or two of the digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgan.data.augment import match_channels, resize
from fastgan.data.dataset import Data, Range, Split, ranges_of
from fastgan.data.digits import make_digits
from fastgan.data.images import DataError, read_images
from fastgan.data.store import Images

DIGITS = 7, 0  # numbers of the content among the digits of A and of the style among those of B
SIDE = 64  # pixels of these digits


def open_two(
    content: Path | None,
    style: Path | None,
    *,
    channels: int = 3,
    load_size: int = 512,
    limits: tuple[Range | None, Range | None] = (None, None),
) -> Data:
    """Read a file as domain A and another as B, the first page of each; digits where there are none.

    Args:
        load_size: longest side in pixels; larger images are reduced to it, smaller ones stay.
        limits: values of A and of B that become black and white; None: of the type.

    Raises:
        DataError: a file that cannot be read, or has other channels.
    """
    if content is None or style is None:
        digits = make_digits("train", paired=False, size=SIDE)
        stores = _store(digits.A[DIGITS[0]], "content"), _store(digits.B[DIGITS[1]], "style")
        name = "digits"
    else:
        stores = (
            _store(_read(content, channels, load_size), content.stem),
            _store(_read(style, channels, load_size), style.stem),
        )
        name = f"{content.stem}-{style.stem}"
    notes: list[str] = []
    ranges = ranges_of(stores, limits, notes)
    split = Split(stores, ranges, crop=None, flip=False, paired=False, serial=True)
    return Data(
        name=name, train=split, test=split, channels=(stores[0].channels, stores[1].channels), ranges=ranges,
        dtypes=(stores[0].dtype, stores[1].dtype), paired=False, size=None, notes=notes,
    )  # fmt: skip


def _read(path: Path, channels: int, load_size: int) -> np.ndarray:
    image = match_channels(found := read_images(path)[0], channels)
    if image is None:
        raise DataError(f"{path}: has {found.shape[2]} channels, --channels is {channels}")
    height, width = image.shape[:2]
    if max(height, width) > load_size:
        share = load_size / max(height, width)
        image = resize(image, (max(1, round(height * share)), max(1, round(width * share))))
    return image


def _store(image: np.ndarray, name: str) -> Images:
    height, width, channels = image.shape
    about = {
        "names": [name], "channels": channels, "dtype": image.dtype.str,
        "low": float(image.min()), "high": float(image.max()),
    }  # fmt: skip
    return Images([image], np.array([(0, height, width)], np.int64), about)

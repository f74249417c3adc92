"""Read TIFF: 8 and 16 bits, float32, several pages or channels, planar, BigTIFF."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile

from fastgan.data.decode import MANY, Decoded, Limit, blank, oriented
from fastgan.data.errors import DataError

# what is wrong with a file is said in one line of our own; a program that configures logging still gets these
logging.getLogger("tifffile").addHandler(logging.NullHandler())
# the most bytes that come out of one: deflate's longest match is 258 bytes in 2 bits, LZW's 4,096 in 12, JPEG
# needs a bit for a block of 64 values
_AT_MOST = {
    "NONE": 1, "PACKBITS": 64, "LZW": 2731, "DEFLATE": 1033, "ADOBE_DEFLATE": 1033, "JPEG": 512, "OJPEG": 512
}  # fmt: skip


def read_tiff(path: Path, limit: Limit) -> list[Decoded]:
    """The images of a TIFF: its pages, and what lies along other axes than height, width and channels."""
    images: list[Decoded] = []
    size = path.stat().st_size
    _check_tiff_chain(path, size)
    with tifffile.TiffFile(path) as tiff:
        for number, series in enumerate(tiff.series):
            page = series.keyframe
            if number and page.subfiletype & 5:  # a thumbnail or a mask, not one more image
                continue
            if not {"Y", "X"} <= set(series.axes):
                raise DataError(f"{path}: a TIFF with axes {series.axes} is no image")
            channels = [n for axis, n in zip(series.axes, series.shape) if axis in "CS"]
            count = max(1, int(np.prod(channels, dtype=object)))
            limit.check(int(np.prod(series.shape, dtype=object)) // count, count)
            for part in series.pages:
                if part:
                    _check_parts(path, part, size)
            array = blank(series.shape, series.dtype) if limit.header_only else series.asarray()
            tag, colours = page.tags.get("Orientation"), page.tags.get("InterColorProfile")
            turn = int(tag.value) if tag is not None else 1
            profile = bytes(colours.value) if colours is not None else None
            stack, alpha = _images(path, array, series)
            for k, image in enumerate(stack):
                aside = None if alpha is None else oriented(alpha[k], turn)
                images.append(Decoded(oriented(image, turn), aside, profile))
    if not images:
        raise DataError(f"{path}: the TIFF holds no image")
    return images


def _check_parts(path: Path, page: Any, size: int) -> None:
    """Whether the pixels can be in the file: tifffile fills what is missing with zeros."""
    missing = max((at + n - size for at, n in zip(page.dataoffsets, page.databytecounts)), default=0)
    if missing > 0:
        raise DataError(f"{path}: cut short, {missing:,} bytes are missing")
    counts, factor = page.databytecounts, _AT_MOST.get(page.compression.name)
    # tiles of no bytes are meant to be empty
    filled = page.size * page.bitspersample // 8 * sum(n > 0 for n in counts) // max(1, len(counts))
    if len(counts) < np.prod(page.chunked) or (factor and sum(counts) * factor < filled):
        raise DataError(f"{path}: damaged, its {sum(counts):,} bytes of pixels cannot be {filled:,}")


def _check_tiff_chain(path: Path, size: int) -> None:
    """Follow the list of pages: tifffile silently drops those that lie beyond the end of a file cut short."""
    with path.open("rb") as file:

        def number(place: int, length: int) -> int:
            file.seek(place)
            data = file.read(length)
            if len(data) < length:
                raise DataError(f"{path}: cut short, its list of pages ends at {size:,} bytes")
            return int.from_bytes(data, order)

        order: Literal["little", "big"] = "little" if file.read(2) == b"II" else "big"
        # a classic TIFF has 32-bit places, a BigTIFF (version 43) 64-bit ones
        big = number(2, 2) == 43
        count_size, entry_size, place_size = (8, 20, 8) if big else (2, 12, 4)
        place, seen = number(8 if big else 4, place_size), set[int]()
        while place and place not in seen:
            seen.add(place)
            place = number(place + count_size + entry_size * number(place, count_size), place_size)


def _images(path: Path, array: np.ndarray, series: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """A series as (image, H, W, C) with its colours brought to grey, RGB or plain channels, and its alpha."""
    page, axes = series.keyframe, series.axes
    shape = array.shape
    if series.kind == "shaped" and axes == "QYX" and shape[2] <= MANY < min(shape[:2]):
        # tifffile.imwrite without options stores (H, W, C) as H pages of W x C
        return array[None], None
    inner = [axes.index(axis) for axis in "YXCS" if axis in axes]
    outer = [i for i in range(len(axes)) if i not in inner]
    array = array.transpose(outer + inner)
    height, width = shape[axes.index("Y")], shape[axes.index("X")]
    array = array.reshape(-1, height, width, int(np.prod(array.shape[len(outer) + 2 :])))
    colour = page.photometric.name
    if colour in ("CIELAB", "ICCLAB", "ITULAB", "LOGLUV") or (
        colour == "YCBCR" and page.compression not in (6, 7, 33003, 33005, 34712)
    ):
        raise DataError(f"{path}: TIFF colours of type {colour} are not read; convert it to RGB")
    if colour == "PALETTE" and page.colormap is not None:
        array = (page.colormap.T >> 8).astype(np.uint8)[array[..., 0]]
    elif array.dtype == np.uint8 and page.bitspersample < 8 and colour in ("MINISBLACK", "MINISWHITE"):
        array = (array * (255 // (2**page.bitspersample - 1))).astype(np.uint8)
    if colour == "MINISWHITE":
        array = ~array if array.dtype.kind in "bu" else -array
    alpha = None
    if "S" in axes and "C" not in axes:
        first = array.shape[3] - len(page.extrasamples)
        opacity = [first + k for k, kind in enumerate(page.extrasamples) if int(kind) in (1, 2)]
        if opacity:
            alpha = array[..., opacity[:1]]
            array = array[..., [k for k in range(array.shape[3]) if k not in opacity]]
        if colour == "SEPARATED" and array.shape[3] == 4 and array.dtype.kind == "u":
            white = float(np.iinfo(array.dtype).max)
            ink = array.astype(np.float64)
            rgb = (white - ink[..., :3]) * (white - ink[..., 3:]) / white
            array = np.rint(rgb).astype(array.dtype)
    return array, alpha

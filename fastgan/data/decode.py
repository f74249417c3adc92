"""Read the formats that hold one image or a stack of arrays: PNG, JPEG, WebP, BMP, PNM and .npy."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from PIL import Image

from fastgan.data.colour import cmyk_to_srgb, to_srgb
from fastgan.data.errors import DataError, TooLarge

MANY = 16  # a first or last axis up to this long is taken for channels where nothing else tells
# no further formats: some of Pillow's start other programs
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
_PILLOW_LIMIT = threading.Lock()
# a broken EXIF block is no reason to speak; catch_warnings is not for threads
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class Decoded(NamedTuple):
    """One image of a file: (H, W, C) without alpha, alpha (H, W, 1) in the same type, the ICC profile of its
    colours, and whether the file has its channels first."""

    image: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None
    channels_first: bool = False


class Limit:
    """The most pixels that the images of a file may hold; a pixel of many channels counts as several."""

    def __init__(self, path: Path, pixels: int, header_only: bool) -> None:
        self.path, self.pixels, self.header_only = path, pixels, header_only
        self.counted = 0

    def check(self, pixels: int, channels: int = 1) -> None:
        """Count one more part of the file; raises TooLarge beyond the limit."""
        if pixels == 0:
            raise DataError(f"{self.path}: holds no pixels")
        self.counted += pixels * max(1, channels // 4)
        if self.counted > self.pixels:
            raise TooLarge(
                f"{self.path}: {self.counted:,} pixels are more than the limit of {self.pixels:,}; "
                "make it smaller"
            )


def finish(path: Path, found: Decoded, header_only: bool) -> Decoded:
    """Bring an image to uint8, uint16 or float32 and its colours to sRGB, in contiguous memory."""
    if header_only:
        return found._replace(image=blank(found.image.shape, _plain_dtype(path, found.image.dtype)))
    image = np.ascontiguousarray(_plain(path, found.image))
    alpha = None if found.alpha is None else np.ascontiguousarray(_plain(path, found.alpha))
    image, profile = to_srgb(image, found.profile)
    return Decoded(image, alpha, profile, found.channels_first)


def blank(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array that has a shape and a type, but no memory and no pixels."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation 1..8 to (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def split_alpha(array: np.ndarray, has_alpha: bool, orientation: int, profile: bytes | None) -> Decoded:
    """An image from its pixels as stored, alpha last."""
    array = oriented(array[:, :, None] if array.ndim == 2 else array, orientation)
    return Decoded(array[..., :-1], array[..., -1:], profile) if has_alpha else Decoded(array, None, profile)


def _plain_dtype(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind == "b" or dtype == np.uint8:
        return np.dtype(np.uint8)
    if dtype.kind == "u" and dtype.itemsize == 2:
        return np.dtype(np.uint16)
    if dtype.kind in "iuf":
        return np.dtype(np.float32)
    raise DataError(f"{path}: values of type {dtype} are no image; save it as uint8, uint16 or float32")


def _plain(path: Path, image: np.ndarray) -> np.ndarray:
    target = _plain_dtype(path, image.dtype)
    if image.dtype.kind == "b":
        return image.astype(np.uint8) * np.uint8(255)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as that
        return image.astype(target, copy=False)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken tag must not cost the picture
        return 1


def _open_pillow(path: Path) -> Image.Image:
    # Pillow's own limit is a global far below ours and only warns at first; `Limit` replaces it
    with _PILLOW_LIMIT:
        saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=_PILLOW_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = saved


def read_pillow(path: Path, head: bytes, limit: Limit) -> Decoded:
    """An image that Pillow reads in its own precision."""
    if head[:2] in (b"P3", b"P6") and head[2:3].isspace():
        sizes = re.sub(rb"#[^\n]*\n", b" ", head[2:]).split()[:3]
        if len(sizes) == 3 and int(sizes[2]) > 255:
            raise DataError(f"{path}: PPM with more than 8 bits is not read; convert it to PNG or TIFF")
    with _open_pillow(path) as image:
        limit.check(image.width * image.height)
        # every block of 8x8 takes a bit at least; libjpeg fills what is missing with grey
        if image.format == "JPEG" and image.width * image.height > 512 * path.stat().st_size:
            raise DataError(f"{path}: damaged, its bytes cannot be {image.width}x{image.height} pixels")
        alpha = image.has_transparency_data
        grey = image.mode in ("1", "L", "LA", "La")
        if limit.header_only:
            shape = (image.height, image.width, 1 if grey or image.mode.startswith("I") else 3)
            pixels = blank(shape, np.dtype(np.uint16 if image.mode.startswith("I") else np.uint8))
            return Decoded(oriented(pixels, _orientation(image)))
        image.load()
        orientation, profile = _orientation(image), image.info.get("icc_profile")
        if image.mode.startswith("I"):  # PGM of more than 8 bits, which Pillow scales to 0..65535
            array = np.asarray(image).astype(np.uint16)
        elif alpha:
            array = np.asarray(image.convert("LA" if grey and image.mode != "1" else "RGBA"))
        elif image.mode == "CMYK":
            array, profile = cmyk_to_srgb(image, profile)
        else:
            array = np.asarray(image.convert("L" if grey else "RGB"))
    return split_alpha(array, alpha, orientation, profile)


def read_png16(path: Path, head: bytes, limit: Limit) -> Decoded:
    """Decode with imagecodecs: Pillow reduces 16-bit colour to 8 bits."""
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    limit.check(width * height)
    with _open_pillow(path) as image:
        orientation, profile = _orientation(image), image.info.get("icc_profile")
    if limit.header_only:
        channels = {0: 1, 2: 3, 4: 1, 6: 3}[head[25]]
        return Decoded(oriented(blank((height, width, channels), np.dtype(np.uint16)), orientation))
    array = imagecodecs.png_decode(path.read_bytes())
    return split_alpha(array, array.ndim == 3 and array.shape[2] in (2, 4), orientation, profile)


def read_npy(path: Path, limit: Limit) -> list[Decoded]:
    """The images of a .npy file, memory-mapped until they are converted."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3, 4):
        raise DataError(
            f"{path}: an array of shape {array.shape} is no image; it must be (H, W) or (H, W, C)"
        )
    if 0 in array.shape:
        raise DataError(f"{path}: holds no pixels (shape {array.shape})")
    stack = array if array.ndim == 4 else array[None]
    first = False
    if array.ndim == 2:
        stack = stack[..., None]
    elif first := stack.shape[1] <= MANY < stack.shape[3]:
        stack = stack.transpose(0, 2, 3, 1)
    limit.check(stack.shape[0] * stack.shape[1] * stack.shape[2], stack.shape[3])
    if limit.header_only:
        return [Decoded(blank(each.shape, each.dtype)) for each in stack]
    return [Decoded(np.array(each), channels_first=first) for each in stack]

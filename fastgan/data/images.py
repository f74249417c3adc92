"""Image files as arrays (H, W, C) of uint8, uint16 or float32, and back.

Read and written without loss: PNG of 8 and 16 bits, TIFF (8 and 16 bits, float32, several pages or channels,
planar), WebP, BMP and .npy. Read only in their own precision: JPEG, PGM and PPM. What a file holds is decided
by its first bytes, not by its suffix.

Decisions. Palettes and CMYK become RGB, one-bit images 0 and 255, the orientation tag is applied, colours of
other ICC profiles become sRGB. Alpha is kept aside, not multiplied in: the colours stay those of the file.
Types a network has no use for are converted: bool to 0 and 255, float16 and float64 to float32, and signed,
32-bit and 64-bit integers to float32 (exact up to 2^24). A three-dimensional .npy is (H, W, C), unless its
first size is at most 16 and its last one is larger than 16: then it is (C, H, W); a four-dimensional one is a
stack of such images. A TIFF axis named C or S holds channels, any other one (pages, time, depth) separate
images.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from fastgan.data.decode import Decoded, Limit, finish, read_npy, read_pillow, read_png16
from fastgan.data.encode import WRITE_SUFFIXES, write_image, write_stack
from fastgan.data.errors import DataError
from fastgan.data.tiff import read_tiff

__all__ = [
    "IMAGE_SUFFIXES", "MAX_PIXELS", "WRITE_SUFFIXES", "DataError", "Pages", "Picture", "Probe", "from_unit",
    "list_images", "natural_key", "probe", "read_images", "read_picture", "to_unit", "type_range",
    "write_image", "write_stack",
]  # fmt: skip

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".npy"
)  # fmt: skip
MAX_PIXELS = 512 * 2**20

Pages = Literal["images", "channels"]


class Probe(NamedTuple):
    """What a header tells: size and channels of the first image, type of its values, number of images."""

    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    pages: int


class Picture(NamedTuple):
    """An image file and what is kept aside while its values are worked on.

    images: (H, W, C) of uint8, uint16 or float32, one per page, without alpha. alphas: for each of them alpha
    (H, W, 1) in the same type, or None. profile: ICC profile that the colours have, None without one.
    channels_first: the file, a .npy, has its channels before height and width.
    """

    images: list[np.ndarray]
    alphas: list[np.ndarray | None]
    profile: bytes | None
    channels_first: bool


def read_picture(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a file with all that belongs to it; max_pixels and errors as in `read_images`."""
    path = Path(path)
    with _explained(path):
        found = _decode(path, max_pixels, header_only=False)
        for each in found:
            if each.image.dtype == np.float32 and not np.isfinite(each.image).all():
                raise DataError(f"{path}: holds NaN or infinite values; replace them")
        first = found[0]
        return Picture(
            [each.image for each in found],
            [each.alpha for each in found],
            first.profile,
            first.channels_first,
        )


def read_images(
    path: Path | str, *, pages: Pages = "images", keep_alpha: bool = False, max_pixels: int = MAX_PIXELS
) -> list[np.ndarray]:
    """Read a file as a list of (H, W, C) arrays of uint8, uint16 or float32: one, or one per page of a TIFF.

    pages: "channels" joins all pages of a file into the channels of one image. keep_alpha: keep alpha as the
    last channel. max_pixels: the most pixels a file may hold, all pages together; checked before anything is
    decoded. Raises DataError if the file is missing, damaged, too large, no image, or holds NaN or infinite
    values.
    """
    found = read_picture(path, max_pixels=max_pixels)
    images = found.images
    if keep_alpha:
        pairs = zip(images, found.alphas)
        images = [x if alpha is None else np.concatenate([x, alpha], axis=2) for x, alpha in pairs]
    return _join(Path(path), images, pages)


def probe(path: Path | str, *, pages: Pages = "images", max_pixels: int = MAX_PIXELS) -> Probe:
    """Return what `read_images` would give, from the header alone; raises DataError if that shows a fault."""
    path = Path(path)
    with _explained(path):
        images = [each.image for each in _decode(path, max_pixels, header_only=True)]
        height, width, channels = images[0].shape
        if pages == "channels":
            return Probe(height, width, sum(image.shape[2] for image in images), images[0].dtype, 1)
        return Probe(height, width, channels, images[0].dtype, len(images))


def to_unit(array: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Map value_range (default: 0..255, 0..65535, or 0..1 for float) to 0..1 in float32, without clipping."""
    low, high = value_range or type_range(array.dtype)
    return ((array.astype(np.float32) - np.float32(low)) / np.float32(high - low)).astype(np.float32)


def from_unit(
    array: np.ndarray, dtype: np.dtype[Any] | type, value_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Map 0..1 to value_range (default as in `to_unit`) in dtype; integers are clipped, then rounded."""
    dtype = np.dtype(dtype)
    low, high = value_range or type_range(dtype)
    values = array.astype(np.float32) * np.float32(high - low) + np.float32(low)
    if dtype.kind != "f":
        values = np.rint(np.clip(values, 0, np.iinfo(dtype).max))
    return values.astype(dtype)


def type_range(dtype: np.dtype[Any] | type) -> tuple[float, float]:
    """Return the values shown as black and white where nobody says otherwise."""
    dtype = np.dtype(dtype)
    return (0.0, 1.0) if dtype.kind == "f" else (0.0, float(np.iinfo(dtype).max))


def list_images(folder: Path | str) -> list[Path]:
    """List the image files under a folder, nested ones too, hidden ones not, in natural order (2 before 10).

    The order depends on the names alone, not on the operating system. Linked files count, linked folders
    inside do not.
    """
    folder = Path(folder)
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that orders runs of digits by value and settles ties by the plain text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.lower())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except PermissionError as error:
        raise DataError(f"{path}: no permission to read it") from error
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{path}: not an image this program reads ({known})") from error
    # decoders raise nearly every type there is on damaged files
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded, damaged or cut short ({reason[:200]})") from error


def _decode(path: Path, max_pixels: int, header_only: bool) -> list[Decoded]:
    """Read all images of a file; with header_only they have shape and type, but no memory and no pixels."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path}: a link that leads to itself") from error
        raise
    if not stat.S_ISREG(mode):
        # a pipe would be waited for
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise DataError(f"{path}: is {kind}, not an image file")
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise DataError(f"{path}: the file is empty")
    limit = Limit(path, max_pixels, header_only)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        found = read_tiff(path, limit)
    elif head[:6] == b"\x93NUMPY":
        found = read_npy(path, limit)
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10":
        found = [read_png16(path, head, limit)]
    else:
        found = [read_pillow(path, head, limit)]
    return [finish(path, each, header_only) for each in found]


def _join(path: Path, images: list[np.ndarray], pages: Pages) -> list[np.ndarray]:
    if pages == "images" or len(images) == 1:
        return images
    if len({(image.shape[:2], image.dtype) for image in images}) > 1:
        raise DataError(f"{path}: its pages differ in size or type, so --pages channels cannot join them")
    return [np.concatenate(images, axis=2)]

"""What one image of a data set is like: the numbers from which `check` draws its conclusions.

Near duplicates are found by a perceptual hash: 63 signs of the lowest frequencies (DCT-II) of the image at
32x32, as in pHash (C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010).
"""

import hashlib
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from fastgan.data.augment import match_channels
from fastgan.data.images import DataError, read_images

_SIDE, _KEPT = 32, 8
_COSINES = np.cos(np.pi * np.outer(np.arange(_KEPT), np.arange(_SIDE) + 0.5) / _SIDE).astype(np.float32)
# how close to black or white a pixel counts as that
_NEARLY = 0.02
Half = Literal["", "left", "right"]


class Place(NamedTuple):
    """Where an image is: its file, the half of it or "", its page, and the group it belongs to."""

    path: Path
    half: Half
    group: str
    page: int = 0


class Seen(NamedTuple):
    """Size, type and contents of one image; dark, bright: share of nearly black and nearly white pixels.

    grey: all channels are equal. flat: one colour. digest: of the pixels. signs: the perceptual hash, 63
    values of -1 and 1. small: 16x16 grey levels.
    """

    place: Place
    mode: str
    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    low: float
    high: float
    dark: float
    bright: float
    grey: bool
    flat: bool
    digest: bytes
    signs: np.ndarray
    small: np.ndarray


def look(path: Path, places: list[Place]) -> list[Seen] | DataError:
    """Read a file and describe its images; places are the halves (or the whole) that count."""
    try:
        mode, seen = _mode(path), []
        for number, image in enumerate(read_images(path)):
            for place in places:
                part = half_of(path, image, place.half)
                seen.append(_describe(place._replace(page=number), mode or _type(part), part))
        return seen
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"{path}: cannot be read ({error.strerror or error})")


def half_of(path: Path, image: np.ndarray, half: Half) -> np.ndarray:
    """Return the left or right half of (H, W, C), or all of it; raises DataError for an odd width."""
    if not half:
        return image
    width = image.shape[1]
    if width % 2:
        raise DataError(f"{path}: {width} pixels wide; two images side by side need an even width")
    return image[:, : width // 2] if half == "left" else image[:, width // 2 :]


def _describe(place: Place, mode: str, image: np.ndarray) -> Seen:
    height, width, channels = image.shape
    low, high = float(image.min()), float(image.max())
    least, most = (low, high) if image.dtype.kind == "f" else (0.0, float(np.iinfo(image.dtype).max))
    margin = _NEARLY * (most - least)
    # compared in the type of the image: no copy of it in floats
    bounds = np.array([least + margin, most - margin]).astype(image.dtype)
    dark, bright = float((image <= bounds[0]).mean()), float((image >= bounds[1]).mean())
    weighed = match_channels(image, 1)
    plane = image.mean(axis=2) if weighed is None else weighed[..., 0]
    picture = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    table = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    waves = (_COSINES @ table @ _COSINES.T).ravel()[1:]
    small = table.reshape(16, 2, 16, 2).mean(axis=(1, 3))
    spread = float(np.ptp(small)) or 1.0
    digest = hashlib.blake2b(f"{image.shape}{image.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    flat = all(image[..., c].min() == image[..., c].max() for c in range(channels)) if low != high else True
    return Seen(
        place, mode, height, width, channels, image.dtype, low, high, dark, bright,
        grey=channels == 3 and bool((image[..., :1] == image[..., 1:]).all()),
        flat=flat,
        digest=digest.digest(),
        signs=np.where(waves > np.median(waves), 1, -1).astype(np.int8),
        small=((small - small.min()) * (255 / spread)).astype(np.uint8),
    )  # fmt: skip


def _mode(path: Path) -> str:
    """How the file stores its pixels, for the formats where that is not what `read_images` returns."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "PPM")) as image:
            mode = image.mode + ("" if not image.has_transparency_data or "A" in image.mode else "+alpha")
    except Exception:  # `read_images` says what is wrong with the file
        return ""
    return "" if mode.startswith("I") or mode == "RGB" else mode


def _type(image: np.ndarray) -> str:
    channels = {1: "grey", 3: "RGB"}.get(image.shape[2], f"{image.shape[2]} channels")
    return channels + {"uint8": "", "uint16": " 16 bit"}.get(image.dtype.name, f" {image.dtype}")


class Twins(NamedTuple):
    """Two images that are the same; exact: pixel for pixel, otherwise nearly."""

    first: int
    second: int
    exact: bool


def find_twins(seen: list[Seen], *, limit: int = 6, most: int = 10_000) -> list[Twins]:
    """Find images that occur twice: pairs of numbers into seen, at most `most` pairs that are not exact.

    limit: number of the 63 signs in which near duplicates may differ; their 16x16 versions must agree, too.
    """
    copies: dict[bytes, list[int]] = {}
    for number, image in enumerate(seen):
        copies.setdefault(image.digest, []).append(number)
    twins = [Twins(same[0], number, True) for same in copies.values() for number in same[1:]]
    # an even image has nothing to compare
    numbers = [same[0] for same in copies.values() if not seen[same[0]].flat]
    if len(numbers) < 2:
        return twins
    signs = np.stack([seen[number].signs for number in numbers]).astype(np.float32)
    for start in range(0, len(numbers), 1024):
        # the product of two rows of signs is 63 less twice the number of differences
        near = signs[start : start + 1024] @ signs[start:].T >= signs.shape[1] - 2 * limit
        for i, j in np.argwhere(np.triu(near, 1)).tolist():
            a, b = numbers[start + i], numbers[start + j]
            if not _alike(seen[a].small, seen[b].small):
                continue
            for x, y in product(copies[seen[a].digest], copies[seen[b].digest]):
                twins.append(Twins(min(x, y), max(x, y), False))
                most -= 1
                if most <= 0:
                    return twins
    return twins


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    x, y = (small.astype(np.float64).ravel() - small.mean() for small in (a, b))
    return float(x @ y) >= 0.98 * float(np.sqrt((x @ x) * (y @ y)))

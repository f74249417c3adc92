"""Embedded default data: scanned digits, white on a colour (domain A) and coloured on white (domain B).

The scans are the 1,797 test images (8x8, grey values 0..16) of "Optical Recognition of Handwritten Digits" by
E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, licence
CC BY 4.0, in the order scikit-learn ships them. `digits.npz` beside this file was made once (and needs no
scikit-learn any more) by

    digits = sklearn.datasets.load_digits()
    images, labels = digits.images.astype("uint8"), digits.target.astype("uint8")
    numpy.savez_compressed("digits.npz", images=images, labels=labels, credit=numpy.array(CREDIT))

With ink m in 0..1 and one colour c per digit, A = m + (1 - m) c and B = m c + (1 - m): both domains hold the
same shapes, and a translator has to move the colour between digit and background. A colour is uniform in RGB,
redrawn until its luminance (ITU-R BT.601) is at most 0.6, so that it stands out from white, and its largest
and smallest component differ by at least 0.25, so that there is a hue to carry over.

For translation between labels (`make_colours`) a digit is drawn on white in one of five colours, which is its
label: COLOURS, at least 136 steps of 255 apart (Euclidean) and dark enough to be read.

Everything is integer arithmetic on the raw output of PCG64, whose stream numpy guarantees (that of Generator
methods it does not), so the same bytes come out on every machine and with every version.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

CREDIT = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, "
    "1998, https://doi.org/10.24432/C50P49, CC BY 4.0 (changed: upsampled and coloured)"
)
_SPLIT_SEED, _DOMAIN_SEED, _COLOUR_SEED, _LABEL_SEED = 1797, 1798, 1799, 1800
COLOURS = {
    "red": (225, 30, 30),
    "green": (0, 150, 50),
    "blue": (30, 60, 230),
    "orange": (255, 160, 0),
    "magenta": (215, 0, 215),
}


@dataclass(frozen=True)
class DigitSet:
    """Per domain: images (N, size, size, 3) uint8, labels (N,) uint8, ink (N, size, size) float32 in 0..1."""

    A: np.ndarray
    B: np.ndarray
    labels_A: np.ndarray
    labels_B: np.ndarray
    ink_A: np.ndarray
    ink_B: np.ndarray


def make_digits(split: Literal["train", "test"], *, paired: bool, size: int = 32) -> DigitSet:
    """Draw one split of the digits; the same arguments give the same bytes for ever.

    A fifth of every class is held out as "test". Paired: entry i of A and B is the same digit in the same
    colour. Unpaired: the split is divided, class by class, into halves, so no digit occurs in both domains.

    split: "train" or "test". size: side in pixels, a multiple of 8 up to 256. Raises ValueError for others.
    """
    if split not in ("train", "test"):
        raise ValueError(f'make_digits: split must be "train" or "test", got {split!r}')
    if size % 8 or not 8 <= size <= 256:
        raise ValueError(f"make_digits: size must be a multiple of 8 from 8 to 256, got {size}")
    images, labels = load_scans()
    held_out = _stratified(labels, np.arange(len(labels)), _SPLIT_SEED, numerator=1, denominator=5)
    chosen = np.flatnonzero(held_out == (split == "test"))
    if paired:
        index_a = index_b = chosen
    else:
        first = _stratified(labels, chosen, _DOMAIN_SEED, numerator=1, denominator=2)
        index_a, index_b = chosen[first], chosen[~first]
    colours = _colours(len(labels))
    ink_a, ink_b = _upsample(images[index_a], size), _upsample(images[index_b], size)
    return DigitSet(
        A=_blend(ink_a, np.uint8(255), colours[index_a]),
        B=_blend(ink_b, colours[index_b], np.uint8(255)),
        labels_A=labels[index_a],
        labels_B=labels[index_b],
        ink_A=ink_a.astype(np.float32) / np.float32(255),
        ink_B=ink_b.astype(np.float32) / np.float32(255),
    )


@dataclass(frozen=True)
class ColouredDigits:
    """Images (N, size, size, 3) uint8; digits, and colours as numbers of COLOURS, (N,) uint8; ink (N, size,
    size) float32 in 0..1."""

    images: np.ndarray
    digits: np.ndarray
    colours: np.ndarray
    ink: np.ndarray


def make_colours(split: Literal["train", "test"], *, size: int = 32) -> ColouredDigits:
    """Draw the digits of one split of `make_digits`, paired, on white, each in one of COLOURS at random."""
    digits = make_digits(split, paired=True, size=size)
    level = np.rint(digits.ink_A * 255).astype(np.uint8)
    # a seed for each split: no digit depends on how many there are of the others
    draws = np.random.PCG64(_LABEL_SEED + (split == "test")).random_raw(len(level))
    colours = (draws % len(COLOURS)).astype(np.uint8)
    palette = np.array(list(COLOURS.values()), np.uint8)
    images = _blend(level, palette[colours], np.uint8(255))
    return ColouredDigits(images, digits.labels_A, colours, digits.ink_A)


@lru_cache(maxsize=1)
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,797 scans (1797, 8, 8) uint8 with values 0..16 and their labels (1797,) uint8."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
    images.setflags(write=False)
    labels.setflags(write=False)
    return images, labels


def _stratified(
    labels: np.ndarray, members: np.ndarray, seed: int, *, numerator: int, denominator: int
) -> np.ndarray:
    """Mark the share numerator/denominator (rounded half up) of every class among `members`."""
    keys = np.random.PCG64(seed).random_raw(len(labels))[members]
    marked = np.zeros(len(members), dtype=bool)
    for label in range(10):
        positions = np.flatnonzero(labels[members] == label)
        count = (2 * numerator * len(positions) + denominator) // (2 * denominator)
        marked[positions[np.argsort(keys[positions], kind="stable")[:count]]] = True
    return marked


def _colours(count: int) -> np.ndarray:
    # about a third of the draws passes both rules, so eight draws per colour are plenty
    draws = np.random.PCG64(_COLOUR_SEED).random_raw(8 * count)
    parts = [(draws >> np.uint64(shift)) & np.uint64(255) for shift in (0, 8, 16)]
    rgb = np.stack(parts, axis=1).astype(np.int64)
    dark = rgb @ np.array([299, 587, 114]) <= 600 * 255
    hue = 4 * (rgb.max(axis=1) - rgb.min(axis=1)) >= 255
    return rgb[dark & hue][:count].astype(np.uint8)


def _upsample(scans: np.ndarray, size: int) -> np.ndarray:
    """Enlarge (N, 8, 8) values 0..16 to (N, size, size) levels 0..255 by an exact Catmull-Rom kernel."""
    scale = size // 8
    unit = 2 * scale  # positions are counted in 1/unit source pixels
    weights = np.zeros((size, 8), dtype=np.int64)
    for row in range(size):
        centre = 2 * row + 1 - scale
        for tap in range(centre // unit - 1, centre // unit + 3):
            distance = abs(centre - tap * unit)
            weights[row, min(max(tap, 0), 7)] += _catmull_rom(distance, unit)
    full = 16 * (2 * unit**3) ** 2
    levels = np.clip(weights @ scans.astype(np.int64) @ weights.T, 0, full)
    return ((levels * 255 + full // 2) // full).astype(np.uint8)


def _catmull_rom(distance: int, unit: int) -> int:
    """Return 2 unit^3 times the kernel's value at distance/unit."""
    if distance < unit:
        return 3 * distance**3 - 5 * distance**2 * unit + 2 * unit**3
    if distance < 2 * unit:
        return -(distance**3) + 5 * distance**2 * unit - 8 * distance * unit**2 + 4 * unit**3
    return 0


def _blend(ink: np.ndarray, digit: np.ndarray | np.uint8, ground: np.ndarray | np.uint8) -> np.ndarray:
    """Mix digit over ground, each (N, 3) colours or one level for all, rounding to the nearest level."""
    level = ink.astype(np.int32)[..., None]
    front, back = (np.broadcast_to(c, (len(ink), 3))[:, None, None].astype(np.int32) for c in (digit, ground))
    return ((level * front + (255 - level) * back + 127) // 255).astype(np.uint8)

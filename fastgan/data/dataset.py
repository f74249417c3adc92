"""Training and test images as batches that depend on a number and a seed alone.

`open_data` finds, checks and decodes the images of two domains, once; `Split.batch(k, ...)` is training batch
k, a pure function, so that a run resumes exactly from the number of its next batch. Every domain has its own
endless stream of indices: pass after pass over its images, each in a fresh order drawn from (seed, domain,
pass). Paired data has one stream for both. Crop positions and flips are drawn from (seed, k). Draws are raw
PCG64 numbers, whose stream numpy guarantees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgan.data.augment import (
    Geometry,
    OutputRange,
    Preprocess,
    centre_crop,
    map_values,
    match_channels,
    to_device,
    to_tensor,
)
from fastgan.data.digits import make_digits
from fastgan.data.images import DataError, Pages, type_range
from fastgan.data.reading import Wanted, read_folder
from fastgan.data.store import Images

Domain = Literal["A", "B"]
Range = tuple[float, float]


class HostImages(NamedTuple):
    """Images of one domain (N, H, W, C) as stored, on the host or already on the device, which of them are to
    be mirrored, and their labels (N, L) where there are some."""

    pixels: np.ndarray | Tensor
    flips: list[bool]
    labels: np.ndarray | None = None


class Split:
    """The images of both domains, or of A alone, for training or testing.

    stores, ranges: of A and B. crop: side of the square cut out for training, None for whole images. labels:
    of the images of A, (len_A, L) float32; batches then hold them under "label".
    """

    def __init__(
        self,
        stores: tuple[Images, ...],
        ranges: tuple[Range, Range],
        *,
        crop: int | None,
        flip: bool,
        paired: bool,
        serial: bool,
        labels: np.ndarray | None = None,
    ) -> None:
        self.stores, self.ranges, self.labels = stores, ranges, labels
        self.crop, self._flip, self._paired, self._serial = crop, flip, paired, serial

    @property
    def len_A(self) -> int:  # noqa: N802
        """Number of images of domain A."""
        return len(self.stores[0])

    @property
    def len_B(self) -> int:  # noqa: N802
        """Number of images of domain B, 0 without one."""
        return len(self.stores[1]) if len(self.stores) > 1 else 0

    @property
    def names_A(self) -> list[str]:  # noqa: N802
        """Names of the images of A: path below its folder, no suffix, `_<page>` where there are several."""
        return self.stores[0].names

    @property
    def names_B(self) -> list[str]:  # noqa: N802
        """Names of the images of B, in the same form; none without a domain B."""
        return self.stores[1].names if len(self.stores) > 1 else []

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return how many batches hold as many images as the larger domain, rounded up."""
        return math.ceil(max(self.len_A, self.len_B) / batch_size)

    def sizes(self) -> list[tuple[str, int, int]]:
        """Return name, height and width of every image as a training batch holds it (names are those of A and
        B)."""
        found = []
        for store in self.stores:
            for name, (_, height, width) in zip(store.names, store.index.tolist()):
                found.append((name, self.crop or height, self.crop or width))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all images of both domains, as stored."""
        return sum(_values(store) * store.dtype.itemsize for store in self.stores)

    def batch(
        self,
        k: int,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        output_range: OutputRange = "tanh",
        rank: int = 0,
        ranks: int = 1,
    ) -> dict[str, Tensor]:
        """Return training batch k, counted from 0 over all epochs, as {"A": tensor, "B": tensor}.

        Tensors: (batch_size, C, H, W) float32, channels last, on the device, in [-1, 1] ("tanh") or [0, 1]
        ("sigmoid"). With several ranks, batch k of rank r is part r of what a single one would see as batch k
        with a batch size of ranks * batch_size. Raises DataError where whole images of unequal size do not
        make a batch.
        """
        host = self.host_batch(k, batch_size, seed=seed, rank=rank, ranks=ranks)
        return self.finish(host, device=device, output_range=output_range)

    def choose(self, k: int, batch_size: int, *, seed: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Return what batch k consists of, (domains, batch_size, 4) int64: number of the image, top and
        left of the crop, and 1 to mirror it or 0."""
        whole = batch_size * ranks
        first = rank * batch_size
        # per domain and image of all ranks: left, top, flip
        draws = _raw(6 * whole, seed, 2, k).reshape(2, whole, 3)[:, first : first + batch_size]
        chosen = np.zeros((len(self.stores), batch_size, 4), np.int64)
        for domain, store in enumerate(self.stores):
            for i, (left, top, flip) in enumerate(draws[0 if self._paired else domain].tolist()):
                number = self._number(domain, k * whole + first + i, seed)
                _, height, width = store.index[number].tolist()
                if self.crop is None:
                    top = left = 0
                else:
                    top, left = top % (height - self.crop + 1), left % (width - self.crop + 1)
                chosen[domain, i] = number, top, left, flip >> 63 if self._flip else 0
        return chosen

    def host_batch(
        self,
        k: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        out: Sequence[np.ndarray] | None = None,
    ) -> tuple[HostImages, ...]:
        """Return batch k as it is stored, cropped; the half of `batch` that may run in another thread.

        out: memory for the pixels of A and of B, uint8, of at least batch_size * `largest` bytes.
        """
        chosen = self.choose(k, batch_size, seed=seed, rank=rank, ranks=ranks)
        return tuple(self._cropped(domain, rows, out) for domain, rows in enumerate(chosen))

    def largest(self, domain: int) -> int:
        """Return the bytes of the largest image of domain 0 or 1 as a training batch holds it."""
        store = self.stores[domain]
        if self.crop is not None:
            return self.crop**2 * store.channels * store.dtype.itemsize
        pixels = (store.index[:, 1] * store.index[:, 2]).max(initial=0)
        return int(pixels) * store.channels * store.dtype.itemsize

    def finish(
        self,
        host: tuple[HostImages, ...],
        *,
        device: torch.device | str = "cpu",
        output_range: OutputRange = "tanh",
    ) -> dict[str, Tensor]:
        """Bring a host batch to the device, mirror it and map its values; no waiting for the device."""
        found = {}
        for domain, (name, (pixels, flips, labels)) in enumerate(zip("AB", host)):
            x = pixels if isinstance(pixels, Tensor) else to_device(pixels, torch.device(device))
            low_high, clamp = self.ranges[domain], self.clamps(domain)
            found[name] = map_values(x, low_high, output_range=output_range, flips=flips, clamp=clamp)
            if labels is not None:
                found["label"] = to_device(labels, torch.device(device))
        return found

    def images(
        self,
        domain: Domain,
        i0: int,
        i1: int,
        *,
        device: torch.device | str = "cpu",
        output_range: OutputRange = "tanh",
    ) -> Tensor:
        """Return images i0 <= i < i1 of one domain in order, cropped in the centre, not mirrored."""
        number = "AB".index(domain)
        store = self.stores[number]
        numbers = range(len(store))[i0:i1]
        pixels = self._stacked([centre_crop(store[i], self.crop) for i in numbers], number)
        clamp = self.clamps(number)
        return to_tensor(pixels, self.ranges[number], device=device, output_range=output_range, clamp=clamp)

    def test_batch(
        self, i0: int, i1: int, *, device: torch.device | str = "cpu", output_range: OutputRange = "tanh"
    ) -> dict[str, Tensor]:
        """Return `images` of both domains; the shorter one may give fewer."""
        return {
            "A": self.images("A", i0, i1, device=device, output_range=output_range),
            "B": self.images("B", i0, i1, device=device, output_range=output_range),
        }

    def clamps(self, domain: int) -> bool:
        """Whether images of domain 0 or 1 have values outside of the domain's range."""
        store, (low, high) = self.stores[domain], self.ranges[domain]
        return store.low < low or store.high > high

    def _number(self, domain: int, position: int, seed: int) -> int:
        """Return which image stands at a position of the domain's endless stream."""
        count = len(self.stores[domain])
        if self._serial:
            return position % max(self.len_A, self.len_B) % count
        number, place = divmod(position, count)
        return int(_order(count, seed, 0 if self._paired else domain, number)[place])

    def _cropped(self, domain: int, chosen: np.ndarray, out: Sequence[np.ndarray] | None) -> HostImages:
        store, side, parts = self.stores[domain], self.crop, []
        for number, top, left, _ in chosen.tolist():
            image = store[number]
            parts.append(image if side is None else image[top : top + side, left : left + side])
        flips = [bool(flip) for flip in chosen[:, 3]] if self._flip else []
        labels = None if self.labels is None or domain else self.labels[chosen[:, 0]]
        return HostImages(self._stacked(parts, domain, None if out is None else out[domain]), flips, labels)

    def _stacked(self, parts: list[np.ndarray], domain: int, out: np.ndarray | None = None) -> np.ndarray:
        store = self.stores[domain]
        if not parts:
            side = self.crop or 0
            return np.zeros((0, side, side, store.channels), store.dtype)
        for part in parts:
            if part.shape != parts[0].shape:
                (h, w), (h2, w2) = parts[0].shape[:2], part.shape[:2]
                raise DataError(
                    f"domain {'AB'[domain]}: images of {w}x{h} and {w2}x{h2} pixels make no batch; use "
                    "--batch-size 1 or a --preprocess that crops"
                )
        if out is None:
            return np.stack(parts)
        shape = (len(parts), *parts[0].shape)
        return np.stack(
            parts, out=out[: math.prod(shape) * store.dtype.itemsize].view(store.dtype).reshape(shape)
        )


@dataclass
class Data:
    """Everything `open_data` found; domains are already swapped for direction BtoA.

    channels, ranges: of A and B; a range holds the values that become black and white. size: side of the
    square training images, None where sizes differ. notes: remarks for the user, one line each. labels: names
    of the numbers in a label of A; without a domain B their count stands for its channels.
    """

    name: str
    train: Split
    test: Split
    channels: tuple[int, int]
    ranges: tuple[Range, Range]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    paired: bool
    size: int | None
    notes: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    @property
    def shown(self) -> Split:
        """The images to show samples of: the test images, or the training images where a domain has none."""
        return self.test if all(len(store) for store in self.test.stores) else self.train


def open_data(
    root: Path | str | None,
    *,
    paired: bool,
    direction: Literal["AtoB", "BtoA"] = "AtoB",
    channels: int | None = None,
    channels_b: int | None = None,
    preprocess: Preprocess = "resize_and_crop",
    load_size: int = 286,
    crop_size: int = 256,
    flip: bool = True,
    serial: bool = False,
    range_a: Range | None = None,
    range_b: Range | None = None,
    pages: Pages = "images",
    max_images: int | None = None,
    skip_bad: bool = False,
    cache: Path | str | None = None,
    progress: bool = False,
) -> Data:
    """Find, check and decode the images below a folder, or draw the embedded digits where root is None.

    Digits are 32x32, neither resized nor cropped nor mirrored. channels, channels_b, range_a, range_b are
    about the folder's A and B; direction "BtoA" swaps everything at the end. channels_b: like channels where
    not given. A range not given is that of the type, or smallest to largest training value for float. cache:
    folder for the decoded images, which a later call with the same files and options uses again; None keeps
    them in memory. skip_bad: leave out files that cannot be used (and their partners) and say so in the
    notes. Raises DataError for everything wrong with files, folders or options.
    """
    if channels_b is None:
        channels_b = channels
    for flag, value in (("--channels", channels), ("--channels-b", channels_b), ("--max-images", max_images)):
        if value is not None and value < 1:
            raise DataError(f"{flag} {value}: must be at least 1")
    for flag, limits in (("--range-a", range_a), ("--range-b", range_b)):
        if limits is not None and not limits[0] < limits[1]:
            raise DataError(f"{flag} {limits[0]:g} {limits[1]:g}: the second value must be the larger one")
    notes: list[str] = []
    if root is None:
        name = "digits"
        geometry = None
        stores = _digits(paired, (channels, channels_b), max_images)
    else:
        name = Path(root).resolve().name
        geometry = Geometry(preprocess, load_size, crop_size)
        wanted = Wanted(paired, (channels, channels_b), geometry, pages, max_images, skip_bad)
        folder = Path(cache) if cache is not None else None
        stores = read_folder(Path(root), wanted, folder, progress, notes)
    train, test = (stores["train_A"], stores["train_B"]), (stores["test_A"], stores["test_B"])
    ranges = ranges_of(train, (range_a, range_b), notes)
    notes += _remarks(train, test, paired)
    if direction == "BtoA":
        train, test, ranges = train[::-1], test[::-1], ranges[::-1]
    elif direction != "AtoB":
        raise DataError(f"--direction {direction}: must be AtoB or BtoA")
    crop = geometry.crop if geometry is not None else None
    splits = [
        Split(pair, ranges, crop=crop, flip=flip and root is not None, paired=paired, serial=serial)
        for pair in (train, test)
    ]
    return Data(
        name=name,
        train=splits[0],
        test=splits[1],
        channels=(train[0].channels, train[1].channels),
        ranges=ranges,
        dtypes=(train[0].dtype, train[1].dtype),
        paired=paired,
        size=crop if geometry is not None else 32,
        notes=notes,
    )


def _values(store: Images) -> int:
    """Values of all images of a domain."""
    return int((store.index[:, 1] * store.index[:, 2]).sum()) * store.channels


def _raw(count: int, *key: int) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence([part % 2**64 for part in key])).random_raw(count)


@lru_cache(maxsize=8)
def _order(count: int, seed: int, domain: int, number: int) -> np.ndarray:
    order = np.argsort(_raw(count, seed, domain, number), kind="stable")
    order.setflags(write=False)
    return order


def _digits(
    paired: bool, channels: tuple[int | None, int | None], max_images: int | None
) -> dict[str, Images]:
    stores = {}
    for split in ("train", "test"):
        digits = make_digits(split, paired=paired)
        for domain, (letter, pixels) in enumerate((("A", digits.A), ("B", digits.B))):
            count = channels[domain] or 3
            right = [match_channels(image, count) for image in pixels[:max_images]]
            kept = [image for image in right if image is not None]
            if len(kept) < len(right):
                raise DataError(f"--channels {count}: the digits have 3 channels, or 1 as grey")
            values = np.stack(kept)
            about = {
                "names": [f"{i:04d}" for i in range(len(kept))],
                "channels": count,
                "dtype": "|u1",
                "low": float(values.min()),
                "high": float(values.max()),
            }
            index = np.array([(i, 32, 32) for i in range(len(kept))], dtype=np.int64)
            stores[f"{split}_{letter}"] = Images(list(values), index, about)
    return stores


def ranges_of(
    stores: tuple[Images, Images], given: tuple[Range | None, Range | None], notes: list[str]
) -> tuple[Range, Range]:
    """The values of A and of B that become black and white: as given, or by type and images."""
    ranges: list[Range] = []
    for letter, store, limits in zip("AB", stores, given):
        if limits is not None:
            ranges.append((float(limits[0]), float(limits[1])))
            continue
        if store.dtype.kind == "f":
            if store.low == store.high:
                raise DataError(
                    f"domain {letter}: all values are {store.low:g}; give --range-{letter.lower()}"
                )
            ranges.append((store.low, store.high))
            continue
        ranges.append(type_range(store.dtype))
        bits = int(store.high).bit_length()
        if store.dtype == np.uint16 and bits < 15:
            hint = f"--range-{letter.lower()} 0 {2**bits - 1}"
            notes.append(
                f"the 16-bit images of {letter} only reach {store.high:g} of 65535, nearly black; see {hint}"
            )
    return ranges[0], ranges[1]


def _remarks(train: tuple[Images, Images], test: tuple[Images, Images], paired: bool) -> list[str]:
    notes = []
    counts = [len(store) for store in train]
    for letter, count in zip("AB", counts):
        if count == 1 and not (paired and letter == "B"):
            notes.append(f"only 1 training image in {letter}")
    if not paired and max(counts) >= 10 * min(counts):
        notes.append(f"A has {counts[0]} images, B has {counts[1]}: very unequal")
    if not all(len(store) for store in test):
        notes.append("no test images: samples show training images")
    return notes

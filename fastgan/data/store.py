"""Decoded images of one domain: in memory, or in one memory-mapped .npy file that a second start uses again.

A cache is three kinds of files in one folder, all named after a key that stands for the list of image files,
their sizes and dates, and every option that decides the bytes: `images-<key>_<split>_<domain>.npy` hold the
pixels, one image behind the other, and `images-<key>.json` says where each one starts. The JSON file is
written last and under a temporary name, so a cache that was cut off is never taken for a whole one. Pixels
are streamed with plain writes, because a full disk under a memory map would end the process instead of
raising an error.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from fastgan.data.folders import Source
from fastgan.data.images import DataError

_VERSION = 1
_WORKERS = min(8, os.cpu_count() or 1)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Images:
    """Images (h, w, channels) of one type, by number: views of `pixels`, each starting at its place."""

    def __init__(
        self, pixels: np.ndarray | Sequence[np.ndarray], index: np.ndarray, about: dict[str, Any]
    ) -> None:
        self.names: list[str] = about["names"]
        self.channels: int = about["channels"]
        self.dtype = np.dtype(about["dtype"])
        # smallest and largest value of all images
        self.low: float = about["low"]
        self.high: float = about["high"]
        # rows of (place in pixels, height, width)
        self.index = index
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> np.ndarray:
        place, height, width = self.index[number].tolist()
        if isinstance(self._pixels, np.ndarray):
            flat = self._pixels[place : place + height * width * self.channels]
            return flat.reshape(height, width, self.channels)
        return self._pixels[place]


def in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, total: int, label: str, progress: bool
) -> Iterator[_Result]:
    """Apply a function in threads and yield the results in order, with few of them in memory at a time."""
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="images") as pool:
        try:
            with tqdm(total=total, desc=label, unit="file", disable=not progress, leave=False) as bar:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= 4 * _WORKERS:
                        yield waiting.popleft().result()
                        bar.update()
                while waiting:
                    yield waiting.popleft().result()
                    bar.update()
        finally:
            for future in waiting:
                future.cancel()


class Writer:
    """Takes images one by one, into a list or to the end of a .npy file."""

    def __init__(self, channels: int, dtype: np.dtype[Any], path: Path | None) -> None:
        self.channels, self.dtype, self.path = channels, dtype, path
        self.names: list[str] = []
        self.rows: list[tuple[int, int, int]] = []
        self.low, self.high = float("inf"), float("-inf")
        self._kept: list[np.ndarray] = []
        self._size = 0
        self._temporary = path.with_suffix(".tmp") if path is not None else None
        self._file = None
        if self._temporary is not None:
            with writing(self._temporary):
                self._file = self._temporary.open("wb")
                self._header_size = self._write_header()

    def __len__(self) -> int:
        return len(self.rows)

    def _write_header(self) -> int:
        assert self._file is not None
        # numpy pads the header so that a larger number fits in the same place
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self._size,)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def append(self, name: str, image: np.ndarray) -> None:
        self.low, self.high = min(self.low, float(image.min())), max(self.high, float(image.max()))
        self.names.append(name)
        self.rows.append((self._size if self._file else len(self.rows), *image.shape[:2]))
        self._size += image.size
        if self._file is None:
            self._kept.append(image)
            return
        assert self._temporary is not None
        with writing(self._temporary):
            self._file.write(np.ascontiguousarray(image).data)

    def finish(self) -> Images:
        about = {
            "names": self.names,
            "channels": self.channels,
            "dtype": self.dtype.str,
            "low": self.low,
            "high": self.high,
        }
        index = np.array(self.rows, dtype=np.int64).reshape(-1, 3)
        if self._file is None or self.path is None or self._temporary is None:
            return Images(self._kept, index, about)
        with writing(self._temporary):
            assert self._write_header() == self._header_size
            self._file.close()
            self._temporary.replace(self.path)
        return Images(_mapped(self.path, self._size), index, about)

    def close(self) -> None:
        if self._file is not None and self._temporary is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what went wrong with the cache file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise DataError(
                f"{path}: disk full while writing the cache; free some space or use --max-images"
            ) from error
        raise DataError(f"{path}: the cache cannot be written ({error.strerror or error})") from error


def _mapped(path: Path, size: int) -> np.ndarray:
    # an empty file cannot be mapped; a plain array is quicker to slice than numpy's memmap type
    return np.load(path, mmap_mode="r" if size else None, allow_pickle=False).view(np.ndarray)


def cache_key(options: dict[str, Any], root: Path, groups: dict[str, Sequence[Source]]) -> str:
    """Return 16 hex digits that change with the options and with any file's name, size or date."""
    listed = {}
    for group, sources in groups.items():
        listed[group] = [
            [source.path.relative_to(root).as_posix(), source.half, *_size_and_date(source.path)]
            for source in sources
        ]
    text = json.dumps([_VERSION, str(root.resolve()), options, listed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size_and_date(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:  # a broken link; reading it gives the error
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def save_index(folder: Path, key: str, stores: dict[str, Images], extra: dict[str, Any]) -> None:
    """Declare the cache whole: write its JSON file, then remove the files of other keys."""
    about = {
        name: {
            "names": images.names,
            "channels": images.channels,
            "dtype": images.dtype.str,
            "low": images.low if len(images) else 0.0,
            "high": images.high if len(images) else 0.0,
            "index": images.index.tolist(),
        }
        for name, images in stores.items()
    }
    path = folder / f"images-{key}.json"
    temporary = path.with_suffix(".tmp")
    with writing(path):
        temporary.write_text(json.dumps({"stores": about, "extra": extra}), encoding="utf-8")
        temporary.replace(path)
    for old in folder.glob("images-*"):
        if not old.name.startswith(f"images-{key}"):
            with contextlib.suppress(OSError):  # still mapped by another process on Windows
                old.unlink()


def load_index(folder: Path, key: str) -> tuple[dict[str, Images], dict[str, Any]] | None:
    """Open the cache of this key, or return None where there is no whole one."""
    try:
        saved = json.loads((folder / f"images-{key}.json").read_text(encoding="utf-8"))
        stores = {}
        for name, about in saved["stores"].items():
            index = np.array(about["index"], dtype=np.int64).reshape(-1, 3)
            size = int((index[:, 1] * index[:, 2]).sum()) * about["channels"]
            pixels = _mapped(folder / f"images-{key}_{name}.npy", size)
            if pixels.shape != (size,) or pixels.dtype != np.dtype(about["dtype"]):
                return None
            stores[name] = Images(pixels, index, about)
        return stores, saved["extra"]
    except (OSError, ValueError, KeyError):
        return None

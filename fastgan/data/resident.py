"""Training images that stay in device memory; a batch is a few numbers per image and one kernel per domain.

`records(k)` is made on the host and depends on k and the seed alone; `batch(records)` is work on the device
alone, at addresses that never change: it can be captured in a CUDA graph whose records lie in a static
tensor. The batches are those of `Split.batch`, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from fastgan_kernels import crop_images
from torch import Tensor

from fastgan.data.augment import OutputRange, to_device
from fastgan.data.dataset import Split
from fastgan.data.images import DataError

# of the device memory that is free before the networks have been used
SHARE = 0.25


def fits(split: Split, free_bytes: int) -> bool:
    """Whether the images of both domains take at most a quarter (SHARE) of the free device memory."""
    return split.nbytes <= SHARE * free_bytes


def one_size(split: Split) -> list[tuple[int, int]] | None:
    """Height and width of a training image of A and of B, None where those of a domain are unequal."""
    if split.crop is not None:
        return [(split.crop, split.crop)] * len(split.stores)
    sizes = [{(height, width) for _, height, width in store.index.tolist()} for store in split.stores]
    return [size.pop() for size in sizes] if all(len(size) == 1 for size in sizes) else None


class Resident:
    """Training batches k = start, start + 1, ... of images that lie in device memory; see `Loader`.

    Args:
        split: training images; those of a domain must be of one size once they are cropped.
        batch_size: images per domain, batch and rank.
        rank, ranks: as for `Split.batch`.

    Raises:
        DataError: images of unequal size.
    """

    wait = 0.0  # seconds: nothing to wait for

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str,
        output_range: OutputRange = "tanh",
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        sizes = one_size(split)
        if sizes is None:
            raise DataError(
                "--data-on device: images of unequal size; use --data-on host or a --preprocess that crops"
            )
        self._split, self._batch_size, self._sizes, self._k = split, batch_size, sizes, start
        self._seed, self._rank, self._ranks = seed, rank, ranks
        self._device, self._output_range = torch.device(device), output_range
        # where each image begins, in values
        self._places: list[np.ndarray] = []
        self._pixels: list[Tensor] = []
        for store in split.stores:
            lengths = store.index[:, 1] * store.index[:, 2] * store.channels
            ends = np.cumsum(lengths)
            self._places.append(ends - lengths)
            kind = to_device(np.empty(0, store.dtype), torch.device("cpu")).dtype
            flat = torch.empty(int(lengths.sum()), dtype=kind, device=self._device)
            for i, end in enumerate(ends.tolist()):
                image = to_device(store[i], torch.device("cpu")).flatten()
                flat[end - len(image) : end].copy_(image)
            self._pixels.append(flat)
        if split.labels is not None:
            self._labels = to_device(split.labels, self._device)
            self._starts = torch.from_numpy(self._places[0]).to(self._device)

    def records(self, k: int) -> Tensor:
        """Return what batch k consists of, (domains, batch_size, 6) int64 on the host: see `crop_images`."""
        chosen = self._split.choose(k, self._batch_size, seed=self._seed, rank=self._rank, ranks=self._ranks)
        parts = []
        for (number, top, left, flip), places, store in zip(
            chosen.transpose(0, 2, 1), self._places, self._split.stores
        ):
            parts.append(np.stack([places[number], *store.index[number, 1:].T, top, left, flip], axis=1))
        return torch.from_numpy(np.stack(parts))

    def batch(self, records: Tensor) -> dict[str, Tensor]:
        """Return the batch of records that lie on the device; nothing but launches there."""
        found = {}
        for domain, (name, store) in enumerate(zip("AB", self._split.stores)):
            found[name] = crop_images(
                self._pixels[domain],
                records[domain],
                store.channels,
                self._sizes[domain],
                self._split.ranges[domain],
                output_range=self._output_range,
                clamp=self._split.clamps(domain),
            )
        if self._split.labels is not None:
            # the image that begins at the place of the record
            found["label"] = self._labels[torch.searchsorted(self._starts, records[0, :, 0].contiguous())]
        return found

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def take(self) -> Tensor:
        """Return the records of the next batch, on the host, pinned for a GPU."""
        if not self._pixels:
            raise StopIteration
        records = self.records(self._k)
        self._k += 1
        # else the copy would wait for everything queued on the device
        return records.pin_memory() if self._device.type == "cuda" else records

    def __next__(self) -> dict[str, Tensor]:
        return self.batch(self.take().to(self._device, non_blocking=True))

    def close(self) -> None:
        """Give the memory back; afterwards the iterator is at its end."""
        self._pixels = []

    def __enter__(self) -> Resident:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

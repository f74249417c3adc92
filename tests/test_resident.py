"""Images in device memory give the batches of `Split.batch`, bit by bit; where the images of a run lie."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgan.data import Loader, Resident, open_data, open_feed
from fastgan.data.dataset import Data
from fastgan.data.feed import resident_bytes
from fastgan.data.images import DataError, write_image
from fastgan.data.resident import SHARE, fits, one_size

CROP: dict[str, Any] = {"preprocess": "crop", "crop_size": 16}


def images(root: Path, dtype: str, count_b: int, sizes: tuple[tuple[int, int], ...]) -> Path:
    """5 training images of A and count_b of B: of A with 3 channels, of B with 1, of these sizes in turn."""
    rng = np.random.default_rng(0)
    for domain, count, channels in (("A", 5, 3), ("B", count_b, 1)):
        (root / domain / "train").mkdir(parents=True)
        for i in range(count):
            values = rng.random((*sizes[i % len(sizes)], channels))
            if dtype == "float32":
                path, values = root / domain / f"train/{i}.npy", (values * 3 - 1).astype(np.float32)
            else:
                path = root / domain / f"train/{i}.tif"
                values = (values * np.iinfo(dtype).max).astype(dtype)
            write_image(path, values)
    return root


def check(data: Data, resident: Resident, steps: range, batch_size: int, **options: Any) -> None:
    for k, batch in zip(steps, resident):
        expected = data.train.batch(k, batch_size, seed=3, **options)
        assert set(batch) == {"A", "B"}
        for name, x in batch.items():
            assert torch.equal(x, expected[name]) and x.stride() == expected[name].stride()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_batches_are_those_of_the_split(tmp_path, dtype, paired, batch_size):
    # crops of images of unequal size; a range that cuts off in A and not in B
    images(tmp_path, dtype, 5 if paired else 3, ((20, 24), (31, 17)))
    limits = {"uint8": (20, 200), "uint16": (100, 50000), "float32": (-0.5, 1.1)}[dtype]
    data = open_data(tmp_path, paired=paired, range_a=limits, **CROP)
    for output_range in ("tanh", "sigmoid"):
        options = {"output_range": output_range}
        with Resident(data.train, batch_size, seed=3, device="cpu", start=7, **options) as resident:
            check(data, resident, range(7, 15), batch_size, **options)
            assert resident.wait == 0
        assert next(resident, None) is None


@pytest.mark.parametrize("cached", [False, True])
def test_whole_images(tmp_path, cached):
    images(tmp_path / "data", "uint8", 3, ((20, 24),))
    cache = tmp_path / "cache" if cached else None
    data = open_data(tmp_path / "data", paired=False, preprocess="none", flip=False, cache=cache)
    assert one_size(data.train) == [(20, 24)] * 2
    check(data, Resident(data.train, 2, seed=3, device="cpu"), range(6), 2)


def test_digits():
    data = open_data(None, paired=True, max_images=20)
    check(data, Resident(data.train, 8, seed=3, device="cpu"), range(5), 8)


def test_records_alone_decide_the_batch():
    """As a captured graph replays it: the records are copied into a tensor that stays where it is."""
    data = open_data(None, paired=False, max_images=20)
    resident = Resident(data.train, 2, seed=3, device="cpu")
    static = torch.zeros((2, 2, 6), dtype=torch.int64)
    for k in (5, 0, 5):
        records = resident.records(k)
        assert records.shape == static.shape and records.dtype == static.dtype
        static.copy_(records)
        batch, expected = resident.batch(static), data.train.batch(k, 2, seed=3)
        assert torch.equal(batch["A"], expected["A"]) and torch.equal(batch["B"], expected["B"])


@pytest.mark.parametrize("paired", [False, True])
def test_ranks_see_together_what_one_process_sees(tmp_path, paired):
    images(tmp_path, "uint8", 5 if paired else 3, ((20, 24), (31, 17)))
    data = open_data(tmp_path, paired=paired, **CROP)
    ranks, size = 3, 2
    for k in range(8):
        whole = data.train.batch(k, ranks * size, seed=3)
        parts = [data.train.batch(k, size, seed=3, rank=r, ranks=ranks) for r in range(ranks)]
        for name in "AB":
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    for rank in range(ranks):
        feeds: list[Any] = [
            kind(data.train, size, seed=3, device="cpu", start=4, rank=rank, ranks=ranks)
            for kind in (Resident, Loader)
        ]
        for feed in feeds:
            with feed:
                check(data, feed, range(4, 9), size, rank=rank, ranks=ranks)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_buffers_of_the_loader_are_used_again(tmp_path, dtype):
    """A batch is the caller's: it stays as it is while its buffer is filled anew."""
    images(tmp_path, dtype, 3, ((20, 24),))
    data = open_data(tmp_path, paired=False, flip=False, **CROP)
    with Loader(data.train, 2, seed=3, depth=1) as loader:
        kept: list[dict[str, Tensor]] = [next(loader) for _ in range(12)]
        assert loader._free.qsize() + loader._ready.qsize() <= 4
    for k, batch in enumerate(kept):
        expected = data.train.batch(k, 2, seed=3)
        assert torch.equal(batch["A"], expected["A"]) and torch.equal(batch["B"], expected["B"])


def test_whole_images_of_unequal_size_pass_through_the_buffers(tmp_path):
    images(tmp_path, "uint8", 3, ((20, 24), (32, 16)))
    data = open_data(tmp_path, paired=False, preprocess="none")
    with Loader(data.train, 1, seed=3) as loader:
        for k, batch in zip(range(9), loader):
            expected = data.train.batch(k, 1, seed=3)
            assert torch.equal(batch["A"], expected["A"]) and torch.equal(batch["B"], expected["B"])


def test_where_the_images_lie(tmp_path, monkeypatch):
    data = open_data(None, paired=False, max_images=20)
    assert data.train.nbytes == 2 * 20 * 32 * 32 * 3
    assert fits(data.train, int(data.train.nbytes / SHARE)) and not fits(data.train, data.train.nbytes)
    kinds = {"auto": Loader, "host": Loader, "device": Resident}
    for where, kind in kinds.items():
        with open_feed(data, 2, seed=3, start=4, where=where) as feed:
            assert type(feed) is kind
            check(data, feed, range(4, 6), 2)
    images(tmp_path, "uint8", 3, ((20, 24), (32, 16)))
    unequal = open_data(tmp_path, paired=False, preprocess="none")
    with pytest.raises(DataError, match="--data-on device: images of unequal size; use --data-on host"):
        open_feed(unequal, 1, seed=0, where="device")
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


@pytest.mark.parametrize(
    "times, where, found", [(8, "auto", Resident), (2, "auto", Loader), (2, "device", None)]
)
def test_on_a_gpu_the_free_memory_decides(monkeypatch, times, where, found):
    """Without one: what a GPU would answer, and which kind would be opened."""
    data = open_data(None, paired=False, max_images=20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (times * data.train.nbytes, 2**40))
    opened: list[type] = []
    for kind in (Resident, Loader):
        monkeypatch.setattr(f"fastgan.data.feed.{kind.__name__}", lambda *a, k=kind, **o: opened.append(k))
    if found is None:
        with pytest.raises(DataError, match="--data-on device: the images take 0 MiB, more than 25% of the"):
            open_feed(data, 1, seed=0, device="cuda", where=where)
    else:
        open_feed(data, 1, seed=0, device="cuda", where=where)
        assert opened == [found]


def test_bytes_that_the_images_take_of_a_gpu(tmp_path, monkeypatch):
    """Those of `open_feed`'s choice: none where it would read ahead on the host."""
    data, cuda = open_data(None, paired=False, max_images=20), torch.device("cuda")
    images(tmp_path, "uint8", 3, ((20, 24), (32, 16)))
    unequal = open_data(tmp_path, paired=False, preprocess="none")
    free = int(data.train.nbytes / SHARE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    assert resident_bytes(data, cuda, "auto") == resident_bytes(data, cuda, "device") == data.train.nbytes
    assert resident_bytes(data, cuda, "host") == resident_bytes(data, torch.device("cpu"), "device") == 0
    assert unequal.train.nbytes < data.train.nbytes and resident_bytes(unequal, cuda, "auto") == 0
    free -= 4
    assert resident_bytes(data, cuda, "auto") == 0

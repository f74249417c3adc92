"""Several processes that train one model, one per GPU, as torchrun starts them.

Every rank holds all networks and a part of the global batch. Gradients are averaged, batch norm takes its
statistics over all ranks, and what one rank finds wrong ends all of them (`together`). Values travel in one
canonical order of memory, so that ranks need not agree on the strides of their tensors.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from fastgan.config import UsageError

# the others wait while the first rank decodes the images; an ended rank is noticed at once, not by this
PATIENCE = timedelta(days=1)
LAUNCH = "torchrun --nproc-per-node N -m fastgan.train"


class LostRank(RuntimeError):
    """Another process of the run does not answer any more: it has ended, or failed on its own."""


class Ranks:
    """All processes of a run, seen from one of them: `rank` of `size`, `local` of `local_size` on this
    machine."""

    def __init__(self) -> None:
        """Join the others.

        Raises:
            UsageError: the environment is not that of torchrun, or the others cannot be reached.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise UsageError(f"WORLD_SIZE is set without {missing[0]}: start several processes with {LAUNCH}")
        try:
            self.rank, self.size, self.local, self.local_size = (int(os.environ[name]) for name in names[:4])
            nccl = torch.cuda.is_available() and distributed.is_nccl_available()
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"the processes cannot reach each other: {str(error).splitlines()[0]}"
            ) from error
        # set where all ranks have raised the same error
        self.agreed = False

    @classmethod
    def start(cls) -> Ranks | None:
        """The ranks that torchrun started; None for a process on its own."""
        return None if os.environ.get("WORLD_SIZE", "1") == "1" else cls()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a copied network still belongs to the same processes

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def close(self) -> None:
        """Wait for the others, unless they are gone, and leave; torchrun ends all ranks when one fails."""
        with suppress(LostRank):
            self.highest(0)
        distributed.destroy_process_group()

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks of a tensor of equal shape; not differentiable."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        with _answering():
            distributed.all_reduce(total)
        return total

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the ranks, in one exchange per dtype.

        tensors: of any shapes, layouts and dtypes on the device, the same ones in the same order everywhere.
        Queued like a kernel on a GPU: nobody waits on the host.
        """

        def exchange(flat: Tensor) -> None:
            distributed.all_reduce(flat)
            flat.div_(self.size)

        _as_one(tensors, exchange)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by those of the first rank, in one exchange per dtype."""
        _as_one(tensors, lambda flat: distributed.broadcast(flat, 0))

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """(N, ...) of every rank as (size * N, ...) in the order of ranks, detached; images channels_last."""
        mine = _ordered(x).contiguous()
        out = mine.new_empty(self.size * mine.shape[0], *mine.shape[1:])
        with _answering():
            distributed.all_gather(list(out.split(mine.shape[0])), mine)
        return out.permute(0, 3, 1, 2) if x.dim() == 4 else out

    def highest(self, number: int) -> int:
        """The largest number that any rank has; through the hosts, without the devices."""
        found = torch.tensor(number)
        with _answering():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether any rank has the flag set; through the hosts, without the devices."""
        return bool(self.highest(int(flag)))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.highest(0)

    def collect(self, value: Any) -> list[Any]:
        """A picklable value of every rank, through the hosts, in the order of ranks."""
        out: list[Any] = [None] * self.size
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        length = self.highest(len(data))
        # pickle stops at its own end and does not mind what follows
        rows = self.gather(F.pad(data, (0, length - len(data)))[None])
        for rank, row in enumerate(rows):
            out[rank] = pickle.loads(row.numpy().tobytes())
        return out


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # torch has no exception of its own for a connection that gloo or NCCL lost
        raise LostRank("another process of the run has ended: its lines, or torchrun's, say why") from error


def _ordered(x: Tensor) -> Tensor:
    """A view of x in the order in which channels_last stores images: free in the layout of our networks."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


@torch.no_grad()
def _as_one(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        views = [_ordered(x) for x in tensors if x.dtype == dtype]
        flat = torch.cat([view.reshape(-1) for view in views])
        with _answering():
            exchange(flat)
        parts = flat.split([view.numel() for view in views])
        torch._foreach_copy_(views, [part.view(view.shape) for part, view in zip(parts, views)])


@contextmanager
def together(ranks: Ranks | None) -> Iterator[None]:
    """All ranks leave the block alike: where one fails in it, all raise the error of the first that did.

    Nothing in the block may exchange anything between ranks.
    """
    if ranks is None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    if not ranks.highest(error is not None):
        return
    try:
        pickle.loads(pickle.dumps(error))
        message = error
    except Exception:
        message = RuntimeError(f"{type(error).__name__}: {error}")
    told = next(e for e in ranks.collect(message) if e is not None)
    ranks.agreed = True
    raise told from error

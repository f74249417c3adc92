"""How a kernel is launched: a short function of the shape (bandwidth kernels), or the fastest of a few tried.

`choose` picks one of at most eight candidates, an implementation or a tile. It looks at, in this order: what
this process chose before, the user's cache file, the table shipped for this GPU (tuned.json). Else it
measures, and adds the times to the cache file. The first candidate is the safe one, taken where nothing may
be measured: on a CPU, in Triton's interpreter, while torch.compile traces or a CUDA graph is captured, under
a dispatch mode (fake tensors, a FLOP counter), and with FASTGAN_AUTOTUNE=0.

Both files map GPU name -> "<op><key>" -> candidate -> microseconds, null where it raised. A candidate is
written as its text, so that a file survives another order; texts that no candidate has are passed over.
The cache file, in $XDG_CACHE_HOME/fastgan or ~/.cache/fastgan, is one per GPU name, version of torch and of
triton, and hash of this package's sources.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ._op import INTERPRET, triton

T = TypeVar("T")
Times = dict[str, float | None]

SHIPPED = Path(__file__).with_name("tuned.json")
# a candidate that comes earlier wins up to this factor, so that noise does not decide
TIE = 1.02
ROUNDS = 11
# a sample takes so long, in at most so many calls
SAMPLE_US, MOST_CALLS = 500.0, 20
# clock cycles (0.1 ms at 2 GHz) per call: a launch from Python takes less
PAUSE = 200_000

_lock = threading.RLock()
_tables: dict[str, dict[str, Times]] = {}
_chosen: dict[tuple[str, tuple[Hashable, ...], torch.device], Any] = {}


def choose(
    op: str,
    key: tuple[Hashable, ...],
    candidates: Sequence[T],
    run: Callable[[T], object],
    device: torch.device,
) -> T:
    """The candidate that ran fastest for this op and key on this GPU; up to 2 % go to the earlier one.

    key: what the speed depends on; sizes through `bucket` and `bucket_count`. Numbers, strings, dtypes; a
    NamedTuple keeps its fields' names in the tables.
    candidates: strings or NamedTuples, the first one safe at any shape. run: launches the work with a
    candidate, on tensors of the real shape, without effects besides its result.
    A measured candidate that raises is dropped, with a warning unless it ran out of the GPU's resources.
    The choice depends on measured times: another machine may choose otherwise, and sum in another order.
    Raises ValueError for a value of FASTGAN_AUTOTUNE other than 0 or 1, RuntimeError where no candidate runs.
    """
    if device.type != "cuda" or INTERPRET or len(candidates) == 1:
        return candidates[0]
    known = _chosen.get((op, key, device))
    if known is not None and known in candidates:
        return known
    allowed = _may_measure()
    with _lock:
        # of a NamedTuple the fields, not its name
        entries, entry = table(device), f"{op}({repr(key).partition('(')[2]}"
        best = _fastest(candidates, entries.get(entry, {}))
        if best is None:
            if not allowed:
                return candidates[0]
            times = entries[entry] = _measure(op, key, candidates, run, device)
            _save(_cache_file(_gpu(device)), _gpu(device), {entry: times})
            best = _fastest(candidates, times)
            assert best is not None
        _chosen[op, key, device] = best
        return best


def table(device: torch.device) -> dict[str, Times]:
    """What is known of a GPU: "<op><key>" -> candidate -> microseconds; the shipped table, over it the user's
    cache file, over it what this process measured."""
    gpu = _gpu(device)
    if gpu not in _tables:
        _tables[gpu] = _load(SHIPPED, gpu) | _load(_cache_file(gpu), gpu)
    return _tables[gpu]


def bucket(n: int) -> int:
    """The nearest by ratio of 1, 2, 3, 4, 6, 8, 12, 16, 24 ...: a size within a quarter of the one measured.

    221 to 313 are 256, 314 to 443 are 384: 250x300 images share the entry of 256x256.
    """
    power = 1 << (max(n, 1).bit_length() - 1)
    if 2 * n * n < 3 * power * power:
        return power
    return 3 * power // 2 if n * n < 3 * power * power else 2 * power


def bucket_count(n: int) -> int:
    """A number of images or weight sets: exact up to 8, then the next power of two."""
    return n if n <= 8 else power_of_two(n)


def _may_measure() -> bool:
    value = os.environ.get("FASTGAN_AUTOTUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"FASTGAN_AUTOTUNE must be 0 or 1, got {value!r}")
    traced = torch.compiler.is_dynamo_compiling() or _get_current_dispatch_mode() is not None
    return value == "1" and not traced and not torch.cuda.is_current_stream_capturing()


def _text(candidate: object) -> str:
    return candidate if isinstance(candidate, str) else repr(candidate)


def _fastest(candidates: Sequence[T], times: Times) -> T | None:
    """None where no candidate was measured."""
    timed = [(us, c) for c in candidates if (us := times.get(_text(c))) is not None]
    limit = TIE * min((us for us, _ in timed), default=0.0)
    return next((c for us, c in timed if us <= limit), None)


def _measure(
    op: str,
    key: tuple[Hashable, ...],
    candidates: Sequence[T],
    run: Callable[[T], object],
    device: torch.device,
) -> Times:
    times: Times = {_text(c): None for c in candidates}
    calls: dict[T, int] = {}
    failure: Exception | None = None
    for candidate in candidates:
        try:
            # the first call compiles, cuDNN tries its algorithms in it, and it fails here if it does at all
            for _ in range(3):
                run(candidate)
            once = _elapsed(run, candidate, 1, device)
            calls[candidate] = max(1, min(MOST_CALLS, int(SAMPLE_US / max(once, 1.0))))
        except Exception as error:
            failure = error
            scarce = (torch.OutOfMemoryError, getattr(triton, "OutOfResources", torch.OutOfMemoryError))
            if not isinstance(error, scarce):
                warnings.warn(f"{op}: {_text(candidate)} fails for {key}: {error}", stacklevel=3)
    if not calls:
        raise RuntimeError(f"{op}: none of {len(candidates)} candidates runs for {key}") from failure
    samples: dict[T, list[float]] = {c: [] for c in calls}
    # in turns, so that a change of the clock meets all of them
    for _ in range(ROUNDS):
        for c, number in calls.items():
            samples[c].append(_elapsed(run, c, number, device))
    return times | {_text(c): round(statistics.median(us), 3) for c, us in samples.items()}


def _elapsed(run: Callable[[T], object], candidate: T, calls: int, device: torch.device) -> float:
    """Microseconds of the device per call."""
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the launches queue up behind a pause: the GPU never waits for Python, as in a CUDA graph
        torch.cuda._sleep(PAUSE * calls)
        begin.record()
        for _ in range(calls):
            run(candidate)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls


@cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _sources(folder: Path) -> str:
    """A hash of the sources: measured times say nothing about another kernel."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _cache_file(gpu: str) -> Path | None:
    """None where the user has no home."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    versions = f"torch-{torch.__version__}_triton-{getattr(triton, '__version__', 'none')}"
    name = f"{gpu}_{versions}_{_sources(SHIPPED.parent)}.json"
    return Path(root) / "fastgan" / re.sub(r"[^\w.+-]+", "-", name)


def _load(path: Path | None, gpu: str) -> dict[str, Times]:
    """The entries of a GPU; none where the file is absent or broken."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[gpu] if path else {}
        return {entry: {c: _legal(us) for c, us in times.items()} for entry, times in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _legal(us: object) -> float | None:
    return float(us) if isinstance(us, (int, float)) and 0 < us < math.inf else None


def _save(path: Path | None, gpu: str, entries: dict[str, Times]) -> None:
    """Adds entries to a file; where it cannot be written they stay with this process."""
    if path is None:
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # another process may write at the same time: what one of them loses is measured again
        text = json.dumps({gpu: _load(path, gpu) | entries}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def row_tile(columns: int) -> tuple[int, int]:
    """(BLOCK_H, BLOCK_W) of 1024 elements: the widest that overhangs the row by an eighth of it at most."""
    block_w = 1024
    while block_w > 32 and ceil_div(columns, block_w) * block_w * 8 > columns * 9:
        block_w //= 2
    return 1024 // block_w, block_w


class PlaneTile(NamedTuple):
    """A program takes BLOCK_C planes: all pixels (chunks is 0), or a chunk of BLOCK_P * STEPS of them."""

    block_c: int
    block_p: int
    steps: int
    chunks: int
    num_warps: int


def plane_tile(n: int, c: int, pixels: int, channels_last: bool, itemsize: int, most: int = 256) -> PlaneTile:
    """Tile of a reduction over the pixels of each (n, c) plane, in at most so many chunks."""
    # 16384 float32 values are 32 registers of each thread of 16 warps
    limit = 8192 if itemsize == 8 else 16384
    # 16 channels of a half type fill the 32-byte sector that one pixel's load fetches
    block_c = min(16, power_of_two(c)) if channels_last else 1
    block_p = power_of_two(pixels)
    if block_c * block_p <= limit:
        block_c = max(block_c, min(2048 // block_p, power_of_two(c)))
        return PlaneTile(block_c, block_p, 1, 0, max(1, min(16, block_c * block_p // 512)))
    block_c = min(64, power_of_two(c)) if channels_last else 1
    block_p = 2048 // block_c
    # about 1024 programs fill every GPU in sight; the partial sums of a plane fit in one program
    chunks = max(1, min(most, 1024 // (n * ceil_div(c, block_c))))
    steps = power_of_two(ceil_div(pixels, chunks * block_p))
    # 8 warps: each thread fetches one 16-byte vector of a half type
    return PlaneTile(block_c, block_p, steps, ceil_div(pixels, steps * block_p), 8)

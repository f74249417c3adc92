"""choose: where it looks, what it measures, what it keeps on disk.

The GPU is made of three replaced functions: its name, whether a graph is captured, and the timer, which runs
the candidate as often as it is told and takes the time from a table.
"""

import ast
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import fastgan_kernels
import pytest
import torch
from fastgan_kernels import _tune
from fastgan_kernels._tune import SHIPPED, bucket, bucket_count, choose

DEVICE = torch.device("cuda", 0)
KEY = (1, 256, "reflect", torch.bfloat16)
ENTRY = f"conv{KEY!r}"


class Tile(NamedTuple):
    block_m: int
    num_warps: int = 4


CANDIDATES = ["cudnn", Tile(64), Tile(128, 8)]
TEXTS = ["cudnn", "Tile(block_m=64, num_warps=4)", "Tile(block_m=128, num_warps=8)"]


class Gpu:
    """A GPU whose candidates take the given microseconds; `fails` raise when they run."""

    def __init__(self, *us: float, fails: dict[object, Exception] | None = None) -> None:
        self.us, self.fails = dict(zip(CANDIDATES, us)), fails or {}
        self.name, self.capturing = "Test GPU 80GB/PCIe", False
        self.runs: list[object] = []
        self.samples: list[object] = []

    def run(self, candidate: object) -> None:
        self.runs.append(candidate)
        if candidate in self.fails:
            raise self.fails[candidate]

    def elapsed(self, run, candidate, calls, device) -> float:
        assert device == DEVICE
        self.samples.append(candidate)
        for _ in range(calls):
            run(candidate)
        return self.us[candidate]

    def choose(self, candidates=CANDIDATES, key=KEY):
        return choose("conv", key, candidates, self.run, DEVICE)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Puts a Gpu into the machine, with an empty cache folder; calling it again is a new process."""
    monkeypatch.delenv("FASTGAN_AUTOTUNE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_tune, "SHIPPED", tmp_path / "tuned.json")
    monkeypatch.setattr(_tune, "INTERPRET", False)
    monkeypatch.setattr(_tune, "_sources", lambda folder: "0123456789ab")

    def start(gpu: Gpu) -> Gpu:
        monkeypatch.setattr(_tune, "_tables", {})
        monkeypatch.setattr(_tune, "_chosen", {})
        monkeypatch.setattr(_tune, "_gpu", lambda device: gpu.name)
        monkeypatch.setattr(_tune, "_elapsed", gpu.elapsed)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
        return gpu

    return start


def cache_file(gpu: Gpu) -> Path:
    path = _tune._cache_file(gpu.name)
    assert path is not None
    return path


def write(path: Path, gpu: Gpu, entries: dict[str, dict[str, float | None]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({gpu.name: entries}))


def test_the_fastest_wins_and_is_measured_once(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    assert gpu.choose() == Tile(64)
    runs = len(gpu.runs)
    assert gpu.choose() == Tile(64) and len(gpu.runs) == runs
    assert gpu.choose(key=(2, *KEY[1:])) == Tile(64) and len(gpu.runs) > runs


def test_a_key_with_names_keeps_them(machine):
    class Shape(NamedTuple):
        kernel: int
        dtype: torch.dtype = torch.bfloat16

    gpu = machine(Gpu(30.0, 20.0, 25.0))
    gpu.choose(key=Shape(3))
    assert list(_tune.table(DEVICE)) == ["conv(kernel=3, dtype=torch.bfloat16)"]


def test_candidates_take_turns(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    gpu.choose()
    # one sample each to learn how many calls it takes, then rounds
    assert gpu.samples == CANDIDATES * (1 + _tune.ROUNDS)


def test_a_median_forgives_a_slow_round(machine, monkeypatch):
    gpu = machine(Gpu(20.0, 30.0))
    # after the first sample of each, every other one is the first candidate's
    slow = iter([False, False] + [True, False] * 5)
    honest = gpu.elapsed
    monkeypatch.setattr(_tune, "_elapsed", lambda *a: honest(*a) * (100 if next(slow, False) else 1))
    assert gpu.choose(CANDIDATES[:2]) == "cudnn"


@pytest.mark.parametrize("second, wins", [(98.1, "cudnn"), (97.9, Tile(64))])
def test_a_tie_goes_to_the_earlier(machine, second, wins):
    assert machine(Gpu(100.0, second, 150.0)).choose() == wins


def test_a_candidate_out_of_resources_is_dropped_without_a_word(machine, recwarn):
    gpu = machine(Gpu(30.0, 10.0, 25.0, fails={Tile(64): torch.OutOfMemoryError("shared memory")}))
    assert gpu.choose() == Tile(128, 8)
    assert not recwarn.list
    assert json.loads(cache_file(gpu).read_text())[gpu.name][ENTRY] == dict(zip(TEXTS, (30.0, None, 25.0)))
    # what failed is not tried again
    again = machine(Gpu(30.0, 10.0, 25.0))
    assert again.choose() == Tile(128, 8) and not again.runs


def test_a_candidate_that_fails_otherwise_is_dropped_with_a_warning(machine):
    gpu = machine(Gpu(30.0, 10.0, 25.0, fails={Tile(64): RuntimeError("misaligned address")}))
    with pytest.warns(UserWarning, match=r"conv: Tile\(block_m=64.*misaligned address"):
        assert gpu.choose() == Tile(128, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_candidates_fail(machine):
    gpu = machine(Gpu(1.0, 1.0, 1.0, fails=dict.fromkeys(CANDIDATES, RuntimeError("broken"))))
    with pytest.raises(
        RuntimeError, match=re.escape(f"conv: none of 3 candidates runs for {KEY!r}")
    ) as error:
        gpu.choose()
    assert "broken" in str(error.value.__cause__)
    assert not cache_file(gpu).exists()


def test_look_up_order(machine):
    # shipped: 128; cache file: 64; measured: cudnn
    gpu = Gpu(10.0, 20.0, 30.0)
    write(_tune.SHIPPED, gpu, {ENTRY: dict(zip(TEXTS, (3.0, 2.0, 1.0)))})
    assert machine(gpu).choose() == Tile(128, 8)
    write(cache_file(gpu), gpu, {ENTRY: dict(zip(TEXTS, (3.0, 1.0, 2.0)))})
    assert gpu.choose() == Tile(128, 8), "this process has chosen"
    assert machine(gpu).choose() == Tile(64)
    assert not gpu.runs
    cache_file(gpu).unlink()
    _tune.SHIPPED.unlink()
    assert machine(gpu).choose() == "cudnn" and gpu.runs
    assert machine(gpu).choose() == "cudnn", "from the cache file that it wrote"


def test_a_table_is_of_one_gpu(machine):
    other = Gpu(1.0, 2.0, 3.0)
    other.name = "Another GPU"
    gpu = Gpu(30.0, 20.0, 25.0)
    write(_tune.SHIPPED, other, {ENTRY: {"cudnn": 1.0}})
    assert machine(gpu).choose() == Tile(64) and gpu.runs
    assert cache_file(gpu) != cache_file(other)


def test_an_entry_without_a_legal_candidate_is_measured_again(machine):
    gpu = Gpu(30.0, 20.0, 25.0)
    write(_tune.SHIPPED, gpu, {ENTRY: {"Tile(block_m=256, num_warps=8)": 1.0, "triton": 2.0}})
    assert machine(gpu).choose() == Tile(64) and gpu.runs
    # one that is known among unknown ones is enough
    write(_tune.SHIPPED, gpu, {ENTRY: {"Tile(block_m=256, num_warps=8)": 1.0, TEXTS[2]: 9.0}})
    cache_file(gpu).unlink()
    gpu.runs.clear()
    assert machine(gpu).choose() == Tile(128, 8) and not gpu.runs


def test_a_choice_of_this_process_must_still_be_a_candidate(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    assert gpu.choose() == Tile(64)
    assert gpu.choose(["cudnn", Tile(128, 8)]) == Tile(128, 8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_measured_without_a_gpu(machine, device):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    assert choose("conv", KEY, CANDIDATES, gpu.run, torch.device(device)) == "cudnn"
    assert not gpu.runs and not cache_file(gpu).parent.exists()


def test_the_interpreter_measures_nothing(machine, monkeypatch):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    monkeypatch.setattr(_tune, "INTERPRET", True)
    assert gpu.choose() == "cudnn" and not gpu.runs


def test_one_candidate_needs_no_measurement(machine):
    gpu = machine(Gpu(30.0))
    assert gpu.choose(["cudnn"]) == "cudnn" and not gpu.runs


def test_capture_takes_the_first_and_forgets_it(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    gpu.capturing = True
    assert gpu.choose() == "cudnn" and not gpu.runs
    gpu.capturing = False
    assert gpu.choose() == Tile(64)
    gpu.capturing = True
    assert gpu.choose() == Tile(64), "what was measured before holds while capturing"


def test_a_dispatch_mode_measures_nothing(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    with torch._subclasses.FakeTensorMode():
        assert gpu.choose() == "cudnn" and not gpu.runs


def test_a_constant_of_torch_compile_is_measured(machine):
    # the engine asks while torch.compile traces, through assume_constant_result: that call is a real one
    gpu = machine(Gpu(30.0, 20.0, 25.0))

    @torch.compiler.assume_constant_result
    def block() -> int:
        return gpu.choose([Tile(128, 8), Tile(64)]).block_m

    compiled = torch.compile(lambda x: x + block(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 64 and gpu.runs


def test_autotune_0_reads_tables_and_measures_nothing(machine, monkeypatch):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "0")
    gpu = Gpu(30.0, 20.0, 25.0)
    assert machine(gpu).choose() == "cudnn"
    write(_tune.SHIPPED, gpu, {ENTRY: dict(zip(TEXTS, (3.0, 2.0, 1.0)))})
    assert machine(gpu).choose() == Tile(128, 8)
    assert not gpu.runs and not cache_file(gpu).exists()
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    assert gpu.choose(key=(7,)) == Tile(64)


@pytest.mark.parametrize("value", ["", "2", "yes", "False"])
def test_autotune_takes_0_or_1(machine, monkeypatch, value):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"FASTGAN_AUTOTUNE must be 0 or 1, got '{value}'"):
        machine(Gpu(30.0, 20.0, 25.0)).choose()


def test_the_cache_file_gathers(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    gpu.choose()
    # another process, which had read the file before this one wrote to it
    write(
        cache_file(gpu),
        gpu,
        {"conv(9,)": {"cudnn": 4.0}, **json.loads(cache_file(gpu).read_text())[gpu.name]},
    )
    gpu.choose(key=(8,))
    entries = json.loads(cache_file(gpu).read_text())[gpu.name]
    assert set(entries) == {ENTRY, "conv(8,)", "conv(9,)"}
    assert entries[ENTRY] == dict(zip(TEXTS, (30.0, 20.0, 25.0)))
    assert list(cache_file(gpu).parent.iterdir()) == [cache_file(gpu)], "no temporary file is left"
    assert set(_tune.table(DEVICE)) == {ENTRY, "conv(8,)"}


def test_writing_is_atomic(machine, monkeypatch):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    gpu.choose()
    before = cache_file(gpu).read_bytes()

    def power_cut(self, target):
        assert self.parent == target.parent, "a rename is atomic within a file system"
        assert set(json.loads(self.read_text())[gpu.name]) == {ENTRY, "conv(8,)"}, (
            "complete before it takes the name"
        )
        raise OSError("no power")

    monkeypatch.setattr(Path, "replace", power_cut)
    assert gpu.choose(key=(8,)) == Tile(64)
    assert cache_file(gpu).read_bytes() == before
    assert list(cache_file(gpu).parent.iterdir()) == [cache_file(gpu)]


def test_many_writers_never_show_a_broken_file(machine):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    path, stop, broken = cache_file(gpu), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if path.exists():
                try:
                    json.loads(path.read_text())
                except ValueError as error:
                    broken.append(error)

    def save(first: int) -> None:
        for i in range(first, first + 30):
            _tune._save(
                path, gpu.name, {f"conv({i},)": {"cudnn": float(i + 1)} | dict.fromkeys(map(str, range(50)))}
            )

    reader, *writers = [threading.Thread(target=read)] + [
        threading.Thread(target=save, args=(100 * k,)) for k in range(3)
    ]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not broken
    entries = json.loads(path.read_text())[gpu.name]
    assert any(f"conv({100 * k + 29},)" in entries for k in range(3)), "the last to write"


BROKEN = {
    "empty": "",
    "cut off": '{"Test GPU 80GB/PCIe": {"conv',
    "binary": b"\xff\xfe\x00",
    "a list": "[1]",
    "a number": "7",
    "not a table of this GPU": '{"Test GPU 80GB/PCIe": 3}',
    "entry is a text": json.dumps({"Test GPU 80GB/PCIe": {ENTRY: "cudnn"}}),
    "times are none": json.dumps({"Test GPU 80GB/PCIe": {ENTRY: dict(zip(TEXTS, ("1", math.nan, -1.0)))}}),
    "times are infinite": json.dumps({"Test GPU 80GB/PCIe": {ENTRY: {"cudnn": math.inf, TEXTS[1]: None}}}),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_cache_file_is_replaced(machine, what):
    gpu = Gpu(30.0, 20.0, 25.0)
    path = cache_file(gpu)
    path.parent.mkdir(parents=True)
    content = BROKEN[what]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert machine(gpu).choose() == Tile(64) and gpu.runs
    assert json.loads(path.read_text())[gpu.name][ENTRY] == dict(zip(TEXTS, (30.0, 20.0, 25.0)))


@pytest.mark.parametrize("obstacle", ["a file is in the way", "the folder is read-only", "no home"])
def test_a_cache_that_cannot_be_written(machine, monkeypatch, tmp_path, obstacle):
    gpu = machine(Gpu(30.0, 20.0, 25.0))
    if obstacle == "a file is in the way":
        (tmp_path / "cache").write_text("")
    elif obstacle == "the folder is read-only":
        # root may write anywhere, so the refusal is played
        monkeypatch.setattr(_tune.tempfile, "NamedTemporaryFile", refuse)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", refuse_home)
    assert gpu.choose() == Tile(64)
    runs = len(gpu.runs)
    assert gpu.choose() == Tile(64) and len(gpu.runs) == runs, "the measurement stays with the process"
    assert ENTRY in _tune.table(DEVICE)


def refuse(*args, **kwargs):
    raise PermissionError("read-only")


def refuse_home():
    raise RuntimeError("Could not determine home directory.")


def test_where_the_cache_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = _tune._cache_file("NVIDIA RTX / 6000")
    assert path is not None and path.parent == tmp_path / "fastgan"
    assert re.fullmatch(r"NVIDIA-RTX-6000_torch-[\w.+-]+_triton-[\w.+-]+_[0-9a-f]{12}\.json", path.name)
    assert f"torch-{torch.__version__}_" in path.name
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    path = _tune._cache_file("NVIDIA H200")
    assert path is not None and path.parent == tmp_path / "home/.cache/fastgan"


def test_the_hash_follows_the_sources(tmp_path):
    hashes = []
    for name, text in [("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", ""), ("notes.txt", "not a source")]:
        (tmp_path / name).write_text(text)
        _tune._sources.cache_clear()
        hashes.append(_tune._sources(tmp_path))
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    _tune._sources.cache_clear()
    hashes.append(_tune._sources(tmp_path))
    assert len(set(hashes)) == 4 and hashes[2] == hashes[3]
    assert all(re.fullmatch("[0-9a-f]{12}", h) for h in hashes)


def test_bucket():
    ladder = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert [bucket(n) for n in ladder] == ladder
    for n in range(1, 1025):
        assert bucket(n) == min(ladder, key=lambda step: max(n / step, step / n)), n
    assert [bucket(n) for n in (250, 300, 221, 222, 313, 314)] == [256, 256, 192, 256, 256, 384]
    assert all(max(n / bucket(n), bucket(n) / n) < 1.25 for n in range(1, 5000))
    assert bucket(0) == 1


def test_bucket_count():
    assert [bucket_count(n) for n in range(9)] == list(range(9))
    assert [bucket_count(n) for n in (9, 16, 17, 100)] == [16, 16, 32, 128]


def test_the_shipped_table():
    # GPU name -> "<op><key>" -> candidate -> microseconds; a candidate is a word or Name(field=value, ...)
    tables = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert isinstance(tables, dict)
    for gpu, entries in tables.items():
        assert gpu.startswith(("NVIDIA ", "Tesla ")), gpu
        for entry, times in entries.items():
            assert isinstance(ast.parse(entry, mode="eval").body, ast.Call), entry
            assert _tune._load(SHIPPED, gpu)[entry] == times, entry
            assert any(us is not None for us in times.values()), entry
            for candidate in times:
                node = ast.parse(candidate, mode="eval").body
                word = isinstance(node, ast.Name)
                call = isinstance(node, ast.Call) and not node.args and len(node.keywords) > 0
                assert word or call, candidate


WRITER = """
import sys
from pathlib import Path
from fastgan_kernels import _tune
for i in range(40):
    _tune._save(Path(sys.argv[1]), "GPU", {f"conv({sys.argv[2]}, {i})": {"cudnn": 1.0}})
"""


def test_processes_share_a_cache_file(tmp_path):
    path = tmp_path / "cache.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(fastgan_kernels.__file__).parents[1])}
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(k)], env=environment) for k in range(2)
    ]
    assert [process.wait() for process in running] == [0, 0]
    entries = json.loads(path.read_text())["GPU"]
    # one process may overwrite what another just wrote: that is measured again, nothing is broken
    assert set(entries) <= {f"conv({k}, {i})" for k, i in itertools.product(range(2), range(40))}
    assert entries.keys() & {"conv(0, 39)", "conv(1, 39)"}, "the last to write"
    assert list(tmp_path.iterdir()) == [path]

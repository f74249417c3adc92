"""Measures the ops on the GPU and writes raw figures and a table: python benchmarks/run.py

    --only conv       ops whose name contains one of these words
    --quick           the main shapes only, in less than 8 minutes: what does not fit is listed, not measured
    --minutes 20      begin no further case after so many minutes
    --out DIR         instead of benchmarks/results
    --table           write what the autotuner measured here into the shipped table, and measure nothing

Writes <gpu>_<date>.json (machine before, under load and after; pytest-benchmark's records) and .md after
every op, so that a run that is cut off leaves the ops it has done. Without a GPU it says so, writes nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# run as a script, the folder of this file is on the path, not the root
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks._machine import describe, free_name  # noqa: E402
from benchmarks._report import markdown  # noqa: E402

# a case that begins just before the end may tune or compile for a minute
QUICK_MINUTES = 6.5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU that torch can use: nothing is measured, nothing is written.")
        return
    if given.table:
        write_table(given.out)
        return
    # from the end of the alphabet: with little time, the trunk of the generator comes first
    names = (path.stem for path in (ROOT / "kernels/fastgan_kernels").glob("[!_]*.py"))
    ops = sorted((op for op in names if any(word in op for word in given.only)), reverse=True)
    if not ops:
        parser.error(f"no op's name contains {' or '.join(given.only)}")
    minutes = given.minutes if given.minutes is not None else QUICK_MINUTES if given.quick else None
    measure(ops, given.quick, minutes, given.out or ROOT / "benchmarks/results")


def measure(ops: list[str], quick: bool, minutes: float | None, out: Path) -> None:
    """Runs the benchmark of every op in a process of its own and writes the files after each."""
    out.mkdir(parents=True, exist_ok=True)
    before = describe()
    path = free_name(out, before)
    run: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "before": before, "after": before, "under_load": None, "ops": {}, "not_measured": [],
    }  # fmt: skip
    begin = time.monotonic()
    for op in ops:
        left = None if minutes is None else minutes - (time.monotonic() - begin) / 60
        output = benchmark(op, quick, left) if left is None or left > 0 else nothing(op, "out of time")
        if output["benchmarks"]:
            run["ops"][op] = output["benchmarks"]
        run["under_load"] = run["under_load"] or output["gpu_under_load"]
        run["not_measured"] += output["not_measured"]
        run["after"] = describe()
        path.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(run), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"{path.with_suffix('.json')} and .md, {(time.monotonic() - begin) / 60:.1f} minutes")


def benchmark(op: str, quick: bool, minutes: float | None) -> dict[str, Any]:
    """What pytest-benchmark writes for an op."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.json"
        command = [sys.executable, "-m", "pytest", f"benchmarks/bench_{op}.py", "--benchmark-only", "-q"]
        command += [f"--benchmark-json={output}", "--benchmark-columns=median,rounds"]
        command += ["--tb=short", "--show-capture=no", "-p", "no:cacheprovider"]
        command += ["-m", "quick"] if quick else []
        command += [] if minutes is None else [f"--minutes={minutes:.2f}"]
        # three minutes for the case that began last
        limit = None if minutes is None else 60 * minutes + 180
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return nothing(op, "stopped, a case took too long")
        if output.exists():
            return json.loads(output.read_text(encoding="utf-8"))
        return nothing(op, f"no case was measured, exit code {code} of pytest")


def nothing(op: str, reason: str) -> dict[str, Any]:
    return {"benchmarks": [], "gpu_under_load": None, "not_measured": [(op, reason)]}


def write_table(out: Path | None) -> None:
    """The shipped table with what is known of this GPU, into the package or another folder."""
    from fastgan_kernels import _tune

    tables = json.loads(_tune.SHIPPED.read_text(encoding="utf-8"))
    measured = _tune.table(torch.device("cuda", 0))
    tables[torch.cuda.get_device_name(0)] = measured
    path = _tune.SHIPPED if out is None else out / _tune.SHIPPED.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{path}: {len(measured)} entries of this GPU")


if __name__ == "__main__":
    main()

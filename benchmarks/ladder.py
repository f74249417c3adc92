"""Times a training step from upstream's to fastgan's, rung by rung: python benchmarks/ladder.py

    --quick                         fewer rounds and cases: below 8 minutes on a GPU, compilation included
    --only cyclegan inference       of cyclegan, pix2pix and inference
    --out DIR                       instead of benchmarks/results

Writes ladder_<machine>_<date>.json (raw rounds, losses, kernels) and .md (tables) after every rung, .png
(bars) after every system, so that a run that is cut off leaves what it has. A rung that cannot run says why
in its line, and the rest goes on. Exits with 1 if a rung failed or computes something else than the first.
Without a GPU a small ladder of the same form is measured (128x128, 6 residual blocks, no graphs).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
# run as a script, the folder of this file is on the path, not the root
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import _generators  # noqa: E402
from benchmarks._generators import Case  # noqa: E402
from benchmarks._ladder import Rung, System, climb, reason, rungs  # noqa: E402
from benchmarks._ladder_report import chart, markdown  # noqa: E402
from benchmarks._machine import describe, free_name, gpu_state  # noqa: E402
from benchmarks._measure import Ceilings, measure_ceilings  # noqa: E402
from benchmarks._profile import profile  # noqa: E402

PARTS = ("cyclegan", "pix2pix", "inference")


@dataclass(frozen=True)
class Plan:
    """What is measured: systems, generator cases, rounds of each, shortest round in seconds."""

    device: torch.device
    systems: Sequence[System]
    cases: Sequence[Case]
    rungs: Sequence[Rung]
    ways: Sequence[_generators.Way]
    rounds: int
    profiled_steps: int
    span: float = 0.05
    memory: bool = True


def make_plan(device: torch.device, only: Sequence[str] = PARTS, *, quick: bool = False) -> Plan:
    """The ladder of a device; its first rung is always there."""
    cuda = device.type == "cuda"
    size, blocks, levels = (256, 9, 8) if cuda else (128, 6, 7)
    systems = [System("cyclegan", size, blocks), System("pix2pix", size, levels)]
    sizes: Sequence[int] = (
        ((256,) if quick else (256, 512, 1024)) if cuda else ((128,) if quick else (128, 256))
    )
    cases = [Case(side, batch) for batch in ((1, 16) if cuda else (1,)) for side in sizes]
    return Plan(
        device,
        [system for system in systems if system.recipe in only],
        cases if "inference" in only else [],
        rungs(device, quick=quick),
        _generators.ways(device, quick=quick),
        rounds=(10 if quick else 30) if cuda else (3 if quick else 5),
        profiled_steps=10 if cuda else 2,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ladder.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    given = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        parser.error("the chart needs matplotlib: pip install -e '.[bench]'")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = "python benchmarks/ladder.py" + " --quick" * given.quick
    command += f" --only {' '.join(given.only)}" if given.only != PARTS else ""
    return measure(make_plan(device, given.only, quick=given.quick), given.out, command)


def measure(plan: Plan, out: Path, command: str) -> int:
    """Climbs the ladder and writes after every rung; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    begin, before = time.monotonic(), describe() | {"threads": torch.get_num_threads()}
    path = free_name(out, before, "ladder_")
    run: dict[str, Any] = {
        "command": command, "before": before, "after": before, "under_load": None, "minutes": 0.0,
        "ceilings": {}, "systems": [], "inference": [], "profiles": [], "failed": [],
    }  # fmt: skip

    def write() -> None:
        run["minutes"] = (time.monotonic() - begin) / 60
        run["after"] = describe()
        path.with_suffix(".json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(run), encoding="utf-8")

    def note(where: str, record: dict[str, Any]) -> None:
        print(_line(where, record), flush=True)
        if record.get("error") or record.get("differs"):
            run["failed"].append(_line(where, record))
        write()

    def watch() -> None:
        run["under_load"] = gpu_state()

    found: dict[str, Ceilings] = {}
    for half in sorted({rung.half for rung in plan.rungs}):
        name = "bf16" if half else "TF32" if plan.device.type == "cuda" else "fp32"
        torch.backends.cuda.matmul.allow_tf32 = True
        dtype = torch.bfloat16 if half else torch.float32
        found[name] = measure_ceilings(watch, plan.device, dtype)
        run["ceilings"][name] = asdict(found[name])
    precise, fast = next(iter(found)), list(found)[-1]

    for system in plan.systems:
        entry: dict[str, Any] = {
            "system": str(system),
            "tflop": system.work.flop / 1e12,
            "floors": {
                name: system.work.seconds(c.flop_per_second, c.bytes_per_second) for name, c in found.items()
            },
            "records": [],
        }
        run["systems"].append(entry)
        halves = {rung.name: rung.half for rung in plan.rungs}
        for record in climb(
            system, list(plan.rungs), plan.device, rounds=plan.rounds, memory=plan.memory, span=plan.span
        ):
            if "ms" in record:
                floor = entry["floors"][fast if halves[record["rung"]] else precise]["step"]
                record["share_of_floor"] = 1e3 * floor / record["ms"]
            entry["records"].append(record)
            note(system.recipe, record)
        chart(run, path.with_suffix(".png"))
    inference = _generators.measure(
        list(plan.cases), list(plan.ways), plan.device, rounds=plan.rounds, span=plan.span
    )
    for record in inference:
        run["inference"].append(record)
        note(record["case"], record)
    chart(run, path.with_suffix(".png"))
    # last: a profiler slows down what follows it
    (ours,) = (rung for rung in plan.rungs if rung.name == "fastgan")
    for system in plan.systems:
        try:
            run["profiles"].append(profile(system, ours, plan.device, found[fast], steps=plan.profiled_steps))
        except Exception as error:
            note(f"profile of {system.recipe}", {"label": ours.label, "error": reason(error)})
    write()
    print(f"{path}.json, .md, .png: {run['minutes']:.1f} minutes, {len(run['failed'])} failed")
    return 1 if run["failed"] else 0


def _line(where: str, record: dict[str, Any]) -> str:
    """What the terminal says of a record."""
    if record.get("error"):
        return f"{where}: {record['label']}: {record['error']}"
    if record["differs"]:
        return f"{where}: {record['label']}: computes something else: {'; '.join(record['differs'])}"
    if "ms" in record:
        return f"{where}: {record['label']}: {record['ms']:.4g} ms, {record['speedup']:.2f} times the first"
    return f"{where}: {record['label']}: {record['latency_ms']:.4g} ms, {record['images_per_s']:.4g} images/s"


if __name__ == "__main__":
    sys.exit(main())

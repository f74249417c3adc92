"""A measured run as a markdown page: per op, one line for each case and direction."""

from __future__ import annotations

from typing import Any

OURS = "triton"
# name of a reading, its unit
GPU = {
    "sm_mhz": "SM MHz", "memory_mhz": "memory MHz", "power_w": "W", "temperature_c": "°C",
    "other_processes": "other processes", "other_processes_mib": "MiB of theirs",
}  # fmt: skip

NOTE = """\
Times: medians of the device's time per call, replayed from a CUDA graph; those marked `eager` could not be
captured and contain their launches, those marked `wrong` belong to a wrong result. Inputs that fit in the
cache stay in it. Speed-up: the fastest peer's time over triton's. % of ceiling: of the matrix product or of
the copy measured in the same process, whichever bounds the work; × floor: its inverse. MiB: peak above the
inputs, triton / fastest peer. Launched: a triton call with its launches from Python."""


def markdown(run: dict[str, Any]) -> str:
    """The page of a run: {"command", "before", "after": machine, "under_load": GPU state or None, "ops": {op:
    list of pytest-benchmark's records}, "not_measured": [(case, reason)]}."""
    before = run["before"]
    gpu = before["gpu"] or {}
    lines = [
        f"# Ops on {gpu.get('name') or 'a GPU'}, {before['date'][:10]}",
        "",
        f"    {run['command']}",
        "",
        f"Commit {before['commit']}, driver {gpu.get('driver')}, CUDA {before['cuda']}, "
        f"cuDNN {before['cudnn']}, torch {before['torch']}, triton {before['triton']}, {before['cpu']}.",
        "",
        *_states(run),
        "",
        NOTE,
    ]
    for op, records in run["ops"].items():
        lines += ["", f"## {op}", "", _ceilings(records), "", *_table(records)]
    if run["not_measured"]:
        lines += ["", "## Not measured", "", *_reasons(run["not_measured"])]
    return "\n".join(lines) + "\n"


def _reasons(not_measured: list[tuple[str, str]]) -> list[str]:
    """Of many cases with a reason, the first one."""
    reasons: dict[str, list[str]] = {}
    for case, reason in not_measured:
        reasons.setdefault(reason, []).append(case)
    return [
        f"- {reason}: {cases[0]}" + f" and {len(cases) - 1} more" * (len(cases) > 1)
        for reason, cases in reasons.items()
    ]


def _states(run: dict[str, Any]) -> list[str]:
    """The GPU before, under load (while the ceilings are measured) and after."""
    states = {
        "before": run["before"]["gpu"],
        "under load": run["under_load"],
        "after": run["after"]["gpu"],
    }
    lines = ["| GPU | " + " | ".join(GPU.values()) + " |", "|---" * (len(GPU) + 1) + "|"]
    for when, state in states.items():
        lines.append(f"| {when} | " + " | ".join(_plain((state or {}).get(key)) for key in GPU) + " |")
    gpu = run["before"]["gpu"] or {}
    lines += ["", f"Limits: {_plain(gpu.get('max_sm_mhz'))} SM MHz, {_plain(gpu.get('power_limit_w'))} W."]
    for reading, reason in gpu.get("unavailable", {}).items():
        lines.append(f"Not readable: {reading} ({reason}).")
    return lines


def _ceilings(records: list[dict[str, Any]]) -> str:
    info = records[0]["extra_info"]
    flop, copied = info["ceiling_tflop_per_s"], info["ceiling_gb_per_s"]
    return f"Ceilings: {flop} TFLOP/s (bf16 product of 8192^3), {copied} GB/s (copy)."


def _table(records: list[dict[str, Any]]) -> list[str]:
    rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        info = record["extra_info"]
        rows.setdefault((info["case"], info["direction"]), {})[info["implementation"]] = info
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = [
        "case",
        "",
        *(f"{name} µs" for name in names),
        "speed-up",
        "rate",
        "% of ceiling",
        "× floor",
        "MiB",
    ]
    head.append("launched µs")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for (case, direction), row in rows.items():
        ours = row.get(OURS)
        peers = [info for name, info in row.items() if name != OURS]
        best = min(peers, key=lambda info: info["us"], default=None)
        cells = [case, direction, *(_time(row.get(name)) for name in names)]
        cells += _ours(ours, best) if ours else ["-"] * 6
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ours(ours: dict[str, Any], best: dict[str, Any] | None) -> list[str]:
    rate = f"{ours['tflop_per_s']} TFLOP/s" if ours["ceiling"] == "flop" else f"{ours['gb_per_s']} GB/s"
    return [
        f"{best['us'] / ours['us']:.2f}" if best else "-",
        rate,
        _plain(ours["percent_of_ceiling"]),
        _plain(ours["times_floor"]),
        f"{_plain(ours['peak_mib'])} / {_plain(best['peak_mib']) if best else '-'}",
        f"{ours['eager_us']:.1f}",
    ]


def _time(info: dict[str, Any] | None) -> str:
    """Microseconds, with a word where the time does not mean what the others mean."""
    if info is None:
        return "-"
    eager = " eager" if info["timed"] == "eager" else ""
    wrong = "" if info.get("right", True) else " wrong"
    return f"{info['us']:.1f}{eager}{wrong}"


def _plain(value: object) -> str:
    return "-" if value is None else str(value)

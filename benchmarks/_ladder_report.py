"""A ladder run as a markdown page and as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NOTE = """\
Images are in device memory and losses stay there, as upstream runs a step. Each round of a rung follows a
round of the first one; ms is the median of the rounds, speed-up the median of the ratios of such pairs with
their quartiles; in the first line the rung runs against a second one of its kind. Before it is timed, the
losses of a rung's first two steps are compared with the first rung's, from the same weights. Floor: the FLOP
of the convolutions at the matrix product of the same precision, or the bytes that cannot be avoided at the
copy, whichever takes longer. MiB: all that a step needs, weights and optimiser included."""
GREY, BLUES, ORANGES = "#8a8a8a", ("#9ecae1", "#4292c6", "#084594"), ("#f28e2b", "#c05a00")


def machine_name(machine: dict[str, Any]) -> str:
    """The GPU, or the CPU with its threads."""
    if machine["gpu"]:
        return machine["gpu"]["name"]
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"


def markdown(run: dict[str, Any]) -> str:
    """The page of a run, see `benchmarks.ladder.measure`; also of one that is not done yet."""
    m = run["before"]
    gpu = m["gpu"] or {}
    lines = [
        f"# The ladder on {machine_name(m)}, {m['date'][:10]}",
        "",
        f"    {run['command']}",
        "",
        f"Commit {m['commit']}, torch {m['torch']}, triton {m['triton']}, "
        + (f"CUDA {m['cuda']}, cuDNN {m['cudnn']}, driver {gpu.get('driver')}, " if gpu else "")
        + f"{m['cpu']}. {run['minutes']:.1f} minutes.",
        *([f"Clocks under load: {_clocks(run['under_load'])}."] if run["under_load"] else []),
        *[
            f"Ceiling {name}: {c['flop_per_second'] / 1e12:.4g} TFLOP/s; copy "
            f"{c['bytes_per_second'] / 1e9:.4g} GB/s."
            for name, c in run["ceilings"].items()
        ],
        "",
        NOTE,
    ]
    for system in run["systems"]:
        lines += ["", f"## {system['system']}, batch 1", "", *_step_table(system)]
    if run["inference"]:
        lines += [
            "",
            "## Generator alone (ResNet, ngf 64, 9 blocks)",
            "",
            *_inference_table(run["inference"]),
        ]
    for profile in run["profiles"]:
        title = f"## Where the time of {profile['rung']} goes: {profile['system']}"
        lines += ["", title, "", *_profile_table(profile)]
    if run["failed"]:
        lines += ["", "## Failed", "", *(f"- {line}" for line in run["failed"])]
    return "\n".join(lines) + "\n"


def _clocks(state: dict[str, Any]) -> str:
    return f"SM {state['sm_mhz']} MHz, memory {state['memory_mhz']} MHz, {state['power_w']} W"


def _plain(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _why(record: dict[str, Any]) -> str | None:
    """Why there are no times, in words for a table."""
    if record.get("error"):
        return "failed: " + record["error"].replace("|", "/")
    return "computes something else: " + "; ".join(record["differs"][:2]) if record["differs"] else None


def _note(record: dict[str, Any]) -> str:
    return f" ({record['note']})" if record.get("note") else ""


def _step_table(system: dict[str, Any]) -> list[str]:
    floors = "; ".join(f"{k} {1e3 * v['step']:.4g} ms" for k, v in system["floors"].items())
    lines = [f"{system['tflop']:.4g} TFLOP a step. Floor: {floors}.", ""]
    lines += [
        "| rung | ms | speed-up | quartiles | share of the floor | peak MiB |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for record in system["records"]:
        why = _why(record)
        if why:
            lines.append(f"| {record['label']} | {why} | | | | |")
            continue
        low, high = record["speedup_quartiles"]
        peak = f"{record['peak_mib']:.0f}" if "peak_mib" in record else "-"
        lines.append(
            f"| {record['label']}{_note(record)} | {_plain(record['ms'])} | {record['speedup']:.2f} | "
            f"{low:.2f} to {high:.2f} | {record['share_of_floor']:.2f} | {peak} |"
        )
    return lines


def _inference_table(records: list[dict[str, Any]]) -> list[str]:
    labels = list(dict.fromkeys(record["label"] for record in records))
    lines = ["Latency of one call in ms / images per second of calls in a row.", ""]
    lines += ["| images | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for case in dict.fromkeys(record["case"] for record in records):
        row = {record["label"]: record for record in records if record["case"] == case}
        lines.append("| " + " | ".join([case, *(_inference_cell(row.get(name)) for name in labels)]) + " |")
    return lines


def _inference_cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    return _why(record) or f"{_plain(record['latency_ms'])} / {_plain(record['images_per_s'])}"


def _profile_table(profile: dict[str, Any]) -> list[str]:
    lines = ["| group | ms a step | floor ms |", "|---|---:|---:|"]
    for name, found in profile["groups"].items():
        floor = "" if found["floor_ms"] is None else _plain(found["floor_ms"])
        lines.append(f"| {name} | {_plain(found['ms'])} | {floor} |")
    lines += ["", "| kernel | group | calls | ms a step |", "|---|---|---:|---:|"]
    for kernel in profile["kernels"][:20]:
        name = kernel["name"].replace("|", "/")[:100]
        lines.append(f"| `{name}` | {kernel['group']} | {kernel['calls']:g} | {_plain(kernel['ms'])} |")
    return lines


def chart(run: dict[str, Any], path: Path) -> None:
    """A bar per rung and system, and per way and case of the generator, as PNG; nothing if none was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    systems = [(system["system"], [r for r in system["records"] if "ms" in r]) for system in run["systems"]]
    systems = [(name, records) for name, records in systems if records]
    inference = [record for record in run["inference"] if "latency_ms" in record]
    heights = [0.5 * len(records) + 1.0 for _, records in systems] + [4.0] * bool(inference)
    if not heights:
        return
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(10, sum(heights) + 0.8), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    machine = run["before"]
    figure.suptitle(f"{machine_name(machine)}, {machine['date'][:10]}, torch {machine['torch']}", fontsize=13)
    for (name, records), axis in zip(systems, axes[:, 0]):
        _bars(axis, name, records)
    if inference:
        _groups(axes[-1, 0], inference)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _colours(names: list[str]) -> dict[str, str]:
    peers = iter(BLUES)
    own = iter(ORANGES)
    return {
        name: GREY if name == "eager" else next(own) if name.startswith("fastgan") else next(peers)
        for name in names
    }


def _bars(axis: Any, name: str, records: list[dict[str, Any]]) -> None:
    colours = _colours([r["rung"] for r in records])
    values = [r["speedup"] for r in records]
    spread = [
        [r["speedup"] - r["speedup_quartiles"][0] for r in records],
        [r["speedup_quartiles"][1] - r["speedup"] for r in records],
    ]
    axis.barh(
        [r["label"].replace("`", "") for r in records], values, xerr=spread, height=0.7,
        color=[colours[r["rung"]] for r in records], error_kw={"ecolor": "#333333", "capsize": 3, "lw": 1},
    )  # fmt: skip
    for place, record in enumerate(records):
        end = record["speedup_quartiles"][1]
        axis.annotate(
            f"{record['speedup']:.2f}×  ({_plain(record['ms'])} ms)", (max(end, record["speedup"]), place),
            xytext=(6, 0), textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(max(values), *(r["speedup_quartiles"][1] for r in records)))
    axis.set_title(f"Training step: {name}, batch 1", fontsize=11, loc="left")
    axis.set_xlabel("times as fast as upstream's eager step")
    axis.spines[["top", "right"]].set_visible(False)


def _groups(axis: Any, records: list[dict[str, Any]]) -> None:
    ways = list(dict.fromkeys(r["way"] for r in records))
    cases = list(dict.fromkeys(r["case"] for r in records))
    labels = {r["way"]: r["label"] for r in records}
    colours, width = _colours(ways), 0.8 / len(ways)
    for number, way in enumerate(ways):
        found = [(cases.index(r["case"]), r["images_per_s"]) for r in records if r["way"] == way]
        bars = axis.bar(
            [place + (number - (len(ways) - 1) / 2) * width for place, _ in found],
            [rate for _, rate in found], width, color=colours[way], label=labels[way],
        )  # fmt: skip
        axis.bar_label(bars, fmt=_plain, fontsize=8, padding=2)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.25)
    axis.set_xticks(range(len(cases)), cases)
    axis.set_ylabel("images per second")
    axis.set_title("Generator alone", fontsize=11, loc="left")
    axis.legend(fontsize=8, ncols=min(3, len(ways)), frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)

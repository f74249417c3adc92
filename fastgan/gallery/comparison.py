"""The page that lays runs over each other: curves, newest samples, settings that differ, measures."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastgan.gallery import curves, pictures
from fastgan.gallery.page import facts, fill, plain
from fastgan.gallery.pictures import Grid

PICTURE_BYTES = 5_000_000  # of all grids together, before base64
POINTS = 500  # per curve, of which there are as many as runs times values
NAMES = {"name", "runs"}  # settings that say where a run is, not what it is
LONGEST = 100  # letters of a measure
COLOURS = 6  # of page.html; further runs are dashed


@dataclass(frozen=True)
class Run:
    """A run to compare.

    folder: with log.jsonl and samples/, either of which may be missing or incomplete.
    settings: name -> value. evaluation: measure -> value, or a mapping of such.
    """

    name: str
    folder: Path
    settings: Mapping[str, object]
    evaluation: Mapping[str, object] = field(default_factory=dict)


def write_comparison(path: Path, runs: Sequence[Run]) -> Path:
    """Write one self-contained page about several runs, at most about 7 MB of pictures in it.

    Samples can be laid over each other where the runs have translated the same test images into cells of one
    size; that is read off the pixels of the grids. Of each run the newest grid is there, and the newest step
    that all have.

    Args:
        path: HTML file to write, replaced in one move.
        runs: two or more, with different names.

    Raises:
        OSError: a log that cannot be read, a page that cannot be written.
    """
    logs = [curves.read_log(run.folder / "log.jsonl") for run in runs]
    grids, note = _grids(runs)
    facts_of = [facts(log) for log in logs]
    settings = [{k: plain(v) for k, v in run.settings.items() if k not in NAMES} for run in runs]
    differ = [k for k in _keys(settings) if len({s.get(k) for s in settings}) > 1]
    equal = len(_keys(settings)) - len(differ)
    measures = [_flat(run.evaluation) for run in runs]
    top = _section("Runs", runs, facts_of, _keys(facts_of))
    top += _section("Settings that differ", runs, settings, differ, f"{equal} others are equal.")
    # how a measure was computed is of interest where the runs differ in it
    measured = [
        k
        for k in _keys(measures)
        if any(k in run.evaluation for run in runs) or len({m.get(k) for m in measures}) > 1
    ]
    top += _section("Evaluation", runs, measures, measured)
    title = f"{', '.join(run.name for run in runs[:-1])} and {runs[-1].name}"
    return fill(
        path,
        title=title,
        header='<p class="state">Runs compared</p>',
        top=top,
        middle=pictures.side_by_side(
            "Newest samples", [(_label(runs, i), row) for i, row in enumerate(grids)], note
        ),
        charts=_charts(runs, logs),
        # in the order of the pictures
        grids=[
            grid.cells and {"run": i, "step": grid.step, **grid.cells}
            for i, row in enumerate(grids)
            for grid in row
        ],
        runs=[{"name": run.name, "times": _times(log)} for run, log in zip(runs, logs)],
    )


def _grids(runs: Sequence[Run]) -> tuple[list[list[Grid]], str]:
    """Per run the newest grid, then that of the newest step that all with its test images have; and a remark.

    The grids of runs that show other test images than most are without the places of their cells.
    """
    found = [pictures.find(run.folder) for run in runs]
    groups: dict[str, list[int]] = {}
    for i, files in enumerate(found):
        digest = pictures.inputs(files[-1][1]) if files else ""
        groups.setdefault(digest or f"alone {i}", []).append(i)
    together = max(groups.values(), key=len)
    common = max(set.intersection(*({step for step, _ in found[i]} for i in together)), default=-1)
    chosen = [
        [entry for entry in reversed(files) if entry == files[-1] or (i in together and entry[0] == common)]
        for i, files in enumerate(found)
    ]
    limit = PICTURE_BYTES // max(sum(map(len, chosen)), 1)
    grids = [[grid for entry in row if (grid := pictures.read(*entry, limit))] for row in chosen]
    if len(together) < 2:
        together = []
    grids = [
        row if i in together else [replace(grid, cells=None) for grid in row] for i, row in enumerate(grids)
    ]
    others = [runs[i].name for i, row in enumerate(grids) if row and i not in together]
    if not others or sum(map(bool, grids)) < 2:
        return grids, ""
    if not together:
        return grids, "They show different test images, so they cannot be laid over each other."
    return grids, f"Other test images, and so not laid over the others: {', '.join(others)}."


def _charts(runs: Sequence[Run], logs: list[list[curves.Record]]) -> list[dict[str, Any]]:
    """A chart for each value that any run has, in the order of the training page, with a line per run."""
    read = [curves.series(log) for log in logs]
    out = []
    for name in sorted(_keys([columns for columns, _ in read]), key=curves.rank):
        where = curves.place(name)
        lines = [
            {"name": run.name, "run": i, "points": points}
            for i, (run, (columns, _)) in enumerate(zip(runs, read))
            if (points := curves.curve(columns.get(name, []), where, POINTS))
        ]
        levels = sorted({balance[name] for _, balance in read if name in balance})
        if lines:
            note = (*curves.GROUPS, curves.OTHER)[where][0]
            out.append({"title": name, "note": note, **curves.style(where), "lines": lines, "levels": levels})
    return out


def _times(log: list[curves.Record]) -> list[tuple[int, float]]:
    """Seconds of training at some steps, between which a line is true enough; empty if the log has none."""
    known = [(r["step"], t) for r in log if not math.isnan(t := curves.number(r.get("time")))]
    thinned = known[:: max(len(known) // POINTS, 1)]
    return [(0, 0.0), *thinned, *known[-1:]] if known else []


def _keys(tables: Iterable[Mapping[str, object]]) -> list[str]:
    """The keys of all tables in the order of their appearance."""
    return list(dict.fromkeys(key for table in tables for key in table))


def _flat(measures: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Names and values as text, those of inner mappings behind the mapping's name."""
    out: dict[str, str] = {}
    for key, value in measures.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key} ")
        else:
            text = f"{value:.4g}" if isinstance(value, float) else plain(value)
            out[f"{prefix}{key}"] = text if len(text) <= LONGEST else text[: LONGEST - 1] + "\u2026"
    return out


def _label(runs: Sequence[Run], i: int) -> str:
    return f'<span class="run" style="--c: var(--c{i % COLOURS})">{html.escape(runs[i].name)}</span>'


def _section(
    heading: str, runs: Sequence[Run], tables: Sequence[Mapping[str, str]], keys: list[str], note: str = ""
) -> str:
    """A table with a column per run; none without rows."""
    if not keys:
        return ""
    head = "".join(f"<th>{_label(runs, i)}</th>" for i in range(len(runs)))
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th>"
        + "".join(f"<td>{html.escape(table.get(key, chr(0x2013)))}</td>" for table in tables)
        + "</tr>"
        for key in keys
    )
    note = f'<p class="note">{note}</p>' if note else ""
    return (
        f'<section><h2>{heading}</h2><div class="card scroll"><table class="runs"><tr><th></th>{head}</tr>'
        f"{rows}</table></div>{note}</section>"
    )

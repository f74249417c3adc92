"""The page of one run: curves, samples, warnings and settings."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastgan.gallery import curves, pictures
from fastgan.gallery.curves import Record
from fastgan.gallery.grid import replace


def write_page(run: Path, *, title: str, settings: Mapping[str, object], state: str = "") -> Path:
    """Write `<run>/index.html` from `<run>/log.jsonl` and `<run>/samples/step_*.png`.

    The newest grid is shown as it is; of the earlier ones at most 12, at even distances, as smaller copies
    where they are big. Where a grid says where its cells are, any two of its columns and of the steps can be
    laid over each other. A curve keeps at most 1000 of its points. Missing, empty or incomplete files give an
    emptier page.

    Args:
        run: the run's folder.
        title: heading.
        settings: name -> value, listed as they are.
        state: what the run is doing, e.g. "running, step 300 of 3000".

    Returns:
        Path of the page, replaced in one move.
    """
    log = curves.read_log(run / "log.jsonl")
    found = pictures.find(run)
    grids = pictures.choose(found)
    rows = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(plain(v))}</td></tr>"
        for k, v in settings.items()
    )
    return fill(
        run / "index.html",
        title=title,
        header=(f'<p class="state">{html.escape(state)}</p>' if state else "") + _facts(log),
        top=_warnings(log) + pictures.samples(grids, len(found)),
        after=f"<section><details><summary>Settings</summary><table>{rows}</table></details></section>",
        charts=curves.charts(log),
        grids=[grid.cells and {"step": grid.step, **grid.cells} for grid in grids],
    )


def fill(
    path: Path, *, title: str, header: str, top: str, middle: str = "", after: str = "", **data: object
) -> Path:
    """Write the template with its places filled: a title, pieces of HTML, and data for its script.

    data: `charts` as `curves.charts` gives them; `grids`, one for each `.shot` in document order: the step
    and the places of the cells, or None; for several runs `runs`: name and [step, seconds] of each.
    """
    pieces = {
        "title": html.escape(title), "header": header, "top": top, "middle": middle, "after": after,
        # a "<" could end the script element early
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }  # fmt: skip
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: pieces[match[1]], template)
    # a lone surrogate, which JSON may hold, is no text
    replace(path, page.encode(errors="replace"))
    return path


def plain(value: object) -> str:
    """A setting as text."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def facts(log: list[Record]) -> dict[str, str]:
    """What the log's end says about the run, as text; nothing for an empty log."""
    if not log:
        return {}
    epoch = next((record["epoch"] for record in reversed(log) if "epoch" in record), "")
    out = {"step": f"{log[-1]['step']:,}", "epoch": str(epoch)}
    recent = log[-10:]
    if speeds := curves.numbers(recent, "img_per_s"):
        speed = float(np.median(speeds))
        out["images per second"] = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    if times := curves.numbers(recent, "time"):
        out["training time"] = _clock(times[-1])
    if waits := curves.numbers(recent, "wait_share"):
        out["waiting for data"] = f"{100 * float(np.median(waits)):.1f} %"
    return {k: v for k, v in out.items() if v}


def _facts(log: list[Record]) -> str:
    if not log:
        return '<p class="note">No report has been logged yet.</p>'
    items = "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts(log).items())
    return f'<dl class="facts">{items}</dl>'


def _warnings(log: list[dict[str, Any]]) -> str:
    """One item per kind of warning, the latest first, with how often it was given."""
    kinds: dict[str, tuple[int, int, str]] = {}
    for record in log:
        for text in record.get("warnings") or ():
            kind = str(text).partition(":")[0]
            kinds[kind] = (kinds.get(kind, (0, 0, ""))[0] + 1, record["step"], str(text))
    items = []
    for count, step, text in sorted(kinds.values(), key=lambda item: -item[1]):
        kind, _, rest = text.partition(":")
        when = f"step {step:,}" + (f", {count} times" if count > 1 else "")
        advice = re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", html.escape(rest and ":" + rest))
        items.append(f"<li><b>{html.escape(kind)}</b>{advice} <i>{when}</i></li>")
    return f'<section><h2>Warnings</h2><ul class="warnings">{"".join(items)}</ul></section>' if items else ""

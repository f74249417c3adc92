"""Curves of a run: its log, read, grouped into charts, smoothed and thinned for the page's script."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 1000  # per curve

NO_CURVE = {"step", "epoch", "time", "wait_share"}

Record = dict[str, Any]
Point = tuple[int, float | None, float | None]  # step, value, smoothed value

# title, y label, log axis, names; the first that matches takes a value
GROUPS = (
    ("Gradient norms", "norm", True, r"grad_.*"),
    ("Learning rate", "rate", False, r"lr(_.*)?"),
    ("Spread of outputs over that of real images", "ratio", False, r"diversity.*"),
    ("Verdicts on real and generated images", "mean output of D", False, r"D.*_(real|fake)"),
    ("Discriminators", "loss", False, r"D(_[A-Z])?"),
    ("Generators, adversarial", "loss", False, r"G(_[A-Z]|_GAN)?"),
    ("Cycle, identity, L1", "weighted loss", False, r"cycle(_[A-Z])?|idt.*|identity.*|rec.*|.*L1"),
    ("Speed", "images per second", False, r"img_per_s"),
)
OTHER = ("", "value", False, "")  # a chart each: their scales have nothing in common
ORDER = (5, 4, 6, 3, 0, 2, 1, 8, 7)  # places on the page; 8 are the others


def read_log(path: Path) -> list[Record]:
    """The reports of a log.jsonl, none if it is missing; a line cut off by a crash is left out."""
    log = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                # larger steps are no longer exact in the page's script
                if isinstance(record, dict) and type(step := record.get("step")) is int and 0 <= step < 2**53:
                    log.append(record)
    return log


def number(value: object) -> float:
    """A finite float, or not a number for whatever else a log may hold."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value) if math.isfinite(value) else math.nan
    return math.nan


def numbers(log: Iterable[Record], name: str) -> list[float]:
    """What the reports say under a name, without what is not a finite number."""
    found = (number(record.get(name)) for record in log)
    return [value for value in found if not math.isnan(value)]


def series(log: list[Record]) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
    """Every value of the log: name -> its (step, number), however rare; and the balance of D."""
    columns: dict[str, list[tuple[int, float]]] = {}
    balance: dict[str, float] = {}
    for record in log:
        step = record["step"]
        for name, value in record.items():
            # nearly all are; a long log has a million of them
            if type(value) is not float:
                if name == "balance" and isinstance(value, dict):
                    balance = {k: number(v) for k, v in value.items()}
                if isinstance(value, (str, list, dict, bool)):
                    continue
                value = number(value)
            if name in columns:
                columns[name].append((step, value))
            elif name not in NO_CURVE:
                columns[name] = [(step, value)]
    return columns, {k: v for k, v in balance.items() if not math.isnan(v)}


def place(name: str) -> int:
    """Index of the group of a value."""
    return next((i for i, group in enumerate(GROUPS) if re.fullmatch(group[3], name)), len(GROUPS))


def rank(name: str) -> tuple[bool, int]:
    """Place of a value on the page: evaluations lead, as losses of adversaries say little about quality."""
    return not name.startswith("eval/"), ORDER.index(place(name))


def charts(log: list[Record]) -> list[dict[str, Any]]:
    """What the page's script draws: per group its lines as [step, value, smoothed value]."""
    columns, balance = series(log)
    members: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for name, points in columns.items():
        where = place(name)
        # the two directions of one measure belong together
        title = GROUPS[where][0] if where < len(GROUPS) else re.sub(r"(?<=.)_[AB]$", "", name)
        if found := curve(points, where):
            members.setdefault((where, title), []).append({"name": name, "points": found})
    out = []
    for (where, title), lines in sorted(members.items(), key=lambda item: rank(item[1][0]["name"])):
        levels = sorted({balance[line["name"]] for line in lines if line["name"] in balance})
        out.append({"title": title, **style(where), "lines": lines, "levels": levels})
    return out


def style(where: int) -> dict[str, Any]:
    """Label and kind of a group's value axis."""
    _, unit, logarithmic, _ = (*GROUPS, OTHER)[where]
    return {"unit": unit, "log": logarithmic}


def curve(points: list[tuple[int, float]], where: int, limit: int = POINTS) -> list[Point]:
    """At most `limit` of the points, each with the mean (geometric on a log axis) of its surroundings."""
    logarithmic = style(where)["log"]
    # a learning rate has no scatter, and smoothing would round its corners
    half = 0 if style(where)["unit"] == "rate" else len(points) // 50
    steps = [step for step, _ in points]
    values = np.array([value for _, value in points])
    values = np.where(np.isfinite(values), values, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(values > 0, np.log(values), math.nan) if logarithmic else values
    if logarithmic:
        values = np.where(values > 0, values, math.nan)
    known = np.isfinite(scaled)
    if not known.any():
        return []
    total = np.concatenate([[0.0], np.cumsum(np.where(known, scaled, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(points))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(points))
    amount = count[high] - count[low]
    mean = np.where(amount > 0, (total[high] - total[low]) / np.maximum(amount, 1), math.nan)
    smooth = np.exp(mean) if logarithmic else mean
    kept = _thin(values, limit)
    raw, trend = values[kept].tolist(), smooth[kept].tolist()
    return [(steps[i], _short(v), _short(t)) for i, v, t in zip(kept.tolist(), raw, trend)]


def _thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices to keep: of each stretch the smallest and the largest value, so that no spike is lost."""
    index = np.arange(len(values))
    if len(values) <= limit:
        return index
    stretch = math.ceil(2 * len(values) / limit)
    start = index[::stretch]
    padded = np.full(len(start) * stretch, math.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, stretch)
    # a stretch without any number gives its first index, and so a gap in the curve
    low = start + np.where(np.isnan(rows), math.inf, rows).argmin(1)
    high = start + np.where(np.isnan(rows), -math.inf, rows).argmax(1)
    return np.unique(np.concatenate([low, high]))


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None

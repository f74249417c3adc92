"""Measuring a system: once (`measure`), or again and again while it trains (`Evaluation`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastgan import metrics
from fastgan.checkpoint import best_of
from fastgan.config import Config, UsageError
from fastgan.data.dataset import Data
from fastgan.measure.drawn import measure_drawn
from fastgan.measure.enlarging import measure_enlarging
from fastgan.measure.labels import measure_labels
from fastgan.measure.system import Found, System
from fastgan.measure.tools import Tools, prepare
from fastgan.measure.ways import measure_way
from fastgan.metrics import measure_of
from fastgan.recipes.base import Nets, Recipe


@torch.no_grad()
def measure(system: System, tools: Tools) -> Found:
    """All chosen measures on the held-out images (the training images where there are none).

    Leaves the random generators alone.

    Raises:
        UsageError: images that a chosen measure cannot take.
    """
    found = Found(notes=list(tools.notes))
    shown = system.data.shown
    found.details["images"] = {"A": shown.len_A, "B": shown.len_B, "split": _split_name(system.data)}
    device = system.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        target = _labelled(system, tools)
        for way in system.ways:
            if system.scale > 1:
                measure_enlarging(system, tools, way, found)
            elif system.labelled:
                measure_labels(system, tools, way, found)
            else:
                measure_way(system, tools, way, found, way.target == target)
        if not system.ways:
            measure_drawn(system, tools, found)
    return found


def _split_name(data: Data) -> str:
    return "test" if data.shown is data.test else "training"


def _labelled(system: System, tools: Tools) -> str | None:
    """The domain whose images are label maps: of those translated to, the nearest to the palette."""
    if tools.palette is None:
        return None
    palette, shown = tools.palette, system.data.shown
    targets = {way.target for way in system.ways}
    return min(targets, key=lambda d: palette.distance(system.unit(system.images(shown, d, 0))))


class Evaluation:
    """What a run measures while it trains, and which of its checkpoints is the best.

    Args:
        recipe: with `measures`, `weights`, `palette` and `keep_best`.
        data, device: of the run.
        folder: its `checkpoints`.

    Raises:
        UsageError, CheckpointError: a measure that is not possible here, or a file that cannot be had.
    """

    def __init__(self, recipe: Recipe, data: Data, device: torch.device, folder: Path) -> None:
        c: Config = recipe.config
        self.system = System.of(recipe, {}, data, device)
        self.name = c.keep_best
        if self.name and measure_of(self.name).higher is None:
            raise UsageError(f"--keep-best {self.name}: it does not depend on the generator")
        self._tools = prepare(
            self.system.has(), device, measures=c.measures, besides=[self.name] if self.name else [],
            weights=c.weights, palette=c.palette, light=True,
        )  # fmt: skip
        if not self._tools.names:
            raise UsageError("--evaluate-every: nothing can be measured here without --measures or --weights")
        best = best_of(folder)
        self._best: float | None = best["value"] if best.get("measure") == self.name else None
        self._told: set[str] = set()

    def run(self, nets: Nets) -> Found:
        """Measure generators that are in evaluation mode; notes that were told before are left out.

        A measure that fails does not end the run: what went wrong is a note.
        """
        self.system.nets = nets
        try:
            found = measure(self.system, self._tools)
            if _split_name(self.system.data) == "training":
                found.notes.append("there are no test images: the evaluation is on training images")
        except Exception as error:
            found = Found(notes=[f"the evaluation failed: {type(error).__name__}: {error}"])
        found.notes = [note for note in dict.fromkeys(found.notes) if note not in self._told]
        self._told |= set(found.notes)
        return found

    def better(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """What a checkpoint is the best by, where it is; of a measure in both domains the mean counts."""
        name = self.name
        found = [v for k, v in values.items() if name in (k, metrics.stem(k))]
        value = sum(found) / len(found) if found else math.nan
        if not name or not math.isfinite(value):
            return {}
        sign = 1 if measure_of(name).higher else -1
        if self._best is not None and sign * value <= sign * self._best:
            return {}
        self._best = value
        return {"measure": name, "value": value, "step": step}

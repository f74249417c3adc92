"""A run's system, read back from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgan import checkpoint
from fastgan.checkpoint import CheckpointError
from fastgan.config import from_json, read_json
from fastgan.recipes import RECIPES
from fastgan.recipes.base import Nets, Recipe


def load_run(run: Path, device: torch.device) -> tuple[Recipe, Nets, dict[str, Any]]:
    """Recipe, generators in evaluation mode (averaged ones where the run has them) and the header of a run's
    newest checkpoint or of a checkpoint folder: its "step", "channels", "ranges", "dtypes" and so on.

    Raises:
        CheckpointError, UsageError: not a run, or nothing saved yet.
    """
    if (run / "state.safetensors").is_file():
        folder = run
    else:
        if not (run / "config.json").is_file():
            raise CheckpointError(f"{run} is not a run folder: config.json is missing")
        found = checkpoint.checkpoints(run / "checkpoints")
        if not found:
            raise CheckpointError(f"{run} has no checkpoint yet")
        folder = found[-1]
    weights, _, header = checkpoint.load(folder)
    about = read_json(run / "config.json") if folder != run else header
    if about.get("recipe") not in RECIPES:
        raise CheckpointError(f"{run} is of the recipe {about.get('recipe')}, which is not known here")
    cls = RECIPES[about["recipe"]]
    recipe = cls(from_json(cls.config_class, about["settings"]))
    nets = recipe.networks(*about["channels"])
    for name in recipe.generators:
        kept = f"{name}_ema" if f"{name}_ema" in weights else name
        checkpoint.load_into(nets[name], weights[kept], str(folder / f"{kept}.safetensors"))
    return recipe, {name: nets[name].to(device).eval() for name in recipe.generators}, header

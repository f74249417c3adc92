"""Images of generators that make them from noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgan.recipes.base import Nets, Recipe


@torch.no_grad()
def draw(
    recipe: Recipe,
    nets: Nets,
    count: int,
    *,
    key: int,
    device: torch.device,
    labels: Tensor | None = None,
    each: int = 1,
    seed: int | None = None,
    skip: int = 0,
) -> Tensor:
    """Generated images of domain A in the range of the output, (count, C, H, W): image k of a seed and key is
    always the same.

    Args:
        labels: (count, numbers), where the recipe is labelled.
        each: how many images in a row share their noise; divides count.
        seed: default: that of the run.
        skip: number of the first image.
    """
    given = {} if labels is None else {"label": labels}
    for number, (name, numbers) in enumerate(recipe.noise.items()):
        rng = np.random.default_rng([recipe.config.seed if seed is None else seed, key, number])
        values = rng.standard_normal((skip + count // each, numbers), np.float32)[skip:]
        given[name] = torch.from_numpy(values).repeat_interleave(each, 0)
    found = []
    for start in range(0, count, 100):
        batch = {name: x[start : start + 100].to(device) for name, x in given.items()}
        found.append(recipe.translate(nets, batch)["A"].float().cpu())
    return torch.cat(found)

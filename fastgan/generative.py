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
) -> Tensor:
    """Generated images of domain A in the range of the output, (count, C, H, W): a function of the networks,
    the seed and the key alone.

    Args:
        labels: (count, numbers), where the recipe is labelled.
        each: how many images in a row share their noise; divides count.
    """
    rng = np.random.default_rng([recipe.config.seed, key])
    given = {} if labels is None else {"label": labels}
    for name, numbers in recipe.noise.items():
        values = torch.from_numpy(rng.standard_normal((count // each, numbers), np.float32))
        given[name] = values.repeat_interleave(each, 0)
    found = []
    for start in range(0, count, 100):
        batch = {name: x[start : start + 100].to(device) for name, x in given.items()}
        found.append(recipe.translate(nets, batch)["A"].float().cpu())
    return torch.cat(found)

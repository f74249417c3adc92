"""The columns of a sample picture: what a system makes of the same test images or noise, each time."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.data.dataset import Data
from fastgan.generative import draw
from fastgan.models import translate_any_size
from fastgan.recipes.base import Nets, Recipe

IMAGES = 6  # test images in a sample picture
STYLES = 4  # of each translation, where there are styles
COLUMNS, ROWS = 10, 6  # of images from noise
KEY = 3  # keeps these draws apart from others


@torch.no_grad()
def sample_columns(recipe: Recipe, nets: Nets, data: Data, *, device: torch.device) -> dict[str, Tensor]:
    """Columns by their captions, each (rows, C, H, W) in the range of the output.

    Args:
        nets: in evaluation mode.
    """
    columns = _translated if recipe.directions else _drawn
    return columns(recipe, nets, data, device)


def _translated(recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> dict[str, Tensor]:
    """Of each way the input, the translation and the way back, if there is one; of pairs the true image."""
    test = data.shown

    def show(domain: Literal["A", "B"]) -> list[Tensor]:
        count = min(IMAGES, test.len_A if domain == "A" else test.len_B)
        span = recipe.config.output
        return [test.images(domain, i, i + 1, device=device, output_range=span) for i in range(count)]

    columns: dict[str, Tensor] = {}
    for way in recipe.directions.values():
        net, images = recipe.translator(nets, way), show(way.source)
        if size := int(getattr(net, "style_size", 0)):
            columns |= {way.source: _stack(images)} | _in_styles(net, way.target, images, size)
            continue
        fakes = [translate_any_size(net, x) for x in images]
        columns |= {way.source: _stack(images), f"{way.net}({way.source})": _stack(fakes)}
        if way.back:
            again = [translate_any_size(nets[way.back], x) for x in fakes]
            columns[f"{way.back}({way.net}({way.source}))"] = _stack(again)
    if recipe.paired:
        columns["true B"] = _stack(show("B"))
    return columns


def _in_styles(net: nn.Module, target: str, images: list[Tensor], size: int) -> dict[str, Tensor]:
    """Translations in a few styles, the same ones in every grid of a run."""
    columns = {}
    for k, numbers in enumerate(
        np.random.default_rng([KEY, size]).standard_normal((STYLES, size), np.float32), 1
    ):
        net.style = torch.from_numpy(numbers).to(images[0].device)
        columns[f"{target} style {k}"] = _stack([translate_any_size(net, x) for x in images])
    return columns


def _stack(images: list[Tensor]) -> Tensor:
    """Batch of (1, C, H, W) images, those of another size with white at the right and below."""
    height, width = (max(x.shape[k] for x in images) for k in (2, 3))
    return torch.cat([F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), value=1.0) for x in images])


def _drawn(recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> dict[str, Tensor]:
    """One of each label (of the first 10), or any images; the noise of a row is the same in every grid of a
    run, and for all labels. The last column is real images."""
    names = data.labels[:COLUMNS] if recipe.labelled else []
    width = len(names) or COLUMNS - 1
    labels = torch.eye(len(data.labels))[:width].repeat(ROWS, 1) if names else None
    each = width if names else 1
    images = draw(recipe, nets, width * ROWS, key=KEY, device=device, labels=labels, each=each)
    columns = images.unflatten(0, (ROWS, width)).transpose(0, 1)
    # captions must differ, and there is nothing to say about images without a label
    captions = names or [" " * k for k in range(width)]
    real = data.shown.images("A", 0, ROWS, output_range=recipe.config.output)
    return {**dict(zip(captions, columns)), "real": real}

"""The columns of a sample picture: what a system makes of the same test images or noise, each time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.data.augment import OutputRange, from_tensor
from fastgan.data.dataset import Data
from fastgan.data.images import write_image
from fastgan.data.labelled import has_classes, other_labels
from fastgan.generative import draw
from fastgan.models import translate_any_size
from fastgan.models.srgan import enlarge, reduce
from fastgan.models.style import Picture
from fastgan.recipes.base import Nets, Recipe

IMAGES = 6  # test images in a sample picture
STYLES = 4  # of each translation, where there are styles
CENTRE = 128  # pixels of a side that are shown of an enlarged image
COLUMNS, ROWS = 10, 6  # of images from noise
KEY = 3  # keeps these draws apart from others


@torch.no_grad()
def sample_columns(recipe: Recipe, nets: Nets, data: Data, *, device: torch.device) -> dict[str, Tensor]:
    """Columns by their captions, each (rows, C, H, W) in the range of the output.

    Args:
        nets: in evaluation mode.
    """
    columns = _drawn
    if recipe.directions:
        columns = _by_label if recipe.labelled else _translated
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
        if (scale := int(getattr(net, "scale", 1))) > 1:
            columns |= _enlarged(net, images, scale)
            continue
        fakes = [translate_any_size(net, x) for x in images]
        if isinstance(net, Picture):
            return {"content": _stack(images), "style": _stack(show("B")), "picture": _stack(fakes)}
        columns |= {way.source: _stack(images), f"{way.net}({way.source})": _stack(fakes)}
        if way.back:
            again = [translate_any_size(nets[way.back], x) for x in fakes]
            columns[f"{way.back}({way.net}({way.source}))"] = _stack(again)
    if recipe.paired:
        columns["true B"] = _stack(show("B"))
    return columns


def _by_label(recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> dict[str, Tensor]:
    """The input and its translation to each label (the first 10); of attributes each one changed."""
    test, classes = data.shown, has_classes(data)
    assert test.labels is not None
    (way,) = recipe.directions.values()
    net, rows = recipe.translator(nets, way), []
    for k in range(min(IMAGES, test.len_A)):
        x = test.images("A", k, k + 1, device=device, output_range=recipe.config.output)
        labels = torch.from_numpy(other_labels(test.labels[k], data.labels, classes=classes)[:COLUMNS])
        fakes = translate_any_size(net, x.expand(len(labels), -1, -1, -1), labels.to(device))
        rows.append(torch.cat([x, fakes.to(x.dtype)]))
    changed = "" if classes else " changed"
    captions = ["A", *(f"{way.net}(A, {name}{changed})" for name in data.labels[:COLUMNS])]
    return {caption: _stack([row[k : k + 1] for row in rows]) for k, caption in enumerate(captions)}


def _in_styles(net: nn.Module, target: str, images: list[Tensor], size: int) -> dict[str, Tensor]:
    """Translations in a few styles, the same ones in every grid of a run."""
    columns = {}
    for k, numbers in enumerate(
        np.random.default_rng([KEY, size]).standard_normal((STYLES, size), np.float32), 1
    ):
        net.style = torch.from_numpy(numbers).to(images[0].device)
        columns[f"{target} style {k}"] = _stack([translate_any_size(net, x) for x in images])
    return columns


@torch.no_grad()
def save_picture(run: Path, nets: Nets, data: Data, output: OutputRange) -> None:
    """Write the picture of a run that is one: `picture.png`, as deep as its content; of float .tif."""
    net = nets.get("G")
    if isinstance(net, Picture):
        dtype = data.dtypes[0]
        image = from_tensor(net.image[None], data.ranges[0], dtype, output_range=output)[0]
        write_image(run / ("picture.tif" if dtype.kind == "f" else "picture.png"), image)


def _enlarged(net: nn.Module, images: list[Tensor], scale: int) -> dict[str, Tensor]:
    """The small image made of a large one, pixel by pixel, bicubic and by the network; the large one."""
    images = [x[..., _middle(x.shape[2], scale), _middle(x.shape[3], scale)] for x in images]
    small = [reduce(x, scale) for x in images]
    return {
        f"A / {scale}": _stack([F.interpolate(x, scale_factor=scale) for x in small]),
        "bicubic": _stack([enlarge(x, scale) for x in small]),
        f"G(A / {scale})": _stack([translate_any_size(net, x) for x in small]),
        "A": _stack(images),
    }


def _middle(side: int, scale: int) -> slice:
    """What is shown of a side of a large image: of more the differences would not be seen."""
    shown = min(side, CENTRE) // scale * scale
    start = (side - shown) // 2
    return slice(start, start + shown)


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

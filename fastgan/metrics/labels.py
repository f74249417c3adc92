"""Label maps: images whose colours stand for classes, compared pixel by pixel.

A pixel belongs to the class of the nearest colour (Euclidean in RGB). With n[i, j] pixels of class i taken
for class j, void pixels of the true map left out (Long, Shelhamer, Darrell 2015, section 5):

    per-pixel accuracy  sum n[i, i] / sum n        class accuracy  mean of n[i, i] / sum_j n[i, j]
    IoU of class i      n[i, i] / (sum_j n[i, j] + sum_j n[j, i] - n[i, i])

as the Cityscapes benchmark computes them: a prediction of void is wrong, and classes that occur on neither
side are left out of the means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan.config import UsageError, read_json

VOID = "void"
PIXELS = 2**18  # assigned to colours at once, which bounds the memory
# https://github.com/mcordts/cityscapesScripts, helpers/labels.py: the 19 classes of the benchmark; void are
# the other labels whose colour is none of these
CITYSCAPES: dict[str, list[tuple[int, int, int]]] = {
    "road": [(128, 64, 128)],
    "sidewalk": [(244, 35, 232)],
    "building": [(70, 70, 70)],
    "wall": [(102, 102, 156)],
    "fence": [(190, 153, 153)],
    "pole": [(153, 153, 153)],
    "traffic light": [(250, 170, 30)],
    "traffic sign": [(220, 220, 0)],
    "vegetation": [(107, 142, 35)],
    "terrain": [(152, 251, 152)],
    "sky": [(70, 130, 180)],
    "person": [(220, 20, 60)],
    "rider": [(255, 0, 0)],
    "car": [(0, 0, 142)],
    "truck": [(0, 0, 70)],
    "bus": [(0, 60, 100)],
    "train": [(0, 80, 100)],
    "motorcycle": [(0, 0, 230)],
    "bicycle": [(119, 11, 32)],
    VOID: [
        *((0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180)),
        *((150, 100, 100), (150, 120, 90), (0, 0, 90), (0, 0, 110)),
    ],
}


@dataclass(frozen=True)
class Palette:
    """Names of the classes without void, colours (K, 3) in 0..255, and the class (K,) of each, void last."""

    names: tuple[str, ...]
    colours: Tensor
    classes: Tensor

    @classmethod
    def of(cls, table: Mapping[str, Sequence[Sequence[int]]]) -> Palette:
        """From name -> RGB colours; the class `void` is ignored."""
        names = tuple(name for name in table if name != VOID)
        number = {name: i for i, name in enumerate([*names, VOID])}
        rows = [(colour, number[name]) for name, colours in table.items() for colour in colours]
        return cls(
            names,
            torch.tensor([list(colour) for colour, _ in rows], dtype=torch.float32),
            torch.tensor([k for _, k in rows]),
        )

    @classmethod
    def read(cls, source: str) -> Palette:
        """`cityscapes`, a JSON file {name: [r, g, b] or several of them}, or text: `name r g b` a line.

        Raises:
            UsageError: unreadable, not such a file, or fewer than two classes.
        """
        if source == "cityscapes":
            return cls.of(CITYSCAPES)
        path = Path(source)
        table = _from_json(path) if path.suffix.lower() == ".json" else _from_text(path)
        colours = [tuple(colour) for each in table.values() for colour in each]
        twice = next((colour for colour in colours if colours.count(colour) > 1), None)
        if twice:
            raise UsageError(f"--palette {path}: the colour {twice} stands for two classes")
        if len(table.keys() - {VOID}) < 2:
            raise UsageError(f"--palette {path}: needs at least two classes besides {VOID}")
        return cls.of(table)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != 3:
            raise UsageError(f"--palette has RGB colours, the images have {x.shape[1]} channels")
        pixels = x.detach().cpu().float().permute(0, 2, 3, 1).reshape(-1, 3) * 255
        # a matrix product would round differences away
        mode = "donot_use_mm_for_euclid_dist"
        found = [torch.cdist(part, self.colours, compute_mode=mode).min(1) for part in pixels.split(PIXELS)]
        return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])

    def read_image(self, x: Tensor) -> Tensor:
        """The class of every pixel of images (N, 3, H, W) in 0..1, as (N, H, W) int64; void is len(names).

        Raises:
            UsageError: not three channels.
        """
        return self.classes[self._nearest(x)[1]].view(len(x), *x.shape[2:])

    def distance(self, x: Tensor) -> float:
        """Mean distance of pixels from their nearest colour, in 0..255."""
        return self._nearest(x)[0].mean().item()

    def confusion(self, true: Tensor, found: Tensor) -> Tensor:
        """Number of pixels (classes, classes + 1), int64, of true class i taken for j; the last j is void.

        Args:
            true, found: images (N, 3, H, W) in 0..1.
        """
        rows, columns = self.read_image(true).flatten(), self.read_image(found).flatten()
        size = len(self.names) + 1
        counts = torch.bincount(rows * size + columns, minlength=size * size).view(size, size)
        return counts[:-1]


def label_scores(confusion: Tensor) -> tuple[dict[str, float], list[float | None]]:
    """pixel_accuracy, class_accuracy and mean_iou of a matrix of `Palette.confusion`; the IoU of each class,
    None where it occurs nowhere."""
    n = confusion.double()
    hits, true, found = n[:, :-1].diagonal(), n.sum(1), n[:, :-1].sum(0)
    union = true + found - hits
    iou, recall = hits / union, hits / true
    scores = {
        "pixel_accuracy": (hits.sum() / n.sum()).item(),
        "class_accuracy": recall[true > 0].mean().item(),
        "mean_iou": iou[union > 0].mean().item(),
    }
    return scores, [value if count else None for value, count in zip(iou.tolist(), union.tolist())]


def _colour(values: Sequence[Any], path: Path, name: str) -> tuple[int, int, int]:
    if len(values) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
        raise UsageError(f"--palette {path}: {name} must be three whole numbers 0..255, got {list(values)}")
    return values[0], values[1], values[2]


def _from_json(path: Path) -> dict[str, list[tuple[int, int, int]]]:
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(v, list) and v for v in table.values()):
        raise UsageError(f'--palette {path}: must be {{"name": [r, g, b], ...}}')
    return {
        name: [_colour(c, path, name) for c in (value if isinstance(value[0], list) else [value])]
        for name, value in table.items()
    }


def _from_text(path: Path) -> dict[str, list[tuple[int, int, int]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"--palette {path} cannot be read ({reason}): it takes cityscapes, a .json or a text file"
        ) from error
    table: dict[str, list[tuple[int, int, int]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*(\S.*?)[\s,:]+(\d+)[\s,]+(\d+)[\s,]+(\d+)\s*", line)
        if not match:
            raise UsageError(f"--palette {path}: line {number} must be `name r g b`, got {line.strip()[:60]}")
        table.setdefault(match[1], []).append(_colour([int(g) for g in match.groups()[1:]], path, match[1]))
    return table

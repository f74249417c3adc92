"""Translations of one image in several random styles: how far apart their colours are."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgan.data.digits import make_digits
from fastgan.measure.system import System
from fastgan.recipes.base import Direction

STYLES = 8  # of each image


def in_styles(system: System, way: Direction, x: Tensor) -> list[Tensor]:
    """An image in the next `STYLES` styles of torch's generator, each (1, C, H, W) in 0..1."""
    return [system.unit(system.translated(way, x)) for _ in range(STYLES)]


def style_distance(system: System, fakes: Tensor) -> float:
    """How many colours the embedded digits get beside those of real B: the mean Euclidean distance of the ink
    colours of two styles of one image, over that of two real images.

    Args:
        fakes: translations to B in 0..1, `STYLES` of each test image in a row.
    """
    digits = make_digits("test", paired=system.data.paired)
    ink = torch.from_numpy(digits.ink_A).repeat_interleave(STYLES, 0)[: len(fakes)]
    styles = ink_colours(fakes, ink).unflatten(0, (-1, STYLES))
    real = torch.from_numpy(digits.B.astype(np.float32) / 255).permute(0, 3, 1, 2)
    return apart(styles) / apart(ink_colours(real, torch.from_numpy(digits.ink_B))[None])


def ink_colours(x: Tensor, ink: Tensor) -> Tensor:
    """Mean colours (N, C) of images (N, C, H, W) where there is ink, (N, H, W) in 0..1."""
    return (x * ink[:, None]).sum((2, 3)) / ink.sum((1, 2))[:, None]


def apart(colours: Tensor) -> float:
    """Mean distance of two different ones among K colours, (groups, K, C), of one group."""
    return torch.stack([torch.pdist(each).mean() for each in colours]).mean().item()

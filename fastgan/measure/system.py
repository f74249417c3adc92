"""What is measured (`System`) and what came of it (`Found`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastgan import metrics
from fastgan.config import Config
from fastgan.data.dataset import Data, Split
from fastgan.data.digits import COLOURS
from fastgan.data.folders import find_layout
from fastgan.data.labelled import has_classes
from fastgan.models import translate_any_size
from fastgan.recipes.base import Direction, Nets, Recipe


@dataclass
class System:
    """Generators in evaluation mode by name, the ways they lead, and the images; pairs: image k of both
    domains shows the same thing; recipe: of a run, for one that has no ways."""

    nets: Nets
    ways: Sequence[Direction]
    data: Data
    output: Literal["tanh", "sigmoid"]
    device: torch.device
    pairs: bool
    digits: bool = False
    recipe: Recipe | None = None

    @classmethod
    def of(cls, recipe: Recipe, nets: Nets, data: Data, device: torch.device) -> System:
        """The system of a recipe's run."""
        c: Config = recipe.config
        pairs = recipe.paired
        if not pairs and c.data is not None and data.shown.names_A == data.shown.names_B:
            pairs = find_layout(c.data, paired=False).side_by_side
        digits = c.data is None and c.direction == "AtoB"
        return cls(nets, list(recipe.directions.values()), data, c.output, device, pairs, digits, recipe)

    def has(self) -> set[str]:
        """Which of `NEEDS` this system meets without further flags."""
        if not self.ways:
            known = has_classes(self.data)
            named = known and self.recipe is not None and self.recipe.labelled
            return {"inception"} | ({"drawn"} if known else set()) | ({"labels"} if named else set())
        if self.scale > 1:
            return {"pairs", "enlarged"}
        if self.labelled:
            coloured = self.digits and self.data.labels == list(COLOURS)
            return {"labels", "colours"} if coloured else {"labels"}
        back = any(way.back for way in self.ways)
        classes = self.digits or bool(class_names(self.data))
        styles = self.digits and any(self.style_size(way) for way in self.ways)
        facts = {
            "pairs": self.pairs,
            "back": back,
            "digits": self.digits,
            "classes": classes,
            "styles": styles,
        }
        return {"inception", "samples", *(name for name, true in facts.items() if true)}

    def style_size(self, way: Direction) -> int:
        """Numbers in a style, 0 for a system without styles."""
        if self.recipe:
            return self.recipe.noise.get(f"style_{way.target}", 0)
        return int(getattr(self.nets[way.net], "style_size", 0))

    @property
    def labelled(self) -> bool:
        """Whether images are translated between labels."""
        known = self.data.train.labels is not None and bool(self.ways)
        return known and (self.recipe is None or self.recipe.labelled)

    def translated(self, way: Direction, x: Tensor, *given: Tensor) -> Tensor:
        """Images of any size, one way. given: labels, of a system that takes some."""
        net = self.recipe.translator(self.nets, way) if self.recipe else self.nets[way.net]
        return translate_any_size(net, x, *given)

    @property
    def scale(self) -> int:
        """How many times a side becomes as long; 1 where sizes stay."""
        return int(getattr(self.recipe.config, "scale", 1)) if self.recipe else 1

    def returned(self, way: Direction, fake: Tensor) -> Tensor:
        """What came of `translated`, back again; ValueError for a way without one."""
        if way.back is None:
            raise ValueError(f"System: {way} does not lead back")
        return translate_any_size(self.nets[way.back], fake)

    def unit(self, x: Tensor) -> Tensor:
        """Images of the network's range in 0..1, float32 on the host."""
        return (x.float() / 2 + 0.5 if self.output == "tanh" else x.float()).cpu()

    def images(self, split: Split, domain: Literal["A", "B"], k: int) -> Tensor:
        """Image k of a domain, (1, C, H, W) on the device."""
        return split.images(domain, k, k + 1, device=self.device, output_range=self.output)


@dataclass
class Found:
    """Values by name, how they were computed, and remarks for the user."""

    values: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def class_names(data: Data) -> list[str]:
    """Classes of images that lie in a folder per class, [] otherwise."""
    return metrics.class_folders(
        data.train.names_A, data.train.names_B, data.shown.names_A, data.shown.names_B
    )

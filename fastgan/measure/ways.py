"""All measures of one way through a system of translators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgan import metrics
from fastgan.measure.pairs import Pairs, inception
from fastgan.measure.styles import STYLES, in_styles, style_distance
from fastgan.measure.system import Found, System
from fastgan.measure.taught import measure_taught
from fastgan.measure.tools import Tools
from fastgan.recipes.base import Direction


def measure_way(system: System, tools: Tools, way: Direction, found: Found, labelled: bool) -> None:
    """Add all chosen measures of one way to what was found; labelled: its results are label maps."""
    shown, several = system.data.shown, len(system.ways) > 1
    suffix = f"_{way.target}" if several else ""
    pairs = Pairs(tools, labelled)
    spools = (metrics.Spool(), metrics.Spool()) if tools.inception is not None else None
    kept: list[Tensor] = []
    spread: list[float] = []
    keep = tools.wants("tstr", "trts", "digit_accuracy_fake", "background_distance", "style_distance")
    # of the digits only translations to B are read
    keep = keep and not (system.digits and way.target != "B")
    styled = system.style_size(way) > 0
    count = shown.len_A if way.source == "A" else shown.len_B
    cycle = 0.0
    for k in range(count):
        x = system.images(shown, way.source, k)
        if styled:
            # its styles are its own, whatever else is measured
            torch.manual_seed(k)
        fake = system.translated(way, x)
        unit = system.unit(fake)
        if way.back and tools.wants("cycle_l1"):
            cycle += metrics.l1(system.unit(system.returned(way, fake)), system.unit(x))
        if system.pairs and pairs.needed:
            pairs.add(unit, system.unit(system.images(shown, way.target, k)))
        if spools:
            spools[0].append(unit)
        if keep:
            kept += [metrics.small(each) for each in (in_styles(system, way, x) if styled else [unit])]
        if tools.wants("diversity"):
            several_fakes = _samples(system, way, x, tools.samples)
            spread.append(metrics.mean_distance(several_fakes, tools.lpips or metrics.l1))
    if way.back and tools.wants("cycle_l1"):
        found.values[f"cycle_l1_{way.source}"] = cycle / count
    pairs.finish(found, suffix, tools)
    if spread:
        found.values[f"diversity{suffix}"] = sum(spread) / len(spread)
        found.details["diversity"] = {
            "samples": tools.samples, "distance": tools.about_lpips() if tools.lpips else "l1"
        }  # fmt: skip
        if not styled and not _dropouts(system.nets[way.net]):
            found.notes.append(
                f"diversity{suffix} is 0: {way.net} has no dropout, so nothing in it is random"
            )
    if spools:
        total = shown.len_B if way.target == "B" else shown.len_A
        for k in range(total):
            spools[1].append(system.unit(system.images(shown, way.target, k)))
        inception(spools[0], spools[1], tools, system.device, found, suffix)
    if keep:
        measure_taught(system, tools, way, kept, found, suffix, each=STYLES if styled else 1)
    if styled and keep and tools.wants("style_distance"):
        found.values["style_distance"] = style_distance(system, torch.cat(kept))
        found.details["style_distance"] = {"styles": STYLES, "images": count}


def _dropouts(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]


def _samples(system: System, way: Direction, x: Tensor, count: int) -> Tensor:
    """Translations (count, C, H, W) in 0..1 of one image, with dropout as in training, styles and draws by
    seeds."""
    dropouts = _dropouts(system.nets[way.net])
    for module in dropouts:
        module.train()
    try:
        fakes = []
        for k in range(count):
            torch.manual_seed(k)
            fakes.append(system.unit(system.translated(way, x)))
    finally:
        for module in dropouts:
            module.eval()
    return torch.cat(fakes)

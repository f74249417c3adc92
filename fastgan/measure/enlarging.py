"""Measures of a generator that enlarges images: held-out images are reduced, enlarged and compared with what
they were, beside the same of bicubic enlarging.

As the field does, `scale` pixels of every border are left out, and sides are first cut to multiples of the
scale. Images are whole, also where training crops them. `psnr_db` and `ssim` are of all channels, `psnr_y_db`
of the luma alone (`models.srgan.luma`), which papers print. The small image is not rounded to 8 bits.
"""

from __future__ import annotations

from torch import Tensor

from fastgan import metrics
from fastgan.data.dataset import Split
from fastgan.measure.system import Found, System
from fastgan.measure.tools import Tools
from fastgan.metrics.pixels import WINDOW
from fastgan.models.srgan import enlarge, luma, reduce
from fastgan.recipes.base import Direction


def measure_enlarging(system: System, tools: Tools, way: Direction, found: Found) -> None:
    """Add all chosen measures of one way to what was found; results are compared where they are 0..1, cut
    off beyond it."""
    shown, scale = system.data.shown, system.scale
    whole = Split(shown.stores, shown.ranges, crop=None, flip=False, paired=False, serial=True)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for k in range(whole.len_A):
        x = system.images(whole, "A", k)
        x = x[..., : x.shape[2] // scale * scale, : x.shape[3] // scale * scale]
        if min(x.shape[2:]) <= 2 * scale:
            continue
        small = reduce(x, scale)
        true = _inner(system.unit(x), scale)
        for suffix, result in (("", system.translated(way, small)), ("_bicubic", enlarge(small, scale))):
            for name, value in _compared(_inner(system.unit(result), scale), true, tools, suffix).items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1
    found.values |= {name: value / counts[name] for name, value in sums.items()}
    found.details["enlarging"] = {"scale": scale, "border": scale, "images": max(counts.values(), default=0)}
    if tools.lpips is not None:
        found.details["lpips"] = tools.about_lpips()
    for name in ("ssim", "psnr_db"):
        if tools.wants(name) and (small_ones := whole.len_A - counts.get(name, 0)):
            found.notes.append(f"{name} is left out of {small_ones} images: they are too small")


def _inner(x: Tensor, border: int) -> Tensor:
    return x[..., border : x.shape[2] - border, border : x.shape[3] - border].clamp(0, 1)


def _compared(x: Tensor, true: Tensor, tools: Tools, suffix: str) -> dict[str, float]:
    """The chosen measures of an enlarged image; suffix: what stands behind their names."""
    values = {"l1": metrics.l1(x, true)} if tools.wants("l1") and not suffix else {}
    if tools.wants(f"psnr_db{suffix}"):
        values["psnr_db"] = metrics.psnr(x, true)
    if tools.wants(f"psnr_y_db{suffix}"):
        values["psnr_y_db"] = metrics.psnr(luma(x), luma(true))
    if tools.wants(f"ssim{suffix}") and min(x.shape[2:]) >= WINDOW:
        values["ssim"] = metrics.ssim(x, true)
    if tools.wants(f"lpips{suffix}") and tools.lpips is not None:
        values["lpips"] = tools.lpips(x, true)
    return {f"{name}{suffix}": value for name, value in values.items()}

"""Measures of generated images beside true ones, pair by pair, and of two sets by Inception features."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import metrics
from fastgan.measure.system import Found
from fastgan.measure.tools import Tools
from fastgan.metrics.learned import FEATURES
from fastgan.metrics.pixels import WINDOW


class Pairs:
    """Sums of the measures of pairs."""

    def __init__(self, tools: Tools, labelled: bool) -> None:
        self._tools, self._sums, self._count = tools, dict[str, float](), 0
        self._palette = tools.palette if labelled else None
        self._confusion: Tensor | int = 0
        self._small = 0
        self.needed = self._palette is not None or tools.wants("l1", "psnr_db", "ssim", "lpips")

    def add(self, fake: Tensor, true: Tensor) -> None:
        """Compare images (N, C, H, W) in 0..1."""
        tools, values = self._tools, dict[str, float]()
        if tools.wants("l1"):
            values["l1"] = metrics.l1(fake, true)
        if tools.wants("psnr_db"):
            values["psnr_db"] = metrics.psnr(fake, true)
        if tools.wants("ssim"):
            if min(fake.shape[2:]) < WINDOW:
                self._small += 1
            else:
                values["ssim"] = metrics.ssim(fake, true)
        if tools.wants("lpips") and tools.lpips is not None:
            values["lpips"] = tools.lpips(fake, true)
        if self._palette is not None:
            self._confusion = self._confusion + self._palette.confusion(true, fake)
        self._sums = {key: self._sums.get(key, 0.0) + value for key, value in values.items()}
        self._count += 1

    def finish(self, found: Found, suffix: str, tools: Tools) -> None:
        """Add the means to what was found."""
        found.values |= {f"{key}{suffix}": value / self._count for key, value in self._sums.items()}
        if self._small:
            found.notes.append(f"ssim{suffix} is left out: {self._small} images are below {WINDOW} pixels")
        if "lpips" in self._sums:
            found.details["lpips"] = tools.about_lpips()
        if self._palette is not None and isinstance(self._confusion, Tensor):
            scores, each = metrics.label_scores(self._confusion)
            found.values |= {f"{key}{suffix}": value for key, value in scores.items() if key in tools.names}
            found.details["class_iou"] = dict(zip(self._palette.names, each))


def inception(
    fake: metrics.Spool,
    real: metrics.Spool,
    tools: Tools,
    device: torch.device,
    found: Found,
    suffix: str = "",
) -> None:
    """Add fid and its relatives to what was found, with a warning where there are few images."""
    assert tools.inception is not None
    values, about = metrics.inception_measures(fake, real, tools.inception, device)
    found.values |= {f"{key}{suffix}": value for key, value in values.items() if key in tools.names}
    found.details[f"inception{suffix}"] = tools.files["inception"] | about
    fewest = min(len(fake), len(real))
    if fewest < FEATURES and "fid" in tools.names:
        found.notes.append(
            f"fid{suffix} of {fewest} images: below {FEATURES:,} the covariance is rank-deficient, FID far "
            "too high; compare it at equal numbers only, or take kid"
        )

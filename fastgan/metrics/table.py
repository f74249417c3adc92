"""The measures by name: which way is better, and what each of them needs."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from fastgan.config import UsageError


class Measure(NamedTuple):
    """Whether larger values are better, None for a yardstick; what a measure needs, see `NEEDS`."""

    higher: bool | None
    needs: str


MEASURES = {
    "l1": Measure(False, "pairs"),
    "psnr_db": Measure(True, "pairs"),
    "psnr_db_bicubic": Measure(None, "enlarged"),
    "psnr_y_db": Measure(True, "enlarged"),
    "psnr_y_db_bicubic": Measure(None, "enlarged"),
    "ssim": Measure(True, "pairs"),
    "ssim_bicubic": Measure(None, "enlarged"),
    "lpips": Measure(False, "alexnet"),
    "lpips_bicubic": Measure(None, "enlarged"),
    "cycle_l1": Measure(False, "back"),
    "fid": Measure(False, "inception"),
    "kid": Measure(False, "inception"),
    "inception_score": Measure(True, "inception"),
    "precision": Measure(True, "inception"),
    "recall": Measure(True, "inception"),
    "pixel_accuracy": Measure(True, "palette"),
    "class_accuracy": Measure(True, "palette"),
    "mean_iou": Measure(True, "palette"),
    "digit_accuracy_real": Measure(None, "digits"),
    "digit_accuracy_fake": Measure(True, "digits"),
    "background_distance": Measure(False, "digits"),
    "style_distance": Measure(True, "styles"),
    "tstr": Measure(True, "classes"),
    "trts": Measure(True, "classes"),
    "diversity": Measure(True, "samples"),
    "class_score": Measure(True, "drawn"),
    "class_score_real": Measure(None, "drawn"),
    "class_share_min": Measure(True, "drawn"),
    "class_share_max": Measure(False, "drawn"),
    "class_accuracy_real": Measure(None, "drawn"),
    "label_accuracy": Measure(True, "labels"),
    "label_accuracy_real": Measure(None, "labels"),
    "colour_accuracy": Measure(True, "colours"),
    "digit_accuracy": Measure(True, "colours"),
}
NEEDS = {
    "pairs": "pairs: data for pix2pix, or A and B side by side in one image",
    "enlarged": "a generator that enlarges images",
    "back": "a generator that leads back, as CycleGAN has",
    "palette": "--palette and pairs",
    "digits": "the embedded digits in direction AtoB",
    "styles": "the embedded digits in direction AtoB, and a system with styles",
    "classes": "known classes: the embedded digits, or a folder a class, the same ones in both domains",
    "samples": "--samples of at least 2, and a generator",
    "drawn": "a generator of images from noise, and classes",
    "labels": "a generator that takes a label, and images with labels",
    "colours": "the embedded digits in colours, as stargan has them",
    "inception": "images of both domains",
    "alexnet": "pairs, or --samples of at least 2",
}


def stem(name: str) -> str:
    """A value's name without the domain behind it."""
    return name.removesuffix("_A").removesuffix("_B")


def measure_of(name: str) -> Measure:
    """The measure of a value's name, with or without the domain behind it.

    Raises:
        UsageError: unknown.
    """
    found = MEASURES.get(stem(name))
    if found is None:
        near = difflib.get_close_matches(name, MEASURES, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(MEASURES)}"
        raise UsageError(f"unknown measure {name}: {hint}")
    return found

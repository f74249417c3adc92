"""Measures of images: of pairs (`pixels`), label maps (`labels`), by a classifier (`classifier`), and by the
networks of others (`learned`); `table` lists them."""

from fastgan.metrics.classifier import (
    accuracy,
    class_folders,
    class_numbers,
    one_batch,
    small,
    train_classifier,
)
from fastgan.metrics.labels import Palette, label_scores
from fastgan.metrics.learned import Lpips, Spool, inception_measures
from fastgan.metrics.pixels import as_rgb, background_distance, l1, mean_distance, psnr, ssim
from fastgan.metrics.table import MEASURES, NEEDS, Measure, measure_of, stem

__all__ = [
    "MEASURES",
    "Measure",
    "NEEDS",
    "class_folders",
    "class_numbers",
    "measure_of",
    "one_batch",
    "small",
    "Lpips",
    "Palette",
    "Spool",
    "accuracy",
    "as_rgb",
    "background_distance",
    "inception_measures",
    "l1",
    "label_scores",
    "mean_distance",
    "psnr",
    "ssim",
    "stem",
    "train_classifier",
]

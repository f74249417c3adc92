"""Measures of pairs of images, pixel by pixel or window by window; every function takes images in 0..1 as
(N, C, H, W) and returns a float."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from fastgan.config import UsageError

WINDOW = 11  # side in pixels of the window of SSIM


def l1(x: Tensor, y: Tensor) -> float:
    """Mean absolute difference."""
    return (x.float() - y.float()).abs().mean().item()


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio in dB at a peak of 1, averaged over the images; equal images count 100
    dB."""
    error = (x.float() - y.float()).square().flatten(1).mean(1).clamp_min(1e-10)
    return (-10 * error.log10()).mean().item()


def ssim(x: Tensor, y: Tensor) -> float:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004) at a peak of 1, averaged over images.

    With the paper's Gaussian window of 11x11 pixels and sigma 1.5, of windows that lie inside the image;
    channels are measured one by one and averaged.

    Raises:
        UsageError: scikit-image is not installed, or images smaller than the window.
    """
    try:
        # imported here: an optional extra
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UsageError('ssim needs scikit-image: pip install -e ".[metrics]"') from error
    if min(x.shape[-2:]) < WINDOW:
        raise UsageError(f"ssim needs images of at least {WINDOW} pixels, got {x.shape[-1]}x{x.shape[-2]}")
    pairs = zip(x.double().cpu().numpy(), y.double().cpu().numpy())
    values = [
        structural_similarity(
            a,
            b,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in pairs
    ]
    return float(sum(values) / len(values))


def mean_distance(x: Tensor, distance: Callable[[Tensor, Tensor], float] = l1) -> float:
    """Mean distance between any two of the images; 0 for a single one."""
    found = [distance(x[i : i + 1], x[j : j + 1]) for i, j in combinations(range(len(x)), 2)]
    return sum(found) / max(1, len(found))


def background_distance(x: Tensor, ink: Tensor) -> float:
    """Mean distance from white where there is no ink.

    Args:
        x: images.
        ink: (N, H, W) in 0..1, the share of digit in each pixel.
    """
    empty = (ink < 0.05).unsqueeze(1).expand_as(x)
    return (1 - x.float())[empty].abs().mean().item()


def as_rgb(x: Tensor) -> Tensor:
    """Images of one or three channels as RGB.

    Raises:
        UsageError: another number of channels.
    """
    if x.shape[1] not in (1, 3):
        raise UsageError(
            f"fid, kid, inception_score, precision, recall and lpips need 1 or 3 channels, got {x.shape[1]}"
        )
    return x.expand(-1, 3, -1, -1)


def as_bytes(x: Tensor) -> Tensor:
    """Images in 0..1 as uint8 RGB on the host, rounded."""
    return (as_rgb(x.detach()).float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)

"""The schedule of the learning rates."""

from __future__ import annotations

import math

from fastgan.config import Config


def lr_factor(config: Config, epoch: int) -> float:
    """Factor of the learning rates in a 0-based epoch; above zero up to and including the last one.

    linear: 1, then falling evenly to 1 / (epochs_decay + 1); cosine: half a period, never rising again; step:
    lr_decay_factor every lr_decay_epochs; constant: 1.
    """
    total = config.epochs + config.epochs_decay
    if config.lr_policy == "linear":
        return max(
            1 - max(0, epoch + 1 - config.epochs) / (config.epochs_decay + 1), 1 / (config.epochs_decay + 1)
        )
    if config.lr_policy == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(epoch, total - 1) / total))
    if config.lr_policy == "step":
        return config.lr_decay_factor ** (epoch // config.lr_decay_epochs)
    return 1.0

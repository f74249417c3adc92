"""A discriminator whose hidden layers can be looked at: the ground of feature matching and of perceptual
losses that need no trained network (Salimans et al. 2016, arXiv 1606.03498, section 3.1)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from fastgan.layers import skip_idle_biases
from fastgan.stack import run_layers, run_plain, runs_fused


class FeatureDiscriminator(nn.Module):
    """Blocks one after the other; the outputs of some of them are the hidden features.

    Args:
        blocks: the layers of each block; the last one gives the logits.
        taps: numbers of the blocks whose outputs are features, from 0.
    """

    memory = "fast"

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], taps: Collection[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*layers) for layers in blocks)
        self.taps = frozenset(taps)
        skip_idle_biases(self)

    @property
    def line(self) -> list[nn.Module]:
        """The layers one after the other; see `fastgan.stack`."""
        return list(self.blocks)

    def forward(self, x: Tensor, *, hidden: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits of images (N, C, H, W); with `hidden` also the features, first to last, each (N, c, h, w).

        Features keep their graph: a loss on them trains the discriminator, or the images.
        """
        found: list[Tensor] = []
        for k, block in enumerate(self.blocks):
            layers = list(block.children())
            x = run_layers([layers], x, self.memory) if runs_fused(x) else run_plain(layers, x, self.memory)
            if k in self.taps:
                found.append(x)
        return (x, found) if hidden else x

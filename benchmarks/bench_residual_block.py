"""residual_block at the trunk of CycleGAN's ResNet-9 generator at 256x256: its nine blocks, and one alone.

A case is named network, size, channels, blocks, weight sets x images of each.
"""

import pytest
import torch.nn.functional as F
from fastgan_kernels import residual_block
from torch import Tensor

from benchmarks._peers import DIRECTIONS, IMPLEMENTATIONS, LOADS, Work, cases, compare

CHANNELS, SIZE = 256, 64
CASES = cases((9,), LOADS, quick=((2, 2),))
CASES += cases((1,), LOADS, quick=((1, 1),))


def peer(x: Tensor, weights: list[Tensor]) -> Tensor:
    for first, second in zip(weights[::2], weights[1::2]):
        y = F.conv2d(F.pad(x, (1,) * 4, mode="reflect"), first)
        y = F.relu(F.instance_norm(y))
        y = F.conv2d(F.pad(y, (1,) * 4, mode="reflect"), second)
        x = x + F.instance_norm(y)
    return x


def work(blocks: int, sets: int, images: int) -> Work:
    weights: list[tuple[int, ...]] = [(CHANNELS, CHANNELS, 3, 3)] * (2 * blocks)
    # two for each weight at each pixel
    flop = 2 * SIZE**2 * 2 * blocks * 9 * CHANNELS**2
    name = f"resnet 64^2 256, {blocks} block{'s' * (blocks > 1)}"
    return Work(
        "residual_block", name, residual_block, peer, (CHANNELS, SIZE, SIZE), weights, sets, images, flop
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("blocks, sets, images", CASES)
def bench_residual_block(measure, blocks, sets, images, direction, implementation):
    compare(measure, work(blocks, sets, images), implementation, direction)

"""conv_norm_act at the layers of CycleGAN's ResNet-9 generator and 70x70 PatchGAN and of pix2pix, at 256x256.

A case is named network, size of the input, channels, kernel / stride, weight sets x images of each.
"""

import pytest
from fastgan_kernels import conv_norm_act
from torch import Tensor

from benchmarks._peers import (
    DIRECTIONS,
    IMPLEMENTATIONS,
    LOADS,
    ONE_NETWORK,
    PATCHGAN,
    PIX2PIX,
    RESNET,
    Layer,
    Work,
    cases,
    compare,
)

CASES = cases(RESNET[3:4], LOADS, quick=((1, 1), (2, 2)))
CASES += cases((RESNET[0], RESNET[2], RESNET[4], *PATCHGAN[2:4]), LOADS, quick=((2, 2),))
CASES += cases(PIX2PIX[2:3], ONE_NETWORK, quick=((1, 1),))
CASES += cases((RESNET[1], *PATCHGAN[:2], PATCHGAN[4]), LOADS)
CASES += cases((*PIX2PIX[:2], *PIX2PIX[3:]), ONE_NETWORK)


def work(layer: Layer, sets: int, images: int) -> Work:
    options = {"stride": layer.stride, "padding": layer.pad, "padding_mode": layer.mode}

    def ours(x: Tensor, parameters: list[Tensor]) -> Tensor:
        return conv_norm_act(x, **layer.named(parameters), **options, norm=layer.norm, act=layer.act)

    shape = (layer.inputs, layer.size, layer.size)
    return Work(
        "conv_norm_act", layer.name, ours, layer.peer, shape, layer.parameters, sets, images, layer.flop
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer, sets, images", CASES)
def bench_conv_norm_act(measure, layer, sets, images, direction, implementation):
    compare(measure, work(layer, sets, images), implementation, direction)

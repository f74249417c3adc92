"""conv_transpose_norm_act at the layers of CycleGAN's ResNet-9 generator and of pix2pix's U-Net, at 256x256.

A case is named network, size of the input, channels, kernel / stride, weight sets x images of each.
"""

import pytest
from fastgan_kernels import conv_transpose_norm_act
from torch import Tensor

from benchmarks._peers import (
    DIRECTIONS,
    IMPLEMENTATIONS,
    LOADS,
    ONE_NETWORK,
    RESNET_UP,
    UNET_UP,
    Layer,
    Work,
    cases,
    compare,
)

CASES = cases(RESNET_UP, LOADS, quick=((2, 2),))
CASES += cases(UNET_UP[2:3], ONE_NETWORK, quick=((1, 1),))
CASES += cases((*UNET_UP[:2], *UNET_UP[3:]), ONE_NETWORK)


def work(layer: Layer, sets: int, images: int) -> Work:
    options = {"stride": layer.stride, "padding": layer.pad, "output_padding": layer.output_pad}

    def ours(x: Tensor, parameters: list[Tensor]) -> Tensor:
        return conv_transpose_norm_act(
            x, **layer.named(parameters), **options, norm=layer.norm, act=layer.act
        )

    shape = (layer.inputs, layer.size, layer.size)
    return Work(
        "conv_transpose_norm_act", layer.name, ours, layer.peer, shape, layer.parameters, sets, images,
        layer.flop,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer, sets, images", CASES)
def bench_conv_transpose_norm_act(measure, layer, sets, images, direction, implementation):
    compare(measure, work(layer, sets, images), implementation, direction)

"""The products of `_block` by torch's own convolutions (cuDNN on a GPU), on plain NHWC memory.

They are the other candidate for every shape: where cuDNN is measured to be faster, only the passes are ours.
"""

import torch
from torch import Tensor

from ._layout import Conv
from ._pointwise import activation


def _nchw(matrix: Tensor, height: int, width: int) -> Tensor:
    """(N * height * width, C) as a channels_last tensor."""
    return matrix.view(-1, height, width, matrix.shape[1]).permute(0, 3, 1, 2)


def _per_set(x: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(samples, weight) of each set; the weight in x's dtype and in the layout that cuDNN likes."""
    w = weight.to(x.dtype)
    return [
        (part, w[s].contiguous(memory_format=torch.channels_last)) for s, part in enumerate(_split(x, len(w)))
    ]


def _split(x: Tensor, sets: int) -> list[Tensor]:
    return list(x.split(len(x) // sets)) if len(x) else [x] * sets


def _convolve(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    """Convolution of images that are already padded, (N, C, H, W) to (N, O, Ho, Wo)."""
    return torch.convolution(x, weight, None, (conv.stride,) * 2, (0, 0), (1, 1), False, (0, 0), 1)


def _transposed(dz: Tensor, weight: Tensor, conv: Conv, height: int, width: int, pad: int) -> Tensor:
    """Input gradient of the convolution of a height x width image with zero padding."""
    sizes = ((height, conv.out_h), (width, conv.out_w))
    over = [size + 2 * pad - conv.kernel - (out - 1) * conv.stride for size, out in sizes]
    return torch.convolution(dz, weight, None, (conv.stride,) * 2, (pad, pad), (1, 1), True, over, 1)


def _rows(parts: list[Tensor]) -> Tensor:
    """Channels_last tensors of the sets as one (N, H, W, C)."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.permute(0, 2, 3, 1).contiguous()


def forward(
    rows: Tensor, weight: Tensor, conv: Conv, transposed: bool, bias: Tensor | None, act: str, slope: float
) -> Tensor:
    """z, (N, H, W, C), with bias (S, C) and activation."""
    if transposed:
        x = _nchw(rows, conv.out_h, conv.out_w)
        found = [_transposed(p, w, conv, conv.height, conv.width, conv.pad) for p, w in _per_set(x, weight)]
    else:
        x = _nchw(rows, conv.input.grid_h, conv.input.grid_w)
        found = [_convolve(p, w, conv) for p, w in _per_set(x, weight)]
    if bias is not None:
        found = [z + b.to(z.dtype).view(1, -1, 1, 1) for z, b in zip(found, bias)]
    return activation(_rows(found), act, slope)


def input_gradient(dz: Tensor, weight: Tensor, conv: Conv, transposed: bool) -> Tensor:
    """The gradient on the padded image, (N, H + 2 pad, W + 2 pad, C); of a transposed layer on its input."""
    if transposed:
        x = _nchw(dz, conv.input.grid_h, conv.input.grid_w)
        return _rows([_convolve(p, w, conv) for p, w in _per_set(x, weight)])
    grid, x = conv.input, _nchw(dz, conv.out_h, conv.out_w)
    return _rows([_transposed(p, w, conv, grid.grid_h, grid.grid_w, 0) for p, w in _per_set(x, weight)])


def weight_gradient(rows: Tensor, dz: Tensor, conv: Conv, groups: int) -> Tensor:
    """(groups, O, C, k, k), group by group."""
    x, dy = _nchw(rows, conv.input.grid_h, conv.input.grid_w), _nchw(dz, conv.out_h, conv.out_w)
    shape = (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
    weight = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
    found = [
        torch.ops.aten.convolution_backward(
            d, p, weight, None, (conv.stride,) * 2, (0, 0), (1, 1), False, (0, 0), 1, (False, True, False)
        )[1]
        for p, d in zip(_split(x, groups), _split(dy, groups))
    ]
    return torch.stack([f.contiguous() for f in found])

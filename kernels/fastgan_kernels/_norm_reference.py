"""The backward pass of the norms in torch functions: what a CPU runs, and what is differentiated again."""

import math
from typing import Any

import torch
from torch import Tensor

from ._norm import IMAGE, Options, deviation_factor, of_parameters, per_sample
from ._pointwise import accumulator, dropout


def reference_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
    seed: Tensor | None,
    statistics: tuple[Tensor, Tensor] | int | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual, without concat, written so that torch can differentiate it again.

    y: the op's own inner output, whose sign decides the activation, or None. statistics: given (mean, rstd),
    the number of groups of a batch norm, IMAGE for those of each image, or None for those of each plane.
    """
    kind = accumulator(x.dtype)
    n, c, height, width = x.shape
    axes: tuple[int, ...] = (1, 3, 4)
    shape = (n, 1, c, height, width)
    if statistics == IMAGE:
        axes = (1, 2, 3, 4)
    elif isinstance(statistics, int):
        shape = (statistics, n // statistics, c, height, width)
    centred = x.to(kind).reshape(shape)
    if isinstance(statistics, tuple):
        mean, rstd = (t.view(n, 1, c, 1, 1) for t in statistics)
        centred = centred - mean
    else:
        centred = centred - centred.mean(axes, keepdim=True)
        if statistics == IMAGE:
            rstd = 1 / (deviation(centred) + options.eps)
        else:
            rstd = (centred.square().mean(axes, keepdim=True) + options.eps).rsqrt()
    xhat = (centred * rstd).view(x.shape)
    w = x.new_ones(c, dtype=kind) if weight is None else weight.to(kind)
    z = xhat * per_plane(w, x)
    z = z if bias is None else z + per_plane(bias, x).to(kind)
    z = z if residual is None else z + residual.to(kind)
    g = _unpad(dy.to(kind), x, options.pad, options.padding_mode)
    if options.act == "tanh":
        g = g * (1 - torch.tanh(z).square())
    elif options.act != "none":
        sign = z.detach() if y is None else y
        g = torch.where(sign > 0, g, g * (options.slope if options.act == "leaky_relu" else 0.0))
    if seed is not None:
        g = dropout(g, options.dropout, seed)
    dxhat = (g * per_plane(w, x)).view(shape)
    if not isinstance(statistics, tuple):
        s1, s2 = (t.mean(axes, keepdim=True) for t in (dxhat, dxhat * xhat.view(shape)))
        if statistics == IMAGE:
            s2 = s2 * deviation_factor(rstd, options.eps, c * height * width)
        dxhat = dxhat - s1 - xhat.view(shape) * s2
    dx = (dxhat * rstd).view(x.shape)
    sums = torch.stack([g.sum((2, 3)), (g * xhat).sum((2, 3))], 1)
    return dx.to(x.dtype), *of_parameters(sums, weight, bias, x), g.to(x.dtype)


def deviation(centred: Tensor) -> Tensor:
    """The unbiased standard deviation of each image's values, whose mean is 0; that of one value is 0."""
    count = math.prod(centred.shape[1:])
    # a norm: unlike a root it has a gradient, of 0, where all values are equal
    norm = torch.linalg.vector_norm(centred, dim=tuple(range(1, centred.dim())), keepdim=True)
    # not by max and math.sqrt, which would bind an exported function to one size
    return norm / torch.sym_max(1, count - 1) ** 0.5


def per_plane(parameter: Tensor, x: Tensor) -> Tensor:
    return per_sample(parameter, x)[:, :, None, None]


def _unpad(dy: Tensor, x: Tensor, pad: int, mode: str) -> Tensor:
    """The transpose of padding."""
    if pad == 0:
        return dy
    if mode == "zeros" or dy.numel() == 0:
        return dy[:, :, pad : pad + x.shape[2], pad : pad + x.shape[3]]
    backward = {
        "reflect": torch.ops.aten.reflection_pad2d_backward.default,
        "replicate": torch.ops.aten.replication_pad2d_backward.default,
    }[mode]
    return backward(dy.contiguous(), x.to(dy.dtype), (pad,) * 4)


def second_order(
    given: tuple[Tensor | None, ...], grads: tuple[Tensor, ...], rest: tuple[Any, ...]
) -> list[Tensor | None]:
    """The gradients of reference_backward(*given, *rest) for what is given.

    grads: for each of its results; one of another shape belongs to a result that nobody asked for.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # fresh nodes: the gradient stops here and does not run on through dy, which may depend on x
        fresh: list[Any] = [t if t is None else t.view_as(t).requires_grad_() for t in given]
        outputs = reference_backward(*fresh, *rest)
    pairs = [(o, grad) for o, grad in zip(outputs, grads) if o.requires_grad and o.shape == grad.shape]
    outputs, grads = zip(*pairs)
    inputs = [t for t in fresh if t is not None]
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=create_graph, allow_unused=True))
    return [None if t is None else next(found) for t in fresh]

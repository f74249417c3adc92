"""First and second order of the registered ops by finite differences: what autograd makes of a pair of ops.

On the CPU outside the interpreter, where an op runs its reference: gradcheck calls it some fifty times. That
the kernels' gradients are those of the reference, test_<op>.py shows.
"""

import pytest
import torch
from fastgan_kernels import channel_layer_norm_act
from fastgan_kernels._block import EXTERNAL, NONE, Layer, Plan
from fastgan_kernels._op import INTERPRET
from torch import Tensor

if INTERPRET:
    pytest.skip("gradcheck calls an op too often for the interpreter", allow_module_level=True)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def layer(
    norm: str, residual: int = NONE, transposed: bool = False, stride: int = 1, mode: str = "zeros"
) -> Layer:
    return Layer(transposed, stride, 1, 0, mode, norm, "tanh", 0.2, 0.0, 1e-5, residual, False)


# op, x, residual, weights, parameters of the norm, layers
CASES = {
    "plain": ("conv_norm_act", (1, 2, 4, 4), None, [(1, 3, 2, 3, 3)], 0, [layer("none", mode="reflect")]),
    "instance": ("conv_norm_act", (1, 9, 3, 2), None, [(1, 2, 9, 3, 3)], 2, [layer("instance", stride=2)]),
    "batch": ("conv_norm_act", (2, 1, 4, 4), None, [(1, 2, 1, 4, 4)], 2, [layer("batch")]),
    "sets": ("conv_norm_act", (2, 2, 3, 3), None, [(2, 2, 2, 3, 3)], 2, [layer("instance")]),
    "residual": (
        "conv_norm_act", (1, 2, 3, 3), (1, 2, 3, 3), [(1, 2, 2, 3, 3)], 2, [layer("instance", EXTERNAL)],
    ),
    "transposed": (
        "conv_transpose_norm_act", (1, 2, 2, 3), None, [(1, 2, 3, 3, 3)], 2,
        [layer("instance", NONE, True, 2)],
    ),
    "block": (
        "residual_block", (1, 2, 3, 4), None, [(1, 2, 2, 3, 3)] * 2, 2,
        [layer("instance", mode="reflect"), layer("instance", 0, mode="reflect")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("act", ["none", "leaky_relu", "tanh"])
def test_orders_of_channel_layer_norm_act(act):
    torch.manual_seed(0)
    tensors = random(2, 2, 3, 2), random(2, 2), random(2, 2)

    def call(*tensors: Tensor) -> Tensor:
        return torch.ops.fastgan.channel_layer_norm_act(*tensors, 1e-1, act, 0.2)[0]

    def reference(*tensors: Tensor) -> Tensor:
        return channel_layer_norm_act(*tensors, eps=1e-1, act=act)

    for function in (call, reference):
        torch.autograd.gradcheck(function, tensors, fast_mode=True)
        torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_orders(case):
    torch.manual_seed(0)
    name, size, residual, weights, norms, layers = CASES[case]
    x, added = random(*size), None if residual is None else random(*residual)
    parameters = [random(*shape) for shape in weights]
    outputs = [shape[2 if layers[0].transposed else 1] for shape in weights]
    affine = [[random(shape[0], c) for shape, c in zip(weights, outputs)] for _ in range(norms)]
    leaves = [t for t in (x, added, *parameters, *(t for group in affine for t in group)) if t is not None]
    assert sum(t.numel() for t in leaves) <= 250
    lists = [parameters, [], *affine, *([[]] * (4 - norms))]
    plan = Plan(tuple(layers), "all").text()
    op = getattr(torch.ops.fastgan, name)

    # the op reads the leaves themselves, which gradcheck moves in place
    def call(*_: Tensor) -> Tensor:
        return op(x, added, None, *lists, plan)[0]

    torch.autograd.gradcheck(call, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(call, leaves, fast_mode=True)

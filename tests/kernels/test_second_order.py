"""First and second order of the registered ops by finite differences: what autograd makes of a pair of ops.

Outside the interpreter: gradcheck calls an op some fifty times. That the kernels' gradients are those of the
formula, test_<op>.py shows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgan_kernels import batch_norm_act, channel_layer_norm_act, instance_norm_act
from fastgan_kernels._block import EXTERNAL, NONE, Layer, Plan
from fastgan_kernels._op import INTERPRET
from torch import Tensor

from tests.kernels import norm_cases
from tests.kernels.norm_cases import FORMS, LAYOUTS

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


def check_orders(function: Callable[..., Any], tensors: list[Tensor | None]) -> None:
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


NAMES = ("x", "weight", "bias", "residual", "concat")
PLAIN = ("affine", {"act": "relu"})
FULL: dict[str, Any] = {"act": "none", "dropout": 0.0, "pad": 0, "padding_mode": "zeros"}


def public(op: Callable[..., Tensor], tensors: norm_cases.Tensors, options: dict[str, Any]) -> Any:
    """The public function of the tensors in a row, with its options in full: a seed for a dropout."""
    full = norm_cases.complete(options, tensors["x"].device.type)
    return lambda *values: op(**dict(zip(tensors, values)), **full)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts, act", [("affine", "relu"), ("affine residual", "leaky_relu")])
def test_instance_norm_act(parts, act, layout, device):
    tensors = norm_cases.make((2, 2, 3, 4), parts, torch.float64, layout, device)

    def op(*values: Tensor | None) -> Tensor:
        return torch.ops.fastgan.instance_norm_act(*values, 1e-5, act, 0.2)[0]

    check_orders(op, [tensors.get(name) for name in NAMES[:4]])
    check_orders(public(instance_norm_act, tensors, {"act": act}), [*tensors.values()])


@pytest.mark.parametrize("parts, options", FORMS)
def test_forms_of_instance_norm_act(parts, options, device):
    tensors = norm_cases.make((2, 1, 2, 3), parts, torch.float64, LAYOUTS[0], device)
    check_orders(public(instance_norm_act, tensors, options), [*tensors.values()])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("parts, options", [PLAIN, *FORMS])
def test_batch_norm_act(parts, options, fixed, device):
    tensors = norm_cases.make((2, 1, 2, 3), parts, torch.float64, LAYOUTS[0], device)
    sets, statistics = (2 if "sets" in parts else 1), (None, None)
    if fixed:
        shape = (sets, 1) if sets > 1 else (1,)
        mean, var = (
            torch.randn(shape, device=device).double(),
            torch.rand(shape, device=device).double() + 0.5,
        )
        statistics = (mean, var)
        options = {**options, "running_mean": mean, "running_var": var, "training": False}

    def op(*values: Tensor | None) -> Tensor:
        act, dropout, pad, mode = ({**FULL, **options}[key] for key in FULL)
        seed = torch.tensor([31], device=device) if dropout else None
        given = (1e-5, act, 0.2, dropout, pad, mode, seed)
        return torch.ops.fastgan.batch_norm_act(*values[:4], *statistics, sets, *given, values[4])[0]

    check_orders(op, [tensors.get(name) for name in NAMES])
    check_orders(public(batch_norm_act, tensors, options), [*tensors.values()])


@pytest.mark.parametrize("act", ["none", "leaky_relu", "tanh"])
def test_channel_layer_norm_act(act, device):
    tensors = norm_cases.make((2, 2, 3, 2), "sets", torch.float64, LAYOUTS[0], device)

    def op(*values: Tensor) -> Tensor:
        return torch.ops.fastgan.channel_layer_norm_act(*values, 1e-1, act, 0.2)[0]

    check_orders(op, [*tensors.values()])
    check_orders(public(channel_layer_norm_act, tensors, {"act": act, "eps": 1e-1}), [*tensors.values()])

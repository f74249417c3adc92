import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from fastgan_kernels import _norm, _norm_reference, channel_layer_norm_act
from fastgan_kernels._op import INTERPRET, runs_kernel
from fastgan_kernels._tune import PlaneTile
from torch import Tensor

from tests.kernels import norm_cases
from tests.kernels.norm_cases import LAYOUTS

# the package names the function like its module
module = importlib.import_module("fastgan_kernels.channel_layer_norm_act")

AFFINE = ("affine", {"act": "relu"})
CASES: list[tuple[tuple[int, ...], tuple[str, dict[str, Any]]]] = [
    ((1, 3, 5, 7), AFFINE),  # one image, odd, rectangular
    ((3, 3, 5, 7), ("affine", {"act": "leaky_relu"})),
    ((3, 3, 5, 7), ("", {})),
    ((2, 66, 3, 3), ("affine", {"act": "tanh"})),  # two channels over a block, one pixel over one of 8
    ((4, 3, 2, 3), ("sets", {"act": "relu"})),
    ((1, 2, 1, 1), AFFINE),  # fewest values that have a deviation
    ((0, 3, 4, 4), AFFINE),  # empty batch
]


def normalise(x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean((1, 2, 3), keepdim=True)
    variance = centred.square().sum((1, 2, 3), keepdim=True) / (math.prod(x.shape[1:]) - 1)
    return centred / (variance.sqrt() + eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, form", CASES)
def test_matches_reference(shape, form, layout, device):
    parts, options = form
    tensors = norm_cases.make(shape, parts, torch.float64, layout, device)
    norm_cases.assert_matches(channel_layer_norm_act, tensors, normalise, options, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype, layout, device):
    # float32 sums of 105 terms; one rounding of y and of the gradients to a half type, and Triton's
    # interpreter truncates to bfloat16 where a GPU rounds
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    tensors = norm_cases.make((2, 3, 5, 7), "affine", dtype, layout, device)
    norm_cases.assert_matches(channel_layer_norm_act, tensors, normalise, {"act": "leaky_relu"}, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tile",
    [
        PlaneTile(1, 8, 2, 7, 4),  # of 16 values, the last of 9
        PlaneTile(1, 16, 4, 2, 4),  # the last chunk ends in its third step
        PlaneTile(1, 128, 1, 0, 4),  # a single chunk
    ],
)
def test_chunks(tile, layout, device, monkeypatch):
    monkeypatch.setattr(_norm, "plane_tile", lambda *shape: tile)
    tensors = norm_cases.make((2, 3, 5, 7), "affine", torch.float64, layout, device)
    norm_cases.assert_matches(channel_layer_norm_act, tensors, normalise, {"act": "leaky_relu"}, 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks", [1, 7])
def test_large_mean(chunks, layout, device, monkeypatch):
    # |mean| = 1000 std: E[x^2] - E[x]^2 in float32 would be lost altogether; the float32 mean is exact to
    # 6e-5, and an error of the mean is one of xhat
    if chunks > 1:
        monkeypatch.setattr(_norm, "plane_tile", lambda *shape: PlaneTile(1, 8, 2, 7, 4))
    x = (torch.randn(2, 3, 5, 7, device=device) + 1000).contiguous(memory_format=layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, y64 = channel_layer_norm_act(x), normalise(exact)
    torch.testing.assert_close(y.double(), y64, rtol=0, atol=3e-4)
    dy = torch.randn_like(y)
    dx, dx64 = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(y64, exact, dy.double())[0]
    torch.testing.assert_close(dx.double(), dx64, rtol=0, atol=3e-4)


def test_large_image(device):
    # more chunks than a plane of other norms gets
    assert _norm.tile_of(torch.empty(1, 1, 2**21, 1), 1024)[3].chunks == 1024
    x = 3 * torch.randn(1, 2, 97, 96, device=device) + 1
    torch.testing.assert_close(channel_layer_norm_act(x).double(), normalise(x.double()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 1, 1, 1)])
def test_equal_values(shape, layout, device):
    # no deviation, and of one value it is not even defined: xhat is 0, and so is dx
    x = torch.full(shape, 2.0, device=device).contiguous(memory_format=layout).requires_grad_()
    bias = torch.randn(shape[1], device=device)
    y = channel_layer_norm_act(x, torch.ones_like(bias), bias)
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand(shape))
    dy = torch.randn(shape, device=device)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = 1e5 * (dy - dy.mean((1, 2, 3), keepdim=True))
    torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-1)


def test_eps_and_slope(device):
    # a deviation that eps outweighs
    x = (1e-3 * torch.randn(2, 2, 3, 4, dtype=torch.float64, device=device)).requires_grad_()
    tensors = {"x": x, "weight": torch.randn(2, dtype=x.dtype, device=device, requires_grad=True)}
    tensors["bias"] = torch.randn_like(tensors["weight"]).requires_grad_()
    op = partial(channel_layer_norm_act, eps=0.5, slope=0.2)
    norm_cases.assert_matches(op, tensors, partial(normalise, eps=0.5), {"act": "leaky_relu"}, 1e-12)
    y = channel_layer_norm_act(x, act="leaky_relu", slope=0.01)
    expected = torch.nn.functional.leaky_relu(normalise(x), 0.01)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_gradient_penalty(device):
    # the second order as WGAN-GP uses it: the gradient of a gradient's norm with respect to weights
    tensors = norm_cases.make((2, 2, 3, 2), "affine", torch.float64, LAYOUTS[0], device)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
        loss = (dx.flatten(1).norm(dim=1) - 1).square().sum()
        return torch.autograd.grad(loss, [*tensors.values()])

    options = {"act": "leaky_relu"}
    found = penalty(channel_layer_norm_act(**tensors, **options))
    expected = penalty(norm_cases.formula(tensors, normalise, options))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "parts, layout", [("affine", LAYOUTS[1])] if INTERPRET else [("affine", LAYOUTS[1]), ("", LAYOUTS[0])]
)
def test_registration(parts, layout, device):
    tensors = norm_cases.make((2, 2, 3, 2), parts, torch.float32, layout, device)
    x, weight, bias = (tensors.get(name) for name in ("x", "weight", "bias"))
    options = (1e-5, "relu", 0.2)
    torch.library.opcheck(torch.ops.fastgan.channel_layer_norm_act.default, (x, weight, bias, *options))
    with torch.no_grad():
        y, mean, rstd = torch.ops.fastgan.channel_layer_norm_act(x, weight, bias, *options)
    dy = torch.randn_like(y).requires_grad_()
    backward = torch.ops.fastgan.channel_layer_norm_act_backward.default
    torch.library.opcheck(backward, (dy, x, mean, rstd, weight, bias, *options))


def test_runs_the_kernel(device, monkeypatch):
    tensors = norm_cases.make((2, 2, 4, 4), "affine", torch.float32, LAYOUTS[0], device)
    if not runs_kernel(tensors["x"]):
        pytest.skip("the CPU outside the interpreter runs the reference")
    monkeypatch.delattr(module, "reference")
    monkeypatch.delattr(_norm_reference, "reference_backward")
    y = channel_layer_norm_act(**tensors, act="relu")
    grads = torch.autograd.grad(y, [*tensors.values()], torch.randn_like(y))
    assert all(torch.isfinite(g).all() for g in grads)


def test_parameters_follow_the_dtype_of_x(device):
    x = torch.randn(2, 3, 2, 2, device=device)
    weight, bias = (torch.randn(3, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        y = channel_layer_norm_act(x.bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), (weight, bias)))


def test_non_contiguous_input(device):
    whole = torch.randn(2, 6, 5, 6, dtype=torch.float64, device=device)
    for x in (whole[:, ::2, 1:, ::3], whole.contiguous(memory_format=LAYOUTS[1])[:, :4]):
        x = x.detach().requires_grad_()
        y = channel_layer_norm_act(x, act="relu")
        # a broadcast gradient has no strides to speak of
        dy = torch.randn(2, 1, 1, x.shape[3], dtype=x.dtype, device=device).expand_as(y)
        expected = normalise(x).relu()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        pair = (torch.autograd.grad(t, x, dy)[0] for t in (y, expected))
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


def test_no_graph_break(device):
    torch._dynamo.reset()
    tensors = norm_cases.make((2, 3, 3, 2), "affine", torch.float32, LAYOUTS[1], device)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return channel_layer_norm_act(x, weight, bias, act="relu")

    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(*tensors.values())
    expected = layer(*tensors.values())
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, [*tensors.values()], dy) for t in (y, expected)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be \(N, C, H, W\), got shape \(3, 4, 4\)"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "x must be float16, .*, got torch.int32"),
        ({"weight": torch.zeros(4)}, r"weight must be of shape \(3,\) or \(S, 3\), .*, got \(4,\)"),
        ({"bias": torch.zeros(2, 3)}, "x must be a batch that 2 weight sets can share, got 1 samples"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"act": "gelu"}, "act must be one of none, relu, leaky_relu, tanh, got 'gelu'"),
        ({"slope": -0.1}, "slope must be >= 0, got -0.1"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {"x": torch.zeros(1, 3, 4, 4), **change}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=f"channel_layer_norm_act: {message}"):
        channel_layer_norm_act(**arguments)

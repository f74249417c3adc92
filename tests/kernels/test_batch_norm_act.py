import importlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import _norm, _norm_reference
from fastgan_kernels._op import runs_kernel
from fastgan_kernels._tune import PlaneTile
from fastgan_kernels.batch_norm_act import batch_norm_act
from torch import Tensor

from tests.kernels import norm_cases
from tests.kernels.norm_cases import CONCATENATED, LAYOUTS, PADDED

# the package names the function like its module
module = importlib.import_module("fastgan_kernels.batch_norm_act")

PLAIN = ("affine", {"act": "relu"})
CASES = [*norm_cases.CASES, (norm_cases.SHAPE, PLAIN), ((2, 3, 1, 1), PLAIN)]


def normalise(x: Tensor, sets: int = 1, eps: float = 1e-5) -> Tensor:
    groups = x.reshape(sets, -1, *x.shape[1:])
    centred = groups - groups.mean((1, 3, 4), keepdim=True)
    rstd = 1 / (centred.square().mean((1, 3, 4), keepdim=True) + eps).sqrt()
    return (centred * rstd).view(x.shape)


def normaliser(parts: str) -> Any:
    return partial(normalise, sets=2 if "sets" in parts else 1)


def running(c: int, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(c, device=device).to(dtype), (torch.rand(c, device=device) + 0.5).to(dtype)


def op_of(names: list[str], options: dict[str, Any]) -> Any:
    return lambda *tensors: batch_norm_act(**dict(zip(names, tensors)), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, form", CASES)
def test_matches_reference(shape, form, layout, device):
    parts, options = form
    tensors = norm_cases.make(shape, parts, torch.float64, layout, device)
    norm_cases.assert_matches(batch_norm_act, tensors, normaliser(parts), options, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts, options", [PLAIN, PADDED, CONCATENATED])
def test_other_types(parts, options, dtype, device):
    # float32 sums of 140 terms; one rounding of y, on the CPU three, and Triton's interpreter truncates to
    # bfloat16 where a GPU rounds
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    tensors = norm_cases.make(norm_cases.SHAPE, parts, dtype, LAYOUTS[1], device)
    norm_cases.assert_matches(batch_norm_act, tensors, normaliser(parts), options, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts", ["affine", "sets"])
def test_chunks(parts, layout, device, monkeypatch):
    monkeypatch.setattr(_norm, "plane_tile", lambda *shape: PlaneTile(2, 8, 2, 3, 4))
    tensors = norm_cases.make((4, 3, 5, 7), parts, torch.float64, layout, device)
    norm_cases.assert_matches(batch_norm_act, tensors, normaliser(parts), {"act": "leaky_relu"}, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_torch(layout, device):
    # y, the gradients and the running statistics of F.batch_norm, in training and not
    x = (3 * torch.randn(4, 5, 6, 7, device=device) + 1).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(5, device=device, requires_grad=True) for _ in range(2))
    own, theirs = running(5, device, torch.float32), running(5, device, torch.float32)
    for a, b in zip(own, theirs):
        b.copy_(a)
    for training, momentum in ((True, 0.1), (True, 0.7), (False, 0.1)):
        y = batch_norm_act(x, weight, bias, None, *own, training=training, momentum=momentum)
        expected = F.batch_norm(x, *theirs, weight, bias, training, momentum)
        dy = torch.randn_like(y)
        pairs = [(y, expected), *zip(own, theirs)]
        pairs += zip(*(torch.autograd.grad(t, (x, weight, bias), dy) for t in (y, expected)))
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_running_statistics_of_sets(device):
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64, device=device)
    weight = torch.ones(2, 3, dtype=x.dtype, device=device)
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    batch_norm_act(x, weight, None, None, mean, var, momentum=0.25)
    groups = x.view(2, 3, 3, 20)
    torch.testing.assert_close(mean, 0.25 * groups.mean((1, 3)))
    torch.testing.assert_close(var, 0.75 + 0.25 * groups.var((1, 3)))
    given = (mean.clone(), var.clone())
    y = batch_norm_act(x, weight, None, None, mean, var, training=False)
    scale = [t[:, None, :, None, None] for t in given]
    expected = (x.view(2, 3, 3, 4, 5) - scale[0]) / (scale[1] + 1e-5).sqrt()
    torch.testing.assert_close(y, expected.view(x.shape))
    assert torch.equal(mean, given[0]) and torch.equal(var, given[1])


def test_without_running_statistics(device):
    x = torch.randn(4, 3, 4, 5, device=device)
    # as torch: there are no others than those of x
    torch.testing.assert_close(batch_norm_act(x, training=False), batch_norm_act(x))


def test_one_value(device):
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64, device=device)
    mean, var = (torch.zeros(3, dtype=x.dtype, device=device) for _ in range(2))
    bias = torch.randn(3, dtype=x.dtype, device=device)
    y = batch_norm_act(x, None, bias, None, mean, var, momentum=0.5)
    # torch adds and subtracts the mean, times 1 / sqrt(eps)
    torch.testing.assert_close(y, bias.view(1, 3, 1, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean, 0.5 * x.flatten())
    torch.testing.assert_close(var, torch.zeros_like(var), rtol=0, atol=1e-12)


def test_large_mean(device):
    # |mean| = 100 std: E[x^2] - E[x]^2 in float32 would be off by 1e-2
    x = torch.randn(3, 2, 24, 20, device=device) + 100
    torch.testing.assert_close(batch_norm_act(x).double(), normalise(x.double()), rtol=0, atol=3e-4)


def test_parameters_follow_the_dtype_of_x(device):
    x = torch.randn(2, 3, 4, 4, device=device)
    weight, bias = (torch.randn(3, device=device, requires_grad=True) for _ in range(2))
    mean, var = running(3, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = batch_norm_act(x.bfloat16(), weight, bias, None, mean, var)
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), (weight, bias)))


@pytest.mark.parametrize("form, fixed", norm_cases.crossed([CONCATENATED, PADDED, PLAIN], [False, True]))
def test_registration(form, fixed, device):
    parts, options = form
    tensors = norm_cases.make((2, 3, 5, 4), parts, torch.float32, LAYOUTS[1], device)
    names = ("x", "weight", "bias", "residual", "concat")
    x, weight, bias, residual, concat = (tensors.get(name) for name in names)
    sets = len(weight) if weight.dim() == 2 else 1
    full = {"dropout": 0.0, "pad": 0, "padding_mode": "zeros", **options}
    seed = torch.tensor([5], device=device) if full["dropout"] else None
    given = (1e-5, full["act"], 0.2, full["dropout"], full["pad"], full["padding_mode"])
    statistics = (bias.detach(), weight.detach().abs()) if fixed else (None, None)
    arguments = (x, weight, bias, residual, *statistics, sets, *given, seed, concat)
    torch.library.opcheck(torch.ops.fastgan.batch_norm_act.default, arguments)
    with torch.no_grad():
        y, mean, rstd = torch.ops.fastgan.batch_norm_act(*arguments)
    dy = torch.randn_like(y)[:, y.shape[1] - x.shape[1] :]
    inner = None if residual is None else _norm.inner(y, x, full["pad"])
    saved = (mean, rstd, weight, bias, inner, 0 if fixed else sets, *given, seed)
    tail = (residual if full["act"] == "tanh" else None, residual is not None)
    backward = torch.ops.fastgan.batch_norm_act_backward.default
    torch.library.opcheck(backward, (dy.requires_grad_(), x, *saved, *tail))


def test_runs_the_kernel(device, monkeypatch):
    tensors = norm_cases.make((2, 2, 4, 4), "affine residual", torch.float32, LAYOUTS[0], device)
    if not runs_kernel(tensors["x"]):
        pytest.skip("the CPU outside the interpreter runs the reference")
    monkeypatch.delattr(module, "reference")
    monkeypatch.delattr(_norm_reference, "reference_backward")
    y = batch_norm_act(**tensors, act="relu")
    assert all(
        torch.isfinite(g).all() for g in torch.autograd.grad(y, [*tensors.values()], torch.randn_like(y))
    )


def test_non_contiguous_input(device):
    whole = torch.randn(2, 6, 9, 10, dtype=torch.float64, device=device)
    for x in (
        whole[:, ::2, 1:, ::3],
        whole.transpose(2, 3),
        whole.contiguous(memory_format=LAYOUTS[1])[:, :4],
    ):
        x = x.detach().requires_grad_()
        y = batch_norm_act(x, act="relu")
        # a broadcast gradient has no strides to speak of
        dy = torch.randn(2, 1, 1, x.shape[3], dtype=x.dtype, device=device).expand_as(y)
        expected = normalise(x).relu()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        pair = (torch.autograd.grad(t, x, dy)[0] for t in (y, expected))
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts, options", [PLAIN, PADDED, CONCATENATED])
def test_no_graph_break(parts, options, device):
    torch._dynamo.reset()
    tensors = norm_cases.make((2, 3, 5, 6), parts, torch.float32, LAYOUTS[1], device)
    rows = (2, 3) if "sets" in parts else (3,)
    statistics = {name: torch.ones(rows, device=device) for name in ("running_mean", "running_var")}
    layer = op_of([*tensors], norm_cases.complete({**options, **statistics}, device))
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(*tensors.values())
    found = [t.clone() for t in statistics.values()]
    for t in statistics.values():
        t.fill_(1)
    expected = layer(*tensors.values())
    torch.testing.assert_close([y, *found], [expected, *statistics.values()])
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, list(tensors.values()), dy) for t in (y, expected))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be \(N, C, H, W\), got shape \(3, 4, 4\)"),
        ({"x": torch.zeros(1, 3, 0, 4)}, r"x must be at least one pixel, got shape \(1, 3, 0, 4\)"),
        ({"weight": torch.zeros(4)}, r"weight must be of shape \(3,\) or \(S, 3\), .*, got \(4,\)"),
        ({"bias": torch.zeros(2, 3)}, "x must be a batch that 2 weight sets can share, got 1 samples"),
        ({"residual": torch.zeros(1, 3, 4, 1)}, r"residual must be of shape \(1, 3, 4, 4\), got \(1, 3, 4, "),
        ({"running_mean": torch.zeros(3)}, "running_var must be given where the other .*, got None"),
        ({"running_mean": torch.zeros(3), "running_var": torch.zeros(2)}, "running_var must be of shape"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"act": "gelu"}, "act must be one of none, relu, leaky_relu, tanh, got 'gelu'"),
        ({"dropout": -0.1}, "dropout must be in 0 <= p < 1, got -0.1"),
        ({"concat": torch.zeros(1, 3, 4, 4), "pad": 1}, "pad must be 0 with concat, got 1"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {"x": torch.zeros(1, 3, 4, 4), **change}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=f"batch_norm_act: {message}"):
        batch_norm_act(**arguments)


def test_sets_need_running_statistics_of_their_own(device):
    x, weight, one = (torch.ones(shape, device=device) for shape in ((2, 3, 4, 4), (2, 3), (3,)))
    with pytest.raises(ValueError, match=r"running_mean must be .* a row for each weight set, got \(3,\)"):
        batch_norm_act(x, weight, None, None, one, one)

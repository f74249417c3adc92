import importlib
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import _norm, _norm_reference, instance_norm_act
from fastgan_kernels._op import INTERPRET, runs_kernel
from fastgan_kernels._pointwise import keep_mask
from fastgan_kernels._tune import PlaneTile
from torch import Tensor

from tests.kernels import norm_cases
from tests.kernels.norm_cases import CONCATENATED, FORMS, PADDED

# the package names the function like its module
module = importlib.import_module("fastgan_kernels.instance_norm_act")

SHAPES = [
    (2, 3, 1, 1),  # smallest legal: one pixel
    (2, 3, 5, 7),  # odd, rectangular
    (2, 40, 9, 5),  # more than one block of channels, the last one not full
    (0, 3, 4, 4),  # empty batch
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# affine, residual, activation
OPTIONS = [
    (False, False, "none"),
    (True, False, "relu"),
    (True, False, "leaky_relu"),
    (False, True, "relu"),
    (True, True, "none"),
    (True, True, "leaky_relu"),
]
CASES = [(shape, options, layout) for shape in SHAPES for options in OPTIONS for layout in LAYOUTS]
LARGE_SHAPES = [
    (1, 2, 131, 127),  # a plane larger than a program, in both layouts
    (1, 66, 33, 32),  # the same in channels_last only, with two blocks of channels
]
CASES += [(shape, OPTIONS[-1], layout) for shape, layout in norm_cases.crossed(LARGE_SHAPES, LAYOUTS)]
# two blocks of channels, two steps of each chunk, the last chunk not full
CHUNKED = PlaneTile(2, 8, 2, 3, 4)


def inputs(
    shape: tuple[int, ...],
    options: tuple[bool, bool, str],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: str,
) -> list[Tensor | None]:
    affine, has_residual, _ = options
    x = (3 * torch.randn(shape, device=device) + 1).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape[1], device=device).to(dtype) if affine else None
    bias = torch.randn(shape[1], device=device).to(dtype) if affine else None
    residual = torch.randn(shape, device=device).to(dtype) if has_residual else None
    return [None if t is None else t.requires_grad_() for t in (x, weight, bias, residual)]


def formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    eps: float = 1e-5,
) -> Tensor:
    centred = x - x.mean((2, 3), keepdim=True)
    z = centred / (centred.square().mean((2, 3), keepdim=True) + eps).sqrt()
    if weight is not None and bias is not None:
        z = z * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual
    return {"none": z, "relu": F.relu(z), "leaky_relu": F.leaky_relu(z, 0.2)}[act]


def differentiable(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def assert_matches(tensors: list[Tensor | None], act: str, tolerance: float) -> None:
    """y and every gradient against the formula in float64; the tolerance is relative to the largest value."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y = instance_norm_act(*tensors, act=act)
    y64 = formula(*exact, act=act)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    found = torch.autograd.grad(y, differentiable(tensors), dy)
    expected = torch.autograd.grad(y64, differentiable(exact), dy.double())
    names = ["y", *(n for n, t in zip(("dx", "dweight", "dbias", "dresidual"), tensors) if t is not None)]
    for name, a, b in zip(names, (y, *found), (y64, *expected)):
        assert a.dtype == y.dtype, name
        scale = b.abs().max().clamp(min=1).item() if b.numel() else 1.0
        where = partial("{}: {}".format, name)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * scale, msg=where)
    layout = module.layout(tensors[0])
    assert y.is_contiguous(memory_format=layout)
    assert found[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape, options, layout", CASES)
def test_matches_reference(shape, options, layout, device):
    # float32 sums of up to 17000 terms; 1e-6 is seen
    assert_matches(inputs(shape, options, torch.float32, layout, device), options[2], 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape, options, tile",
    [
        ((2, 3, 5, 7), (True, False, "relu"), None),
        ((2, 3, 5, 7), (True, True, "none"), None),
        ((2, 3, 5, 7), (True, False, "relu"), CHUNKED),
        *([] if INTERPRET else [((1, 2, 131, 127), (True, False, "relu"), None)]),
    ],
)
def test_half_precision(shape, options, tile, dtype, layout, device, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(_norm, "plane_tile", lambda *shape: tile)
    # one rounding of y (on the CPU another, before torch adds the residual); Triton's interpreter truncates
    # to bfloat16 where a GPU rounds
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_matches(inputs(shape, options, dtype, layout, device), options[2], tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tile",
    [
        PlaneTile(1, 64, 1, 0, 4),  # one plane
        PlaneTile(4, 64, 1, 0, 4),  # more planes than there are
        PlaneTile(2, 8, 1, 5, 4),  # five chunks, the last of 3 pixels
        CHUNKED,  # the last step of the last chunk is empty
        PlaneTile(2, 4, 4, 3, 4),  # the last chunk ends in its first step
        PlaneTile(4, 16, 4, 1, 4),  # a single chunk
    ],
)
def test_every_tile(tile, layout, device, monkeypatch):
    tensors = inputs((2, 3, 5, 7), (True, True, "leaky_relu"), torch.float64, layout, device)
    if not runs_kernel(tensors[0]):
        pytest.skip("the CPU outside the interpreter has no tiles")
    monkeypatch.setattr(_norm, "plane_tile", lambda *shape: tile)
    assert_matches(tensors, "leaky_relu", 1e-13)
    assert_matches(tensors[:3] + [None], "relu", 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, tile",
    [
        ((2, 3, 24, 20), None),
        ((2, 3, 24, 20), PlaneTile(2, 64, 2, 4, 4)),  # chunks of 128 pixels
        *([] if INTERPRET else [((1, 2, 131, 127), None), ((1, 40, 37, 33), None)]),
    ],
)
def test_large_mean(shape, tile, layout, device, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(_norm, "plane_tile", lambda *shape: tile)
    # |mean| = 100 std: E[x^2] - E[x]^2 in float32 would be off by 1e-2; the float32 mean is exact to 1e-5
    x = (torch.randn(shape, device=device) + 100).contiguous(memory_format=layout)
    y = instance_norm_act(x)
    torch.testing.assert_close(y.double(), formula(x.double(), None, None, None, "none"), rtol=0, atol=3e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_third_order(layout, device):
    (x, *_) = inputs((1, 2, 3, 3), (False, False, "leaky_relu"), torch.float64, layout, device)

    def third(y: Tensor) -> Tensor:
        for power in (3, 3, 2):
            (y,) = torch.autograd.grad(y.pow(power).sum(), x, create_graph=True)
        return y

    expected = third(formula(x, None, None, None, "leaky_relu"))
    found = third(torch.ops.fastgan.instance_norm_act(x, None, None, None, 1e-5, "leaky_relu", 0.2)[0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradient_penalty(device):
    # the second order as WGAN-GP uses it: the gradient of a gradient's norm with respect to weights
    x, weight, bias, _ = inputs((2, 3, 6, 5), (True, False, "leaky_relu"), torch.float64, LAYOUTS[0], device)

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad((dx.flatten(1).norm(dim=1) - 1).square().sum(), (x, weight, bias))

    found = penalty(instance_norm_act(x, weight, bias, act="leaky_relu"))
    for a, b in zip(found, penalty(formula(x, weight, bias, None, "leaky_relu"))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options, layout", norm_cases.crossed([(False, False, "none"), (True, True, "relu")], LAYOUTS)
)
def test_registration(options, layout, device):
    tensors = inputs((2, 3, 5, 4), options, torch.float32, layout, device)
    arguments = (*tensors, 1e-5, options[2], 0.2)
    torch.library.opcheck(torch.ops.fastgan.instance_norm_act.default, arguments)
    with torch.no_grad():
        y, mean, rstd = torch.ops.fastgan.instance_norm_act(*arguments)
    x, weight, bias, residual = tensors
    dy = torch.randn_like(y).requires_grad_()
    saved = (mean, rstd, weight, bias, None if residual is None else y, *arguments[4:])
    torch.library.opcheck(torch.ops.fastgan.instance_norm_act_backward.default, (dy, x, *saved))


def normalise(x: Tensor) -> Tensor:
    return formula(x, None, None, None, "none")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, form", norm_cases.CASES)
def test_forms(shape, form, layout, device):
    parts, options = form
    tensors = norm_cases.make(shape, parts, torch.float64, layout, device)
    norm_cases.assert_matches(instance_norm_act, tensors, normalise, options, 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parts, options", [FORMS[0], FORMS[2], PADDED])
def test_forms_in_chunks(parts, options, layout, device, monkeypatch):
    monkeypatch.setattr(_norm, "plane_tile", lambda *shape: CHUNKED)
    tensors = norm_cases.make((2, 3, 5, 7), parts, torch.float64, layout, device)
    norm_cases.assert_matches(instance_norm_act, tensors, normalise, options, 1e-12)


@pytest.mark.parametrize("parts, options", [PADDED, CONCATENATED, FORMS[9]])
def test_forms_in_half_precision(parts, options, device):
    # as in test_half_precision, and the CPU rounds once more in the dropout
    tensors = norm_cases.make((2, 3, 5, 7), parts, torch.bfloat16, LAYOUTS[1], device)
    norm_cases.assert_matches(instance_norm_act, tensors, normalise, options, 2**-6)


def op_of(names: list[str], options: dict[str, Any]) -> Any:
    return lambda *tensors: instance_norm_act(**dict(zip(names, tensors)), **options)


@pytest.mark.parametrize(
    "parts, options", [PADDED, CONCATENATED] if INTERPRET else [PADDED, CONCATENATED, FORMS[7]]
)
def test_registration_of_forms(parts, options, device):
    tensors = norm_cases.make((2, 3, 5, 4), parts, torch.float32, LAYOUTS[1], device)
    full = {"dropout": 0.0, "pad": 0, "padding_mode": "zeros", **options}
    x, weight, bias, residual, concat = (
        tensors.get(name) for name in ("x", "weight", "bias", "residual", "concat")
    )
    given = (1e-5, options["act"], 0.2, full["dropout"], full["pad"], full["padding_mode"])
    seed = torch.tensor([5], device=device) if full["dropout"] else None
    arguments = (x, weight, bias, residual, *given, seed, concat)
    torch.library.opcheck(torch.ops.fastgan.instance_norm_act.default, arguments)
    with torch.no_grad():
        y, mean, rstd = torch.ops.fastgan.instance_norm_act(*arguments)
    dy = torch.randn_like(y)
    if concat is not None:
        dy, y = dy[:, 2:], y[:, 2:]
    inner = _norm.inner(y, x, full["pad"])
    saved = (mean, rstd, weight, bias, None if residual is None else inner, *given, seed)
    tail = (residual if options["act"] == "tanh" else None, residual is not None)
    backward = torch.ops.fastgan.instance_norm_act_backward.default
    torch.library.opcheck(backward, (dy.requires_grad_(), x, *saved, *tail))


@pytest.mark.parametrize("parts, options", [PADDED, CONCATENATED])
def test_no_graph_break_in_forms(parts, options, device):
    torch._dynamo.reset()
    tensors = norm_cases.make((2, 3, 5, 6), parts, torch.float32, LAYOUTS[1], device)
    layer = op_of([*tensors], norm_cases.complete(options, device))
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(*tensors.values())
    expected = layer(*tensors.values())
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(t, list(tensors.values()), dy) for t in (y, expected))):
        torch.testing.assert_close(a, b)


def test_one_pixel_with_a_border(device):
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64, device=device)
    bias = torch.randn(3, dtype=torch.float64, device=device)
    y = instance_norm_act(x, None, bias, pad=1, padding_mode="replicate")
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand(2, 3, 3, 3))


def test_dropout_draws_a_seed(device):
    x = torch.randn(1, 4, 16, 16, device=device)
    torch.manual_seed(1)
    first, second = (instance_norm_act(x, act="relu", dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, instance_norm_act(x, act="relu", dropout=0.5))
    assert not torch.equal(first, second)
    seed = torch.tensor([7], device=device)
    kept = keep_mask(seed, x.shape, 0.5)
    y = instance_norm_act(x, dropout=0.5, seed=seed)
    torch.testing.assert_close(y, instance_norm_act(x) * kept * 2)


def test_runs_the_kernel(device, monkeypatch):
    tensors = inputs((1, 2, 4, 4), (True, True, "relu"), torch.float32, LAYOUTS[0], device)
    if not runs_kernel(tensors[0]):
        pytest.skip("the CPU outside the interpreter runs the reference")
    monkeypatch.delattr(module, "reference")
    monkeypatch.delattr(_norm_reference, "reference_backward")
    y = instance_norm_act(*tensors, act="relu")
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y, tensors, torch.randn_like(y)))


@pytest.mark.parametrize("options", [(True, False, "none"), (True, True, "relu")])
def test_one_pixel(options, device):
    x, weight, bias, residual = inputs((2, 3, 1, 1), options, torch.float32, LAYOUTS[0], device)
    y = instance_norm_act(x, weight, bias, residual, act=options[2])
    z = bias.view(1, -1, 1, 1).expand_as(x) if residual is None else bias.view(1, -1, 1, 1) + residual
    assert torch.equal(y, z if options[2] == "none" else z.relu())
    assert torch.equal(torch.autograd.grad(y, x, torch.randn_like(y))[0], torch.zeros_like(x))


def test_eps_and_slope(device):
    x = 1e-2 * torch.randn(1, 2, 6, 6, dtype=torch.float64, device=device)
    expected = F.leaky_relu(formula(x, None, None, None, "none", eps=0.5), 0.01)
    torch.testing.assert_close(instance_norm_act(x, eps=0.5, act="leaky_relu", slope=0.01), expected)


def test_parameters_follow_the_dtype_of_x(device):
    # as under autocast: half-precision activations, float32 parameters
    x, weight, bias, residual = inputs((1, 3, 4, 4), (True, True, "relu"), torch.float32, LAYOUTS[0], device)
    with torch.autocast(device, torch.bfloat16):
        y = instance_norm_act(x.bfloat16(), weight, bias, residual, act="relu")
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, (x, weight, bias, residual), torch.randn_like(y))
    assert all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu"])
def test_nan_stays_nan(act, device):
    x = torch.randn(1, 2, 4, 4, device=device)
    x[0, 0, 1, 1] = float("nan")
    y = instance_norm_act(x, act=act)
    assert y[0, 0].isnan().all() and not y[0, 1].isnan().any()


def test_non_contiguous_input(device):
    whole = torch.randn(2, 6, 9, 10, device=device)
    nhwc = whole.contiguous(memory_format=torch.channels_last)
    for x in (whole[:, ::2, 1:, ::3], whole.transpose(2, 3), nhwc[:, :4]):
        x = x.detach().requires_grad_()
        residual = torch.randn(x.shape[:2] + x.shape[:1:-1], device=device).transpose(2, 3).requires_grad_()
        assert_matches([x, None, None, residual], "relu", 1e-5)
        y = instance_norm_act(x, act="relu")
        # a broadcast gradient has no strides to speak of
        dy = torch.randn(2, 1, 1, x.shape[3], device=device).expand_as(y)
        x64 = x.detach().double().requires_grad_()
        expected = torch.autograd.grad(formula(x64, None, None, None, "relu"), x64, dy.double())[0]
        torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_takes_the_layout_of_x(layout, device):
    tensors = inputs((2, 3, 5, 6), (False, True, "relu"), torch.float32, layout, device)
    y = instance_norm_act(*tensors, act="relu")
    for dy in [torch.randn_like(y, memory_format=f) for f in LAYOUTS]:
        (dx,) = torch.autograd.grad(y, tensors[0], dy, retain_graph=True)
        assert dx.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_graph_break(layout, device):
    torch._dynamo.reset()
    tensors = inputs((2, 3, 5, 6), (True, True, "leaky_relu"), torch.float32, layout, device)

    def layer(*tensors: Tensor | None) -> Any:
        return instance_norm_act(*tensors, act="leaky_relu")

    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(*tensors)
    dy = torch.randn_like(y)
    expected = layer(*tensors)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 4, 4)}, r"x must be \(N, C, H, W\), got shape \(3, 4, 4\)"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "x must be float16, .*, got torch.int32"),
        ({"x": torch.zeros(1, 3, 0, 4)}, r"x must be at least one pixel, got shape \(1, 3, 0, 4\)"),
        (
            {"weight": torch.zeros(4)},
            r"weight must be of shape \(3,\) or \(S, 3\), one S for all, got \(4,\)",
        ),
        ({"bias": torch.zeros(1, 4)}, r"bias must be of shape \(3,\) or .*, got \(1, 4\)"),
        ({"bias": torch.zeros(2, 3)}, "x must be a batch that 2 weight sets can share, got 1 samples"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3, 3)}, "weight must be of shape .*, got"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must be on .*, got meta"),
        ({"residual": torch.zeros(1, 3, 4, 1)}, r"residual must be of shape \(1, 3, 4, 4\), got \(1, 3, 4, "),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"act": "gelu"}, "act must be one of none, relu, leaky_relu, tanh, got 'gelu'"),
        ({"slope": -0.1}, "slope must be >= 0, got -0.1"),
        ({"dropout": 1.0}, "dropout must be in 0 <= p < 1, got 1.0"),
        ({"seed": torch.zeros(1)}, r"seed must be \(1,\) int64, got \(1,\) torch.float32"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, "seed must be on .*, got meta"),
        ({"pad": -1}, "pad must be an int >= 0, got -1"),
        ({"pad": 4, "padding_mode": "reflect"}, "pad must be below the size 4, got 4"),
        (
            {"padding_mode": "circular"},
            "padding_mode must be one of zeros, reflect, replicate, got 'circular'",
        ),
        ({"concat": torch.zeros(1, 3, 4, 5)}, r"concat must be of shape \(1, C2, 4, 4\), got \(1, 3, 4, 5\)"),
        ({"concat": torch.zeros(1, 3, 4, 4), "pad": 1}, "pad must be 0 with concat, got 1"),
    ],
)
def test_bad_input(change, message, device):
    arguments = {"x": torch.zeros(1, 3, 4, 4), **change}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=f"instance_norm_act: {message}"):
        instance_norm_act(**arguments)

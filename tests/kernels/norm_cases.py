"""What the tests of instance_norm_act and batch_norm_act share: the formula in plain torch functions, its
forms (act, dropout, padding, concatenation, weight sets), and the comparison with it."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastgan_kernels._op import INTERPRET, runs_kernel
from fastgan_kernels._pointwise import keep_mask
from torch import Tensor

Tensors = dict[str, Tensor]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPE = (4, 5, 5, 7)  # odd, rectangular
OTHER_SHAPES = [
    (4, 3, 2, 3),  # smallest that a reflection of 1 takes
    (2, 66, 3, 3),  # two channels over a block of the passes that pad, one pixel over one of 8
    (0, 3, 4, 4),  # empty batch
]
# each of: affine parameters (sets of them: 2), residual, concat; the other keyword arguments
FORMS: list[tuple[str, dict[str, Any]]] = [
    ("affine", {"act": "tanh"}),
    ("affine residual", {"act": "tanh", "pad": 1, "padding_mode": "reflect"}),
    ("affine residual", {"act": "leaky_relu", "dropout": 0.3}),
    ("sets", {"act": "relu"}),
    ("sets residual concat", {"act": "relu", "dropout": 0.3}),
    ("affine", {"pad": 1, "padding_mode": "reflect"}),
    ("sets residual", {"act": "relu", "pad": 1, "padding_mode": "replicate"}),
    ("affine", {"act": "leaky_relu", "pad": 3, "dropout": 0.5}),
    ("residual", {"pad": 1}),
    ("residual", {"dropout": 0.5}),
    ("concat", {"act": "leaky_relu"}),
]


# one that pads and one that concatenates, with everything else
PADDED, CONCATENATED = FORMS[1], FORMS[4]
CASES = [(SHAPE, form) for form in FORMS]
CASES += [(shape, form) for shape in OTHER_SHAPES for form in (PADDED, CONCATENATED)]


def crossed(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    """All pairs; in the interpreter, which is slow, only the first with the first and so on."""
    return [*zip(first, second)] if INTERPRET else [*itertools.product(first, second)]


def make(
    shape: tuple[int, ...], parts: str, dtype: torch.dtype, layout: torch.memory_format, device: str
) -> Tensors:
    n, c, height, width = shape
    x = 3 * torch.randn(shape, device=device) + 1
    tensors = {"x": x.contiguous(memory_format=layout)}
    if "affine" in parts or "sets" in parts:
        rows = (2, c) if "sets" in parts else (c,)
        tensors |= {name: torch.randn(rows, device=device) for name in ("weight", "bias")}
    if "residual" in parts:
        tensors["residual"] = torch.randn(shape, device=device)
    if "concat" in parts:
        tensors["concat"] = torch.randn(n, 2, height, width, device=device)
    return {name: t.to(dtype).requires_grad_() for name, t in tensors.items()}


def per_sample(parameter: Tensor, x: Tensor) -> Tensor:
    rows = parameter if parameter.dim() == 2 else parameter[None]
    return torch.cat([row.expand(len(x) // len(rows), -1) for row in rows])[:, :, None, None]


def formula(tensors: Tensors, normalise: Callable[[Tensor], Tensor], options: dict[str, Any]) -> Tensor:
    """The op in float64, given how x is normalised."""
    z = normalise(tensors["x"])
    if "weight" in tensors:
        z = z * per_sample(tensors["weight"], z) + per_sample(tensors["bias"], z)
    z = z + tensors["residual"] if "residual" in tensors else z
    act = options.get("act", "none")
    y = {"none": z, "relu": z.relu(), "leaky_relu": F.leaky_relu(z, 0.2), "tanh": torch.tanh(z)}[act]
    p = options.get("dropout", 0.0)
    if p > 0:
        y = y * keep_mask(options["seed"], y.shape, p) / (1 - p)
    if "concat" in tensors:
        return torch.cat([tensors["concat"], y], 1)
    mode = {"zeros": "constant"}.get(options.get("padding_mode", "zeros"), options.get("padding_mode"))
    return F.pad(y, (options.get("pad", 0),) * 4, mode=mode)


def complete(options: dict[str, Any], device: str) -> dict[str, Any]:
    return {**options, "seed": torch.tensor([31], device=device)} if "dropout" in options else options


def assert_matches(
    op: Callable[..., Tensor],
    tensors: Tensors,
    normalise: Callable[[Tensor], Tensor],
    options: dict[str, Any],
    tolerance: float,
) -> None:
    """y and every gradient against the formula in float64; the tolerance is relative to the largest value."""
    options = complete(options, tensors["x"].device.type)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    y, y64 = op(**tensors, **options), formula(exact, normalise, options)
    assert y.dtype == tensors["x"].dtype and y.shape == y64.shape
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    found = torch.autograd.grad(y, list(tensors.values()), dy)
    expected = torch.autograd.grad(y64, list(exact.values()), dy.double())
    for name, a, b in zip(["y", *tensors], (y, *found), (y64, *expected)):
        assert a.dtype == y.dtype, name
        scale = b.abs().max().clamp(min=1).item() if b.numel() else 1.0
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=tolerance * scale, msg=partial("{}: {}".format, name)
        )
    # plain torch functions follow their own rules
    if runs_kernel(y) and y.numel() > 0:
        layout = LAYOUTS[0] if tensors["x"].is_contiguous() else LAYOUTS[1]
        assert y.is_contiguous(memory_format=layout)
        assert found[0].is_contiguous(memory_format=layout)

import importlib

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import reflect_pad2d
from fastgan_kernels._op import runs_kernel
from torch import Tensor

# the package names the function like its module
module = importlib.import_module("fastgan_kernels.reflect_pad2d")

SHAPES = [
    ((1, 1, 1, 1), 0),  # smallest legal
    ((1, 2, 2, 2), 1),  # smallest that can be padded
    ((2, 3, 5, 7), (1, 2, 3, 0)),  # odd, rectangular, four different sides
    ((2, 3, 3, 4), 2),  # the reflections of both sides overlap: three terms per axis
    ((2, 5, 40, 33), 3),  # more than one block of rows and of columns in both layouts
    ((0, 3, 5, 6), 1),  # empty batch
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def image(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Tensor:
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
    return x.requires_grad_()


def sides(pad: int | tuple[int, int, int, int]) -> tuple[int, ...]:
    return (pad,) * 4 if isinstance(pad, int) else pad


def exact_gradient(x: Tensor, pad: int | tuple[int, int, int, int], dy: Tensor) -> Tensor:
    x64 = x.detach().double().requires_grad_()
    return torch.autograd.grad(module.reference(x64, sides(pad)), x64, dy.double())[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, pad", SHAPES)
def test_matches_reference(shape, pad, dtype, layout, device):
    x = image(shape, dtype, layout, device)
    y = reflect_pad2d(x, pad)
    assert torch.equal(y, F.pad(x, sides(pad), mode="reflect"))
    assert y.numel() == 0 or y.is_contiguous(memory_format=layout)
    dy = image(y.shape, dtype, layout, device).detach()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.dtype == dtype
    assert dx.numel() == 0 or dx.is_contiguous(memory_format=layout)
    # nine terms at most; in half precision, torch's CPU gradient rounds after each of them, and Triton's
    # interpreter truncates to bfloat16 where a GPU rounds
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]
    torch.testing.assert_close(dx.double(), exact_gradient(x, pad, dy), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape, pad", SHAPES)
def test_reference_backward(shape, pad, device):
    x = image(shape, torch.float64, torch.contiguous_format, device)
    dy = torch.randn_like(module.reference(x, sides(pad)))
    dx = module.reference_backward(dy, sides(pad))
    torch.testing.assert_close(dx, exact_gradient(x, pad, dy), rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pad", [(1, 0, 2, 1), 2])
def test_gradients(pad, layout, device):
    x = image((2, 2, 3, 4), torch.float64, layout, device)
    for function in (reflect_pad2d, lambda x, pad: torch.ops.fastgan.reflect_pad2d(x, sides(pad))):
        assert torch.autograd.gradcheck(function, (x, pad), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, pad), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration(layout, device):
    x = image((2, 3, 5, 4), torch.float32, layout, device)
    torch.library.opcheck(torch.ops.fastgan.reflect_pad2d.default, (x, (1, 2, 0, 3)))
    torch.library.opcheck(torch.ops.fastgan.reflect_pad2d_backward.default, (x, (1, 1, 0, 2)))


def test_runs_the_kernel(device, monkeypatch):
    x = image((1, 2, 4, 4), torch.float32, torch.contiguous_format, device)
    if not runs_kernel(x):
        pytest.skip("the CPU outside the interpreter runs the reference")
    monkeypatch.delattr(module, "reference")
    monkeypatch.delattr(module, "reference_backward")
    reflect_pad2d(x, 1).sum().backward()
    assert x.grad is not None and x.grad.sum() == 2 * 6 * 6


def test_non_contiguous_input(device):
    whole = torch.randn(2, 6, 9, 10, device=device)
    nhwc = whole.contiguous(memory_format=torch.channels_last)
    for x in (whole[:, ::2, 1:, ::3], whole.transpose(2, 3), nhwc[:, :4]):
        x = x.detach().requires_grad_()
        y = reflect_pad2d(x, 2)
        assert torch.equal(y, F.pad(x, (2, 2, 2, 2), mode="reflect"))
        # a broadcast gradient has no strides to speak of
        dy = torch.randn(1, y.shape[1], 1, 1, device=device).expand_as(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(dx.double(), exact_gradient(x, 2, dy), rtol=0, atol=5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_takes_the_layout_of_x(layout, device):
    x = image((2, 3, 5, 6), torch.float32, layout, device)
    y = reflect_pad2d(x, 1)
    dys = [torch.randn_like(y, memory_format=f) for f in LAYOUTS]
    for dy in (*dys, torch.randn(2, 3, 8, 7, device=device).transpose(2, 3)):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(dx.double(), exact_gradient(x, 1, dy), rtol=0, atol=2e-6)
        assert dx.is_contiguous(memory_format=layout)
        # the op itself, called without the function, follows dy
        direct = torch.ops.fastgan.reflect_pad2d_backward(dy, (1, 1, 1, 1))
        torch.testing.assert_close(direct, dx, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_graph_break(layout, device):
    torch._dynamo.reset()
    x = image((1, 2, 5, 6), torch.float32, layout, device)
    y = torch.compile(reflect_pad2d, backend="aot_eager", fullgraph=True)(x, 2)
    assert torch.equal(y, reflect_pad2d(x, 2))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx.double(), exact_gradient(x, 2, dy), rtol=0, atol=2e-6)


def test_autocast_keeps_the_dtype(device):
    x = image((1, 2, 4, 4), torch.bfloat16, torch.contiguous_format, device)
    with torch.autocast(device, torch.bfloat16):
        assert reflect_pad2d(x, 1).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "shape, dtype, pad, message",
    [
        ((3, 4, 4), torch.float32, 1, r"reflect_pad2d: x must be \(N, C, H, W\), got shape \(3, 4, 4\)"),
        ((1, 3, 4, 4), torch.int64, 1, "reflect_pad2d: x must be float16, .*, got torch.int64"),
        ((1, 3, 4, 5), torch.float32, (0, 0, 4, 0), r"reflect_pad2d: pad must be .* 4x5, got \(0, 0, 4, 0\)"),
        ((1, 3, 4, 5), torch.float32, -1, "reflect_pad2d: pad must be .*, got -1"),
        ((1, 3, 4, 5), torch.float32, (1, 1), r"reflect_pad2d: pad must be .*, got \(1, 1\)"),
        ((1, 3, 4, 5), torch.float32, 1.5, "reflect_pad2d: pad must be .*, got 1.5"),
        ((1, 3, 0, 5), torch.float32, 0, "reflect_pad2d: pad must be .* of 0x5, got 0"),
    ],
)
def test_bad_input(shape, dtype, pad, message, device):
    with pytest.raises(ValueError, match=message):
        reflect_pad2d(torch.zeros(shape, dtype=dtype, device=device), pad)

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import _block_op as block_op
from fastgan_kernels import conv_transpose_norm_act
from fastgan_kernels._block import NONE, Layer, Plan
from torch import Tensor

from tests.kernels.block_cases import (
    HALVES,
    Tensors,
    act,
    assert_matches,
    bias_of,
    case_id,
    normalise,
    per_sample,
)

# n, channels, height, width, outputs, kernel, stride, padding, output_padding
SHAPES = [
    (1, 9, 1, 1, 10, 4, 2, 1, 0),  # one pixel: the innermost layer of a U-Net
    (2, 10, 3, 5, 12, 3, 2, 1, 1),  # upsampling of a ResNet, rectangular
    (1, 33, 6, 5, 65, 4, 2, 1, 0),  # one channel over a block, inside and out; several blocks of rows
    (1, 12, 4, 5, 3, 4, 2, 1, 0),  # few outputs: last layer of a U-Net
    (2, 3, 4, 3, 12, 4, 2, 1, 0),  # few inputs
    (2, 10, 4, 5, 12, 3, 1, 1, 0),  # stride 1
    (1, 3, 4, 5, 12, 3, 1, 1, 0),  # stride 1, few inputs
    (0, 10, 3, 5, 12, 3, 2, 1, 1),  # empty batch
    (1, 10, 3, 4, 12, 3, 2, 1, 0),  # no output padding: an odd size
]
TAILS = [("none", False, "tanh"), ("instance", False, "relu"), ("batch", True, "leaky_relu")]
CASES = [(shape, TAILS[1]) for shape in SHAPES] + [(SHAPES[k], TAILS[i]) for k in (1, 3, 7) for i in (0, 2)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(shape: tuple, affine: bool, dtype: torch.dtype, device: str, sets: int | None = None) -> Tensors:
    n, c, h, w, o, k, *_ = shape
    lead = () if sets is None else (sets,)
    tensors = {
        "x": torch.randn(n, c, h, w, device=device).to(dtype),
        "weight": ((c * k * k / 4) ** -0.5 * torch.randn(*lead, c, o, k, k, device=device)).to(dtype),
        "bias": torch.randn(*lead, o, device=device).to(dtype),
    }
    if affine:
        tensors["norm_weight"] = torch.randn(*lead, o, device=device).to(dtype)
        tensors["norm_bias"] = torch.randn(*lead, o, device=device).to(dtype)
    return tensors


def functions(shape: tuple, norm: str, activation: str, sets: int = 1, **extra: object):
    """The op and the formula, of tensors by name."""
    *_, stride, padding, output_padding = shape
    sizes = {"stride": stride, "padding": padding, "output_padding": output_padding}

    def op(t: Tensors) -> Tensor:
        return conv_transpose_norm_act(**t, **sizes, norm=norm, act=activation, **extra)

    def formula(t: Tensors) -> Tensor:
        z = per_sample(t["x"], t["weight"], lambda x, w: F.conv_transpose2d(x, w, **sizes))
        z = normalise(bias_of(t["bias"], z), norm, t.get("norm_weight"), t.get("norm_bias"), sets)
        return act(z, activation)

    return op, formula


@pytest.fixture(params=["triton", "cudnn"])
def implementation(request, monkeypatch):
    """Both candidates of the launch table, whatever was measured."""
    plain = request.param == "cudnn"
    monkeypatch.setattr(block_op, "_plain", lambda key, device: plain)
    return request.param


@pytest.mark.parametrize("shape, tail", CASES, ids=case_id)
def test_matches_reference(shape, tail, device):
    norm, affine, activation = tail
    # float64: the only rounding is that of sums in another order
    tensors = inputs(shape, affine, torch.float64, device)
    tensors["x"] = tensors["x"].contiguous(memory_format=LAYOUTS[shape[0] % 2])
    assert_matches(*functions(shape, norm, activation), tensors, 1e-11)


@pytest.mark.parametrize("shape", [SHAPES[k] for k in (1, 3)])
def test_single_precision(shape, implementation, device):
    # sums of up to 300 float32 products; a GPU rounds the factors to tf32 (10 bits)
    tolerance = 2e-2 if device == "cuda" else 1e-4
    assert_matches(
        *functions(shape, "instance", "relu"), inputs(shape, False, torch.float32, device), tolerance
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [SHAPES[k] for k in (1, 3)])
def test_half_precision(shape, dtype, implementation, device):
    # z and y are rounded once each, dz once more; relu decides by the sign of a rounded number, hence tanh
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert_matches(*functions(shape, "instance", "tanh"), inputs(shape, False, dtype, device), tolerance)


@pytest.mark.parametrize("norm, affine", [("instance", False), ("batch", True)])
@pytest.mark.parametrize("shape", [(4, *SHAPES[k][1:]) for k in (1, 3)])
def test_weight_sets(shape, norm, affine, implementation, device):
    tensors = inputs(shape, affine, torch.float64, device, sets=2)
    assert_matches(*functions(shape, norm, "leaky_relu", sets=2), tensors, 1e-11)


@pytest.mark.parametrize("recompute", [False, True])
def test_residual(recompute, device):
    tensors = inputs(SHAPES[1], False, torch.float64, device)
    tensors["residual"] = torch.randn(2, 12, 6, 10, dtype=torch.float64, device=device)
    op, formula = functions(SHAPES[1], "instance", "none", recompute=recompute)
    assert_matches(op, lambda t: formula(t) + t["residual"], tensors, 1e-11)


@pytest.mark.parametrize(
    "norm, layout", [("none", torch.channels_last), ("instance", torch.contiguous_format)]
)
def test_registration(norm, layout, device):
    tensors = inputs(SHAPES[1], False, torch.float32, device, sets=1)
    x, weight, bias = (t.requires_grad_() for t in tensors.values())
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    layer = Layer(True, 2, 1, 1, "zeros", norm, "relu", 0.2, 0.0, 1e-5, NONE, False)
    plan = Plan((layer,), "all").text()
    torch.library.opcheck(
        torch.ops.fastgan.conv_transpose_norm_act, (x, None, None, [weight], [bias], [], [], [], [], plan)
    )


def test_no_graph_break(device):
    op, _ = functions(SHAPES[1], "instance", "relu")
    leaves = {k: t.requires_grad_() for k, t in inputs(SHAPES[1], False, torch.float32, device).items()}
    y = torch.compile(op, fullgraph=True, backend="aot_eager")(leaves)
    found = torch.autograd.grad(y.square().sum(), leaves["x"])[0]
    expected = torch.autograd.grad(op(leaves).square().sum(), leaves["x"])[0]
    torch.testing.assert_close(found, expected)


def test_autocast(device):
    dtype = HALVES[-1]
    op, formula = functions(SHAPES[1], "instance", "relu")
    tensors = inputs(SHAPES[1], False, torch.float32, device)
    with torch.autocast(device, dtype):
        y = op(tensors)
    assert y.dtype == dtype
    # bfloat16 keeps 8 bits of each factor
    torch.testing.assert_close(y.float(), formula(tensors), rtol=0, atol=0.1)


def test_non_contiguous(device):
    op, formula = functions(SHAPES[1], "instance", "relu")
    tensors = inputs(SHAPES[1], False, torch.float64, device)
    tensors["x"] = torch.randn(2, 10, 10, 6, dtype=torch.float64, device=device)[..., ::2].mT[..., ::2]
    tensors["weight"] = tensors["weight"].mT
    torch.testing.assert_close(op(tensors), formula(tensors), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"weight": torch.zeros(4, 5, 3, 3)}, "weight must be for 3 input channels"),
        ({"output_padding": 2}, "output_padding must be in"),
        ({"stride": 4}, "stride must be 1 or 2"),
        ({"padding": 6}, "padding must be small enough"),
        ({"bias": torch.zeros(3)}, "bias must be for 5 channels"),
    ],
)
def test_bad_input(bad, message):
    arguments = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(3, 5, 3, 3)} | bad
    with pytest.raises(ValueError, match=f"^conv_transpose_norm_act: {message}"):
        conv_transpose_norm_act(**arguments)

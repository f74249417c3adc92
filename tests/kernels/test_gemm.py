import math

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import _gemm
from fastgan_kernels._gemm import Tile
from fastgan_kernels._layout import Conv
from fastgan_kernels._op import INTERPRET
from fastgan_kernels._pointwise import Pointwise, activation, dropout
from torch import Tensor

# nothing but `tiles` runs on a CPU without the interpreter
DEVICES = ["cpu"] if INTERPRET else ["cuda"] if torch.cuda.is_available() else []
kernels = pytest.mark.skipif(not DEVICES, reason="needs a GPU or Triton's interpreter")

# (height, width, inputs, outputs, kernel, stride, pad, mode); in the interpreter a block is 32 x 32 x 32
CONVS = {
    "smallest": Conv(1, 1, 9, 9, 1, 1, 0, "zeros"),
    "few channels": Conv(3, 4, 3, 5, 1, 1, 0, "zeros"),
    "reflect": Conv(3, 9, 40, 9, 3, 1, 1, "reflect"),  # 33 rows of output; two blocks of k
    "replicate": Conv(6, 4, 13, 40, 3, 1, 1, "replicate"),  # two blocks of n
    "deep": Conv(2, 3, 40, 40, 3, 1, 1, "reflect"),  # two blocks of both
    "stride": Conv(5, 8, 12, 9, 3, 2, 1, "zeros"),  # 1, 2, 2 and 4 taps
    "even": Conv(7, 6, 20, 9, 4, 2, 1, "zeros"),  # four taps for each place of a cell
    "even, outside": Conv(6, 5, 9, 9, 2, 2, 0, "zeros"),  # the last column meets no tap
    "skipping": Conv(5, 4, 9, 9, 1, 2, 0, "zeros"),  # three places of a cell without a tap
    "unrolled": Conv(6, 5, 3, 9, 7, 1, 3, "reflect"),
    "unrolled stride": Conv(7, 6, 6, 9, 4, 2, 1, "zeros"),
    "narrow": Conv(6, 5, 20, 3, 7, 1, 3, "reflect"),
    "narrow zeros": Conv(5, 6, 12, 1, 4, 1, 1, "zeros"),
}


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def plain_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is split, which the few blocks of a test would ask for, and no tile is measured."""
    monkeypatch.setattr(_gemm, "PROCESSORS", 1)
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "0")


def random(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=device)


def of_sample(parameter: Tensor, n: int) -> Tensor:
    """(S, ...) to (N, ...)."""
    return parameter.repeat_interleave(n // len(parameter), 0)


def exact(conv: Conv, x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of sample n with its weight set, by torch."""
    mode = "constant" if conv.mode == "zeros" else conv.mode
    x = F.pad(x, (conv.pad,) * 4, mode=mode) if conv.pad else x
    weights = of_sample(weight, len(x))
    return torch.cat([F.conv2d(x[i : i + 1], weights[i], stride=conv.stride) for i in range(len(x))])


def problem(conv: Conv, device: str, n: int = 2, sets: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weights of the sets, and the gradient of the output."""
    x = random(n, conv.inputs, conv.height, conv.width, device=device)
    weight = random(sets, conv.outputs, conv.inputs, conv.kernel, conv.kernel, device=device)
    return x, weight, random(n, conv.outputs, conv.out_h, conv.out_w, device=device)


def image(z: Tensor) -> Tensor:
    return z.permute(0, 3, 1, 2)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Relative to the largest value: some are sums that cancel."""
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1e-3))


def check(conv: Conv, n: int, sets: int, device: str, dtype: torch.dtype, tolerance: float, **launch) -> None:
    """All three products against torch's convolution and its gradients in float64."""
    x, weight, dz = (t.to(dtype) for t in problem(conv, device, n, sets))
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = exact(conv, x64, weight64)
    dx64, dweight64 = torch.autograd.grad(y64, (x64, weight64), dz.double())
    rows, packed, dz_rows = conv.input.write(x), conv.pack(weight), conv.output.write(dz)

    z, partial = _gemm.forward(rows, packed, conv, **launch)
    assert z.dtype == dtype and z.is_contiguous() and partial.numel() == 0
    y = conv.spread.fold(z.view(-1, z.shape[3])) if conv.kind == "narrow" else image(z)
    close(y, y64.detach(), tolerance)

    g, partial = _gemm.input_gradient(dz_rows, packed, conv, **launch)
    target = conv.gradient
    assert g.shape == (n, target.grid_h, target.grid_w, target.columns) and partial.numel() == 0
    assert g.dtype == dtype and g.is_contiguous()
    close(target.fold(g.view(-1, target.columns).double()), dx64, tolerance)

    dw = _gemm.weight_gradient(rows, dz_rows, conv, sets, **launch)
    assert dw.shape == (sets, *conv.weight_shape)
    assert dw.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(conv.unpack(dw), dweight64, tolerance)


@kernels
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_products(name, tma, device):
    # float64 sums of at most 900 terms
    check(CONVS[name], 2, 2, device, torch.float64, 1e-12, tma=tma)


@kernels
@pytest.mark.parametrize("n, sets", [(1, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("name", ["stride", "unrolled"])
def test_samples_of_a_weight_set(name, n, sets, device):
    check(CONVS[name], n, sets, device, torch.float64, 1e-12)


# in the interpreter a product of bfloat16 is wrong
HALVES = [torch.float16] if INTERPRET else [torch.float16, torch.bfloat16]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["replicate", "even", "narrow"])
def test_types(name, dtype, device):
    # the result is rounded once; of float32, a GPU rounds the operands to tf32 (10 bits)
    tolerance = {torch.float32: 1e-6 if INTERPRET else 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    check(CONVS[name], 2, 2, device, dtype, tolerance)


TILES = {
    "wide blocks": Tile(64, 64, 32, 4, 2),
    "one step": Tile(16, 16, 64, 4, 2),
    "finished in parts": Tile(64, 64, 16, 1, 2),  # 16 columns at a time
}


@kernels
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_tiles_agree(tile, tma, device):
    check(CONVS["deep"], 2, 2, device, torch.float64, 1e-12, tile=tile, tma=tma)


def sums(partial: Tensor) -> Tensor:
    return partial.sum(1)


def exact_sums(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a.sum((2, 3)), (a * b).sum((2, 3))], 1)


@kernels
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("tile", [None, TILES["finished in parts"]])
@pytest.mark.parametrize("name", ["reflect", "stride", "unrolled"])
def test_bias_activation_and_statistics(name, tile, tma, device):
    conv = CONVS[name]
    tile = tile and tile._replace(block_n=min(64, conv.weight_shape[2]), block_k=16)
    x, weight, _ = problem(conv, device)
    bias = random(2, conv.outputs, device=device)
    rows, packed = conv.input.write(x), conv.pack(weight)
    for act in ("none", "leaky_relu", "tanh"):
        work = {"act": act, "slope": 0.3, "tile": tile, "tma": tma}
        z, partial = _gemm.forward(rows, packed, conv, bias=bias, statistics=True, **work)
        expected = activation(exact(conv, x, weight) + bias[:, :, None, None], act, 0.3)
        close(image(z), expected)
        close(sums(partial), exact_sums(expected, expected))


@kernels
def test_statistics_are_not_rounded(device):
    conv = CONVS["reflect"]
    x, weight, _ = (t.half() for t in problem(conv, device))
    _, partial = _gemm.forward(conv.input.write(x), conv.pack(weight), conv, statistics=True)
    expected = exact(conv, x.double(), weight.double())
    assert partial.dtype == torch.float32
    # float32; sums of the rounded z would be 1e-4 away
    close(sums(partial), exact_sums(expected, expected), 2e-6)


# (kernel, padding, output padding, channels in, channels out, height, width)
TRANSPOSED = [
    (3, 1, 1, 17, 13, 3, 6),  # CycleGAN's
    (4, 1, 0, 9, 40, 5, 2),  # U-Net's
    (3, 0, 0, 9, 9, 1, 1),  # nothing is cropped
    (2, 0, 1, 9, 9, 3, 2),  # the last row and column meet no tap
]


@kernels
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("kernel, pad, extra, inputs, outputs, height, width", TRANSPOSED)
def test_transposed(kernel, pad, extra, inputs, outputs, height, width, tma, device):
    x = random(2, inputs, height, width, device=device)
    weight = random(2, inputs, outputs, kernel, kernel, device=device)
    bias = random(2, outputs, device=device)
    expected = torch.cat([
        F.conv_transpose2d(x[i : i + 1], weight[i], bias[i], 2, pad, extra) for i in range(2)
    ]).relu()  # fmt: skip
    conv = Conv(*expected.shape[2:], outputs, inputs, kernel, 2, pad, "zeros")
    y, partial = _gemm.input_gradient(
        conv.output.write(x),
        conv.pack(weight),
        conv,
        crop=True,
        bias=bias,
        act="relu",
        statistics=True,
        tma=tma,
    )
    assert y.is_contiguous()
    close(image(y), expected)
    close(sums(partial), exact_sums(expected, expected))


# conv, samples, act, norm, affine, dropout
PENDING = [
    ("reflect", 2, "relu", True, False, 0.0),
    ("deep", 2, "leaky_relu", True, True, 0.0),
    ("replicate", 4, "leaky_relu", True, True, 0.4),
    ("stride", 2, "tanh", True, True, 0.3),
    ("even", 2, "relu", False, True, 0.0),
    ("smallest", 4, "none", True, False, 0.0),
    ("narrow", 2, "relu", True, False, 0.5),
    ("narrow zeros", 2, "none", False, False, 0.0),
]


def pending_of(conv: Conv, n: int, act: str, norm: bool, affine: bool, p: float, device: str) -> Pointwise:
    mean, rstd = random(2, n, conv.inputs, device=device)
    weight, bias = random(2, 2, conv.inputs, device=device)
    seed = torch.tensor([2**40 + 12345], device=device) if p else None
    return Pointwise(
        mean if norm else None, rstd.abs() + 0.5 if norm else None,
        weight if affine else None, bias if affine else None, act, 0.3, p, seed,
    )  # fmt: skip


def exact_pending(g: Tensor, z: Tensor, pending: Pointwise) -> Tensor:
    """The sums over the image of g * m and g * m * xhat, m by autograd."""
    xhat = z
    if pending.mean is not None:
        xhat = (z - pending.mean[:, :, None, None]) * pending.rstd[:, :, None, None]
    pre = xhat
    if pending.weight is not None:
        pre = pre * of_sample(pending.weight, len(z))[:, :, None, None]
        pre = pre + of_sample(pending.bias, len(z))[:, :, None, None]
    pre = pre.clone().requires_grad_()
    y = activation(pre, pending.act, pending.slope)
    if pending.dropout:
        y = dropout(y, pending.dropout, pending.seed)
    return exact_sums(torch.autograd.grad(y, pre, g)[0], xhat)


@kernels
@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("name, n, act, norm, affine, p", PENDING)
def test_sums_of_a_pending_norm(name, n, act, norm, affine, p, tma, device):
    conv = CONVS[name]
    _, weight, dz = problem(conv, device, n)
    z = random(n, conv.height, conv.width, conv.inputs, device=device)
    pending = pending_of(conv, n, act, norm, affine, p, device)
    rows, packed = conv.output.write(dz), conv.pack(weight)
    g, partial = _gemm.input_gradient(rows, packed, conv, pending=pending, z=z, tma=tma)
    assert torch.equal(g, _gemm.input_gradient(rows, packed, conv, tma=tma)[0])
    folded = conv.gradient.fold(g.view(-1, conv.inputs))
    close(sums(partial), exact_pending(folded, image(z), pending))


@kernels
def test_sums_of_a_pending_norm_in_parts(device):
    conv = CONVS["deep"]
    _, weight, dz = problem(conv, device)
    z = random(2, conv.height, conv.width, conv.inputs, device=device)
    pending = pending_of(conv, 2, "relu", True, True, 0.5, device)
    work = {"pending": pending, "z": z, "tile": TILES["finished in parts"]}
    g, partial = _gemm.input_gradient(conv.output.write(dz), conv.pack(weight), conv, **work)
    folded = conv.gradient.fold(g.view(-1, conv.inputs))
    close(sums(partial), exact_pending(folded, image(z), pending))


# as deep in a U-Net, but of two blocks of rows: k is split, and a second launch adds the parts
SPLIT = Conv(12, 4, 16, 64, 4, 2, 1, "zeros")


@kernels
@pytest.mark.parametrize("tma", [True, False])
def test_split_product(tma, device, monkeypatch):
    monkeypatch.setattr(_gemm, "PROCESSORS", 10**6)
    added = []
    monkeypatch.setattr(_gemm, "_sum", lambda *args, call=_gemm._sum: added.append(call(*args)))
    x, weight, dz = problem(SPLIT, device)
    tile = Tile(16, 16, 16, 4, 2)
    rows, dz_rows, packed = SPLIT.input.write(x), SPLIT.output.write(dz), SPLIT.pack(weight)
    work = {"act": "tanh", "statistics": True, "tile": tile, "tma": tma}

    bias = random(2, 64, device=device)
    z, partial = _gemm.forward(rows, packed, SPLIT, bias=bias, **work)
    expected = (exact(SPLIT, x, weight) + bias[:, :, None, None]).tanh()
    close(image(z), expected)
    close(sums(partial), exact_sums(expected, expected))

    bias = random(2, 16, device=device)
    y, partial = _gemm.input_gradient(dz_rows, packed, SPLIT, crop=True, bias=bias, **work)
    expected = torch.cat(
        [F.conv_transpose2d(dz[i : i + 1], weight[i], bias[i], 2, 1) for i in range(2)]
    ).tanh()
    close(image(y), expected)
    close(sums(partial), exact_sums(expected, expected))
    assert len(added) == 2


@kernels
@pytest.mark.parametrize("tma", [True, False])
def test_split_weight_gradient(tma, device, monkeypatch):
    monkeypatch.setattr(_gemm, "PROCESSORS", 10**6)
    # 272 rows of each image: 17 steps of 16 rows, in two parts of nine
    conv = Conv(16, 17, 9, 9, 1, 1, 0, "zeros")
    x, weight, dz = problem(conv, device)
    rows, dz_rows = conv.input.write(x), conv.output.write(dz)
    weight.requires_grad_()
    expected = torch.autograd.grad(exact(conv, x, weight), weight, dz)[0]
    dw = _gemm.weight_gradient(rows, dz_rows, conv, 2, tile=Tile(16, 16, 16, 4, 2), tma=tma)
    close(conv.unpack(dw), expected)


@kernels
@pytest.mark.parametrize("name", ["reflect", "unrolled stride", "narrow"])
def test_empty_batch(name, device):
    conv = CONVS[name]
    rows = random(0, conv.input.columns, device=device)
    dz_rows = random(0, conv.output.columns, device=device)
    packed = random(2, *conv.weight_shape, device=device)
    assert _gemm.forward(rows, packed, conv)[0].shape[0] == 0
    assert _gemm.input_gradient(dz_rows, packed, conv)[0].shape[0] == 0
    dw = _gemm.weight_gradient(rows, dz_rows, conv, 2)
    assert torch.equal(dw, dw.new_zeros(2, *conv.weight_shape))


@kernels
def test_reproducible(device):
    conv = CONVS["deep"]
    x, weight, dz = (t.half() for t in problem(conv, device))
    rows, dz_rows, packed = conv.input.write(x), conv.output.write(dz), conv.pack(weight)
    for product in (
        lambda: _gemm.forward(rows, packed, conv, statistics=True),
        lambda: _gemm.input_gradient(dz_rows, packed, conv),
        lambda: (_gemm.weight_gradient(rows, dz_rows, conv, 2),),
    ):
        assert all(torch.equal(a, b) for a, b in zip(product(), product()))


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CONVS)
def test_tiles_fit(name, dtype, capability):
    conv = CONVS[name]
    _, k, n = conv.weight_shape
    for kind, columns, contracted in [("forward", n, k), ("input_gradient", k, n), ("weight_gradient", n, 0)]:
        found = _gemm.tiles(kind, conv, dtype, capability, images=2)
        assert 1 <= len(found) <= 8 and len(set(found)) == len(found)
        for tile in found:
            assert columns % tile.block_n == 0 and (not contracted or contracted % tile.block_k == 0)
            assert all(math.log2(size).is_integer() and size >= 16 for size in tile[:3])
            stage = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
            limit = 227 if capability in ((9, 0), (10, 0)) else 99
            assert stage * tile.num_stages <= limit * 1024 and tile.num_stages >= 2
            if kind == "weight_gradient" and capability and capability[0] < 9:
                assert k % tile.block_m == 0

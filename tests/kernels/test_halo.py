import pytest
import torch
from fastgan_kernels import _halo, _pointwise
from fastgan_kernels._layout import Conv, Layout, image_layout
from fastgan_kernels._op import INTERPRET
from fastgan_kernels._pointwise import Pointwise
from torch import Tensor

NHWC = torch.channels_last
# (height, width, inputs, outputs, kernel, stride, pad, mode): the smallest, odd and rectangular ones
CONVS = {
    "wide": Conv(5, 7, 13, 9, 3, 1, 1, "reflect"),
    "overlap": Conv(3, 4, 9, 9, 5, 1, 2, "reflect"),  # pixels that are reflected to both sides
    "replicate": Conv(4, 3, 9, 9, 3, 1, 1, "replicate"),
    "deep": Conv(2, 3, 70, 9, 3, 1, 1, "reflect"),  # more columns than one block
    "stride": Conv(5, 8, 12, 9, 4, 2, 1, "zeros"),
    "deep stride": Conv(3, 2, 40, 9, 3, 2, 1, "reflect"),  # more than one block per pixel of the cell
    "unrolled": Conv(6, 5, 3, 9, 7, 1, 3, "reflect"),
    "unrolled stride": Conv(7, 6, 6, 9, 4, 2, 1, "zeros"),
    "unrolled replicate": Conv(4, 5, 3, 9, 3, 1, 1, "replicate"),
    "narrow": Conv(6, 5, 12, 3, 7, 1, 3, "reflect"),
}
LAYOUTS = {name: conv.input for name, conv in CONVS.items()}
LAYOUTS |= {
    f"{name} gradient": CONVS[name].gradient for name in ("wide", "stride", "unrolled", "unrolled stride")
}
LAYOUTS |= {f"{name} output": CONVS[name].output for name in ("wide", "stride", "narrow")}
LAYOUTS |= {
    "spread": CONVS["narrow"].spread,
    "pixel": image_layout(1, 1, 1),  # the smallest
    "image": image_layout(3, 11, 70),  # one pixel over a block of rows, and columns over one
}

# nothing here runs on a CPU without the interpreter
DEVICES = ["cpu"] if INTERPRET else ["cuda"] if torch.cuda.is_available() else []
pytestmark = pytest.mark.skipif(not DEVICES, reason="needs a GPU or Triton's interpreter")


@pytest.fixture(params=DEVICES or ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def image(layout: Layout, device: str, n: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        n, layout.channels, layout.height, layout.width, dtype=torch.float64, device=device
    ).to(dtype)


def matrix(layout: Layout, device: str, n: int = 2) -> Tensor:
    return torch.randn(n * layout.rows, layout.columns, dtype=torch.float64, device=device)


def due(layout: Layout, device: str, act: str, n: int = 2, sets: int = 2, dropout: float = 0.0) -> Pointwise:
    planes = torch.randn(2, n, layout.channels, dtype=torch.float64, device=device)
    affine = torch.randn(2, sets, layout.channels, dtype=torch.float64, device=device)
    seed = torch.tensor([2**40 + 12345], device=device) if dropout else None
    return Pointwise(planes[0], planes[1].abs() + 0.5, affine[0], affine[1], act, 0.2, dropout, seed)


def planes(x: Tensor, like: Tensor) -> Tensor:
    """(N or S, C), one row for each sample of `like`."""
    return x.repeat_interleave(len(like) // len(x), 0)[:, :, None, None]


def formula(x: Tensor, pending: Pointwise, residual: Tensor | None = None) -> Tensor:
    y = x
    if pending.mean is not None:
        y = (y - planes(pending.mean, x)) * planes(pending.rstd, x)
    if pending.weight is not None:
        y = y * planes(pending.weight, x)
    if pending.bias is not None:
        y = y + planes(pending.bias, x)
    if residual is not None:
        y = y + residual
    y = _pointwise.activation(y, pending.act, pending.slope)
    if pending.dropout:
        kept = _pointwise.keep_mask(pending.seed, x.shape, pending.dropout)
        y = y * kept / (1 - pending.dropout)
    return y


def assert_exact(found: Tensor, expected: Tensor) -> None:
    # sums of at most 147 float64 terms
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("name", LAYOUTS)
def test_write(name, memory_format, device):
    layout = LAYOUTS[name]
    x = image(layout, device).contiguous(memory_format=memory_format)
    assert torch.equal(_halo.write(x, layout), layout.write(x))
    residual = image(layout, device)
    pending = due(layout, device, "leaky_relu", dropout=0.3)
    assert_exact(_halo.write(x, layout, pending, residual), layout.write(formula(x, pending, residual)))


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("parts", [(), ("mean", "rstd"), ("weight",), ("bias",), ("mean", "rstd", "bias")])
def test_every_pending_part(parts, act, device):
    layout = CONVS["wide"].input
    x = image(layout, device, 4)
    full = due(layout, device, act, 4)._asdict()
    pending = Pointwise(act=act, **{part: full[part] for part in parts})
    assert_exact(_halo.write(x, layout, pending), layout.write(formula(x, pending)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types(dtype, device):
    layout = CONVS["wide"].input
    x, residual = image(layout, device, dtype=dtype), image(layout, device, dtype=dtype)
    assert torch.equal(_halo.write(x, layout), layout.write(x))
    pending = due(layout, device, "tanh")
    exact = formula(x.double(), pending, residual.double())
    pending = pending._replace(**{f: getattr(pending, f).float() for f in ("mean", "rstd", "weight", "bias")})
    # one rounding; Triton's interpreter truncates to bfloat16. float32: |z| of up to 20 before the tanh
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype]
    y = torch.empty_like(x)
    _halo.apply(x, y, pending, residual)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance)
    rows = _halo.write(x, layout, pending, residual)
    assert torch.equal(rows, layout.write(y))
    folded = torch.empty_like(x, dtype=torch.float32)
    _halo.fold(rows, layout, folded)
    torch.testing.assert_close(folded, layout.fold(rows.float()), rtol=1e-6, atol=1e-6)


def test_apply_to_any_strides(device):
    layout = image_layout(3, 5, 6)
    x, pending = image(layout, device), due(layout, device, "relu", dropout=0.5)
    expected = formula(x, pending)
    for memory_format in (torch.contiguous_format, NHWC):
        whole = torch.full((2, 9, 3, 5), 7.0, dtype=x.dtype, device=device).contiguous(
            memory_format=memory_format
        )
        for source in (x, x.contiguous(memory_format=NHWC), x.transpose(2, 3).contiguous().transpose(2, 3)):
            _halo.apply(source, whole[:, 2:8], pending)
            assert_exact(whole[:, 2:8], expected)
            assert (whole[:, :2] == 7).all() and (whole[:, 8:] == 7).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("name", LAYOUTS)
def test_fold(name, memory_format, device):
    layout = LAYOUTS[name]
    rows = matrix(layout, device)
    out = torch.empty_like(image(layout, device)).contiguous(memory_format=memory_format)
    _halo.fold(rows, layout, out)
    assert_exact(out, layout.fold(rows))
    bias = due(layout, device, "tanh").bias
    _halo.fold(rows, layout, out, bias, "leaky_relu", 0.1)
    assert_exact(out, torch.nn.functional.leaky_relu(layout.fold(rows) + planes(bias, out), 0.1))


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (2, 70, 5, 7), (1, 3, 33, 16), (3, 16, 3, 11)])
def test_statistics(shape, device, monkeypatch):
    x = torch.randn(shape, dtype=torch.float64, device=device) + 3
    pixels = shape[2] * shape[3]
    for source in (x, x.contiguous(memory_format=NHWC), x.transpose(2, 3)):
        mean, rstd = _halo.finish(_halo.statistics(source), pixels, 1e-5)
        assert_exact(mean, source.mean((2, 3)))
        assert_exact(rstd, 1 / (source.var((2, 3), unbiased=False) + 1e-5).sqrt())
    # chunks of several tiles, the last one not full
    monkeypatch.setattr(_halo, "_chunks", lambda n, image, r, k: (-(-image.rows // (4 * r)), 4))
    partial = _halo.statistics(x)
    assert_exact(partial.sum(1)[:, 0], x.sum((2, 3)))
    assert_exact(partial.sum(1)[:, 1], x.square().sum((2, 3)))


def test_batch_statistics(device):
    x = torch.randn(6, 5, 3, 4, dtype=torch.float64, device=device)
    mean, rstd = _halo.finish(_halo.statistics(x), 12, 1e-5, groups=2)
    groups = x.view(2, 3, 5, 12)
    variance = groups.var((1, 3), unbiased=False)
    assert_exact(mean, groups.mean((1, 3)).repeat_interleave(3, 0))
    assert_exact(rstd, (1 / (variance + 1e-5).sqrt()).repeat_interleave(3, 0))


def test_many_partial_sums(device):
    # more terms than one step of the sum takes
    partial = torch.rand(2, 1100, 2, 9, dtype=torch.float64, device=device)
    partial[:, :, 1] += 1
    mean, rstd = _halo.finish(partial, 1100, 1e-5)
    assert_exact(mean, partial[:, :, 0].mean(1))
    assert_exact(rstd, 1 / (partial[:, :, 1].mean(1) - mean.square() + 1e-5).sqrt())


def test_variance_is_not_negative(device):
    x = torch.full((1, 2, 8, 8), 1000.1, device=device)
    _, rstd = _halo.finish(_halo.statistics(x), 64, 1e-5)
    assert torch.isfinite(rstd).all()


def test_large_mean(device):
    # |mean| = 10 std: float32 sums of 1024 pixels are off by 1e-4 at most
    x = torch.randn(2, 3, 32, 32, device=device) + 10
    mean, rstd = _halo.finish(_halo.statistics(x), 1024, 1e-5)
    torch.testing.assert_close(mean.double(), x.double().mean((2, 3)), rtol=1e-6, atol=0)
    exact = 1 / (x.double().var((2, 3), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-4, atol=0)


# activation, whether its slope is taken from y, norm, dropout
BACKWARD = [
    ("leaky_relu", False, True, 0.0),
    ("tanh", True, True, 0.3),
    ("relu", True, False, 0.3),
    ("tanh", False, True, 0.0),
    ("none", False, False, 0.0),
]


def check_backward(
    layout: Layout, target: Layout, options: tuple[str, bool, bool, float], device: str
) -> None:
    act, of_output, norm, dropout = options
    pixels = layout.height * layout.width
    z, skip, rows = image(layout, device), image(layout, device), matrix(layout, device)
    pending = due(layout, device, act, dropout=dropout)
    mean, rstd = _halo.finish(_halo.statistics(z), pixels, 1e-5)
    if not norm:
        pending = pending._replace(mean=None, rstd=None, weight=None)
    leaf = z.clone().requires_grad_()
    exact = pending
    if norm:
        pending = pending._replace(mean=mean, rstd=rstd)
        variance = leaf.var((2, 3), unbiased=False)
        exact = pending._replace(mean=leaf.mean((2, 3)), rstd=1 / (variance + 1e-5).sqrt())
    before = formula(leaf, exact._replace(act="none", dropout=0.0))
    y = formula(before, Pointwise(act=act, dropout=dropout, seed=pending.seed))
    loss = (layout.write(y) * rows).sum() + (y * skip).sum()
    dz, total = torch.autograd.grad(loss, (leaf, before))
    xhat = (z - planes(mean, z)) * planes(rstd, z) if norm else z

    given = (rows, layout, pending)
    where = {"z": z.contiguous(memory_format=NHWC), "y": y.detach() if of_output else None, "skip": skip}
    partial, pre = _halo.reduce(*given, **where, total=True)
    assert pre.is_contiguous(memory_format=NHWC)
    assert_exact(pre, total)
    assert_exact(partial.sum(1)[:, 0], total.sum((2, 3)))
    assert_exact(partial.sum(1)[:, 1], (total * xhat).sum((2, 3)))
    means = partial.sum(1) / pixels if norm else None
    assert_exact(_halo.gradient(*given, target, **where, means=means), target.write(dz))


@pytest.mark.parametrize("options", BACKWARD)
@pytest.mark.parametrize("name", ["wide gradient", "image"])
def test_backward(name, options, device):
    layout = LAYOUTS[name]
    check_backward(layout, image_layout(layout.height, layout.width, layout.channels), options, device)


@pytest.mark.parametrize("name", LAYOUTS)
def test_backward_from_every_layout(name, device):
    layout = LAYOUTS[name]
    size = (layout.height, layout.width)
    few = layout.channels <= 6
    # as the gradient of a layer's output: pitched, or spread; or on the way into a transposed convolution
    target = Conv(*size, 9, layout.channels, 3, 1, 1, "zeros").output
    if not few and layout.height > 1:
        target = Conv(*size, layout.channels, 9, 4, 2, 1, "zeros").input
    check_backward(layout, target, BACKWARD[0], device)


def test_sums_without_z(device):
    layout = image_layout(3, 5, 6)
    rows, y = matrix(layout, device), image(layout, device)
    partial, pre = _halo.reduce(rows, layout, Pointwise(act="relu"), y=y)
    g = layout.fold(rows) * (y > 0)
    assert_exact(partial.sum(1)[:, 0], g.sum((2, 3)))
    assert (partial[:, :, 1] == 0).all() and pre.numel() == 0


def test_chunks_of_several_tiles(device, monkeypatch):
    monkeypatch.setattr(_halo, "_chunks", lambda n, image, r, k: (-(-image.rows // (2 * r)), 2))
    layout = image_layout(9, 17, 20)
    check_backward(layout, layout, BACKWARD[0], device)
    x = image(layout, device).contiguous(memory_format=NHWC)
    partial = _halo.statistics(x)
    assert partial.shape[1] > 1
    assert_exact(partial.sum(1), torch.stack([x.sum((2, 3)), x.square().sum((2, 3))], 1))


def test_reproducible(device):
    layout = CONVS["wide"].gradient
    rows, z = matrix(layout, device).float(), image(layout, device, dtype=torch.float32)
    first, second = (_halo.reduce(rows, layout, Pointwise(act="relu"), z)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_empty_batch(device):
    layout = CONVS["wide"].input
    x = image(layout, device, 0)
    rows = _halo.write(x, layout)
    assert rows.shape == (0, layout.columns)
    _halo.fold(rows, layout, x)
    mean, rstd = _halo.finish(_halo.statistics(x), 35, 1e-5)
    assert mean.shape == rstd.shape == (0, 13)
    pending = Pointwise(mean, rstd)
    partial, pre = _halo.reduce(rows, layout, pending, x, total=True)
    assert partial.shape[0] == 0 and pre.shape == x.shape
    target = CONVS["wide"].output
    assert (
        _halo.gradient(rows, layout, pending, CONVS["wide"].gradient.__class__(**vars(target)), x).numel()
        == 0
    )

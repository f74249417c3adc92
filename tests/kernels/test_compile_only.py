"""Compiles what the ops would launch for GPUs that are not here, and fails where ptxas spills registers.

The launches are recorded from the functions themselves, run on meta tensors, so that nothing is described
twice. The set: every kernel but those of the products (test_compile_gemm.py), whole planes (the largest that
fit: most registers) and chunks, both layouts, float32 and bfloat16, with every optional input for three
generations of GPU; without the optional inputs, rare layouts, and the tile of small planes, for one. float64
is not in the set: it serves the tests and may be slow.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastgan_kernels import _halo, _norm
from fastgan_kernels._layout import Conv, Layout, image_layout
from fastgan_kernels._op import HAS_TRITON, INTERPRET
from fastgan_kernels._pointwise import Pointwise

if not HAS_TRITON or INTERPRET:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from benchmarks._compile import Launch, record

DTYPES = [torch.float32, torch.bfloat16]
ARCHITECTURES = [80, 90, 100]
NCHW, NHWC = LAYOUTS = [torch.contiguous_format, torch.channels_last]
Recorded = tuple[Any, Any, list[Launch]]


@pytest.fixture
def recorded(op: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """The bodies of the forward and the backward op, and the launches that they will make."""
    module = importlib.import_module(f"fastgan_kernels.{op}")
    monkeypatch.setattr(module, "runs_kernel", lambda x: True)
    with record(module, _norm, _halo) as launches:
        yield module._forward._init_fn, module._backward._init_fn, launches


def check(launches: list[Launch], architecture: int, kernels: set[str]) -> None:
    assert {launch.name for launch in launches} == kernels
    for launch in launches:
        assert launch.compile(architecture).spills == 0, (launch.name, launch.kwargs)


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape, pad", [((1, 256, 64, 64), (1,) * 4), ((1, 3, 4, 4), (3,) * 4)])
@pytest.mark.parametrize("op", ["reflect_pad2d"])
def test_reflect_pad2d(shape, pad, architecture, dtype, layout, recorded):
    forward, backward, launches = recorded
    backward(forward(empty(shape, dtype, layout), pad), pad)
    check(launches, architecture, {"_reflect_pad2d_fwd_kernel", "_reflect_pad2d_bwd_kernel"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adam_step(architecture, monkeypatch):
    module = importlib.import_module("fastgan_kernels.adam_step")
    monkeypatch.setattr(module, "runs_kernel", lambda x: True)
    params, copies = [empty((512, 64), torch.float32)] * 5, [empty((512, 64), torch.bfloat16)] * 5
    step = empty((), torch.float32)
    with record(module) as launches:
        module._forward._init_fn(params, copies, params, params, [step] * 5, copies, step, 0.5, 0.999, 1e-8)
    check(launches, architecture, {"_adam_step_table_kernel", "_adam_step_update_kernel"})
    if architecture == 90:
        # writes p, m and v, each thread eight of their values, 16 bytes at a time
        code = launches[-1].compile(architecture).code
        assert sum(n for name, n in code.items() if name.startswith("STG.E.128")) >= 6


@pytest.mark.parametrize("store", [torch.uint8, torch.int16, torch.float32])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_crop_images(architecture, store, monkeypatch):
    module = importlib.import_module("fastgan_kernels.crop_images")
    monkeypatch.setattr(module, "runs_kernel", lambda x: True)
    options = (3, 256, 256, 0.0, 255.0, True, True, 3, torch.bfloat16)
    with record(module) as launches:
        module._forward._init_fn(empty((10**6,), store), empty((4, 6), torch.int64), *options)
    check(launches, architecture, {"_crop_images_fwd_kernel"})


WHOLE = {"_instance_norm_act_fwd_kernel", "_instance_norm_act_bwd_kernel"}
MOMENTS = {"_norm_partial_kernel", "_norm_combine_kernel"}
CHUNKED = WHOLE | MOMENTS | {"_instance_norm_act_bwd_partial_kernel"}
NORM_TILES = [
    (NCHW, (1, 64, 128, 128), WHOLE),
    (NCHW, (2, 64, 256, 256), CHUNKED),
    (NHWC, (1, 256, 32, 32), WHOLE),
    (NHWC, (4, 256, 64, 64), CHUNKED),
]
NORM_CASES = [(*tile, a, True) for tile in NORM_TILES for a in ARCHITECTURES]
NORM_CASES += [(*tile, 90, False) for tile in NORM_TILES]
NORM_CASES += [(layout, (1, 512, 4, 4), WHOLE, 90, True) for layout in LAYOUTS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout, shape, kernels, architecture, everything", NORM_CASES)
@pytest.mark.parametrize("op", ["instance_norm_act"])
def test_instance_norm_act(layout, shape, kernels, architecture, everything, dtype, recorded):
    forward, backward, launches = recorded
    x = empty(shape, dtype, layout)
    parameter = empty(shape[1:2], dtype) if everything else None
    options = (1e-5, "leaky_relu" if everything else "relu", 0.2)
    y, mean, rstd = forward(x, parameter, parameter, x if everything else None, *options)
    y = y if everything else None
    backward(x, x, mean, rstd, parameter, parameter, y, *options, needs_residual=everything)
    check(launches, architecture, kernels)


PASSES = {"_halo_write_kernel", "_halo_reduce_kernel", "_halo_gradient_kernel"}


PADDED_CASES = [
    ("instance_norm_act", NHWC, (4, 256, 64, 64), a, dtype) for a in ARCHITECTURES for dtype in DTYPES
]
PADDED_CASES += [
    (op, NCHW, (1, 64, 128, 128), 90, torch.bfloat16) for op in ("instance_norm_act", "batch_norm_act")
]


@pytest.mark.parametrize("op, layout, shape, architecture, dtype", PADDED_CASES)
def test_norm_with_padding(op, layout, shape, architecture, dtype, recorded):
    forward, backward, launches = recorded
    x, parameter = empty(shape, dtype, layout), empty(shape[1:2], dtype)
    options = (1e-5, "leaky_relu", 0.2, 0.5, 1, "reflect", empty((1,), torch.int64))
    given: tuple[Any, ...] = ()
    groups: tuple[int, ...] = ()
    if op == "batch_norm_act":
        given, groups = (None, None, 1), (1,)
    y, mean, rstd = forward(x, parameter, parameter, x, *given, *options, None)
    inner = _norm.inner(y, x, 1)
    backward(y, x, mean, rstd, parameter, parameter, inner, *groups, *options, None, True)
    check(launches, architecture, PASSES | MOMENTS)


LAYER_CASES = [(NHWC, (4, 64, 256, 256), a, dtype) for a in ARCHITECTURES for dtype in DTYPES]
LAYER_CASES += [(NCHW, (1, 128, 128, 128), a, torch.bfloat16) for a in ARCHITECTURES]
LAYER_CASES += [(NHWC, (2, 16, 16, 16), 90, torch.float32)]  # one chunk


@pytest.mark.parametrize("layout, shape, architecture, dtype", LAYER_CASES)
@pytest.mark.parametrize("op", ["channel_layer_norm_act"])
def test_channel_layer_norm_act(op, layout, shape, architecture, dtype, recorded):
    forward, backward, launches = recorded
    x, parameter = empty(shape, dtype, layout), empty(shape[1:2], dtype)
    options = (1e-5, "relu", 0.2)
    y, mean, rstd = forward(x, parameter, parameter, *options)
    backward(y, x, mean, rstd, parameter, parameter, *options)
    check(launches, architecture, PASSES | MOMENTS)


# images of a batch, and the convolution that reads them
CONVS = {
    "trunk": (4, Conv(64, 64, 256, 256, 3, 1, 1, "reflect")),
    "last": (1, Conv(256, 256, 64, 3, 7, 1, 3, "reflect")),  # its output is spread
    "stride": (1, Conv(128, 128, 128, 256, 3, 2, 1, "zeros")),  # space to depth
    "first": (1, Conv(256, 256, 3, 64, 7, 1, 3, "reflect")),  # unrolled
    "PatchGAN": (1, Conv(256, 256, 6, 64, 4, 2, 1, "zeros")),  # unrolled, with a stride
    "deep": (2, Conv(2, 2, 512, 512, 4, 2, 1, "zeros")),
    "replicate": (1, Conv(64, 64, 64, 64, 3, 1, 1, "replicate")),
}


def pending(n: int, channels: int, everything: bool) -> Pointwise:
    if not everything:
        return Pointwise()
    planes, affine = empty((n, channels), torch.float32), empty((1, channels), torch.float32)
    return Pointwise(planes, planes, affine, affine, "tanh", dropout=0.5, seed=empty((1,), torch.int64))


def run_passes(n: int, layout: Layout, target: Layout, dtype: torch.dtype, everything: bool) -> None:
    """All passes between `layout` and an image of its size."""
    x = empty((n, layout.channels, layout.height, layout.width), dtype, NHWC if everything else NCHW)
    due, extra = pending(n, layout.channels, everything), x if everything else None
    rows = empty((n * layout.rows, layout.columns), dtype)
    _halo.write(x, layout, due, extra)
    _halo.apply(x, empty(x.shape, dtype), due, extra)
    _halo.fold(rows, layout, x, due.bias, due.act)
    mean, _ = _halo.finish(_halo.statistics(x), layout.height * layout.width, 1e-5)
    _halo.reduce(rows, layout, due, x, None, extra, total=everything)
    means = torch.stack([mean, mean], 1) if everything else None
    _halo.gradient(rows, layout, due, target, x, None, extra, means)


HALO_CASES = [("trunk", a, dtype, True) for a in ARCHITECTURES for dtype in DTYPES]
HALO_CASES += [(name, 90, dtype, True) for name in ("last", "stride", "first") for dtype in DTYPES]
HALO_CASES += [(name, 90, torch.bfloat16, True) for name in ("PatchGAN", "deep", "replicate")]
HALO_CASES += [(name, 90, torch.bfloat16, False) for name in ("trunk", "first")]


@pytest.mark.parametrize("name, architecture, dtype, everything", HALO_CASES)
def test_halo(name, architecture, everything, dtype):
    n, conv = CONVS[name]
    image = image_layout(conv.height, conv.width, conv.inputs)
    # the layer before: its output's gradient lies in columns of at least 16
    before = Conv(conv.height, conv.width, 64, conv.inputs, 3, 1, 1, "zeros")
    with record(_halo) as launches:
        # forward into the layout that the product reads, backward from what it leaves
        run_passes(n, conv.gradient, before.output, dtype, everything)
        x = empty((n, conv.inputs, conv.height, conv.width), dtype, NHWC)
        _halo.write(x, conv.input, pending(n, conv.inputs, everything), x if everything else None)
        if conv.kind == "narrow":
            run_passes(n, conv.spread, conv.output, dtype, everything)
        if conv.stride == 2 and conv.kind == "wide":
            # on the way into a transposed convolution
            run_passes(n, image, conv.input, dtype, everything)
    kernels = {"fold", "write", "statistics", "finish", "reduce", "gradient"}
    check(launches, architecture, {f"_halo_{kernel}_kernel" for kernel in kernels})

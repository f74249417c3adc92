"""The three products of a convolution, as products of shifted rows (see _layout.py).

    forward          z[q]      = sum over taps of  rows[q + shift(tap)] @ w[tap]
    input gradient   g[q]      = sum over taps of  dz[q - shift(tap)] @ w[tap].T
    weight gradient  dw[tap]   = sum over rows of  rows[q + shift(tap)].T @ dz[q]

Rows outside the matrix are 0. Both operands of every product are plain boxes of row-major matrices: through
tensor descriptors (TMA) from Hopper on, through pointers and asynchronous copies before. With a stride of 2
the input gradient is four such products, one for each place of the 2x2 cell, in one launch.
No atomics: sums over many programs are partial sums, added in a fixed order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._gemm_kernels import (
    Product,
    _conv_forward_kernel,
    _conv_input_gradient_kernel,
    _conv_sum_kernel,
    _conv_weight_gradient_kernel,
)
from ._layout import Conv
from ._op import INTERPRET
from ._pointwise import Pointwise, accumulator, threshold
from ._tune import bucket, bucket_count, ceil_div, choose

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # without Triton no kernel runs
    TensorDescriptor = None


class Tile(NamedTuple):
    """A program computes block_m rows of block_n columns, in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def forward(
    rows: Tensor,
    packed: Tensor,
    conv: Conv,
    *,
    bias: Tensor | None = None,
    act: str = "none",
    slope: float = 0.2,
    statistics: bool = False,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of images that lie as `conv.input`: (z, partial).

    rows: (N * conv.input.rows, conv.input.columns). packed: (S, taps, k, n), conv.pack(weight) in the dtype
    of rows; N is a multiple of S, and set s serves the samples from s * N / S on. bias: (S, outputs) in the
    accumulator type.
    Returns z = act(conv + bias), (N, out_h, out_w, outputs) contiguous; for the kind "narrow", without bias
    and act, (N, out_h, grid_w, kernel * outputs), which lies as conv.spread. partial: (N, tiles, 2, outputs),
    accumulator type: the sums of z and z ** 2, before rounding, over each tile; empty without statistics.
    tile, tma: the launch, instead of the first of `tiles`, and whether through tensor descriptors.
    """
    narrow, grid = conv.kind == "narrow", conv.input
    assert not (narrow and (bias is not None or act != "none" or statistics)), (
        "the fold of `spread` does these"
    )
    if tile is None:
        options: dict[str, Any] = {"bias": bias, "act": act, "slope": slope, "statistics": statistics}

        def run(tile: Tile) -> None:
            forward(rows, packed, conv, **options, tile=tile, tma=tma)

        tile = _choose("forward", conv, rows, (len(packed), statistics), run)
    tma = _through_descriptors(tma, rows)
    n, sets, (taps, k, outer) = len(rows) // grid.rows, len(packed), conv.weight_shape
    width, columns = (grid.grid_w, conv.kernel * conv.outputs) if narrow else (conv.out_w, conv.outputs)
    z = rows.new_empty((n, conv.out_h, width, columns))
    blocks = ceil_div(conv.out_h * grid.grid_w, tile.block_m)
    partial = _partial(rows, (n, blocks, 2, columns) if statistics else (0,))
    if z.numel() == 0:
        return z, partial
    product = _product(conv, columns, rows, tile, tma)._replace(act=act, slope=slope)
    launch = (ceil_div(columns, tile.block_n), blocks, n)
    steps = taps * k // tile.block_k
    parts = _k_parts(launch, tile.block_m, steps, taps * k)
    scratch = _scratch(launch, parts, tile, partial)
    a, w = rows, packed.view(sets * taps * k, outer)
    if tma:
        a = TensorDescriptor.from_tensor(a, [tile.block_m, tile.block_k])
        w = TensorDescriptor.from_tensor(w, [tile.block_k, tile.block_n])
    out = (z, partial if statistics else None, bias)
    sizes = (len(rows), grid.rows, grid.grid_w, conv.out_h, width, 0, 0, n // sets, n)
    with torch.cuda.device_of(rows):
        _conv_forward_kernel[launch[0], blocks, parts * n](
            a, w, scratch, out, NOTHING, sizes, P=product, STEPS=steps // parts, **_blocks(tile)
        )  # fmt: skip
        if scratch is not None:
            _sum(scratch, out, NOTHING, sizes, product, 1, parts, launch, tile)
    return z, partial


def input_gradient(
    dz_rows: Tensor,
    packed: Tensor,
    conv: Conv,
    *,
    crop: bool = False,
    bias: Tensor | None = None,
    act: str = "none",
    slope: float = 0.2,
    statistics: bool = False,
    pending: Pointwise | None = None,
    z: Tensor | None = None,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of the convolution's input, or with `crop` a transposed convolution: (g, partial).

    dz_rows: (N * conv.output.rows, conv.output.columns). packed, bias, tile, tma: as in `forward`.
    Returns g, (N, grid_h, grid_w, columns) of conv.gradient, contiguous: the gradient of the padded image, to
    be folded. crop (kind "wide"): g is the image, (N, height, width, inputs), with bias, act and the partial
    sums of `forward`. pending and z, the raw image (N, height, width, inputs) that `pending` makes the input
    (kinds "wide" and "narrow"): partial, (N, tiles, 2, inputs), holds the sums over the padded image of g * m
    and g * m * xhat, m = act' * dropout and xhat = (z - mean) * rstd (z without a norm) being those of the
    pixel that a place shows. They equal the sums over the image of the folded g. Otherwise partial is empty.
    """
    assert conv.kind == "wide" or not crop
    assert conv.kind != "unrolled" or pending is None
    assert crop or not (bias is not None or act != "none" or statistics), "only of an image"
    assert pending is None or not crop
    if tile is None:
        options: dict[str, Any] = {"crop": crop, "bias": bias, "act": act, "slope": slope, "pending": pending}
        options |= {"z": z, "statistics": statistics}

        def run(tile: Tile) -> None:
            input_gradient(dz_rows, packed, conv, **options, tile=tile, tma=tma)

        extras = (len(packed), crop, statistics, pending is not None)
        tile = _choose("input_gradient", conv, dz_rows, extras, run)
    tma = _through_descriptors(tma, dz_rows)
    grid, target, cell = conv.output, conv.gradient, _cell(conv)
    n, sets, (taps, k, outer) = len(dz_rows) // grid.rows, len(packed), conv.weight_shape
    if crop:
        g = dz_rows.new_empty((n, conv.height, conv.width, conv.inputs))
    else:
        g = dz_rows.new_empty((n, target.grid_h, target.grid_w, target.columns))
    blocks, columns = ceil_div(grid.rows, tile.block_m), g.shape[3]
    sums = statistics or pending is not None
    partial = _partial(dz_rows, (n, cell * cell * blocks, 2, columns) if sums else (0,))
    if g.numel() == 0:
        return g, partial
    product = _product(conv, columns, dz_rows, tile, tma)
    product = product._replace(crop=conv.pad if crop else 0, act=act, slope=slope)
    due: tuple[Tensor | None, ...] = NOTHING
    if pending is not None:
        assert z is not None and z.shape == (n, conv.height, conv.width, conv.inputs) and z.is_contiguous()
        due = (z, *pending[:4], pending.seed)
        # the second sum, and the indices of dropout, take registers too
        product = product._replace(
            part=max(16, product.part // (4 if pending.dropout else 2)), pad=conv.pad, mode=conv.mode,
            act=pending.act, slope=pending.slope, threshold=threshold(pending.dropout),
            scale=1 / (1 - pending.dropout),
        )  # fmt: skip
    launch = (ceil_div(columns, tile.block_n), blocks, cell * cell * n)
    # every place of a cell has a multiple of so many steps
    steps = outer // tile.block_k * (1 if conv.kernel % cell else taps // cell**2)
    parts = _k_parts(launch, tile.block_m, steps, taps * outer)
    scratch = _scratch(launch, parts, tile, partial)
    a, w = dz_rows, packed.view(sets * taps * k, outer)
    if tma:
        a = TensorDescriptor.from_tensor(a, [tile.block_m, tile.block_k])
        w = TensorDescriptor.from_tensor(w, [tile.block_n, tile.block_k])
    out = (g, partial if sums else None, bias)
    sizes = (len(dz_rows), grid.rows, grid.grid_w, *g.shape[1:3], conv.height, conv.width, n // sets, n)
    with torch.cuda.device_of(dz_rows):
        _conv_input_gradient_kernel[launch[0], blocks, parts * launch[2]](
            a, w, scratch, out, due, sizes, P=product, PARTS=parts, **_blocks(tile)
        )
        if scratch is not None:
            _sum(scratch, out, due, sizes, product, cell, parts, launch, tile)
    return g, partial


def weight_gradient(
    rows: Tensor,
    dz_rows: Tensor,
    conv: Conv,
    groups: int,
    *,
    tile: Tile | None = None,
    tma: bool | None = None,
) -> Tensor:
    """The gradient of the packed weights, (groups, taps, k, n) in the accumulator type.

    rows: (N * conv.input.rows, conv.input.columns). dz_rows: (N * conv.output.rows, conv.output.columns).
    Group g contracts the samples g * N / groups to (g + 1) * N / groups. tile, tma: as in `forward`.
    """
    if tile is None:

        def run(tile: Tile) -> None:
            weight_gradient(rows, dz_rows, conv, groups, tile=tile, tma=tma)

        tile = _choose("weight_gradient", conv, rows, (groups,), run)
    tma = _through_descriptors(tma, rows)
    taps, k, outer = conv.weight_shape
    if len(rows) == 0:
        return _partial(rows, (groups, taps, k, outer)).zero_()
    of_group = len(rows) // groups
    blocks = ceil_div(k, tile.block_m) * ceil_div(outer, tile.block_n)
    steps = ceil_div(of_group, tile.block_k)
    parts = _row_parts(blocks * taps * groups, steps)
    partial = _partial(rows, (groups, parts, taps, k, outer))
    a, dz = rows, dz_rows
    if tma:
        a = TensorDescriptor.from_tensor(rows, [tile.block_k, tile.block_m])
        # of three axes, so that the rows behind a group's end read as zero
        grouped = dz_rows.view(groups, of_group, outer)
        dz = TensorDescriptor.from_tensor(grouped, [1, tile.block_k, tile.block_n])
    with torch.cuda.device_of(rows):
        _conv_weight_gradient_kernel[(blocks, taps, groups * parts)](
            a, dz, partial, len(rows), of_group, conv.input.grid_w, parts,
            P=_product(conv, outer, rows, tile, tma), STEPS=ceil_div(steps, parts), **_blocks(tile),
        )  # fmt: skip
    return partial[:, 0] if parts == 1 else partial.sum(1)


def tiles(
    kind: str, conv: Conv, dtype: torch.dtype, capability: tuple[int, int] | None, images: int = 1
) -> list[Tile]:
    """At most eight launches that run, the likely best first. kind: "forward", "input_gradient" or
    "weight_gradient".

    capability: of the GPU, or None for the interpreter. images: in the batch.
    """
    taps, k, n = conv.weight_shape
    itemsize, tma = dtype.itemsize, capability is None or capability[0] >= 9
    columns, contracted = {
        "forward": (n, k), "input_gradient": (k, n), "weight_gradient": (n, 64)
    }[kind]  # fmt: skip
    if capability is None or dtype == torch.float64:
        m = min(k, 32) if kind == "weight_gradient" else 32
        return [Tile(m, min(columns, 32), min(contracted, 32 if capability is None else 16), 4, 2)]

    def cost(m: int, n: int) -> float:
        if kind == "weight_gradient":
            blocks = ceil_div(k, m) * (columns // n) * taps
            parts = _row_parts(blocks, ceil_div(images * conv.input.rows, 64))
        else:
            places, rows = _cell(conv) ** 2, conv.output.rows
            if kind == "forward":
                places, rows = 1, conv.out_h * conv.input.grid_w
            launch = (columns // n, ceil_div(rows, m), places * images)
            steps = taps // places * contracted // min(contracted, 64)
            blocks, parts = math.prod(launch), _k_parts(launch, m, steps, taps * contracted)
        # of the tensor cores, or of the shared memory that feeds them
        clocks = max(m * n, 64 * m + m * n // 2 + 32 * n)
        return ceil_div(blocks * parts, PROCESSORS) * clocks / parts

    # Blackwell multiplies 128 rows at a time, Hopper 64
    most = 256 if columns >= 64 else 128
    heights = [m for m in (64, 128, 256) if (128 if capability[0] == 10 else 64) <= m <= most]
    if kind == "weight_gradient":
        heights = [m for m in _blocks_of(k) if columns >= 64 or m <= 64]
        # only a descriptor ends a block at the last column
        heights = [max(m, 64) for m in heights] if tma else heights
    # of float32, copies of the operands are transposed in shared memory
    area, room = (128 * 256, 192) if itemsize == 2 else (128 * 128, 128)
    shapes = [(m, n) for m in heights for n in _blocks_of(columns) if m * n <= area]
    if capability[0] not in (9, 10):
        # eight warps of it spill registers, four have too many accumulators each
        shapes = [shape for shape in shapes if shape != (64, 256)]
    if kind == "input_gradient" and not tma:
        # the sums of a norm at mirrored pixels leave no registers for wider ones on Ampere
        shapes = [(m, n) for m, n in shapes if n <= 128]
    found = []
    # of equal ones the larger block, which reads less
    for m, n in sorted(shapes, key=lambda shape: (cost(*shape), -shape[0] * shape[1]))[:8]:
        # rows of 128 bytes are the widest that a descriptor lays out without bank conflicts
        row = 128 if tma or m * n <= 64 * 64 else 64
        block_k = min(contracted, row // itemsize)
        # half of the shared memory, so that two programs share a processor, or else all of it
        stage = (m + n) * block_k * itemsize
        stages = 96 * 1024 // stage
        if stages < 3 and capability[0] in (9, 10):
            stages = room * 1024 // stage
        # a warp group of Hopper holds 64 rows of 256 columns
        few = m * n < 128 * 128 or (m == 64 and capability[0] == 9)
        found.append(Tile(m, n, block_k, 4 if few else 8, min(4, stages)))
    return found


def _blocks_of(columns: int) -> tuple[int, ...]:
    """Blocks that divide the columns of a matrix (see round_columns)."""
    return (columns,) if columns < 64 else tuple(size for size in (64, 128, 256) if columns % size == 0)


# of an H200
PROCESSORS = 132
NOTHING = (None,) * 6


# the likely best few: each costs a compilation
MEASURED = 4


def _choose(
    kind: str, conv: Conv, rows: Tensor, extras: tuple[object, ...], run: Callable[[Tile], object]
) -> Tile:
    """The measured fastest of the likely tiles. extras: what the speed depends on besides the convolution."""
    assert conv.kind != "plain", "a plain convolution is cuDNN's"
    capability = None if INTERPRET else _capability(rows)
    # rows of either operand: they share the grid
    images = len(rows) // conv.input.rows
    found = tiles(kind, conv, rows.dtype, capability, images)
    if rows.device.type != "cuda" or images == 0:
        return found[0]
    size = (bucket(conv.height), bucket(conv.width), bucket_count(images))
    key = (conv.kind, conv.kernel, conv.stride, conv.inputs, conv.outputs, *size, rows.dtype, *extras)
    return choose(f"tile_{kind}", key, found[:MEASURED], run, rows.device)


def _through_descriptors(tma: bool | None, rows: Tensor) -> bool:
    return tma if tma is not None else INTERPRET or _capability(rows)[0] >= 9


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device)


def _cell(conv: Conv) -> int:
    """Pixels side by side in a row of the matrix, each with taps of its own."""
    return conv.stride if conv.kind == "wide" else 1


def _product(conv: Conv, columns: int, rows: Tensor, tile: Tile, tma: bool) -> Product:
    # 32 values of a thread at once
    part = max(16, min(64, 1024 * tile.num_warps // tile.block_m))
    precision = "tf32" if rows.dtype == torch.float32 and not INTERPRET else "ieee"
    return Product(
        *conv.taps, *conv.weight_shape[1:], _cell(conv), conv.input.pitch, conv.input.columns, columns,
        precision, tma, part,
    )  # fmt: skip


def _blocks(tile: Tile) -> dict[str, int]:
    m, n, k, num_warps, num_stages = tile
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}


def _partial(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.new_empty(shape, dtype=accumulator(rows.dtype))


def _row_parts(blocks: int, steps: int) -> int:
    """Into how many parts the rows of a weight gradient are split, of at least eight steps."""
    return max(1, min(2 * PROCESSORS // blocks, steps // 8))


def _k_parts(launch: tuple[int, ...], block_m: int, steps: int, contracted: int) -> int:
    """Into how many equal parts a product is split along k.

    Only small images with large weights have too few blocks; the sums of the parts, which a second launch
    adds, stay smaller than the weights.
    """
    blocks, rows = math.prod(launch), math.prod(launch[1:]) * block_m
    most = min(PROCESSORS // blocks, steps // 8, contracted // (2 * rows))
    return max((d for d in range(1, most + 1) if steps % d == 0), default=1)


def _scratch(launch: tuple[int, int, int], parts: int, tile: Tile, like: Tensor) -> Tensor | None:
    if parts == 1:
        return None
    return like.new_empty((parts * launch[1] * launch[2] * tile.block_m, launch[0] * tile.block_n))


def _sum(
    scratch: Tensor,
    out: tuple[Any, ...],
    due: tuple[Any, ...],
    sizes: tuple[int, ...],
    product: Product,
    cell: int,
    parts: int,
    launch: tuple[int, int, int],
    tile: Tile,
) -> None:
    # narrow blocks: few rows are left, and all processors should read
    block_n = min(tile.block_n, 16)
    grid = (ceil_div(product.columns, block_n), *launch[1:])
    _conv_sum_kernel[grid](
        scratch, out, due, sizes, scratch.shape[1],
        P=product, CELL=cell, PARTS=parts, BLOCK_M=tile.block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip

"""Compiles what `tiles` can choose for the layers of CycleGAN, pix2pix and their PatchGANs at 256x256.

A launch fails that spills registers, needs more shared memory than a program has, or whose main loop is not
what the design counts on: wgmma and TMA on sm_90, tcgen05 and TMA on sm_100, asynchronous copies on sm_80.

What is compiled once for many: layers that share a kind of product, a tile and the number of loops. They
differ in constants of the address arithmetic and in trip counts, which are scalars; what fills the registers
is the accumulator and the work at the end, and here every launch does all that its kind can do there. Tiles
that differ in block_k or stages alone share the accumulator, and the widest blocks bound the shared memory.
"""

from collections.abc import Iterator

import pytest
import torch
from fastgan_kernels._op import HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

from fastgan_kernels._gemm import Tile, tiles
from fastgan_kernels._layout import Conv

from benchmarks._compile import LAYERS, PRODUCTS, SHARED_LIMIT, Launch, count, record_product

# a "transposed" product is the input gradient run forward
KINDS = ["forward", "input_gradient", "transposed", "weight_gradient"]
# architecture, through tensor descriptors
FORMS = [(80, False), (90, True), (100, True)]


def strided(conv: Conv) -> bool:
    return conv.kind == "wide" and conv.stride == 2


def cases(kind: str, architecture: int, dtype: torch.dtype) -> Iterator[tuple[Conv, Tile]]:
    own = "input_gradient" if kind == "transposed" else kind
    seen = set()
    # an unrolled layer has no work at the end of its input gradient
    for conv in sorted(LAYERS.values(), key=lambda c: (c.kind == "unrolled", strided(c))):
        if kind == "transposed" and not strided(conv):
            continue
        # with an odd kernel each place of a cell has a loop of its own
        loops = kind == "transposed" and conv.kernel % 2
        for images in (1, 2, 4):
            for tile in tiles(own, conv, dtype, (architecture // 10, 0), images):
                key = (tile.block_m, tile.block_n, tile.num_warps, loops)
                if key not in seen:
                    seen.add(key)
                    yield conv, tile


def check(launch: Launch, architecture: int, tma: bool) -> None:
    compiled = launch.compile(architecture)
    what = f"{launch.name} {launch.kwargs}"
    assert compiled.spills == 0, what
    assert compiled.shared <= SHARED_LIMIT[architecture], what
    if launch.name != "_conv_sum_kernel":
        # loops of few steps are unrolled
        loop = compiled.loop if count(compiled.loop, *PRODUCTS) else compiled.code
        assert count(loop, {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[architecture]), what
        assert count(loop, "UTMALDG" if tma else "LDGSTS"), what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture, tma", FORMS)
def test_bfloat16(architecture, tma, kind):
    for conv, tile in cases(kind, architecture, torch.bfloat16):
        for launch in record_product(kind, conv, tile, tma):
            check(launch, architecture, tma)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture, tma", FORMS)
def test_float32(architecture, tma, kind):
    # the largest tile: all others have smaller accumulators
    conv, tile = max(
        cases(kind, architecture, torch.float32), key=lambda case: case[1].block_m * case[1].block_n
    )
    for launch in record_product(kind, conv, tile, tma, dtype=torch.float32):
        check(launch, architecture, tma)


@pytest.mark.parametrize("kind", KINDS)
def test_pointers_on_hopper(kind):
    conv = LAYERS["ResNet down 2"]
    for launch in record_product(kind, conv, Tile(128, 128, 64, 8, 3), False):
        check(launch, 90, False)


@pytest.mark.parametrize("kind", ["forward", "input_gradient", "transposed"])
@pytest.mark.parametrize("architecture, tma", FORMS)
def test_split_products(architecture, tma, kind):
    conv = LAYERS["U-Net down 6"]
    own = "forward" if kind == "forward" else "input_gradient"
    tile = tiles(own, conv, torch.bfloat16, (architecture // 10, 0))[0]
    launches = record_product(kind, conv, tile, tma)
    assert [launch.name for launch in launches][1:] == ["_conv_sum_kernel"]
    for launch in launches:
        check(launch, architecture, tma)

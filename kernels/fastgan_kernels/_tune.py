"""Launch configurations of the bandwidth kernels: short functions of the shape, not yet measured on a GPU."""

from typing import NamedTuple


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def row_tile(columns: int) -> tuple[int, int]:
    """(BLOCK_H, BLOCK_W) of 1024 elements: the widest that overhangs the row by an eighth of it at most."""
    block_w = 1024
    while block_w > 32 and ceil_div(columns, block_w) * block_w * 8 > columns * 9:
        block_w //= 2
    return 1024 // block_w, block_w


class PlaneTile(NamedTuple):
    """A program takes BLOCK_C planes: all pixels (chunks is 0), or a chunk of BLOCK_P * STEPS of them."""

    block_c: int
    block_p: int
    steps: int
    chunks: int
    num_warps: int


def plane_tile(n: int, c: int, pixels: int, channels_last: bool, itemsize: int) -> PlaneTile:
    """Tile of a reduction over the pixels of each (n, c) plane."""
    # 16384 float32 values are 32 registers of each thread of 16 warps
    limit = 8192 if itemsize == 8 else 16384
    # 16 channels of a half type fill the 32-byte sector that one pixel's load fetches
    block_c = min(16, power_of_two(c)) if channels_last else 1
    block_p = power_of_two(pixels)
    if block_c * block_p <= limit:
        block_c = max(block_c, min(2048 // block_p, power_of_two(c)))
        return PlaneTile(block_c, block_p, 1, 0, max(1, min(16, block_c * block_p // 512)))
    block_c = min(64, power_of_two(c)) if channels_last else 1
    block_p = 2048 // block_c
    # about 1024 programs fill every GPU in sight; 256 partial sums of a plane still fit in one program
    chunks = max(1, min(256, 1024 // (n * ceil_div(c, block_c))))
    steps = power_of_two(ceil_div(pixels, chunks * block_p))
    # 8 warps: each thread fetches one 16-byte vector of a half type
    return PlaneTile(block_c, block_p, steps, ceil_div(pixels, steps * block_p), 8)

"""What the ops share: the CPU rule without Triton, memory layouts, launch configurations."""

import os
import subprocess
import sys
from pathlib import Path

import fastgan_kernels
import pytest
import torch
from fastgan_kernels._op import layout
from fastgan_kernels._tune import plane_tile, row_tile

PLANES = [(1, 1, 1), (1, 3, 35), (4, 256, 4096), (1, 64, 65536), (9, 5, 2**24)]

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from fastgan_kernels import _op, instance_norm_act, reflect_pad2d
assert not _op.HAS_TRITON and not _op.INTERPRET
x = torch.randn(2, 3, 5, 6, requires_grad=True)
instance_norm_act(reflect_pad2d(x, 2), act="relu").sum().backward()
assert x.grad.shape == x.shape
torch.library.opcheck(torch.ops.fastgan.reflect_pad2d.default, (x, [1, 1, 1, 1]))
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_works_without_triton(interpret):
    package = Path(fastgan_kernels.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", WITHOUT_TRITON]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_memory_is_poisoned():
    # the tests rely on it: an output element that no kernel wrote is NaN
    assert torch.empty(8).isnan().all()


def test_layout():
    x = torch.randn(2, 3, 4, 5)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    for contiguous in (x, x[:, :2], x[:, :, 1:], x[..., ::2], nhwc[:, :, :1, :1].contiguous(), x[:, :1]):
        assert layout(contiguous) == torch.contiguous_format
    for channels_last in (nhwc, nhwc[:, :2], nhwc[:, :, 1:], nhwc[..., ::2], nhwc.transpose(2, 3)):
        assert layout(channels_last) == torch.channels_last


@pytest.mark.parametrize("columns", [1, 7, 32, 33, 70, 256, 262, 16896, 100000])
def test_row_tile(columns):
    block_h, block_w = row_tile(columns)
    assert block_h * block_w == 1024
    assert block_w == 32 or -columns % block_w <= columns / 8


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 8])
@pytest.mark.parametrize("n, c, pixels", PLANES)
def test_plane_tile(n, c, pixels, itemsize, channels_last):
    tile = plane_tile(n, c, pixels, channels_last, itemsize)
    for size in (tile.block_c, tile.block_p, tile.steps, tile.num_warps):
        assert size & (size - 1) == 0
    if tile.chunks == 0:
        assert tile.block_p >= pixels
        assert tile.block_c * tile.block_p <= (8192 if itemsize == 8 else 16384)
    else:
        chunk = tile.steps * tile.block_p
        assert (tile.chunks - 1) * chunk < pixels <= tile.chunks * chunk
        assert tile.chunks <= 256

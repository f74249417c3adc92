"""The algebra of _layout.py in float64: every convolution as products of shifted rows, against torch.

The kernels are not in it: test_gemm.py and test_halo.py show that they compute these products and layouts.
"""

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels._layout import Conv
from torch import Tensor

CONVS = [
    # height, width, inputs, outputs, kernel, stride, pad, mode
    (6, 9, 13, 17, 3, 1, 1, "reflect"),  # residual block
    (7, 9, 13, 17, 3, 1, 1, "replicate"),
    (12, 9, 3, 20, 7, 1, 3, "reflect"),  # first layer of a ResNet: unrolled
    (12, 9, 20, 3, 7, 1, 3, "reflect"),  # its last: narrow
    (12, 17, 12, 9, 3, 2, 1, "zeros"),  # stride 2, an odd side
    (11, 16, 12, 9, 4, 2, 1, "zeros"),
    (13, 16, 6, 9, 4, 2, 1, "zeros"),  # first layer of a PatchGAN: unrolled, stride 2
    (13, 16, 12, 1, 4, 1, 1, "zeros"),  # its last: narrow
    (5, 4, 12, 9, 1, 1, 0, "zeros"),
]


def shifted(rows: Tensor, taps: list[tuple[int, int, Tensor]]) -> Tensor:
    """The sum over taps of rows[q + shift, column : column + k] @ weight; rows outside are 0."""
    out = rows.new_zeros(len(rows), taps[0][2].shape[1])
    for shift, column, weight in taps:
        low, high = max(0, -shift), min(len(rows), len(rows) - shift)
        out[low:high] += rows[low + shift : high + shift, column : column + weight.shape[0]] @ weight
    return out


def taps_of(conv: Conv, weight: Tensor) -> list[tuple[int, int, int, Tensor]]:
    """Shift, column, phase and weight of each tap."""
    found, cell = [], conv.stride if conv.kind == "wide" else 1
    for t, w in enumerate(weight):
        u, v = divmod(t, conv.taps[1])
        phase = u % cell * cell + v % cell
        found.append((u // cell * conv.input.grid_w + v // cell, phase * conv.input.pitch, phase, w))
    return found


@pytest.mark.parametrize("case", CONVS)
def test_shifted_rows_are_convolutions(case):
    torch.manual_seed(0)
    conv, n = Conv(*case), 2
    x = torch.randn(n, conv.inputs, conv.height, conv.width, dtype=torch.float64, requires_grad=True)
    size = (conv.outputs, conv.inputs, conv.kernel, conv.kernel)
    weight = torch.randn(size, dtype=torch.float64, requires_grad=True)
    mode = {"zeros": "constant"}.get(conv.mode, conv.mode)
    expected = F.conv2d(F.pad(x, (conv.pad,) * 4, mode=mode), weight, stride=conv.stride)
    dy = torch.randn_like(expected)
    expected.backward(dy)
    packed = conv.pack(weight.detach()[None])
    assert packed.shape[1:] == conv.weight_shape
    assert torch.equal(conv.unpack(packed)[0], weight.detach())
    taps, grid = taps_of(conv, packed[0]), conv.input

    rows = grid.write(x.detach())
    y = shifted(rows, [(shift, column, w) for shift, column, _, w in taps])
    y = y.view(n, grid.grid_h, grid.grid_w, -1)[:, : conv.out_h]
    if conv.kind == "narrow":
        y = conv.spread.fold(y[..., : conv.spread.columns].reshape(-1, conv.spread.columns))
    else:
        y = y[:, :, : conv.out_w, : conv.outputs].permute(0, 3, 1, 2)
    torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-11)

    dz = conv.output.write(dy)
    phases = max(phase for *_, phase, _ in taps) + 1
    parts = [shifted(dz, [(-s, 0, w.T) for s, _, p, w in taps if p == phase]) for phase in range(phases)]
    g = torch.stack([part[:, : conv.gradient.columns] for part in parts], 1)
    cell = 1 if phases == 1 else 2
    g = g.view(n, grid.grid_h, grid.grid_w, cell, cell, -1).transpose(2, 3)
    dx = conv.gradient.fold(g.reshape(-1, conv.gradient.columns))
    torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-11)

    padded = torch.cat([rows, rows.new_zeros(conv.kernel * (grid.grid_w + 1), grid.columns)])
    k = packed.shape[2]
    dw = torch.stack([padded[s : s + len(rows), c : c + k].T @ dz for s, c, *_ in taps])
    torch.testing.assert_close(conv.unpack(dw[None])[0], weight.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CONVS)
def test_fold_is_the_transpose_of_write(case):
    conv = Conv(*case)
    for layout in (conv.input, conv.output, conv.gradient, conv.spread):
        x = torch.randn(2, layout.channels, layout.height, layout.width, dtype=torch.float64)
        rows = torch.randn(2 * layout.rows, layout.columns, dtype=torch.float64)
        torch.testing.assert_close((layout.write(x) * rows).sum(), (x * layout.fold(rows)).sum())


@pytest.mark.parametrize("case", CONVS)
def test_operands_fit_tensor_descriptors(case):
    """Rows of 16 bytes in a half type, and blocks of columns that never reach into another tap."""
    conv = Conv(*case)
    _, k, n = conv.weight_shape
    for columns in (conv.input.columns, conv.output.columns, k, n):
        assert columns % 64 == 0 or columns in (16, 32)
    assert conv.output.columns == n

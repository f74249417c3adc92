"""Where an image batch lies in memory so that every convolution becomes a product of shifted rows.

A Layout turns images (N, C, H, W) into a matrix: the row (n, i, j) and the column (a, b, c) hold

    image[n, c, m(step * i + a - top), m(step * j + b - left)]          (back: step * j - b)

where m mirrors, clamps or, outside the padded image, gives 0. With it, tap (u, v) of a convolution reads row
q + u * grid_w + v for output row q: a box of the matrix, without index arithmetic. The rows whose j is not
below the output width are garbage; they are not stored.

Conv says which layouts a convolution uses:

    wide      stride 1: a pixel is a row. stride 2: the four pixels of a 2x2 cell are a row, side by side.
    unrolled  few input channels: a row also holds the kernel's columns, so that only its rows are taps.
    narrow    few output channels: the product gives an output per kernel column, and `spread`.fold adds them.

The gradient of the output is laid out on the same grid as the input (`output`), with zeros to the right and
below: the input gradient is the same product with negative shifts, the weight gradient contracts the rows.
A transposed convolution is the input gradient of the Conv that maps its output to its input.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tune import ceil_div

MODES = ("zeros", "reflect", "replicate")
# at most so many channels are unrolled (input) or spread (output)
FEW = 8


def round_columns(columns: int) -> int:
    """Columns of a matrix operand: a multiple of the product's block of 64, 32 or 16."""
    return ceil_div(columns, 64) * 64 if columns > 32 else 32 if columns > 16 else 16


@dataclass(frozen=True)
class Layout:
    """Images of `channels` x `height` x `width` as grid_h * grid_w rows each, of `columns` columns.

    step: pixels of the padded image per grid row and column. sub_h, sub_w: pixels of it in a row.
    pitch: columns per pixel. top, left: rows and columns of padding before the image. padded_h, padded_w:
    size of the padded image; beyond it, and in the columns beyond the channels, the matrix is 0.
    """

    height: int
    width: int
    channels: int
    grid_h: int
    grid_w: int
    step: int
    sub_h: int
    sub_w: int
    back: bool
    pitch: int
    columns: int
    top: int
    left: int
    padded_h: int
    padded_w: int
    mode: str

    @property
    def rows(self) -> int:
        """Rows of one image."""
        return self.grid_h * self.grid_w

    def source(self) -> tuple[Tensor, Tensor]:
        """For each (row, column): the index into the flattened (H, W, C) image, and whether it is one."""
        row = torch.arange(self.rows).view(-1, 1)
        column = torch.arange(self.columns).view(1, -1)
        c, b, a = column % self.pitch, column // self.pitch % self.sub_w, column // self.pitch // self.sub_w
        h = self.step * (row // self.grid_w) + a
        w = self.step * (row % self.grid_w) + (-b if self.back else b)
        used = (a < self.sub_h) & (c < self.channels)
        used = used & (h < self.padded_h) & (w >= 0) & (w < self.padded_w)
        h, w = h - self.top, w - self.left
        if self.mode == "zeros":
            used = used & (h >= 0) & (h < self.height) & (w >= 0) & (w < self.width)
        elif self.mode == "reflect":
            h, w = _reflect(h, self.height), _reflect(w, self.width)
        h, w = h.clamp(0, self.height - 1), w.clamp(0, self.width - 1)
        return (h * self.width + w) * self.channels + c.clamp(max=self.channels - 1), used

    def write(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N * rows, columns): what the kernel has to write; differentiable, and slow."""
        index, used = self.source()
        flat = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        rows = flat[:, index.flatten().to(x.device)] * used.flatten().to(x.device)
        return rows.view(len(x) * self.rows, self.columns)

    def fold(self, rows: Tensor) -> Tensor:
        """The transpose of write: each pixel is the sum of the places that hold it."""
        index, used = self.source()
        n = len(rows) // self.rows
        flat = rows.new_zeros(n, self.height * self.width * self.channels)
        values = rows.reshape(n, -1) * used.flatten().to(rows.device)
        flat = flat.index_add(1, index.flatten().to(rows.device), values)
        return flat.view(n, self.height, self.width, self.channels).permute(0, 3, 1, 2)


def _reflect(i: Tensor, size: int) -> Tensor:
    i = i.abs()
    return torch.where(i >= size, 2 * (size - 1) - i, i)


def image_layout(height: int, width: int, channels: int) -> Layout:
    """The layout of a channels_last tensor."""
    return Layout(
        height, width, channels, height, width, 1, 1, 1, False, channels, channels, 0, 0, height, width,
        "zeros",
    )  # fmt: skip


@dataclass(frozen=True)
class Conv:
    """A convolution of (N, inputs, height, width) images: its layouts, its taps, and its weights as a matrix.

    mode: "zeros", "reflect" or "replicate", how the `pad` pixels on every side are filled. stride: 1 or 2.
    plain: as cuDNN takes it: the layouts are the padded image and the plain output, whatever the stride.
    """

    height: int
    width: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    pad: int
    mode: str
    plain: bool = False

    @property
    def out_h(self) -> int:
        return (self.height + 2 * self.pad - self.kernel) // self.stride + 1

    @property
    def out_w(self) -> int:
        return (self.width + 2 * self.pad - self.kernel) // self.stride + 1

    @cached_property
    def kind(self) -> str:
        """ "plain", "wide", "unrolled" or "narrow"."""
        if self.plain:
            return "plain"
        if self.inputs <= FEW and self.kernel > 1:
            return "unrolled"
        if self.outputs <= FEW and self.stride == 1 and self.kernel > 1:
            return "narrow"
        return "wide"

    @cached_property
    def input(self) -> Layout:
        """The layout that the product reads."""
        k, s, c = self.kernel, self.stride, self.inputs
        padded_h, padded_w = self.height + 2 * self.pad, self.width + 2 * self.pad
        if self.kind == "plain":
            grid_h, grid_w, step, sub_h, sub_w, pitch = padded_h, padded_w, 1, 1, 1, c
        elif self.kind == "unrolled":
            grid_h, grid_w, step, sub_h, sub_w, pitch = ceil_div(padded_h, s), self.out_w, s, s, k, c
        else:
            grid_h, grid_w = ceil_div(padded_h, s), ceil_div(padded_w, s)
            step, sub_h, sub_w, pitch = s, s, s, round_columns(c)
        columns = c if self.kind == "plain" else round_columns(sub_h * sub_w * pitch)
        return Layout(
            self.height, self.width, c, grid_h, grid_w, step, sub_h, sub_w, False, pitch, columns,
            self.pad, self.pad, padded_h, padded_w, self.mode,
        )  # fmt: skip

    @cached_property
    def output(self) -> Layout:
        """The layout of the output's gradient: on the grid of the input, zero where there is no output."""
        if self.kind == "plain":
            return image_layout(self.out_h, self.out_w, self.outputs)
        grid, narrow = self.input, self.kind == "narrow"
        sub_w, pitch = (self.kernel, self.outputs) if narrow else (1, round_columns(self.outputs))
        # a spread pixel may lie kernel - 1 columns to the right of the last output
        return Layout(
            self.out_h, self.out_w, self.outputs, grid.grid_h, grid.grid_w, 1, 1, sub_w, narrow, pitch,
            round_columns(sub_w * pitch), 0, 0, self.out_h, self.out_w, "zeros",
        )  # fmt: skip

    @cached_property
    def spread(self) -> Layout:
        """narrow: where the product's (N, out_h, grid_w, kernel * outputs) lies; its fold is the output."""
        return Layout(
            self.out_h, self.out_w, self.outputs, self.out_h, self.input.grid_w, 1, 1, self.kernel, True,
            self.outputs, self.kernel * self.outputs, 0, 0, self.out_h, self.out_w, "zeros",
        )  # fmt: skip

    @cached_property
    def gradient(self) -> Layout:
        """Where the product leaves the input's gradient: the padded image, or the unrolled grid."""
        if self.kind in ("plain", "unrolled"):
            # the product leaves no gap behind the columns that it uses
            used = self.input.sub_h * self.input.sub_w * self.input.pitch
            return Layout(**{**vars(self.input), "columns": used})
        h, w = self.stride * self.input.grid_h, self.stride * self.input.grid_w
        return Layout(
            self.height, self.width, self.inputs, h, w, 1, 1, 1, False, self.inputs, self.inputs,
            self.pad, self.pad, self.height + 2 * self.pad, self.width + 2 * self.pad, self.mode,
        )  # fmt: skip

    @cached_property
    def taps(self) -> tuple[int, int]:
        """(rows, columns) of taps of the product; a stride of 2 halves them where it is unrolled."""
        if self.kind == "unrolled":
            return ceil_div(self.kernel, self.stride), 1
        return self.kernel, 1 if self.kind == "narrow" else self.kernel

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """(taps, k, n): k columns of the input meet n columns of the output's gradient at each tap."""
        k = self.input.columns if self.kind == "unrolled" else self.input.pitch
        return self.taps[0] * self.taps[1], k, self.output.columns

    def pack(self, weight: Tensor) -> Tensor:
        """(S, outputs, inputs, kernel, kernel) to (S, taps, k, n), with zeros where it is padded."""
        k, sets = self.kernel, len(weight)
        taps, inner, outer = self.weight_shape
        if self.kind == "unrolled":
            rows = self.taps[0] * self.stride
            w = F.pad(weight, (0, 0, 0, rows - k)).permute(0, 3, 4, 2, 1)
            w = w.reshape(sets, taps, self.stride * k * self.inputs, self.outputs)
        elif self.kind == "narrow":
            w = weight.permute(0, 3, 2, 4, 1).reshape(sets, taps, self.inputs, k * self.outputs)
        else:
            w = weight.permute(0, 3, 4, 2, 1).reshape(sets, taps, self.inputs, self.outputs)
        return F.pad(w, (0, outer - w.shape[3], 0, inner - w.shape[2])).contiguous()

    def unpack(self, packed: Tensor) -> Tensor:
        """The transpose of pack: (S, taps, k, n) to (S, outputs, inputs, kernel, kernel)."""
        k, sets = self.kernel, len(packed)
        if self.kind == "unrolled":
            rows = self.taps[0] * self.stride
            used = packed[:, :, : self.stride * k * self.inputs, : self.outputs]
            w = used.reshape(sets, rows, k, self.inputs, self.outputs)[:, :k].permute(0, 4, 3, 1, 2)
        elif self.kind == "narrow":
            used = packed[:, :, : self.inputs, : k * self.outputs]
            w = used.reshape(sets, k, self.inputs, k, self.outputs).permute(0, 4, 2, 1, 3)
        else:
            used = packed[:, :, : self.inputs, : self.outputs]
            w = used.reshape(sets, k, k, self.inputs, self.outputs).permute(0, 4, 3, 1, 2)
        return w.contiguous()

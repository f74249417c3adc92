"""Exact translation of images larger than memory: a network runs layer by layer over tiles of the image.

A tile with a halo as wide as the network's reach (84 pixels for 9 residual blocks, 60 for 6) is exact only
without instance norm, whose mean and variance are those of the whole image: normalised alone, a tile gets a
brightness and a contrast of its own. So a stage of the network, a convolution with the norm, activation and
residual add that stand in front of it, runs over all tiles before the next begins. Its output, not yet
normalised, goes to a temporary file, and its sums to float64; the next stage reads a tile and the few pixels
around it that one convolution reaches, and normalises by what is now known of the whole image.

The files make the work linear in the number of layers: without them each of the 23 norms of the 9-block
network would need a pass of its own that computes all layers below it again. Memory is that of one tile at
its widest layer. On disk are the input and output of a stage, see `disk_bytes`, in the dtype in which the
network computes; the files have no name where the system allows it, so not even a kill leaves any.

A network without such norms, whose pixels each depend on the few around them alone (it says how many by its
`reach`, as SRResNet and SRCNN do), runs as a whole on each tile with that halo, and needs no files.

Layers run as they are, padding included, and what their padding spoils inside the image is cut off: the
pixels at the true border are therefore padded as in the whole image, by the same code.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastgan.config import UsageError
from fastgan.layers import refusal
from fastgan.stack import CONVS, NORMS, PADS

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Dropout)
LEAST = 32  # pixels; below it the halos are most of the work
# copies of the widest stage's input and output that memory holds, whole and in tiles: above what was measured
# at 9 blocks, ngf 64, 1024x1024, float32 on two CPU cores, 1.4 whole and 2.5 at tile 512 (the halos, and what
# is on its way to and from the files)
COPIES = (2, 4)


class Box(NamedTuple):
    """Rows top to bottom - 1 and columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int

    def inside(self, outer: Box) -> tuple[slice, slice]:
        """The slices of this box in a tensor that holds `outer`."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)

    def scaled(self, up: int, down: int) -> Box:
        """The box in an image `up` / `down` times as large."""
        return Box(*(side * up // down for side in self))

    def grown(self, halo: int, height: int, width: int) -> Box:
        """The box with `halo` pixels around it that an image of height x width has."""
        return Box(
            max(0, self.top - halo), min(height, self.bottom + halo),
            max(0, self.left - halo), min(width, self.right + halo),
        )  # fmt: skip


@dataclass
class Stage:
    """A convolution and what happens to its input: `point` on each pixel ("add": the residual that an earlier
    stage kept), `keep` the result as a residual, `pad`. The last stage has no convolution."""

    point: list[nn.Module | Literal["add"]] = field(default_factory=list)
    keep: bool = False
    pad: nn.Module | None = None
    conv: Any = None
    # sizes are multiplied by up / down
    up: int = 1
    down: int = 1
    halo: int = 0  # pixels of the input around what an output needs; a multiple of `down`

    @property
    def measures(self) -> bool:
        """Whether its input is normalised by statistics of its own."""
        norm = self.point[0] if self.point else None
        return isinstance(norm, NORMS) and _measures(norm)


def local_reach(net: nn.Module) -> int | None:
    """The halo in pixels with which tiles of a network are exact by themselves; None for a network that runs
    stage by stage.

    Raises:
        UsageError: its norms look at the whole image.
    """
    reach = getattr(net, "reach", None)
    if reach is None:
        return None
    for module in net.modules():
        if isinstance(module, NORMS) and _measures(module):
            raise UsageError(
                f"--tile: the {type(module).__name__} in this network takes the statistics of the whole "
                "image; leave --tile out"
            )
    return int(reach)


def _measures(norm: Any) -> bool:
    """Whether a norm takes the statistics of its own input."""
    return norm.training or norm.running_mean is None


def check_network(net: nn.Module) -> None:
    """UsageError where a network cannot run in tiles; says why."""
    if local_reach(net) is None:
        stages(net)


def stages(net: nn.Module) -> list[Stage]:
    """The stages of a network whose layers follow each other, such as the ResNet generator.

    Raises:
        UsageError: a network or a layer that cannot run in tiles; says why.
    """
    line = getattr(net, "line", None)
    if not isinstance(line, nn.Sequential):
        raise UsageError(
            f"--tile: a {type(net).__name__} cannot run in tiles: its innermost layers see the whole image, "
            "and its layers do not simply follow each other; leave --tile out"
        )
    found = [Stage()]
    for item in _flat(line):
        _add(found, item)
    return found


def _flat(line: nn.Sequential) -> Iterator[nn.Module | str]:
    for layer in line:
        body = getattr(layer, "residual_body", None)
        if body is not None:
            yield "keep"
            yield from _flat(body)
            yield "add"
        elif isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        else:
            yield layer


def _add(found: list[Stage], item: Any) -> None:
    stage = found[-1]
    why = None
    if item == "keep":
        stage.keep = True
    elif isinstance(item, PADS):
        stage.pad = item
    elif isinstance(item, CONVS):
        why = refusal(item) or _attach(stage, item)
        found.append(Stage())
    elif stage.pad is not None or stage.keep:
        why = "it stands between a padding or the start of a residual block and its convolution"
    elif isinstance(item, NORMS):
        if stage.point or len(found) == 1:
            why = "it does not follow a convolution"
        stage.point.append(item)
        # the activation that the fused norm holds
        act, slope = getattr(item, "act", "none"), getattr(item, "slope", 0.2)
        if act != "none":
            stage.point.append(nn.ReLU(True) if act == "relu" else nn.LeakyReLU(slope, True))
    elif isinstance(item, nn.Dropout) and item.training:
        why = "in training mode it draws another mask in every tile"
    elif item == "add" or isinstance(item, ELEMENTWISE):
        stage.point.append(item)
    else:
        why = "only convolutions, norms, activations and residual blocks can"
    if why is not None:
        raise UsageError(f"--tile: the layer {item} cannot run in tiles: {why}; leave --tile out")


def _attach(stage: Stage, conv: Any) -> str | None:
    """Sets the convolution of a stage; why it cannot, None where it can."""
    kernel, stride, pad = conv.kernel_size[0], conv.stride[0], conv.padding
    if getattr(conv, "norm", None) is not None or getattr(conv, "act", "none") != "none":
        return "its norm or activation is part of it"
    around = (int(pad[0]) if not isinstance(pad, str) else 0) + getattr(stage.pad, "padding", [0])[0]
    stage.conv = conv
    if isinstance(conv, nn.ConvTranspose2d):
        fits = kernel + conv.output_padding[0] - 2 * around == stride
        stage.up, stage.halo = stride, -(-kernel // stride)
    else:
        fits = 2 * around == kernel - 1 or pad == "same"
        stage.down, stage.halo = stride, -(-(kernel // 2) // stride) * stride
    return None if fits else "its padding does not keep the size"


class _Spill:
    """The pixels of one layer, (height, width, channels) in a temporary file."""

    def __init__(self, folder: Path, height: int, width: int, channels: int) -> None:
        self.size, self.channels, self.dtype = (height, width), channels, torch.float32
        self.file = tempfile.TemporaryFile(dir=folder, prefix=".tile-")  # noqa: SIM115

    def _rows(self, box: Box, pixels: Tensor) -> Iterator[Any]:
        """The bytes of each row of the box, the file at its place."""
        pixel = self.channels * pixels.element_size()
        for k, row in enumerate(pixels.view(torch.uint8).numpy().reshape(len(pixels), -1)):
            self.file.seek(((box.top + k) * self.size[1] + box.left) * pixel)
            yield row

    def write(self, box: Box, x: Tensor) -> None:
        self.dtype = x.dtype
        for row in self._rows(box, x[0].permute(1, 2, 0).contiguous().cpu()):
            self.file.write(row)
        # a full disk shows here, not when the file is closed
        self.file.flush()

    def read(self, box: Box, device: torch.device) -> Tensor:
        shape = (box.bottom - box.top, box.right - box.left, self.channels)
        pixels = torch.empty(shape, dtype=self.dtype)
        for row in self._rows(box, pixels):
            if self.file.readinto(row) != len(row):
                raise OSError(f"{self.file.name}: a temporary file was cut short")
        return pixels.permute(2, 0, 1)[None].to(device)

    def close(self) -> None:
        self.file.close()


class _Moments:
    """Mean and variance of each channel over all tiles, summed in float64."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        # not every device has float64
        x = x if x.is_cuda else x.cpu()
        # few rows at a time: float64 copies of a tile would be the largest tensors of all
        for rows in x.split(32, 2):
            wide = rows.double()
            self.sums = self.sums.to(x.device) + wide.sum((0, 2, 3))
            self.squares = self.squares.to(x.device) + wide.square_().sum((0, 2, 3))
            self.count += rows.shape[2] * rows.shape[3]

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean = self.sums / self.count
        variance = (self.squares / self.count - mean.square()).clamp_(min=0)
        return mean.float().to(device), variance.float().to(device)


Read = Callable[[Box], Tensor]
Write = Callable[[Box, Tensor], None]


@torch.inference_mode()
def run_tiles(
    net: nn.Module,
    read: Read,
    write: Write,
    size: tuple[int, int],
    tile: int,
    *,
    folder: Path | str | None = None,
    progress: bool = False,
) -> None:
    """Apply a generator to an image of any size, holding one tile of activations at a time.

    Args:
        net: see `check_network`; instance norms, and batch norms in training mode, are given the statistics
            of the whole image; batch norms in evaluation mode use theirs.
        read: returns the pixels of a box of the image, (1, C, h, w) on the device of the network. Boxes
            overlap by the halos.
        write: takes the pixels of a box of the result, (1, C, h, w). Boxes cover it once; it is `net.scale`
            times as large as the image where the network has one.
        size: height and width of the image, multiples of `net.multiple`.
        tile: side of a tile in pixels of the image, a multiple of `net.multiple`, at least 32.
        folder: where the temporary files lie (see `disk_bytes`); default: the system's.
        progress: show a progress bar on stderr.

    Raises:
        UsageError: the network or the tile cannot be. OSError: the disk is full, or too small from the start.
    """
    check_tile(tile, int(getattr(net, "multiple", 1)))
    height, width = size
    grid = [
        Box(y, min(y + tile, height), x, min(x + tile, width))
        for y in range(0, height, tile)
        for x in range(0, width, tile)
    ]
    reach = local_reach(net)
    if reach is not None:
        scale = int(getattr(net, "scale", 1))
        for place in tqdm(grid, unit="tile", disable=not progress, leave=False):
            outer = place.grown(reach, height, width)
            box = place.scaled(scale, 1)
            rows, columns = box.inside(outer.scaled(scale, 1))
            write(box, net(read(outer))[:, :, rows, columns])
        return
    plan = stages(net)
    where = Path(tempfile.gettempdir() if folder is None else folder)
    device = next(net.parameters()).device
    need = disk_bytes(net, size, 2 if torch.is_autocast_enabled(device.type) else 4)
    free = shutil.disk_usage(where).free
    if need > free:
        raise OSError(
            f"--tile needs {need / 1e9:.1f} GB of temporary files in {where}, {free / 1e9:.1f} GB are free: "
            "make room, or choose an OUTPUT on another disk"
        )
    spills: dict[str, _Spill] = {}
    moments: _Moments | None = None
    bar = tqdm(total=len(grid) * len(plan), unit="tile", disable=not progress, leave=False)
    try:
        # h and w: the size of the stage's input
        h, w = size
        for stage, after in zip(plan, [*plan[1:], None]):
            statistics = moments.statistics(device) if moments else None
            moments = _Moments() if after and after.measures else None
            ho, wo = h * stage.up // stage.down, w * stage.up // stage.down
            if stage.keep:
                channels = stage.conv.in_channels
                spills["kept"] = _Spill(where, h, w, channels)
            if after:
                spills["next"] = _Spill(where, ho, wo, stage.conv.out_channels)
            for place in grid:
                inner, box = place.scaled(h, height), place.scaled(ho, height)
                outer = inner.grown(stage.halo, h, w)
                x = spills["input"].read(outer, device) if "input" in spills else read(outer)
                for item in stage.point:
                    x = _apply(item, x, statistics, spills.get("residual"), outer)
                rows, columns = inner.inside(outer)
                if stage.keep:
                    spills["kept"].write(inner, x[:, :, rows, columns])
                if after:
                    x = x if stage.pad is None else stage.pad(x)
                    x = stage.conv(x)
                    rows, columns = box.inside(outer.scaled(stage.up, stage.down))
                    x = x[:, :, rows, columns]
                    if moments:
                        moments.add(x)
                    spills["next"].write(box, x)
                else:
                    write(box, x[:, :, rows, columns])
                bar.update()
            _pass_on(spills, "next", "input")
            if stage.keep or "add" in stage.point:
                _pass_on(spills, "kept", "residual")
            h, w = ho, wo
    finally:
        bar.close()
        for spill in spills.values():
            spill.close()


def disk_bytes(net: nn.Module, size: tuple[int, int], item: int = 4) -> int:
    """The most bytes of temporary files that an image of height x width needs; item: bytes of a value."""
    most, into, share, residual = 0, 0.0, 1.0, 0.0
    for stage in stages(net)[:-1]:
        # values per pixel of the image: the input, what is kept, what was kept before, the output
        kept = stage.conv.in_channels * share if stage.keep else 0.0
        share *= (stage.up / stage.down) ** 2
        out = stage.conv.out_channels * share
        most = max(most, int((into + kept + residual + out) * size[0] * size[1] * item))
        residual = kept if stage.keep or "add" in stage.point else residual
        into = out
    return most


def _pass_on(spills: dict[str, _Spill], new: str, old: str) -> None:
    """The new file takes the place of the old one, which is deleted."""
    if old in spills:
        spills.pop(old).close()
    if new in spills:
        spills[old] = spills.pop(new)


def _apply(
    item: nn.Module | Literal["add"],
    x: Tensor,
    statistics: tuple[Tensor, Tensor] | None,
    residual: _Spill | None,
    box: Box,
) -> Tensor:
    if isinstance(item, str):
        assert residual is not None
        return x + residual.read(box, x.device)
    if isinstance(item, NORMS):
        mean, variance = statistics or (item.running_mean, item.running_var)
        return F.batch_norm(x, mean, variance, item.weight, item.bias, eps=item.eps)
    return item(x)


def check_tile(tile: int, multiple: int) -> None:
    """UsageError where a tile of so many pixels cannot be."""
    if tile < LEAST or tile % multiple:
        raise UsageError(f"--tile {tile}: must be a multiple of {multiple} and at least {LEAST}, or auto")


def pick_tile(net: nn.Module, size: tuple[int, int], free: int | None) -> int | None:
    """The side of the tiles for an image of height x width, None for the whole image at once: where that fits
    into half of the `free` bytes, or nothing is known of them, or the network cannot run in tiles."""
    if free is None:
        return None
    try:
        plan = stages(net)
    except UsageError:
        return None
    share, widest = 1.0, 1.0
    for stage in plan[:-1]:
        # values per pixel of the image in the input and the output of a stage
        into = stage.conv.in_channels * share
        share *= (stage.up / stage.down) ** 2
        widest = max(widest, into + stage.conv.out_channels * share)
    # float32 on any path; the other half is left to the images and to other programs
    whole, tiled = (free / 2 / (copies * 4 * widest) for copies in COPIES)
    if size[0] * size[1] <= whole:
        return None
    return next((side for side in (1024, 512, 256, 128) if side * side <= tiled), 64)

"""python -m fastgan.export RUN_OR_FILE OUT: a trained generator in the formats that other people use.

upstream and safetensors hold the weights alone, bit for bit those of the source. The others hold the whole
function at any height and width: values as image files have them -> [-1, 1] or [0, 1] -> padding to what the
network divides -> network -> cropping -> values of the output domain, float32 and not rounded. Each is loaded
again and compared with PyTorch before its file appears.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from fastgan.checkpoint import CheckpointError, Loaded, load_generator, read_weights, write_weights
from fastgan.config import UsageError, fail, parse

Format = Literal["upstream", "safetensors", "onnx", "torch-export", "aoti"]
SUFFIXES = {
    "upstream": (".pth", ".ckpt", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "aoti": (".pt2",),
}
LIMIT = 1e-4  # largest difference from PyTorch, for images in [-1, 1]


class Whole(nn.Module):
    """A generator with its value ranges, for images of any size.

    net: with a `multiple`, or a `scale`, or neither. ranges: values of black and white of the input and the
    output. output: "tanh" or "sigmoid".
    """

    def __init__(
        self, net: nn.Module, ranges: tuple[tuple[float, float], tuple[float, float]], output: str
    ) -> None:
        super().__init__()
        self.net, self.ranges, self.output = net, ranges, output
        self.multiple, self.scale = int(getattr(net, "multiple", 1)), int(getattr(net, "scale", 1))

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in the input's range to (N, C, scale H, scale W) in the output's, float32."""
        (low, high), (out_low, out_high) = self.ranges
        x = ((image - low) / (high - low)).clamp(0, 1)
        x = 2 * x - 1 if self.output == "tanh" else x
        height, width = image.shape[2:]
        # by index and not by F.pad and slices, which ask about sizes that the graph leaves open
        x = x[:, :, self._places(height)][:, :, :, self._places(width)]
        rows, columns = (torch.arange(self.scale * side) for side in (height, width))
        y = self.net(x)[:, :, rows][:, :, :, columns]
        y = (y + 1) / 2 if self.output == "tanh" else y
        return y.clamp(0, 1) * (out_high - out_low) + out_low

    def _places(self, size: int) -> Tensor:
        """Pixels of a side and behind them its reflection, or its last pixel where that is used up."""
        places = torch.arange((size + self.multiple - 1) // self.multiple * self.multiple)
        return torch.where(places < size, places, (2 * (size - 1) - places).clamp(min=0))


def export(found: Loaded, out: Path, form: Format) -> str:
    """Write a generator to a file that appears whole or not at all; returns what was checked, in words.

    Args:
        found: of `fastgan.checkpoint.load_generator`.
        out: the file.
        form: "upstream" (.pth, .ckpt or .pt), "safetensors", "onnx", "torch-export" (.pt2), or "aoti" (.pt2
            of code that AOTInductor compiled for this machine's CPU; needs a C++ compiler).

    Raises:
        UsageError: a suffix of another format, or a package that is missing.
        CheckpointError: the file cannot be written, or does not compute what PyTorch does.
    """
    if out.suffix not in SUFFIXES[form]:
        raise UsageError(f"{out}: --format {form} writes {' or '.join(SUFFIXES[form])}, change the name")
    if out.resolve() == found.path.resolve():
        raise UsageError(f"{out} would overwrite its source: choose another OUT")
    if form in ("upstream", "safetensors"):
        write_weights(out, found.weights, _about(found))
        again = read_weights(out)[0]
        if not all(torch.equal(again[key], value) for key, value in found.weights.items()):
            raise CheckpointError(f"{out} does not hold the weights of {found.path}")
        return f"{len(again)} tensors, equal to those of {found.path}"
    # the exporters' own passes run with gradients on
    whole = Whole(found.net, found.ranges, found.output).eval().requires_grad_(False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing_", dir=out.parent) as folder, _quiet():
            part = Path(folder) / out.name
            run = {"onnx": _onnx, "torch-export": _torch_export, "aoti": _aoti}[form](whole, found, part)
            sides = _sides(whole.multiple)
            difference = max(_difference(whole, run, found, side) for side in sides)
            if not difference <= LIMIT:
                raise CheckpointError(
                    f"{out} was not written: it differs from PyTorch by {difference:.1e}, more than {LIMIT}"
                )
            part.replace(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    sizes = ", ".join(f"{h}x{w}" for h, w in sides)
    (low, high), (out_low, out_high) = found.ranges
    return (
        f"float32 (1, {found.channels[0]}, H, W) in {low:g}..{high:g} to (1, {found.channels[1]}, H, W) in "
        f"{out_low:g}..{out_high:g}; at {sizes} at most {difference:.1e} from PyTorch in [-1, 1]"
    )


def _set_style(found: Loaded, style: Sequence[float] | None, *, needed: bool) -> None:
    """UsageError for another number than the network has in a style; without any none is set."""
    size, given = int(getattr(found.net, "style_size", 0)), 0 if style is None else len(style)
    if given != size and (given or needed):
        rule = f"a style of {size} numbers, got {given}: give --style" if size else "no --style"
        raise UsageError(f"{found.path} takes {rule}")
    if style is not None:
        found.net.style = torch.tensor(style)


def _about(found: Loaded) -> dict[str, Any]:
    """The header of the source, or one that says what is assumed of a foreign file."""
    return found.about or {
        "channels": found.channels, "ranges": found.ranges, "dtypes": [str(d) for d in found.dtypes],
        "settings": {"output": found.output},
    }  # fmt: skip


def _sides(multiple: int) -> list[tuple[int, int]]:
    # one size that the network divides and one that it does not, neither that of the example
    return [(2 * multiple, max(16, multiple)), (max(16, multiple) + 3, 2 * multiple + 7)]


def _example(whole: Whole, found: Loaded) -> Tensor:
    side = max(3 * whole.multiple, 32)
    return _noise(found, (side, side + whole.multiple))


def _noise(found: Loaded, size: tuple[int, int]) -> Tensor:
    low, high = found.ranges[0]
    random = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(1, found.channels[0], *size, generator=random)


@torch.no_grad()
def _difference(whole: Whole, run: Callable[[Tensor], Tensor], found: Loaded, size: tuple[int, int]) -> float:
    x, (low, high) = _noise(found, size), found.ranges[1]
    y, expected = run(x), whole(x)
    return float((y - expected).abs().max()) * 2 / (high - low) if y.shape == expected.shape else float("inf")


@torch.no_grad()
def _program(whole: Whole, found: Loaded) -> torch.export.ExportedProgram:
    # a ResNet reflects one pixel at a quarter of the size, so there must be two
    least = 5 if whole.multiple == 4 else 2
    height, width = torch.export.Dim("height", min=least), torch.export.Dim("width", min=least)
    shapes = ({2: height, 3: width},)
    # otherwise a side of one pixel deep inside a U-Net is ruled out, and with it the image of 256 pixels
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            whole,
            (_example(whole, found),),
            dynamic_shapes=shapes,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _torch_export(whole: Whole, found: Loaded, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_program(whole, found), path)
    return torch.export.load(path).module()


def _aoti(whole: Whole, found: Loaded, path: Path) -> Callable[[Tensor], Tensor]:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    aoti_compile_and_package(_program(whole, found), package_path=str(path))
    return aoti_load_package(str(path))


def _onnx(whole: Whole, found: Loaded, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--format onnx needs {error.name}: run `pip install fastgan[onnx]`") from None
    try:
        program = torch.onnx.export(
            _program(whole, found),
            input_names=["image"],
            output_names=["translation"],
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        net = type(whole.net).__name__
        raise UsageError(
            f"--format onnx: PyTorch's exporter does not know all that a {net} does; take torch-export"
        ) from error
    assert program is not None
    about = {"source": found.path.name, "channels": found.channels, "ranges": found.ranges}
    program.model.metadata_props["fastgan"] = json.dumps(about)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters report progress and remarks on standard output; errors still come as exceptions."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.export` takes."""

    source: tyro.conf.Positional[Path]  # run folder, checkpoint folder, .safetensors, .pth or .ckpt
    out: tyro.conf.Positional[Path]  # file to write
    format: Format  # upstream, safetensors, onnx, torch-export or aoti
    direction: Literal["AtoB", "BtoA"] | None = None  # in terms of the data folder; default: as trained
    label: tuple[float, ...] | None = None  # one number per label, for StarGAN; becomes part of the function
    to: tuple[str, ...] | None = None  # the same by names, see translate
    style: tuple[float, ...] | None = None  # numbers of the style, for MUNIT; becomes part of the function


def main(args: Sequence[str] | None = None) -> None:
    """Export; exit code 0, or 2 with one line about what could not be done."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.export")
        found = load_generator(given.source, given.direction, given.label or given.to)
        _set_style(found, given.style, needed=given.format not in ("upstream", "safetensors"))
        said = export(found, given.out, given.format)
    except (UsageError, CheckpointError) as error:
        fail(error)
    print(f"{given.out}: {said}")


if __name__ == "__main__":
    main()

"""python -m fastgan.demo RUN_OR_CHECKPOINT: a page on this machine that translates the images dropped on it.

The page is Gradio's (an extra). Only files uploaded through it are read, after a look at their header; they
and all that is made from them lie in a temporary folder, which goes when the program ends. Translations run
one at a time. Neither the program nor the page asks any other machine for anything.
"""

from __future__ import annotations

import functools
import html
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from fastgan import tiling
from fastgan.checkpoint import EACH, CheckpointError, choices
from fastgan.config import UsageError, fail, parse
from fastgan.data.augment import match_channels
from fastgan.data.images import (
    DataError,
    Probe,
    from_unit,
    probe,
    read_images,
    to_unit,
    type_range,
    write_image,
)
from fastgan.files import Output, check, translate_file
from fastgan.inference import Generator, load_generator

PREVIEW = 2048  # longest side in pixels of what the page shows
READY = " Not translated yet."
KEEP = 3600  # seconds that an upload and its translation stay on the disk
Direction = Literal["AtoB", "BtoA"] | None
FAULTS = (DataError, UsageError, CheckpointError)


@dataclass(frozen=True)
class Arguments:
    """What `python -m fastgan.demo` takes."""

    run: tyro.conf.Positional[Path]  # run folder, checkpoint folder, .safetensors, .pth or .ckpt
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 lets every machine of the network in
    port: int = 7860  # 0: any free one
    open: bool = False  # open the page in the browser
    max_upload_mb: int = 100  # size of a file
    max_pixels: int = 100_000_000  # of an image, read from its header before it is decoded
    device: str = "auto"  # cuda, cuda:1, mps, cpu
    precision: Literal["auto", "bf16", "fp32", "tf32"] = "auto"  # auto: bf16 where the hardware has it


def translate_upload(
    generator: Generator, source: Path, target: Path, dtype: np.dtype[Any], how: Output
) -> tuple[list[Path], set[str]]:
    """Translate a file of values of a type; returns the results and remarks.

    target: in a folder of its own; it gets the suffix of the source, or .png or .tif where that cannot hold
    the result.
    """
    blank = np.zeros(
        (1, 1, generator.channels[1]), generator.dtypes[1] if dtype == generator.dtypes[0] else dtype
    )
    name = target.name
    for suffix in (source.suffix.lower(), ".png", ".tif"):
        target = target.with_name(name + suffix)
        try:
            write_image(target, blank)
            target.unlink()
            break
        except DataError:
            continue
    notes = translate_file(generator, source, target, how)
    return sorted(target.parent.iterdir()), notes


def preview(image: np.ndarray, value_range: tuple[float, float]) -> Image.Image:
    """(H, W, C) as an 8-bit picture of at most 2048 pixels a side; but for grey and RGB its first channel."""
    shown = image if image.shape[2] == 3 else image[..., :1]
    if image.dtype != np.uint8 or value_range != (0, 255):
        eight = np.empty(shown.shape, np.uint8)
        # in bands: a whole large image in float32 would take four times its size
        for top in range(0, len(shown), 256):
            band = slice(top, top + 256)
            eight[band] = from_unit(to_unit(shown[band], value_range), np.uint8)
        shown = eight
    picture = Image.fromarray(np.ascontiguousarray(shown if shown.shape[2] == 3 else shown[..., 0]))
    picture.thumbnail((PREVIEW, PREVIEW))
    return picture


class Desk:
    """What the page does with an upload, apart from Gradio.

    folder: the only one from which files are read. directions, labels: what can be chosen, see
    `fastgan.checkpoint.choices`. tiles: whether the network can run in tiles.
    """

    def __init__(self, given: Arguments, folder: Path) -> None:
        self.given, self.folder = given, folder.resolve()
        self.directions, self.labels = choices(given.run)
        self.generator = functools.cache(self._load)
        self._seeds = itertools.count()
        net = self.generator(next(iter(self.directions), None)).net
        try:
            tiling.check_network(net)
            self.tiles = True
        except UsageError:
            self.tiles = False

    def _load(self, direction: Direction) -> Generator:
        given, label = self.given, EACH if self.labels.names else None
        return load_generator(
            given.run, direction, label=label, device=given.device, precision=given.precision
        )

    def look(self, path: str | None, direction: Direction) -> tuple[Path, Probe]:
        """An upload and what its header tells; DataError if it is no image, or none for this generator."""
        if path is None:
            raise DataError("no image yet: drop one on the field, or click on it")
        source, generator = Path(path), self.generator(direction)
        if not source.resolve().is_relative_to(self.folder):
            raise DataError("only uploaded files are read")
        found = probe(source, pages=generator.pages, max_pixels=self.given.max_pixels)
        have, want = found.channels, generator.channels[0]
        if match_channels(np.empty((1, 1, have), found.dtype), want) is None:
            raise DataError(f"{path}: has {have} channels, the generator was trained on {want}")
        return source, found

    def before(self, path: str | None, direction: Direction) -> tuple[Image.Image, str]:
        """Preview of an upload and a line about it."""
        source, found = self.look(path, direction)
        return self._shown(source, direction, found.dtype, 0), f"{_about(found)}. Not translated yet."

    def translate(
        self, path: str | None, direction: Direction, label: Sequence[int], tile: float
    ) -> tuple[tuple[Image.Image, Image.Image], list[Path], str]:
        """Previews of both sides, the files of the result and a line about them. label: places of its ones;
        tile: side in pixels, 0 for "auto"."""
        source, found = self.look(path, direction)
        generator = self.generator(direction)
        seed = next(self._seeds)
        how = Output(tile=int(tile) or "auto", max_pixels=self.given.max_pixels, seed=seed)
        check(generator, how)
        if self.labels.names:
            generator.set_label(label)
        target = Path(tempfile.mkdtemp(dir=self.folder)) / f"{source.stem}_{direction or 'translated'}"
        start = time.perf_counter()
        files, notes = translate_upload(generator, source, target, found.dtype, how)
        seconds = time.perf_counter() - start
        before, after = (self._shown(f, direction, found.dtype, k) for k, f in enumerate((source, files[0])))
        if generator.scale > 1:
            # the slider lays one over the other
            before = before.resize(after.size, Image.Resampling.BICUBIC)
        way = f" {direction[0]} to {direction[-1]}" if direction else ""
        lines = [_about(found), f"Translated{way} in {seconds:.1f} s", *sorted(notes)]
        if generator.random:
            lines.append("In a random style; another translation draws another")
        if max(found.height, found.width) > PREVIEW:
            lines.append(f"Shown reduced to {PREVIEW} pixels; the result has all of them")
        return (before, after), files, ". ".join(lines) + "."

    def _shown(self, file: Path, direction: Direction, dtype: np.dtype[Any], end: int) -> Image.Image:
        """Preview of the input (end 0) or the output (end 1) of a translation of values of a type."""
        generator = self.generator(direction)
        image = read_images(file, pages=generator.pages)[0]
        # an image of another type than that of the training is in its type's full range, its result too
        own = dtype == generator.dtypes[0]
        return preview(image, generator.ranges[end] if own else type_range(image.dtype))


def _kind(channels: int, dtype: np.dtype[Any]) -> str:
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    return f"{colour}, {'float' if dtype.kind == 'f' else f'{8 * dtype.itemsize} bit'}"


def _about(found: Probe) -> str:
    pages = f", {found.pages} pages of which the first is shown" if found.pages > 1 else ""
    return f"{found.width} x {found.height} pixels, {_kind(found.channels, found.dtype)}{pages}"


@contextmanager
def _said(path: str | None) -> Iterator[None]:
    """Turn what went wrong into a message of the page, without the folder that an upload lies in."""
    import gradio as gr

    try:
        yield
    except FAULTS as error:
        text = str(error).replace(str(path), Path(path).name) if path else str(error)
        # the page takes a message for HTML
        raise gr.Error(html.escape(text), duration=None, print_exception=False) from None


def page(desk: Desk) -> Any:
    """The page as Gradio's blocks."""
    import gradio as gr

    given, first = desk.given, desk.generator(next(iter(desk.directions), None))

    def arrived(path: str | None, direction: Any) -> Any:
        with _said(path):
            before, line = desk.before(path, direction)
            return (before, before), gr.File(None, visible=False), line

    def translate(path: str | None, direction: Any, label: Any, tile: float) -> Any:
        with _said(path):
            chosen = [label] if isinstance(label, int) else label or []
            pictures, files, line = desk.translate(path, direction, chosen, tile)
            return pictures, gr.File([str(file) for file in files], visible=True), line

    with gr.Blocks(
        title=f"fastgan: {given.run.name}", analytics_enabled=False, delete_cache=(600, KEEP)
    ) as ui:
        kinds = " → ".join(map(_kind, first.channels, first.dtypes))
        way = f"{desk.directions[0].replace('to', ' to ')}: " if desk.directions else ""
        gr.Markdown(f"# {html.escape(given.run.name)}\n{way}{kinds}. Runs on {first.device}.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Image", height=160, elem_id="upload")
                gr.Markdown(
                    f"PNG, JPEG, WebP, TIFF, BMP, PPM or .npy; at most {given.max_upload_mb} MB and "
                    f"{given.max_pixels / 1e6:g} million pixels."
                )
                direction = gr.Radio(
                    [(way.replace("to", " to "), way) for way in desk.directions],
                    value=next(iter(desk.directions), None),
                    label="Direction",
                    visible=len(desk.directions) > 1,
                    elem_id="direction",
                )
                names, several = list(desk.labels.names), not desk.labels.classes
                start: Any = [] if several else names[0]
                label = (gr.CheckboxGroup if several else gr.Radio)(
                    names,
                    value=start,
                    type="index",
                    label="Label: entries that are 1" if several else "Label",
                    visible=bool(names),
                    elem_id="label",
                )
                with gr.Accordion("Advanced", open=False, visible=desk.tiles):
                    tile = gr.Number(
                        0,
                        label="Side of a tile in pixels",
                        info="Large images run in tiles, with the result of the whole image. "
                        "0: by the free memory.",
                        precision=0,
                        minimum=0,
                        elem_id="tile",
                    )
                button = gr.Button("Translate", variant="primary", elem_id="translate")
            with gr.Column(scale=2, min_width=320):
                slider = gr.ImageSlider(
                    label="Before and after",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="slider",
                )
                line = gr.Markdown(elem_id="line")
                result = gr.File(
                    label="Result", file_count="multiple", interactive=False, visible=False, elem_id="result"
                )
        # one at a time, whatever the event
        once: dict[str, Any] = {
            "concurrency_id": "fastgan",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "show_progress_on": slider,
        }
        upload.upload(arrived, [upload, direction], [slider, result, line], **once)
        upload.clear(lambda: (None, gr.File(None, visible=False), ""), None, [slider, result, line], **once)
        button.click(translate, [upload, direction, label, tile], [slider, result, line], **once)
    return ui


def serve(given: Arguments, folder: Path) -> None:
    """Show the page until Ctrl-C or SIGTERM.

    folder: for uploads and results.

    Raises:
        UsageError: Gradio is missing, or the address is in use.
        CheckpointError: no generator there.
    """
    # the page is what the flags say, whatever else is set for other programs
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "GRADIO_EXAMPLES_CACHE": str(folder / "examples"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        import gradio as gr
        import safehttpx
    except ImportError as error:
        raise UsageError(f"the demo needs {error.name}: run `pip install fastgan[demo]`") from None

    async def refuse(*_: Any, **__: Any) -> Any:
        raise gr.Error("only uploaded files are read", print_exception=False)

    # Gradio fetches addresses that a request names in place of a file
    safehttpx.get = safehttpx.async_validate_url = refuse
    desk = Desk(given, folder / "uploads")
    port = _free_port(given.host, given.port)
    ui, fonts = page(desk), ["system-ui", "sans-serif"]
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ui.queue(max_size=32)
    _, address, _ = ui.launch(
        server_name=given.host,
        server_port=port,
        inbrowser=given.open,
        max_file_size=given.max_upload_mb * 2**20,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
    )
    print(f"{given.run}: {address} (Ctrl-C ends it)", flush=True)
    while not ended.wait(1):  # with a limit, or Windows would not see Ctrl-C
        pass


def _free_port(host: str, port: int) -> int:
    try:
        with socket.create_server((host, port)) as place:
            return int(place.getsockname()[1])
    except (OSError, OverflowError) as error:
        code = getattr(error, "errno", None)
        # Python's own words repeat the address; an unknown host has a negative number
        reason = os.strerror(code) if code and code > 0 else getattr(error, "strerror", None) or error
        raise UsageError(
            f"--host {host} --port {port} cannot be used ({reason}): choose another --port"
        ) from None


def _remove(folder: Path) -> None:
    # more than once: a translation under way may make its folder again
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        if not folder.exists():
            return


def main(args: Sequence[str] | None = None) -> None:
    """Serve the page; exit code 0 after Ctrl-C, or 2 with one line about what is wrong."""
    try:
        given = parse(Arguments, sys.argv[1:] if args is None else args, "python -m fastgan.demo")
        folder = Path(tempfile.mkdtemp(prefix="fastgan-demo-"))
        try:
            serve(given, folder)
        finally:
            _remove(folder)
    except FAULTS as error:
        fail(error)
    sys.stdout.flush()
    # a translation under way cannot be stopped, and Gradio would wait for pages that are open
    os._exit(0)


if __name__ == "__main__":
    main()

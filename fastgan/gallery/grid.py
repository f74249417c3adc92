"""Grids of sample images, one PNG each, that carry the places of their cells as text."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

CELL_MIN, CELL_MAX = 96, 256  # pixels of the longer side of an image in a grid
PITCH_MIN = 72  # narrowest column, so that a caption fits over a slim image
GUTTER, MARGIN = 4, 12
INK, FAINT = (24, 24, 27), (113, 113, 122)
KEYWORD = "fastgan"  # of the PNG text that says where the cells are


def save_grid(
    path: Path, columns: Mapping[str, torch.Tensor], *, title: str = "", output_range: str = "tanh"
) -> None:
    """Write image batches side by side as a PNG: a column per batch, a row per image.

    Small images are enlarged by a whole factor without smoothing, large ones reduced. Of two channels the
    mean is shown, of four or more the first three, and the caption says so.

    The PNG's text `fastgan` is JSON with the places of the images in pixels: "columns", a list of
    [caption, left, top of the first, width, height, images], and "pitch", the distance of two rows.

    Args:
        path: file to write, replaced in one move.
        columns: caption -> (N, C, H, W), floating point, any device; sizes and channels may differ.
        title: line above the grid.
        output_range: "tanh" for values in [-1, 1], "sigmoid" for [0, 1].

    Raises:
        ValueError: no columns, a tensor that is not (N, C, H, W), or an unknown range.
    """
    if output_range not in ("tanh", "sigmoid"):
        raise ValueError(f"save_grid: output_range must be tanh or sigmoid, got {output_range!r}")
    if not columns:
        raise ValueError("save_grid: columns must hold at least one batch, got none")
    batches = [_to_bytes(caption, x, output_range) for caption, x in columns.items()]
    box = _cell(max(p.shape[1] for _, p in batches), max(p.shape[2] for _, p in batches))
    pitch = max(box[0], PITCH_MIN)
    rows = max(p.shape[0] for _, p in batches)
    width = len(batches) * (pitch + GUTTER) - GUTTER
    # grids of large images are mostly looked at reduced
    text = 13 if pitch < 180 else 18
    line_small, line_large = round(1.25 * text), round(1.65 * text)
    small, large = ImageFont.load_default(size=text), ImageFont.load_default(size=text + 4)
    heading = _wrap(title, large, width) if title else []
    captions = [_wrap(caption, small, pitch) for caption, _ in batches]
    lines = max(map(len, captions))
    top = MARGIN + line_large * len(heading) + (6 if heading else 0)
    first = top + line_small * lines + 5
    page = Image.new("RGB", (width + 2 * MARGIN, first + rows * (box[1] + GUTTER) - GUTTER + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(heading):
        draw.text((MARGIN, MARGIN + line_large * i), line, INK, large)
    places = []
    for column, ((name, pixels), caption) in enumerate(zip(batches, captions)):
        left = MARGIN + column * (pitch + GUTTER)
        for i, line in enumerate(caption):
            # captions stand on the images, however many lines the others have
            y = top + line_small * (lines - len(caption) + i)
            draw.text((left + (pitch - small.getlength(line)) / 2, y), line, FAINT, small)
        for row, array in enumerate(pixels):
            picture = _fit(Image.fromarray(array), box)
            x = left + (pitch - picture.width) // 2
            y = first + row * (box[1] + GUTTER) + (box[1] - picture.height) // 2
            page.paste(picture, (x, y))
            if row == 0:
                places.append([name, x, y, *picture.size, len(pixels)])
    out = io.BytesIO()
    # the default level takes twice as long for 3 % less
    about = PngImagePlugin.PngInfo()
    about.add_text(KEYWORD, json.dumps({"columns": places, "pitch": box[1] + GUTTER}))
    page.save(out, "PNG", compress_level=3, pnginfo=about)
    replace(path, out.getvalue())


def _to_bytes(caption: str, x: torch.Tensor, output_range: str) -> tuple[str, np.ndarray]:
    """The caption with what it must admit, and (N, H, W, 3) bytes."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"save_grid: {caption!r} must be (N, C, H, W), got {tuple(x.shape)}")
    channels = x.shape[1]
    x = x.detach().to("cpu", torch.float32)
    if channels == 2:
        x, caption = x.mean(1, keepdim=True), f"{caption} (mean of 2 channels)"
    elif channels > 3:
        x, caption = x[:, :3], f"{caption} (channels 1-3 of {channels})"
    if not x.isfinite().all():
        caption = f"{caption} (not finite)"
    x = (x + 1) / 2 if output_range == "tanh" else x
    x = (x.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return caption, x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def _cell(height: int, width: int) -> tuple[int, int]:
    """Width and height of a cell for the largest images."""
    longest = max(height, width)
    if longest > CELL_MAX:
        return max(round(width * CELL_MAX / longest), 1), max(round(height * CELL_MAX / longest), 1)
    factor = max(min(math.ceil(CELL_MIN / longest), CELL_MAX // longest), 1)
    return width * factor, height * factor


def _fit(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    scale = min(box[0] / picture.width, box[1] / picture.height)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines that fit, broken at spaces, or anywhere in a word that is too long."""
    lines, line = [], ""
    # Pillow's own font has no arrows
    for word in text.replace("\u2192", "->").split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    return [part for part in [*lines, line] if part]


def replace(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)

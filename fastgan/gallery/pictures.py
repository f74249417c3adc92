"""The sample grids of a run as a page holds them: data URIs of bounded size, and where their cells are."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import html
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastgan.gallery.grid import KEYWORD

EARLIER = 12  # grids on the page besides the newest
# together they keep the page under 8 MB, base64 included
NEWEST_BYTES, EARLIER_BYTES = 2_400_000, 250_000
# besides OSError: what Pillow says of text or sizes that are no honest PNG's
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Grid:
    """One embedded grid. Width and height in pixels are those of the file, the places of the cells too."""

    step: int
    uri: str
    width: int
    height: int
    reduced: bool
    cells: dict[str, Any] | None  # {"columns", "pitch"} of `save_grid`; None for a picture without them

    def image(self, *, hidden: bool = False) -> str:
        """The HTML element."""
        return (
            f'<img class="shot" data-step="{self.step}" width="{self.width}" height="{self.height}" '
            f'style="--w: {self.width}px" alt="samples at step {self.step}" src="{self.uri}"'
            f"{' hidden' if hidden else ''}>"
        )


def find(run: Path) -> list[tuple[int, Path]]:
    """Step and path of the grids of a run, in order."""
    files = (run / "samples").glob("step_*.png")
    return sorted((int(m[1]), p) for p in files if (m := re.fullmatch(r"step_(\d{1,15})", p.stem)))


def read(step: int, path: Path, limit: int) -> Grid | None:
    """A grid, embedded in at most `limit` bytes before base64; None for a file that is no picture."""
    with contextlib.suppress(*BROKEN):
        stat = path.stat()
        return Grid(step, *_embed(str(path), stat.st_mtime_ns, stat.st_size, limit))
    return None


def choose(found: list[tuple[int, Path]]) -> list[Grid]:
    """The newest grid and at most 12 earlier ones at even distances."""
    earlier, newest = found[:-1], found[-1:]
    # a stride that only doubles picks the same files again and again, which the cache below has ready
    stride = 1
    while math.ceil(len(earlier) / stride) > EARLIER:
        stride *= 2
    grids = [read(*entry, EARLIER_BYTES) for entry in earlier[::stride]]
    grids += [read(*entry, NEWEST_BYTES) for entry in newest]
    return [grid for grid in grids if grid]


def inputs(path: Path) -> str:
    """Digest of the test images in a grid, those of the columns that no network has made; "" if unknown."""
    digest = hashlib.sha256()
    with contextlib.suppress(*BROKEN), Image.open(path) as picture:
        cells = _cells(picture)
        if cells:
            pixels = picture.convert("RGB")
            for caption, x, y, width, height, count in cells["columns"]:
                # "(mean of 2 channels)" is a remark, "G_A(A)" the output of a network
                if "(" not in re.sub(r" \(.*", "", caption):
                    strip = pixels.crop((x, y, x + width, y + (count - 1) * cells["pitch"] + height))
                    digest.update(json.dumps([caption, *strip.size, count]).encode() + strip.tobytes())
            return digest.hexdigest()
    return ""


# the time of change and the size belong to the key: a file that is written again is read again
@functools.lru_cache(maxsize=EARLIER + 2)
def _embed(
    path: str, changed: int, size: int, limit: int
) -> tuple[str, int, int, bool, dict[str, Any] | None]:
    """What `Grid` holds after its step."""
    with Image.open(path) as picture:
        width, height = picture.size
        cells = _cells(picture)
        if size <= limit:
            data, kind, smaller = Path(path).read_bytes(), "png", False
        else:
            copy, smaller, kind = picture.convert("RGB"), True, "jpeg"
            # earlier grids are there to leaf through
            side = max(copy.size) if limit >= NEWEST_BYTES else 1200
            copy.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
            # a blurred picture is worse than a few artefacts: quality goes first, then size
            quality = 88
            while len(data := _jpeg(copy, quality)) > limit:
                if quality > 60:
                    quality -= 14
                else:
                    copy.thumbnail((copy.width * 4 // 5, copy.height * 4 // 5), Image.Resampling.LANCZOS)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height, smaller, cells


def _cells(picture: Image.Image) -> dict[str, Any] | None:
    """The text that `save_grid` has written, unless it is missing or describes another picture."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        about = json.loads(picture.info[KEYWORD])
        columns, pitch = about["columns"], about["pitch"]
        for caption, *sizes in columns:
            x, y, width, height, count = sizes
            low = min(x, y, width - 1, height - 1, count - 1)
            bottom = y + (count - 1) * pitch + height
            if not all(type(v) is int for v in (*sizes, pitch)) or not isinstance(caption, str):
                return None
            if low < 0 or pitch < height or x + width > picture.width or bottom > picture.height:
                return None
        return {"columns": columns, "pitch": pitch} if columns else None
    return None


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def samples(grids: list[Grid], found: int) -> str:
    """The section with one grid at a time and a slider for the step."""
    if not grids:
        return ""
    images = "".join(grid.image(hidden=grid is not grids[-1]) for grid in grids)
    note = f"{len(grids)} of {found} grids" if len(grids) < found else ""
    if any(grid.reduced for grid in grids):
        note += "; large ones are reduced here" if note else "Large grids are reduced here"
    if note:
        note = f'<p class="note">{note}; all of them are in the folder <code>samples</code>.</p>'
    slider = (
        '<div class="time"><button type="button" id="play" aria-label="play">&#9654;&#xFE0E;</button>'
        f'<input type="range" id="when" min="0" max="{len(grids) - 1}" value="{len(grids) - 1}" '
        'aria-label="training step"></div>'
        if len(grids) > 1
        else ""
    )
    return (
        f'<section><h2>Samples <span id="step">step {grids[-1].step:,}</span></h2>'
        f'<figure id="shots">{images}</figure>{slider}{note}</section>'
    )


def side_by_side(heading: str, rows: list[tuple[str, list[Grid]]], note: str) -> str:
    """A section with the first grid of each row; the others are there to be laid over. Names are HTML."""
    if not any(grids for _, grids in rows):
        return ""
    figures = ""
    for name, grids in rows:
        images = "".join(grid.image(hidden=grid is not grids[0]) for grid in grids)
        step = f" <span>step {grids[0].step:,}</span>" if grids else ""
        empty = '<p class="note">No samples yet.</p>'
        figures += f"<div><h3>{name}{step}</h3>{f'<figure>{images}</figure>' if grids else empty}</div>"
    if any(grid.reduced for _, grids in rows for grid in grids):
        note += " Large grids are reduced here."
    note = f'<p class="note">{html.escape(note.strip())}</p>' if note else ""
    return f'<section><h2>{html.escape(heading)}</h2><div class="beside">{figures}</div>{note}</section>'

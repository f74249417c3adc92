"""Pictures of a run: grids of sample images, and one self-contained page with curves, samples and settings.

The page (template: `page.html`) asks nobody for anything: pictures are data URIs, curves are SVG drawn by a
script in it, and its content-security policy forbids every request. It opens from disk.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import html
import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

CELL_MIN, CELL_MAX = 96, 256  # pixels of the longer side of an image in a grid
PITCH_MIN = 72  # narrowest column, so that a caption fits over a slim image
GUTTER, MARGIN = 4, 12
INK, FAINT = (24, 24, 27), (113, 113, 122)

EARLIER = 12  # grids on the page besides the newest
# together they keep the page under 8 MB, base64 included
NEWEST_BYTES, EARLIER_BYTES = 2_400_000, 250_000
POINTS = 1000  # per curve


def save_grid(
    path: Path, columns: Mapping[str, torch.Tensor], *, title: str = "", output_range: str = "tanh"
) -> None:
    """Write image batches side by side as a PNG: a column per batch, a row per image.

    Small images are enlarged by a whole factor without smoothing, large ones reduced. Of two channels the
    mean is shown, of four or more the first three, and the caption says so.

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
    for column, ((_, pixels), caption) in enumerate(zip(batches, captions)):
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
    out = io.BytesIO()
    # the default level takes twice as long for 3 % less
    page.save(out, "PNG", compress_level=3)
    _replace(path, out.getvalue())


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


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def write_page(run: Path, *, title: str, settings: Mapping[str, object], state: str = "") -> Path:
    """Write `<run>/index.html` from `<run>/log.jsonl` and `<run>/samples/step_*.png`.

    The newest grid is shown as it is; of the earlier ones at most 12, at even distances, as smaller copies
    where they are big. A curve keeps at most 1000 of its points. Missing, empty or incomplete files give an
    emptier page.

    Args:
        run: the run's folder.
        title: heading.
        settings: name -> value, listed as they are.
        state: what the run is doing, e.g. "running, step 300 of 3000".

    Returns:
        Path of the page, replaced in one move.
    """
    log = _read_log(run / "log.jsonl")
    fill = {
        "title": html.escape(title),
        "state": f'<p class="state">{html.escape(state)}</p>' if state else "",
        "facts": _facts(log),
        "samples": _samples(run / "samples"),
        "warnings": _warnings(log),
        "settings": "".join(
            f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_plain(v))}</td></tr>"
            for k, v in settings.items()
        ),
        # a "<" could end the script element early
        "charts": json.dumps(_charts(log), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], template)
    path = run / "index.html"
    _replace(path, page.encode())
    return path


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The reports; a line cut off by a crash is left out."""
    log = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    log.append(record)
    return log


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _facts(log: list[dict[str, Any]]) -> str:
    if not log:
        return '<p class="note">No report has been logged yet.</p>'
    last = log[-1]
    speeds = [r["img_per_s"] for r in log[-10:] if r.get("img_per_s") is not None]
    waits = [r["wait_share"] for r in log[-10:] if r.get("wait_share") is not None]
    facts = {"step": f"{last['step']:,}", "epoch": str(last.get("epoch", ""))}
    if speeds:
        speed = float(np.median(speeds))
        facts["images per second"] = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
    if last.get("time") is not None:
        facts["training time"] = _clock(last["time"])
    if waits:
        facts["waiting for data"] = f"{100 * float(np.median(waits)):.1f} %"
    items = "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items() if v)
    return f'<dl class="facts">{items}</dl>'


def _warnings(log: list[dict[str, Any]]) -> str:
    """One item per kind of warning, the latest first, with how often it was given."""
    kinds: dict[str, tuple[int, int, str]] = {}
    for record in log:
        for text in record.get("warnings") or ():
            kind = str(text).partition(":")[0]
            kinds[kind] = (kinds.get(kind, (0, 0, ""))[0] + 1, record["step"], str(text))
    items = []
    for count, step, text in sorted(kinds.values(), key=lambda item: -item[1]):
        kind, _, rest = text.partition(":")
        when = f"step {step:,}" + (f", {count} times" if count > 1 else "")
        advice = re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", html.escape(rest and ":" + rest))
        items.append(f"<li><b>{html.escape(kind)}</b>{advice} <i>{when}</i></li>")
    return f'<section><h2>Warnings</h2><ul class="warnings">{"".join(items)}</ul></section>' if items else ""


def _samples(folder: Path) -> str:
    found = sorted(
        (int(m[1]), p) for p in folder.glob("step_*.png") if (m := re.fullmatch(r"step_(\d+)", p.stem))
    )
    if not found:
        return ""
    earlier, newest = found[:-1], found[-1]
    # a stride that only doubles picks the same files again and again, which the cache below has ready
    stride = 1
    while math.ceil(len(earlier) / stride) > EARLIER:
        stride *= 2
    shown = [*earlier[::stride], newest]
    parts, reduced = [], False
    for step, path in shown:
        with contextlib.suppress(OSError):
            stat, limit = path.stat(), NEWEST_BYTES if path == newest[1] else EARLIER_BYTES
            uri, width, height, smaller = _embed(str(path), stat.st_mtime_ns, stat.st_size, limit)
            reduced |= smaller
            shape = f'width="{width}" height="{height}" style="--w: {width}px"'
            parts.append((step, f'{shape} alt="samples at step {step}" src="{uri}"'))
    if not parts:
        return ""
    images = "".join(
        f'<img class="shot" data-step="{step}" {text}{" hidden" if (step, text) != parts[-1] else ""}>'
        for step, text in parts
    )
    note = f"{len(parts)} of {len(found)} grids" if len(parts) < len(found) else ""
    if reduced:
        note += "; large ones are reduced here" if note else "Large grids are reduced here"
    if note:
        note = f'<p class="note">{note}; all of them are in the folder <code>samples</code>.</p>'
    slider = (
        '<div class="time"><button type="button" id="play" aria-label="play">&#9654;&#xFE0E;</button>'
        f'<input type="range" id="when" min="0" max="{len(parts) - 1}" value="{len(parts) - 1}" '
        'aria-label="training step"></div>'
        if len(parts) > 1
        else ""
    )
    return (
        f'<section><h2>Samples <span id="step">step {parts[-1][0]:,}</span></h2>'
        f'<figure id="shots">{images}</figure>{slider}{note}</section>'
    )


# the time of change and the size belong to the key: a file that is written again is read again
@functools.lru_cache(maxsize=EARLIER + 2)
def _embed(path: str, changed: int, size: int, limit: int) -> tuple[str, int, int, bool]:
    """Data URI of at most `limit` bytes before base64, width and height to show, whether it is reduced."""
    with Image.open(path) as picture:
        width, height = picture.size
        if size <= limit:
            data, kind, smaller = Path(path).read_bytes(), "png", False
        else:
            copy, smaller, kind = picture.convert("RGB"), True, "jpeg"
            # earlier grids are there to leaf through
            side = max(copy.size) if limit == NEWEST_BYTES else 1200
            copy.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
            # a blurred picture is worse than a few artefacts: quality goes first, then size
            quality = 88
            while len(data := _jpeg(copy, quality)) > limit:
                if quality > 60:
                    quality -= 14
                else:
                    copy.thumbnail((copy.width * 4 // 5, copy.height * 4 // 5), Image.Resampling.LANCZOS)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height, smaller


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


# title, y label, log axis, names; the first that matches takes a value
GROUPS = (
    ("Gradient norms", "norm", True, r"grad_.*"),
    ("Learning rate", "rate", False, r"lr(_.*)?"),
    ("Spread of outputs over that of real images", "ratio", False, r"diversity.*"),
    ("Verdicts on real and generated images", "mean output of D", False, r"D.*_(real|fake)"),
    ("Discriminators", "loss", False, r"D(_[A-Z])?"),
    ("Generators, adversarial", "loss", False, r"G(_[A-Z]|_GAN)?"),
    ("Cycle, identity, L1", "weighted loss", False, r"(?i)cycle.*|idt.*|identity.*|rec.*|.*L1"),
    ("Speed", "images per second", False, r"img_per_s"),
    ("Other values", "value", False, r".*"),
)
ORDER = (5, 4, 6, 3, 0, 2, 1, 8, 7)  # places on the page


def _charts(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page's script draws: per group its lines as [step, value, smoothed value]."""
    columns: dict[str, list[tuple[int, float | None]]] = {}
    balance: dict[str, float] = {}
    for record in log:
        for name, value in record.items():
            if name == "balance" and isinstance(value, dict):
                balance = value
            elif name in ("step", "epoch", "time", "wait_share") or isinstance(
                value, (str, list, dict, bool)
            ):
                continue
            else:
                columns.setdefault(name, []).append((record["step"], value))
    members: list[dict[str, Any]] = [{} for _ in GROUPS]
    for name, points in columns.items():
        place = next(i for i, group in enumerate(GROUPS) if re.fullmatch(group[3], name))
        # a learning rate has no scatter, and smoothing would round its corners
        window = 0 if GROUPS[place][1] == "rate" else len(points) // 50
        members[place][name] = _curve(points, GROUPS[place][2], window)
    charts = []
    for place in ORDER:
        label, unit, logarithmic, _ = GROUPS[place]
        lines = [{"name": name, "points": points} for name, points in members[place].items() if points]
        levels = sorted({balance[line["name"]] for line in lines if line["name"] in balance})
        if lines:
            charts.append(
                {"title": label, "unit": unit, "log": logarithmic, "lines": lines, "levels": levels}
            )
    return charts


def _curve(
    points: list[tuple[int, float | None]], logarithmic: bool, half: int
) -> list[tuple[int, float | None, float | None]]:
    """At most `POINTS` of the points, each with the mean (geometric on a log axis) of its surroundings."""
    steps = [step for step, _ in points]
    values = np.array([math.nan if v is None else float(v) for _, v in points])
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(values > 0, np.log(values), math.nan) if logarithmic else values
    if logarithmic:
        values = np.where(values > 0, values, math.nan)
    known = np.isfinite(scaled)
    if not known.any():
        return []
    total = np.concatenate([[0.0], np.cumsum(np.where(known, scaled, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(points))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(points))
    number = count[high] - count[low]
    mean = np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), math.nan)
    smooth = np.exp(mean) if logarithmic else mean
    kept = _thin(values)
    raw, trend = values[kept].tolist(), smooth[kept].tolist()
    return [(steps[i], _short(v), _short(t)) for i, v, t in zip(kept.tolist(), raw, trend)]


def _thin(values: np.ndarray) -> np.ndarray:
    """Indices to keep: of each stretch the smallest and the largest value, so that no spike is lost."""
    index = np.arange(len(values))
    if len(values) <= POINTS:
        return index
    stretch = math.ceil(2 * len(values) / POINTS)
    start = index[::stretch]
    padded = np.full(len(start) * stretch, math.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, stretch)
    # a stretch without any number gives its first index, and so a gap in the curve
    low = start + np.where(np.isnan(rows), math.inf, rows).argmin(1)
    high = start + np.where(np.isnan(rows), -math.inf, rows).argmax(1)
    return np.unique(np.concatenate([low, high]))


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None

"""A contact sheet: some images of every group of a data set, and those that a finding names, in one
picture."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastgan.data.check import Checked
from fastgan.data.images import DataError, read_images, write_image
from fastgan.data.look import Place, Seen, half_of

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_TILE, _GAP, _LINE = 144, 8, 16
_INK, _NOTE, _PROBLEM, _PAPER, _MAT = (
    (20, 20, 20),
    (150, 90, 0),
    (180, 0, 0),
    (255, 255, 255),
    (232, 232, 232),
)


def write_sheet(path: Path, checked: Checked, *, columns: int = 8) -> None:
    """Draw the contact sheet into path (.png, .jpg or .webp): `columns` images of each group, spread over
    it, in a row; below each finding the images it names. 16-bit and float images are shown between the
    smallest and the largest value of their group, of more than three channels the first three. Raises
    DataError if path cannot be written."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise DataError(f"{path}: a contact sheet is a .png, .jpg or .webp file")
    rows: list[tuple[str, tuple[int, int, int], list[Place]]] = []
    for group, images in checked.groups.items():
        if images:
            rows.append(
                (_title(group, images), _INK, [images[i].place for i in _spread(len(images), columns)])
            )
    for finding in checked.findings:
        if finding.places:
            colour = _PROBLEM if finding.problem else _NOTE
            # twins stay beside each other
            shown = finding.places[: columns - columns % 2 or 1]
            rows.append((finding.title, colour, shown))
    height = _GAP + sum(_LINE + _TILE + _LINE + 2 * _GAP for _ in rows)
    sheet = Image.new("RGB", (_GAP + columns * (_TILE + _GAP), max(height, _TILE)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(14), ImageFont.load_default(11)
    y = _GAP
    for text, colour, places in rows:
        draw.text((_GAP, y), _fitted(draw, text, title, sheet.width - 2 * _GAP), colour, title)
        y += _LINE + _GAP
        for column, place in enumerate(places):
            x = _GAP + column * (_TILE + _GAP)
            draw.rectangle((x - 1, y - 1, x + _TILE, y + _TILE), _MAT)
            tile = _tile(place, checked.groups[place.group])
            if tile is None:
                draw.line((x, y, x + _TILE, y + _TILE), _PROBLEM)
            else:
                sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
            name = place.path.relative_to(checked.root).as_posix() if colour != _INK else place.path.name
            draw.text((x, y + _TILE + 1), _fitted(draw, name, small, _TILE), _INK, small)
        y += _TILE + _LINE + _GAP
    write_image(path, np.asarray(sheet))


def _spread(count: int, columns: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, columns))})


def _title(group: str, images: list[Seen]) -> str:
    text = f"{group}: {len(images):,} image{'s' if len(images) > 1 else ''}"
    if any(image.dtype != np.uint8 for image in images):
        low, high = min(i.low for i in images), max(i.high for i in images)
        text += f", shown from {low:g} (black) to {high:g} (white)"
    if images[0].channels not in (1, 3):
        text += f", {'first three' if images[0].channels > 3 else 'first'} of {images[0].channels} channels"
    return text


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> str:
    """Leave out the middle of a text that is too long."""
    # the default font knows few letters
    text = text.encode("ascii", "replace").decode()
    kept = len(text)
    short = text
    while draw.textlength(short, font) > width and kept > 2:
        kept -= 1
        short = f"{text[: kept // 2]}...{text[len(text) - kept // 2 :]}"
    return short


def _tile(place: Place, group: list[Seen]) -> Image.Image | None:
    """The image in a square of _TILE pixels, or None if it cannot be read any more."""
    try:
        image = half_of(place.path, read_images(place.path)[place.page], place.half)
    except (DataError, OSError, IndexError):
        return None
    image = image[..., : 3 if image.shape[2] >= 3 else 1]
    if image.dtype != np.uint8:
        low, high = min(i.low for i in group), max(i.high for i in group)
        image = np.rint((image.astype(np.float32) - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    tile = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
    scale = _TILE / max(tile.size)
    # small images stay pixels
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return tile.resize((max(1, round(tile.width * scale)), max(1, round(tile.height * scale))), how)

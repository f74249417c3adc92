"""Image files as arrays (H, W, C) of uint8, uint16 or float32, and back.

Read and written without loss: PNG of 8 and 16 bits, TIFF (8 and 16 bits, float32, several pages or channels,
planar), WebP, BMP and .npy. Read only in their own precision: JPEG, PGM and PPM. What a file holds is decided
by its first bytes, not by its suffix.

Decisions. Palettes and CMYK become RGB, one-bit images 0 and 255, the orientation tag is applied. Alpha is
dropped, not multiplied in: the colours stay those of the file. Types a network has no use for are converted:
bool to 0 and 255, float16 and float64 to float32, and signed, 32-bit and 64-bit integers to float32 (exact up
to 2^24). A three-dimensional .npy is (H, W, C), unless its first size is at most 16 and its last one is
larger than 16: then it is (C, H, W); a four-dimensional one is a stack of such images. A TIFF axis named C or
S holds channels, any other one (pages, time, depth) separate images.
"""

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".npy"
)  # fmt: skip
WRITE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
MAX_PIXELS = 512 * 2**20
# no further formats: some of Pillow's start other programs
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
_PILLOW_LIMIT = threading.Lock()
_MANY = 16  # a first or last axis up to this long is taken for channels where nothing else tells

Pages = Literal["images", "channels"]


class DataError(ValueError):
    """A fault in the user's images or folders: one line that names the place and says what to do."""


class Probe(NamedTuple):
    """What a header tells: size and channels of the first image, type of its values, number of images."""

    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    pages: int


def read_images(
    path: Path | str, *, pages: Pages = "images", keep_alpha: bool = False, max_pixels: int = MAX_PIXELS
) -> list[np.ndarray]:
    """Read a file as a list of (H, W, C) arrays of uint8, uint16 or float32: one, or one per page of a TIFF.

    pages: "channels" joins all pages of a file into the channels of one image. keep_alpha: keep alpha as the
    last channel. max_pixels: the most pixels a file may hold, all pages together; checked before anything is
    decoded. Raises DataError if the file is missing, damaged, too large, no image, or holds NaN or infinite
    values.
    """
    path = Path(path)
    with _explained(path):
        images = _decode(path, keep_alpha, max_pixels, header_only=False)
        for image in images:
            if image.dtype == np.float32 and not np.isfinite(image).all():
                raise DataError(f"{path}: holds NaN or infinite values; replace them before training")
        return _join(path, images, pages)


def probe(path: Path | str, *, pages: Pages = "images", max_pixels: int = MAX_PIXELS) -> Probe:
    """Return what `read_images` would give, from the header alone; raises DataError if that shows a fault."""
    path = Path(path)
    with _explained(path):
        images = _decode(path, False, max_pixels, header_only=True)
        height, width, channels = images[0].shape
        if pages == "channels":
            return Probe(height, width, sum(image.shape[2] for image in images), images[0].dtype, 1)
        return Probe(height, width, channels, images[0].dtype, len(images))


def write_image(path: Path | str, array: np.ndarray, *, quality: int = 95) -> None:
    """Write (H, W) or (H, W, C) in the format of the suffix; the file appears whole or not at all.

    .png: uint8, uint16 with 1 or 3 channels. .jpg (without chroma subsampling, `quality`), .webp (lossless)
    and .bmp: uint8 with 1 or 3 channels. .tif and .npy: uint8, uint16, float32 with any number of channels.
    Raises DataError for other combinations, and when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(
            f"{path}: cannot write an array of shape {array.shape}; it must be (H, W) or (H, W, C)"
        )
    data = _encode(path, np.ascontiguousarray(array), quality)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def to_unit(array: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Map value_range (default: 0..255, 0..65535, or 0..1 for float) to 0..1 in float32, without clipping."""
    low, high = value_range or type_range(array.dtype)
    return ((array.astype(np.float32) - np.float32(low)) / np.float32(high - low)).astype(np.float32)


def from_unit(
    array: np.ndarray, dtype: np.dtype[Any] | type, value_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Map 0..1 to value_range (default as in `to_unit`) in dtype; integers are clipped, then rounded."""
    dtype = np.dtype(dtype)
    low, high = value_range or type_range(dtype)
    values = array.astype(np.float32) * np.float32(high - low) + np.float32(low)
    if dtype.kind != "f":
        values = np.rint(np.clip(values, 0, np.iinfo(dtype).max))
    return values.astype(dtype)


def type_range(dtype: np.dtype[Any] | type) -> tuple[float, float]:
    """Return the values shown as black and white where nobody says otherwise."""
    dtype = np.dtype(dtype)
    return (0.0, 1.0) if dtype.kind == "f" else (0.0, float(np.iinfo(dtype).max))


def list_images(folder: Path | str) -> list[Path]:
    """List the image files under a folder, nested ones too, hidden ones not, in natural order (2 before 10).

    The order depends on the names alone, not on the operating system. Linked files count, linked folders
    inside do not.
    """
    folder = Path(folder)
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that orders runs of digits by value and settles ties by the plain text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.lower())
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts], name


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except PermissionError as error:
        raise DataError(f"{path}: no permission to read it") from error
    except UnidentifiedImageError as error:
        known = ", ".join(IMAGE_SUFFIXES)
        raise DataError(f"{path}: not an image this program reads ({known})") from error
    # decoders raise nearly every type there is on damaged files
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded, damaged or cut short ({reason[:200]})") from error


def _decode(path: Path, keep_alpha: bool, max_pixels: int, header_only: bool) -> list[np.ndarray]:
    """Read all images of a file; with header_only they have shape and type, but no memory and no pixels."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not an image file")
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise DataError(f"{path}: the file is empty")

    def check(pixels: int) -> None:
        if pixels > max_pixels:
            raise DataError(
                f"{path}: {pixels:,} pixels are more than the limit of {max_pixels:,}; make it smaller"
            )
        if pixels == 0:
            raise DataError(f"{path}: holds no pixels")

    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        images = _read_tiff(path, keep_alpha, check, header_only)
    elif head[:6] == b"\x93NUMPY":
        images = _read_npy(path, check, header_only)
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:25] == b"\x10":
        images = [_read_png16(path, head, keep_alpha, check, header_only)]
    else:
        images = [_read_pillow(path, head, keep_alpha, check, header_only)]
    if header_only:
        return [_blank(image.shape, _plain_dtype(path, image.dtype)) for image in images]
    return [np.ascontiguousarray(_plain(path, image)) for image in images]


def _blank(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def _join(path: Path, images: list[np.ndarray], pages: Pages) -> list[np.ndarray]:
    if pages == "images" or len(images) == 1:
        return images
    if len({(image.shape[:2], image.dtype) for image in images}) > 1:
        raise DataError(f"{path}: its pages differ in size or type, so --pages channels cannot join them")
    return [np.concatenate(images, axis=2)]


def _plain_dtype(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind == "b" or dtype == np.uint8:
        return np.dtype(np.uint8)
    if dtype.kind == "u" and dtype.itemsize == 2:
        return np.dtype(np.uint16)
    if dtype.kind in "iuf":
        return np.dtype(np.float32)
    raise DataError(f"{path}: values of type {dtype} are no image; save it as uint8, uint16 or float32")


def _plain(path: Path, image: np.ndarray) -> np.ndarray:
    target = _plain_dtype(path, image.dtype)
    if image.dtype.kind == "b":
        return image.astype(np.uint8) * np.uint8(255)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as that
        return image.astype(target, copy=False)


def _oriented(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation 1..8 to (H, W, C)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a broken tag must not cost the picture
        return 1


def _open_pillow(path: Path) -> Image.Image:
    # Pillow's own limit is a global far below ours and only warns at first; `check` replaces it
    with _PILLOW_LIMIT:
        saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=_PILLOW_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = saved


def _read_pillow(
    path: Path, head: bytes, keep_alpha: bool, check: Callable[[int], None], header_only: bool
) -> np.ndarray:
    if head[:2] in (b"P3", b"P6") and head[2:3].isspace():
        sizes = re.sub(rb"#[^\n]*\n", b" ", head[2:]).split()[:3]
        if len(sizes) == 3 and int(sizes[2]) > 255:
            raise DataError(f"{path}: PPM with more than 8 bits is not read; convert it to PNG or TIFF")
    with _open_pillow(path) as image:
        check(image.width * image.height)
        alpha = keep_alpha and image.has_transparency_data
        grey = image.mode in ("1", "L", "LA", "La")
        if header_only:
            shape = (image.height, image.width, (1 if grey or image.mode.startswith("I") else 3) + alpha)
            blank = _blank(shape, np.dtype(np.uint16 if image.mode.startswith("I") else np.uint8))
            return _oriented(blank, _orientation(image))
        image.load()
        orientation = _orientation(image)
        if image.mode.startswith("I"):  # PGM of more than 8 bits, which Pillow scales to 0..65535
            array = np.asarray(image).astype(np.uint16)
        elif alpha:
            array = np.asarray(image.convert("LA" if grey and image.mode != "1" else "RGBA"))
        elif image.mode in ("LA", "RGBA"):
            array = np.asarray(image)[..., :-1]
        else:
            array = np.asarray(image.convert("L" if grey else "RGB"))
    return _oriented(array[:, :, None] if array.ndim == 2 else array, orientation)


def _read_png16(
    path: Path, head: bytes, keep_alpha: bool, check: Callable[[int], None], header_only: bool
) -> np.ndarray:
    """Decode with imagecodecs: Pillow reduces 16-bit colour to 8 bits."""
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    check(width * height)
    with _open_pillow(path) as image:
        orientation = _orientation(image)
    if header_only:
        channels = {0: 1, 2: 3, 4: 1 + keep_alpha, 6: 3 + keep_alpha}[head[25]]
        return _oriented(_blank((height, width, channels), np.dtype(np.uint16)), orientation)
    array = imagecodecs.png_decode(path.read_bytes())
    array = array[:, :, None] if array.ndim == 2 else array
    if not keep_alpha and array.shape[2] in (2, 4):
        array = array[..., :-1]
    return _oriented(array, orientation)


def _read_npy(path: Path, check: Callable[[int], None], header_only: bool) -> list[np.ndarray]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3, 4):
        raise DataError(
            f"{path}: an array of shape {array.shape} is no image; it must be (H, W) or (H, W, C)"
        )
    if 0 in array.shape:
        raise DataError(f"{path}: holds no pixels (shape {array.shape})")
    stack = array if array.ndim == 4 else array[None]
    if array.ndim == 2:
        stack = stack[..., None]
    elif stack.shape[1] <= _MANY < stack.shape[3]:
        stack = stack.transpose(0, 2, 3, 1)
    check(stack.shape[0] * stack.shape[1] * stack.shape[2])
    if header_only:
        return list(_blank(stack.shape, stack.dtype))
    return list(np.array(stack))


def _read_tiff(
    path: Path, keep_alpha: bool, check: Callable[[int], None], header_only: bool
) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    size = path.stat().st_size
    _check_tiff_chain(path, size)
    with tifffile.TiffFile(path) as tiff:
        for number, series in enumerate(tiff.series):
            page = series.keyframe
            if number and page.subfiletype & 5:  # a thumbnail or a mask, not one more image
                continue
            if not {"Y", "X"} <= set(series.axes):
                raise DataError(f"{path}: a TIFF with axes {series.axes} is no image")
            channels = [n for axis, n in zip(series.axes, series.shape) if axis in "CS"]
            check(int(np.prod(series.shape, dtype=object)) // max(1, int(np.prod(channels))))
            # tifffile fills what is missing with zeros
            for part in series.pages:
                ends = [at + n for at, n in zip(part.dataoffsets, part.databytecounts)] if part else []
                if max(ends, default=0) > size:
                    raise DataError(f"{path}: cut short, {max(ends) - size:,} bytes are missing")
            array = _blank(series.shape, series.dtype) if header_only else series.asarray()
            tag = page.tags.get("Orientation")
            for image in _tiff_images(path, array, series, keep_alpha):
                images.append(_oriented(image, int(tag.value) if tag is not None else 1))
    if not images:
        raise DataError(f"{path}: the TIFF holds no image")
    return images


def _check_tiff_chain(path: Path, size: int) -> None:
    """Follow the list of pages: tifffile silently drops those that lie beyond the end of a file cut short."""
    with path.open("rb") as file:

        def number(place: int, length: int) -> int:
            file.seek(place)
            data = file.read(length)
            if len(data) < length:
                raise DataError(f"{path}: cut short, its list of pages ends at {size:,} bytes")
            return int.from_bytes(data, order)

        order: Literal["little", "big"] = "little" if file.read(2) == b"II" else "big"
        # a classic TIFF has 32-bit places, a BigTIFF (version 43) 64-bit ones
        big = number(2, 2) == 43
        count_size, entry_size, place_size = (8, 20, 8) if big else (2, 12, 4)
        place, seen = number(8 if big else 4, place_size), set[int]()
        while place and place not in seen:
            seen.add(place)
            place = number(place + count_size + entry_size * number(place, count_size), place_size)


def _tiff_images(path: Path, array: np.ndarray, series: Any, keep_alpha: bool) -> list[np.ndarray]:
    """Order the axes of a series as (image, H, W, C) and bring its colours to grey, RGB or plain channels."""
    page, axes = series.keyframe, series.axes
    shape = array.shape
    if series.kind == "shaped" and axes == "QYX" and shape[2] <= _MANY < min(shape[:2]):
        # tifffile.imwrite without options stores (H, W, C) as H pages of W x C
        return [array]
    inner = [axes.index(axis) for axis in "YXCS" if axis in axes]
    outer = [i for i in range(len(axes)) if i not in inner]
    array = array.transpose(outer + inner)
    height, width = shape[axes.index("Y")], shape[axes.index("X")]
    array = array.reshape(-1, height, width, int(np.prod(array.shape[len(outer) + 2 :])))
    colour = page.photometric.name
    if colour in ("CIELAB", "ICCLAB", "ITULAB", "LOGLUV") or (
        colour == "YCBCR" and page.compression not in (6, 7, 33003, 33005, 34712)
    ):
        raise DataError(f"{path}: TIFF colours of type {colour} are not read; convert it to RGB")
    if colour == "PALETTE" and page.colormap is not None:
        array = (page.colormap.T >> 8).astype(np.uint8)[array[..., 0]]
    elif array.dtype == np.uint8 and page.bitspersample < 8 and colour in ("MINISBLACK", "MINISWHITE"):
        array = (array * (255 // (2**page.bitspersample - 1))).astype(np.uint8)
    if colour == "MINISWHITE":
        array = ~array if array.dtype.kind in "bu" else -array
    if "S" in axes and "C" not in axes:
        extra = page.extrasamples
        if not keep_alpha and any(int(kind) in (1, 2) for kind in extra):
            first = array.shape[3] - len(extra)
            kept = [i for i in range(array.shape[3]) if i < first or int(extra[i - first]) == 0]
            array = array[..., kept]
        if colour == "SEPARATED" and array.shape[3] == 4 and array.dtype.kind == "u":
            white = float(np.iinfo(array.dtype).max)
            ink = array.astype(np.float64)
            rgb = (white - ink[..., :3]) * (white - ink[..., 3:]) / white
            array = np.rint(rgb).astype(array.dtype)
    return list(array)


def _encode(path: Path, array: np.ndarray, quality: int) -> bytes:
    suffix, channels, dtype = path.suffix.lower(), array.shape[2], array.dtype
    if suffix not in WRITE_SUFFIXES:
        raise DataError(
            f"{path}: cannot write files ending in {suffix!r}; use one of {', '.join(WRITE_SUFFIXES)}"
        )
    if dtype not in (np.uint8, np.uint16, np.float32):
        raise DataError(f"{path}: cannot write values of type {dtype}; they must be uint8, uint16 or float32")
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, array[:, :, 0] if channels == 1 else array, allow_pickle=False)
        return buffer.getvalue()
    if suffix in (".tif", ".tiff"):
        colour = "rgb" if channels == 3 else "minisblack"
        shaped = array[:, :, 0] if channels == 1 else array
        planar = None if channels == 1 else "contig"
        tifffile.imwrite(buffer, shaped, photometric=colour, planarconfig=planar, compression="zlib")
        return buffer.getvalue()
    if channels not in (1, 3):
        raise DataError(f"{path}: {suffix} cannot hold {channels} channels; use .tif or .npy")
    if dtype == np.uint16 and suffix == ".png":
        return bytes(imagecodecs.png_encode(array[:, :, 0] if channels == 1 else array))
    if dtype != np.uint8:
        raise DataError(f"{path}: {suffix} cannot hold {dtype} values; use .tif or .npy (.png for 16 bits)")
    image = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    if suffix in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif suffix == ".webp":
        image.save(buffer, "WEBP", lossless=True, exact=True)
    else:
        image.save(buffer, "PNG" if suffix == ".png" else "BMP")
    return buffer.getvalue()

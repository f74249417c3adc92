"""Write image files: what each format can hold, and files that appear whole or not at all."""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from fastgan.data.errors import DataError

WRITE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".npy"
)  # fmt: skip
# formats of many images in one file, and of any type and number of channels
STACKS = (".tif", ".tiff", ".npy")
WITH_ALPHA = (".png", ".webp", ".tif", ".tiff")


def write_image(
    path: Path | str,
    array: np.ndarray,
    *,
    alpha: np.ndarray | None = None,
    profile: bytes | None = None,
    quality: int = 95,
) -> None:
    """Write (H, W) or (H, W, C) in the format of the suffix; the file appears whole or not at all.

    .png: uint8, uint16 with 1 or 3 channels. .jpg (without chroma subsampling, `quality`), .webp (lossless),
    .bmp, .pgm (1 channel) and .ppm (3): uint8. .tif and .npy: uint8, uint16, float32 with any number of
    channels. alpha: (H, W, 1) of the same type, for .png, .webp and .tif, elsewhere left out. profile: ICC
    profile of the colours, left out where the format has none. Raises DataError for other combinations, and
    when the disk is full or the folder cannot be written.
    """
    write_stack(path, [array], alphas=[alpha], profile=profile, quality=quality)


def write_stack(
    path: Path | str,
    images: Sequence[np.ndarray],
    *,
    alphas: Sequence[np.ndarray | None] = (),
    profile: bytes | None = None,
    quality: int = 95,
    channels_first: bool = False,
) -> None:
    """Write one or, in .tif and .npy, several images to one file; the rest as in `write_image`.

    channels_first: a .npy is (C, H, W) or (N, C, H, W). A .npy of several images needs equal shapes.
    """
    path = Path(path)
    arrays = [image[:, :, None] if image.ndim == 2 else image for image in images]
    for array in arrays:
        if array.ndim != 3 or 0 in array.shape:
            raise DataError(
                f"{path}: cannot write an array of shape {array.shape}; it must be (H, W) or (H, W, C)"
            )
        _check(path, array)
    if len(arrays) > 1 and path.suffix.lower() not in STACKS:
        raise DataError(f"{path}: {path.suffix} holds one image, not {len(arrays)}; use .tif")
    data = _encode(path, arrays, list(alphas) or [None] * len(arrays), profile, quality, channels_first)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check(path: Path, array: np.ndarray) -> None:
    suffix, channels, dtype = path.suffix.lower(), array.shape[2], array.dtype
    if suffix not in WRITE_SUFFIXES:
        raise DataError(
            f"{path}: cannot write files ending in {suffix!r}; use one of {', '.join(WRITE_SUFFIXES)}"
        )
    if dtype not in (np.uint8, np.uint16, np.float32):
        raise DataError(f"{path}: cannot write values of type {dtype}; they must be uint8, uint16 or float32")
    if suffix in STACKS:
        return
    if channels not in {".pgm": (1,), ".ppm": (3,)}.get(suffix, (1, 3)):
        raise DataError(f"{path}: {suffix} cannot hold {channels} channels; use .tif or .npy")
    if dtype != np.uint8 and (dtype != np.uint16 or suffix != ".png"):
        raise DataError(f"{path}: {suffix} cannot hold {dtype} values; use .tif or .npy (.png for 16 bits)")


def _encode(
    path: Path,
    arrays: list[np.ndarray],
    alphas: Sequence[np.ndarray | None],
    profile: bytes | None,
    quality: int,
    channels_first: bool,
) -> bytes | memoryview:
    suffix, buffer = path.suffix.lower(), io.BytesIO()
    if suffix == ".npy":
        if len({(each.shape, each.dtype) for each in arrays}) > 1:
            raise DataError(f"{path}: images of different size cannot be one .npy; use .tif")
        stack = np.stack(arrays) if len(arrays) > 1 else arrays[0]
        if channels_first:
            stack = np.moveaxis(stack, -1, -3)
        np.save(buffer, stack[:, :, 0] if stack.ndim == 3 and stack.shape[2] == 1 else stack)
        return buffer.getbuffer()
    if suffix in STACKS:
        _encode_tiff(buffer, arrays, alphas, profile)
        return buffer.getbuffer()
    alpha = alphas[0] if suffix in WITH_ALPHA else None
    array = arrays[0] if alpha is None else np.concatenate([arrays[0], alpha], axis=2)
    array = np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)
    if array.dtype == np.uint16:
        return _with_profile(bytes(imagecodecs.png_encode(array)), profile)
    image = Image.fromarray(array)
    tagged = {} if profile is None else {"icc_profile": profile}
    if suffix in (".jpg", ".jpeg", ".jfif"):
        image.save(buffer, "JPEG", quality=quality, subsampling=0, **tagged)
    elif suffix == ".webp":
        image.save(buffer, "WEBP", lossless=True, exact=True, **tagged)
    elif suffix == ".png":
        image.save(buffer, "PNG", **tagged)
    else:
        image.save(buffer, "BMP" if suffix == ".bmp" else "PPM")
    return buffer.getbuffer()


def _encode_tiff(
    buffer: io.BytesIO, arrays: list[np.ndarray], alphas: Sequence[np.ndarray | None], profile: bytes | None
) -> None:
    size = sum(each.nbytes for each in arrays) + sum(each.nbytes for each in alphas if each is not None)
    with tifffile.TiffWriter(buffer, bigtiff=size > 2**31) as tiff:
        for array, alpha in zip(arrays, alphas):
            channels = array.shape[2]
            options: dict[str, Any] = {
                "photometric": "rgb" if channels == 3 else "minisblack",
                "compression": "zlib",
            }
            if channels > 1 or alpha is not None:
                options["planarconfig"] = "contig"
            if alpha is not None:
                array = np.concatenate([array, alpha], axis=2)
                # what is neither grey nor RGB has further samples of no stated meaning before alpha
                extra = channels - (3 if channels == 3 else 1)
                options["extrasamples"] = ["unspecified"] * extra + ["unassalpha"]
            if profile is not None:
                options["iccprofile"] = profile
            # without metadata: its shapes would make one series of pages that belong apart
            shaped = array[:, :, 0] if array.shape[2] == 1 else array
            tiff.write(shaped, metadata=None if len(arrays) > 1 else {}, **options)


def _with_profile(png: bytes, profile: bytes | None) -> bytes:
    """A PNG file with an iCCP chunk behind its header (PNG specification, 11.3.2.3)."""
    if profile is None:
        return png
    body = b"iCCPICC profile\0\0" + zlib.compress(profile)
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    after = 8 + 25  # the signature and IHDR
    return png[:after] + chunk + png[after:]

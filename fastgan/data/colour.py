"""ICC profiles: colours of other spaces become sRGB, by LittleCMS, before anything is computed with them.

Relative colorimetric with black point compensation. What is tagged as sRGB stays as it is, bit for bit; so do
grey values, whose profile is only carried along, float values and files whose profile is broken.
"""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
from PIL import Image, ImageCms

_RELATIVE = 1
_BLACK_POINT, _EXACT = 0x2000, 0x0100  # _EXACT: else 16-bit values go through a table, up to 20 of 255 off


def to_srgb(image: np.ndarray, profile: bytes | None) -> tuple[np.ndarray, bytes | None]:
    """(H, W, C) of any type with an ICC profile -> the same in sRGB, and the profile it has now."""
    if profile is None or image.dtype.kind == "f":
        return image, None
    try:
        space, name = _about(profile)
        if image.shape[2] == 1 and space == "GRAY":
            return image, profile
        if image.shape[2] != 3 or space != "RGB":
            return image, None
        if "srgb" in name:
            return image, profile
        flags = _BLACK_POINT | (_EXACT if image.dtype == np.uint16 else 0)
        converted = imagecodecs.cms_transform(
            image, profile, srgb(), colorspace="rgb", outcolorspace="rgb", outdtype=image.dtype.name,
            intent=_RELATIVE, flags=flags,
        )  # fmt: skip
        return np.ascontiguousarray(converted), srgb()
    except Exception:  # a broken profile must not cost the picture
        return image, None


def cmyk_to_srgb(image: Image.Image, profile: bytes | None) -> tuple[np.ndarray, bytes | None]:
    """The (H, W, 3) colours of a CMYK image, and the profile they have; without a usable one Pillow's."""
    if profile is not None:
        try:
            space, own = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            flags: Any = ImageCms.Flags.BLACKPOINTCOMPENSATION
            intent: Any = ImageCms.Intent.RELATIVE_COLORIMETRIC
            found = ImageCms.profileToProfile(image, space, own, intent, "RGB", flags=flags)
            if found is not None:
                return np.asarray(found), srgb()
        except (ImageCms.PyCMSError, OSError):
            pass
    return np.asarray(image.convert("RGB")), None


def srgb() -> bytes:
    """The ICC profile of sRGB."""
    profile = bytes(imagecodecs.cms_profile("srgb"))
    # the time of making would make every result another file: ICC.1 7.2, bytes 24 to 35
    return profile[:24] + bytes(12) + profile[36:]


def _about(profile: bytes) -> tuple[str, str]:
    """Colour space and name of a profile."""
    found: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
    return found.xcolor_space.strip(), (found.profile_description or "").lower()

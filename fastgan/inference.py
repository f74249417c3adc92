"""A trained generator as a function of images: `fastgan.load`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastgan.data.images import DataError

if TYPE_CHECKING:
    from fastgan.translate import Generator

Picture = TypeVar("Picture", Image.Image, np.ndarray, Tensor)


class Translator:
    """A trained generator; call it with an image and get one of the same kind.

    generator: what it calls, with the network, its channels and value ranges.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __call__(self, image: Picture) -> Picture:
        """Translate an image of any size.

        Args:
            image: a PIL image: upright by its EXIF, palettes become RGB, alpha is kept aside. Or an array
                (H, W), (H, W, C) or (N, H, W, C), or a tensor (C, H, W) or (N, C, H, W) on any device: uint8,
                uint16 or floating. Grey and RGB become the trained channels. Values of the type that the
                generator was trained on are in its range; others are in 0..255, 0..65535, or 0..1 for
                floating, of tensors too.

        Returns:
            The same kind and size; the type is that of the output domain where the image has that of the
            input domain, else its own. Computed without gradients, tensors by way of host memory.

        Raises:
            DataError: another shape, type or number of channels, or what the kind of image cannot hold.
        """
        if isinstance(image, Image.Image):
            return self._pillow(image)
        if isinstance(image, np.ndarray):
            return self._array(image)
        if isinstance(image, Tensor):
            if image.ndim not in (3, 4):
                raise DataError(f"a tensor must be (C, H, W) or (N, C, H, W), got {tuple(image.shape)}")
            half = image.dtype == torch.bfloat16  # NumPy has no such type
            array = (image.float() if half else image).detach().movedim(-3, -1).cpu().numpy()
            y = torch.from_numpy(self._array(array)).movedim(-1, -3)
            return y.to(image.device, torch.bfloat16 if half else y.dtype).contiguous()
        raise DataError(
            f"an image must be a PIL image, a NumPy array or a tensor, got {type(image).__name__}"
        )

    def _array(self, x: np.ndarray) -> np.ndarray:
        if x.ndim not in (2, 3, 4) or 0 in x.shape[-3:]:
            raise DataError(f"an array must be (H, W), (H, W, C) or (N, H, W, C), got {x.shape}")
        if x.dtype not in (np.uint8, np.uint16) and x.dtype.kind != "f":
            raise DataError(f"an image must be uint8, uint16 or floating, got {x.dtype}")
        if x.dtype.kind == "f":
            if not np.isfinite(x).all():
                raise DataError("the image holds NaN or infinite values: replace them")
            x_type, x = x.dtype, x.astype(np.float32)
        else:
            x_type = x.dtype
        images = [x[..., None]] if x.ndim == 2 else list(x) if x.ndim == 4 else [x]
        results = [self.generator(each) for each in images]
        if not results:
            raise DataError("a batch must hold at least one image")
        y = np.stack(results) if x.ndim == 4 else results[0]
        y = y.astype(x_type) if y.dtype.kind == x_type.kind == "f" else y
        return y[..., 0] if x.ndim == 2 and y.shape[-1] == 1 else y

    def _pillow(self, image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image)
        alpha = None
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        if image.mode in ("RGBA", "LA"):
            alpha = image.getchannel("A")
            image = image.convert(image.mode[:-1])
        if image.mode not in ("L", "RGB", "F", "I;16"):
            # 1, CMYK, YCbCr and others
            image = image.convert("L" if image.mode == "1" else "RGB")
        y = self._array(np.asarray(image))
        y = y[..., 0] if y.ndim == 3 and y.shape[-1] == 1 else y
        if not (y.ndim == 2 or (y.dtype == np.uint8 and y.shape[-1] == 3)):
            raise DataError(
                f"a PIL image cannot hold {y.shape[-1]} channels of {y.dtype}: give the image as an array"
            )
        result = Image.fromarray(y)
        if alpha is not None:
            result.putalpha(alpha)
        return result


def load(
    path: Path | str,
    direction: Literal["AtoB", "BtoA"] | None = None,
    *,
    label: Sequence[float] | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> Translator:
    """A trained generator as a function: `fastgan.load("latest_net_G.pth")(Image.open("in.png"))`.

    Args:
        path: a run or checkpoint folder, .safetensors, or .pth or .ckpt of pix2pix, CycleGAN, CUT or StarGAN.
        direction: in terms of the data folder; default is the direction of training.
        label: one number per label, for StarGAN alone.
        device: "auto", "cuda", "cuda:1", "mps" or "cpu". precision: "auto", "bf16", "fp32" or "tf32".

    Raises:
        CheckpointError: nothing there, pickled objects, or not a generator.
        UsageError: a direction, label or device that cannot be had.
    """
    # imported here: `python -m fastgan.translate` runs that module, which the package must not hold yet
    from fastgan.translate import load_generator

    return Translator(load_generator(path, direction, label=label, device=device, precision=precision))

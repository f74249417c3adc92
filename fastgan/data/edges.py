"""Edge maps of photographs, to make pairs: Canny's detector, thinned, without specks, black lines on white.

The form is that of edges2shoes, whose maps are a network's (HED) after non-maximum suppression, a
threshold, thinning and the removal of parts below 5 pixels; here the gradient stands for the network. J.
Canny, "A Computational Approach to Edge Detection", IEEE PAMI 8 (1986). Where no thresholds are given the
upper one is Otsu's for the roots of the image's gradients, the lower one 0.4 of it: neither contrast nor
bit depth plays a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgan.data.augment import match_channels
from fastgan.data.images import DataError, list_images
from fastgan.data.pair import Format, Report, check_folders, count, exists, read_one, side_by_side, write
from fastgan.data.store import in_order

_SPLITS = ("train", "test", "val")
_RATIO = 0.4  # of the lower threshold to the upper one


@dataclass(frozen=True)
class Canny:
    """sigma: blur in pixels. low, high: thresholds of the gradient, where 1 is a step from black to white;
    None: from the image. min_length: connected edges of fewer pixels are dropped. width: of the lines in
    pixels."""

    sigma: float = 2.0
    low: float | None = None
    high: float | None = None
    min_length: int = 10
    width: int = 1

    def __post_init__(self) -> None:
        """Raise DataError for values that cannot be, naming the flag."""
        if not 0 <= self.sigma <= 100:
            raise DataError(f"--sigma must be between 0 and 100 pixels, got {self.sigma:g}")
        for name, value in (("low", self.low), ("high", self.high)):
            if value is not None and not 0 <= value <= 1:
                raise DataError(f"--{name} must be between 0 and 1, got {value:g}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise DataError(f"--low {self.low:g} is above --high {self.high:g}")
        if not self.min_length >= 0 or not 1 <= self.width <= 100:
            raise DataError("--min-length must be at least 0 and --width between 1 and 100")


def edge_map(image: np.ndarray, canny: Canny = Canny()) -> np.ndarray:  # noqa: B008, it is frozen
    """Find the edges of (H, W, C) of uint8, uint16 or float32: (H, W) bool, True on an edge."""
    ndimage, feature, filters, morphology = _libraries()
    grey = match_channels(image, 1) if image.shape[2] in (1, 3) else image.mean(axis=2, keepdims=True)
    assert grey is not None
    plane = grey[..., 0].astype(np.float32)
    # floats have no black and white of their own; automatic thresholds do not depend on the scale
    span = float(np.ptp(plane)) if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
    nothing = np.zeros(plane.shape, bool)
    if min(plane.shape) < 3 or not np.ptp(plane):
        return nothing
    plane = (plane - plane.min()) / np.float32(span)
    low, high = canny.low, canny.high
    if high is None:
        smooth = ndimage.gaussian_filter(plane, canny.sigma, mode="nearest")
        # a Sobel filter answers 4 to a step of 1
        steepness = np.hypot(*(ndimage.sobel(smooth, axis=axis, mode="nearest") for axis in (0, 1))) / 4
        # of the roots: a few steep edges, such as print, must not hide the outline
        high = float(filters.threshold_otsu(np.sqrt(steepness))) ** 2 if np.ptp(steepness) else 0.0
        high = max(high, low or 0.0)
    if low is None:
        low = _RATIO * high
    edges = feature.canny(
        plane, sigma=canny.sigma, low_threshold=4 * low, high_threshold=4 * high, mode="nearest"
    )
    edges = morphology.thin(edges)
    if canny.min_length > 1:
        labels, number = ndimage.label(edges, np.ones((3, 3), bool))
        edges &= (np.bincount(labels.ravel(), minlength=number + 1) >= canny.min_length)[labels]
    if canny.width > 1:
        row, column = np.indices((canny.width, canny.width)) - (canny.width - 1) / 2
        edges = ndimage.binary_dilation(edges, row**2 + column**2 <= (canny.width / 2) ** 2)
    return edges


def make_edges(
    source: Path,
    out: Path,
    canny: Canny,
    *,
    pairs: bool = False,
    kind: Format = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> Report:
    """Write OUT/name with the edges of every image below a folder, 8 bits, 0 on an edge and 255 elsewhere.

    pairs: edges on the left and the photograph, in its own type, on the right, for `pix2pix`; images that
    are not in train/, test/ or val/ go to OUT/train. Files that exist are kept unless overwrite. Raises
    DataError if the folder is missing, holds no images or OUT; a fault of one file is a line of the report.
    """
    _libraries()
    check_folders((source,), out)
    files = list_images(source)
    if not files:
        raise DataError(f"{source}: holds no images")
    report, taken, jobs = Report(), dict[Path, Path](), list[tuple[Path, Path]]()
    for path in files:
        name = path.relative_to(source).with_suffix("")
        if pairs and (len(name.parts) == 1 or name.parts[0].lower() not in _SPLITS):
            name = "train" / name
        if name in taken:
            report.bad.append(f"{path}: has the same name as {taken[name].name}; rename one")
        else:
            taken[name] = path
            jobs.append((path, out / name))

    def trace(job: tuple[Path, Path]) -> str | None:
        path, goal = job
        try:
            if not overwrite and exists(goal, kind):
                return None
            image = read_one(path)
            white = 1.0 if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
            edges = edge_map(image, canny)[..., None]
            if pairs:
                left = np.where(edges, 0, white).astype(image.dtype)
                write(goal, side_by_side(left, image), kind)
            else:
                write(goal, np.where(edges, 0, 255).astype(np.uint8), kind)
            return ""
        except (DataError, OSError) as error:
            return str(error) if str(path.parent) in str(error) else f"{path}: {error}"

    for result in in_order(trace, jobs, total=len(jobs), label="edges", progress=progress):
        count(report, result)
    return report


def _libraries() -> tuple:
    """Import what the extra `data` brings."""
    try:
        from scipy import ndimage
        from skimage import feature, filters, morphology
    except ImportError as error:
        raise DataError(
            f"edge maps need scikit-image ({error}): pip install -e '.[data]' in the "
            "repository, or pip install "
            "scikit-image"
        ) from error
    return ndimage, feature, filters, morphology

"""Measures by networks that others have trained: FID, KID, inception score, precision and recall through
torch-fidelity, LPIPS through the lpips package.

FID (Heusel et al. 2017), KID (Binkowski et al. 2018), inception score (Salimans et al. 2016) and precision
and recall (Kynkaanniemi et al. 2019) here all read the same Inception network in one pass, torch-fidelity's
`inception-v3-compat`: the TensorFlow weights of 2015 that the FID of papers is computed with, behind
TensorFlow's bilinear resize to 299x299 without antialiasing. Values of other weights, another resize or
another number of images cannot be compared with these.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastgan.config import UsageError
from fastgan.metrics.pixels import as_bytes, as_rgb

INCEPTION = ("fid", "kid", "inception_score", "precision", "recall")
NETWORK = "inception-v3-compat"
RESIZE = "299x299, bilinear as in TensorFlow 1, no antialiasing"
FEATURES = 2048  # of an image; the covariance of fewer images has not its full rank
NEIGHBOURS = 3  # of precision and recall
SUBSETS = 100, 1000  # KID: number and size
SPLITS = 10  # inception score
EXTRA = 'pip install -e ".[metrics]"'


class Spool(Dataset[Tensor]):
    """Images in a temporary file, as many as there are: uint8 RGB (3, H, W) by number, in the order of
    `append`."""

    def __init__(self) -> None:
        # gone with its last reference
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._places: list[tuple[int, tuple[int, int]]] = []

    def append(self, images: Tensor) -> None:
        """Add images (N, C, H, W) in 0..1 of one or three channels."""
        for image in as_bytes(images):
            self._places.append((self._file.seek(0, 2), (image.shape[1], image.shape[2])))
            self._file.write(image.numpy().tobytes())

    @property
    def one_size(self) -> bool:
        """Whether all images have the same size."""
        return len({size for _, size in self._places}) < 2

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Tensor:
        start, (height, width) = self._places[number]
        self._file.seek(start)
        data = bytearray(self._file.read(3 * height * width))
        return torch.frombuffer(data, dtype=torch.uint8).view(3, height, width)


def _import(name: str, what: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except ImportError as error:
        raise UsageError(f"{what} need the package {name}: {EXTRA}") from error
    except Exception as error:
        # a torchvision built for another torch fails with a RuntimeError
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{what}: {name} cannot be imported ({reason}); install the torchvision that belongs to torch "
            f"{torch.__version__}"
        ) from error


def fetch(kind: str) -> Path:
    """The file of weights of the `inception` or `alexnet` network in torch's cache, downloaded once.

    Raises:
        UsageError: the packages are missing, or it cannot be downloaded; names the file and where it is from.
    """
    if kind == "inception":
        _import("torch_fidelity", "FID, KID, inception score, precision and recall")
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url
    else:
        _import("torchvision", "LPIPS")
        from torchvision.models import AlexNet_Weights

        url = AlexNet_Weights.IMAGENET1K_V1.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the file's name ends with the start of its SHA-256
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2])
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"the weights {name} cannot be downloaded ({reason}): fetch {url} elsewhere and give --weights "
            f"{name}"
        ) from error
    return path


def recognise(state: Mapping[str, Tensor]) -> str:
    """Which network a state dict is of: inception, alexnet, vgg16 or an empty string."""
    if "Mixed_7c.branch1x1.conv.weight" in state and "fc.weight" in state:
        return "inception"
    first = state.get("features.0.weight")
    sizes: dict[tuple[int, ...], str] = {(64, 3, 11, 11): "alexnet", (64, 3, 3, 3): "vgg16"}
    if "features.34.weight" in state:
        return ""  # VGG19 begins as VGG16 does
    return sizes.get(tuple(first.shape), "") if first is not None and "classifier.6.weight" in state else ""


def inception_measures(
    fake: Spool, real: Spool, state: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, float], dict[str, Any]]:
    """fid, kid, inception_score, precision and recall of generated against real images, and how they were
    computed.

    Args:
        fake, real: at least 4 images each.
        state: weights of the Inception network, see `fetch`.
        device: where the network runs.

    Raises:
        UsageError: torch-fidelity is missing, the weights do not fit, too few images, or features that are
            not finite.
    """
    fidelity = _import("torch_fidelity", "FID, KID, inception score, precision and recall")
    fewest = min(len(fake), len(real))
    if fewest <= NEIGHBOURS:
        raise UsageError(f"{', '.join(INCEPTION)} need at least {NEIGHBOURS + 1} images, got {fewest}")
    subsets, size = SUBSETS[0], min(SUBSETS[1], fewest)
    # torch-fidelity unpickles whatever a file holds: it is given a copy of tensors read without
    weights = io.BytesIO()
    torch.save(dict(state), weights)
    weights.seek(0)
    try:
        # torch-fidelity takes whatever GPU is the current one
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), here:
            warnings.simplefilter("ignore")
            found = fidelity.calculate_metrics(
                input1=fake, input2=real, cuda=device.type == "cuda", fid=True, kid=True, isc=True, prc=True,
                feature_extractor=NETWORK, feature_extractor_weights_path=weights, kid_subsets=subsets,
                kid_subset_size=size, isc_splits=min(SPLITS, len(fake)), prc_neighborhood=NEIGHBOURS,
                batch_size=32 if fake.one_size and real.one_size else 1, cache=False, verbose=False,
                save_cpu_ram=True,  # also means: no worker processes, which could not share the files
            )  # fmt: skip
    except (RuntimeError, ValueError, np.linalg.LinAlgError) as error:
        raise UsageError(
            f"{', '.join(INCEPTION)} cannot be computed: {str(error).splitlines()[0]}"
        ) from error
    values = {
        "fid": found[fidelity.KEY_METRIC_FID],
        "kid": found[fidelity.KEY_METRIC_KID_MEAN],
        "inception_score": found[fidelity.KEY_METRIC_ISC_MEAN],
        "precision": found[fidelity.KEY_METRIC_PRECISION],
        "recall": found[fidelity.KEY_METRIC_RECALL],
    }
    about = {
        "library": f"torch-fidelity {fidelity.__version__}", "network": NETWORK, "resize": RESIZE,
        "images_fake": len(fake), "images_real": len(real),
        "kid_subsets": subsets, "kid_subset_size": size, "kid_std": found[fidelity.KEY_METRIC_KID_STD],
        "inception_score_splits": min(SPLITS, len(fake)),
        "inception_score_std": found[fidelity.KEY_METRIC_ISC_STD], "precision_neighbours": NEIGHBOURS,
    }  # fmt: skip
    return {key: float(value) for key, value in values.items()}, about


class Lpips:
    """LPIPS (Zhang et al. 2018), version 0.1, as a function of images (N, C, H, W) in 0..1.

    Args:
        state: weights of torchvision's AlexNet (the authors' choice for comparing images) or VGG16; the
            calibration on top is part of the lpips package.
        device: where it runs.

    Raises:
        UsageError: the package is missing or the weights do not fit.
    """

    def __init__(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        lpips = _import("lpips", "LPIPS")
        self.network = recognise(state)
        kind = {"alexnet": "alex", "vgg16": "vgg"}.get(self.network)
        if kind is None:
            raise UsageError("LPIPS needs the weights of torchvision's AlexNet or VGG16")
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            net = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
        own = net.net.state_dict()
        # slice2.3.weight is torchvision's features.3.weight
        net.net.load_state_dict({key: state[f"features.{key.partition('.')[2]}"] for key in own})
        self._net = net.to(device).eval().requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> float:
        """Mean distance over the images."""
        a, b = (as_rgb(image.float()).to(self._device) for image in (x, y))
        return self._net(a, b, normalize=True).mean().item()

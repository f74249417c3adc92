"""FID and its relatives, LPIPS: the libraries' own networks with random weights, against NumPy.

The published weights cannot be had in a test. What is checked: that a file reaches the network it is meant
for, that images arrive in it as they should, and that the values are those of the definitions.
"""

import functools
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastgan import metrics
from fastgan.config import UsageError
from fastgan.measure import prepare
from fastgan.metrics import learned

CPU = torch.device("cpu")
try:
    import torchvision
except RuntimeError:
    # the registry's wheel is built for CUDA: beside a CPU build of torch its operators are missing, none of
    # which is used here
    LIBRARY = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision


@pytest.fixture(scope="module")
def inception() -> nn.Module:
    """The extractor with random weights whose signal neither vanishes nor explodes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    class Bare(Extractor):
        def load_state_dict(self, *args, **kwargs):
            return None

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {}
        )
        torch.manual_seed(0)
        net = Bare("bare", ["192", "2048", "logits_unbiased"])
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        # verdicts that differ from image to image
        net.fc.weight.mul_(50)
    return net


@pytest.fixture(scope="module")
def alexnet() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.alexnet(weights=None).state_dict()
    # 220 MB that LPIPS does not read
    return {k: v for k, v in state.items() if not k.startswith(("classifier.1", "classifier.4"))}


def spool(x: Tensor) -> metrics.Spool:
    found = metrics.Spool()
    for image in x:
        found.append(image[None])
    return found


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, equation 6; the trace of the root through the symmetric form."""
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root).clip(0)
    traces = np.cov(a, rowvar=False).trace() + np.cov(b, rowvar=False).trace()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * np.sqrt(middle).sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018, equation 4 with the kernel (x y / d + 1)^3; all images are one subset."""
    n, d = a.shape
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    off = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (n * (n - 1))
    return float(off - 2 * ab.sum() / n**2)


def reached(a: np.ndarray, b: np.ndarray) -> float:
    """Kynkaanniemi et al. 2019, equations 1 and 2: share of a that is nearer to a b than its third
    neighbour."""
    own = np.sort(np.linalg.norm(b[:, None] - b[None], axis=2), axis=1)[:, 3]
    return float((np.linalg.norm(a[:, None] - b[None], axis=2) <= own).any(1).mean())


def test_inception_measures_match_numpy(inception: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_fidelity

    # one split, as one of five images has nothing to differ from; roots of 2048 x 2048 matrices take a minute
    monkeypatch.setattr(learned, "SPLITS", 1)
    small = functools.partial(torch_fidelity.calculate_metrics, feature_layer_fid="192")
    monkeypatch.setattr(torch_fidelity, "calculate_metrics", small)
    x = torch.rand(10, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    x[5:] = x[5:] * 0.4
    fake, real = spool(x[:5]), spool(x[5:])
    before = torch.get_rng_state()
    found, about = metrics.inception_measures(fake, real, inception.state_dict(), CPU)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        features = inception((x * 255).round().to(torch.uint8))
    (small_a, small_b), (a, b), (logits, _) = (f.double().numpy().reshape(2, 5, -1) for f in features)
    assert found["fid"] == pytest.approx(frechet(small_a, small_b), rel=1e-3)
    assert found["kid"] == pytest.approx(kernel_distance(a, b), rel=1e-3)
    assert (found["precision"], found["recall"]) == (reached(a, b), reached(b, a))
    # Salimans et al. 2016, section 4
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert found["inception_score"] == pytest.approx(np.exp(divergence), rel=1e-4)
    assert found["inception_score"] > 1.001 and about["inception_score_splits"] == 1
    assert (about["images_fake"], about["images_real"], about["kid_subset_size"]) == (5, 5, 5)
    assert "no antialiasing" in about["resize"]


def test_images_reach_inception_rounded_and_as_colour() -> None:
    x = torch.tensor([0.0, 0.5, 1.2, -1.0]).view(1, 1, 2, 2)
    found = spool(x)
    assert found[0].tolist() == 3 * [[[0, 128], [255, 0]]] and found[0].dtype == torch.uint8
    found.append(torch.ones(2, 3, 5, 4))
    assert len(found) == 3 and found[2].shape == (3, 5, 4) and not found.one_size
    with pytest.raises(UsageError, match="1 or 3 channels, got 5"):
        found.append(torch.zeros(1, 5, 2, 2))


def test_what_inception_refuses(inception: nn.Module) -> None:
    few, enough = spool(torch.rand(3, 3, 8, 8)), spool(torch.rand(4, 3, 8, 8))
    with pytest.raises(UsageError, match="at least 4 images, got 3"):
        metrics.inception_measures(enough, few, inception.state_dict(), CPU)
    cut = {k: v for k, v in inception.state_dict().items() if not k.startswith("Mixed_6")}
    with pytest.raises(UsageError, match="cannot be computed"):
        metrics.inception_measures(enough, enough, cut, CPU)


def test_lpips_puts_the_weights_where_they_belong(alexnet: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    measure = metrics.Lpips(alexnet, CPU)
    assert torch.equal(before, torch.get_rng_state())
    x, y = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # Zhang et al. 2018, equation 1, with torchvision's own layers and the calibration of the package
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
    net = torchvision.models.alexnet(weights=None).eval()
    net.load_state_dict(alexnet, strict=False)
    calibration = [w for k, w in measure._net.state_dict().items() if k.startswith("lin") and "lins" not in k]
    expected, layers = 0.0, iter(calibration)
    a, b = ((2 * z - 1 - shift) / scale for z in (x, y))
    for number, layer in enumerate(net.features):
        a, b = layer(a), layer(b)
        if number in (1, 4, 7, 9, 11):
            p, q = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (a, b))
            expected += (next(layers) * (p - q).square()).sum(1).mean().item()
    assert measure(x, y) == pytest.approx(expected, rel=1e-4) and expected > 0
    assert measure(x, x) == 0
    assert measure(x[:, :1], y[:, :1]) > 0


def save(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_files_are_told_by_their_keys(
    inception: nn.Module, alexnet: dict[str, Tensor], tmp_path: Path
) -> None:
    telling = {k: v for k, v in inception.state_dict().items() if k.startswith(("Mixed_7c", "fc"))}
    files = [save(alexnet, tmp_path / "a.pth"), save(telling, tmp_path / "b.pth")]
    tools = prepare({"pairs", "inception"}, CPU, weights=files, measures=["fid", "lpips"])
    assert tools.inception is not None and tools.about_lpips()["weights"] == "a.pth"
    assert tools.files["inception"]["weights"] == "b.pth" and len(tools.files["inception"]["sha256"]) == 64
    # without a choice the files choose
    assert {"fid", "kid", "lpips", "l1"} <= prepare({"pairs", "inception"}, CPU, weights=files).names
    assert prepare({"pairs", "inception"}, CPU).names == {"l1", "psnr_db", "ssim"}
    other = save({"x": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="neither torch-fidelity's Inception"):
        prepare({"pairs"}, CPU, weights=[other])


class Pickled:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path("pwned").write_text, ("x",)


def test_a_pickled_object_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"Mixed_7c.branch1x1.conv.weight": Pickled(), "fc.weight": 0}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="never loaded"):
        prepare({"inception"}, CPU, weights=[tmp_path / "bad.pth"])
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("measure", "file"),
    [("fid", "weights-inception-2015-12-05-6726825d.pth"), ("lpips", "alexnet-owt-7be5be79.pth")],
)
def test_without_weights_one_line_names_file_and_flag(
    measure: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(url: str, path: str, hash_prefix: str) -> None:
        assert hash_prefix in url
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UsageError, match=rf"{file} cannot be downloaded .*no route.*--weights") as found:
        prepare({"pairs", "inception"}, CPU, measures=[measure])
    assert "\n" not in str(found.value)
    # what an earlier run has fetched is not fetched again
    (tmp_path / "checkpoints" / file).write_bytes(b"")
    kind = "inception" if measure == "fid" else "alexnet"
    assert learned.fetch(kind) == tmp_path / "checkpoints" / file


@pytest.mark.parametrize(
    ("package", "measure", "said"),
    [
        ("torch_fidelity", "fid", r'torch_fidelity: pip install -e "\.\[metrics\]"'),
        ("skimage", "ssim", r'scikit-image: pip install -e "\.\[metrics\]"'),
    ],
)
def test_a_missing_package_is_named(
    package: str, measure: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util
    import sys

    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    with pytest.raises(UsageError, match=said):
        prepare({"pairs", "inception"}, CPU, measures=[measure])
    # the others are still possible
    tools = prepare({"pairs", "inception"}, CPU)
    assert {"l1", "psnr_db"} <= tools.names and ("ssim" in tools.names) == (package != "skimage")
    assert bool(tools.notes) == (package == "skimage")


def test_a_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(learned, "__import__", broken, raising=False)
    with pytest.raises(UsageError, match="nms does not exist.*torchvision that belongs to torch"):
        learned._import("lpips", "LPIPS")

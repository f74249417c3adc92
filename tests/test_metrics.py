"""Measures against hand-worked values and references in float64 NumPy that share no code with them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan import metrics
from fastgan.config import UsageError
from fastgan.data.digits import make_digits
from fastgan.metrics.labels import CITYSCAPES


def test_l1_and_psnr_of_known_images() -> None:
    x, y = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)
    assert metrics.l1(x, y) == pytest.approx(0.1)
    assert metrics.psnr(x, y) == pytest.approx(20.0, abs=1e-4)  # -10 log10(0.01)
    assert metrics.psnr(x, x) == pytest.approx(100.0)


def ssim_reference(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 13 of Wang et al. 2004 with K1 0.01, K2 0.03, over all windows inside one plane."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    views = [np.lib.stride_tricks.sliding_window_view(z, (11, 11)) for z in (x, y)]
    mx, my = (np.einsum("ijkl,kl->ij", view, window) for view in views)
    xx, yy, xy = (
        np.einsum("ijkl,kl->ij", a * b, window) - m
        for a, b, m in (
            (views[0], views[0], mx**2),
            (views[1], views[1], my**2),
            (views[0], views[1], mx * my),
        )
    )
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * xy + c2) / ((mx**2 + my**2 + c1) * (xx + yy + c2))).mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_matches_the_paper(channels: int) -> None:
    rng = np.random.default_rng(channels)
    x = rng.random((2, channels, 17, 23))
    y = np.clip(x + 0.2 * rng.standard_normal(x.shape), 0, 1)
    expected = np.mean([ssim_reference(a, b) for i in range(2) for a, b in zip(x[i], y[i])])
    found = metrics.ssim(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(expected, abs=1e-9)
    assert metrics.ssim(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(1)
    with pytest.raises(UsageError, match="at least 11 pixels, got 23x10"):
        metrics.ssim(torch.zeros(1, 1, 10, 23), torch.zeros(1, 1, 10, 23))


def test_mean_distance_is_over_all_pairs() -> None:
    x = torch.tensor([0.0, 0.3, 0.9]).view(3, 1, 1, 1)
    assert metrics.mean_distance(x) == pytest.approx((0.3 + 0.9 + 0.6) / 3)
    assert metrics.mean_distance(x[:1]) == 0


def test_background_distance_looks_only_where_there_is_no_ink() -> None:
    ink = torch.zeros(1, 2, 2)
    ink[0, 0, 0] = 1
    x = torch.full((1, 3, 2, 2), 0.75)
    x[..., 0, 0] = 0
    assert metrics.background_distance(x, ink) == pytest.approx(0.25)


def test_the_classifier_reads_real_digits_and_leaves_the_generator_alone() -> None:
    data, held_out = (make_digits(split, paired=False) for split in ("train", "test"))
    x = torch.from_numpy(data.B).permute(0, 3, 1, 2) / 255
    before = torch.get_rng_state()
    with torch.no_grad():
        net = metrics.train_classifier(x, torch.from_numpy(data.labels_B), epochs=15)
    assert torch.equal(before, torch.get_rng_state())
    y = torch.from_numpy(held_out.B).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(held_out.labels_B)
    assert metrics.accuracy(net, y, labels) > 0.9
    assert metrics.accuracy(net, y, (labels + 1) % 10) < 0.1


def test_classes_are_folders_that_all_groups_have() -> None:
    a, b = ["cat/1", "dog/x/2"], ["dog/7", "cat/8"]
    assert metrics.class_folders(a, b) == ["cat", "dog"]
    assert metrics.class_numbers(a, ["cat", "dog"]).tolist() == [0, 1]
    for other in (["cat/1", "fox/2"], ["cat/1", "2"], ["cat/1"]):
        assert metrics.class_folders(a, other) == []
    batch = metrics.one_batch([metrics.small(torch.ones(1, 3, s, 90)) for s in (80, 20)])
    assert batch.shape == (2, 3, 64, 64)
    unequal = [metrics.small(torch.ones(1, 1, s, 20)) for s in (30, 40)]
    assert metrics.one_batch(unequal).shape == (2, 1, 64, 64)


def label_reference(true: np.ndarray, found: np.ndarray, table: dict) -> tuple[dict, list]:
    """Pixel by pixel in Python integers."""
    names = [name for name in table if name != "void"]
    colours = [(np.array(c, np.int64), name) for name, several in table.items() for c in several]
    n = np.zeros((len(names), len(names) + 1))

    def name_of(pixel: np.ndarray) -> str:
        return min(colours, key=lambda entry: int(((pixel - entry[0]) ** 2).sum()))[1]

    for p, q in zip(true.reshape(-1, 3).astype(np.int64), found.reshape(-1, 3).astype(np.int64)):
        if name_of(p) != "void":
            row, column = names.index(name_of(p)), name_of(q)
            n[row, len(names) if column == "void" else names.index(column)] += 1
    recalls, ious = [], []
    for k in range(len(names)):
        union = n[k].sum() + n[:, k].sum() - n[k, k]
        ious.append(n[k, k] / union if union else None)
        recalls += [n[k, k] / n[k].sum()] if n[k].sum() else []
    scores = {
        "pixel_accuracy": sum(n[k, k] for k in range(len(names))) / n.sum(),
        "class_accuracy": np.mean(recalls),
        "mean_iou": np.mean([iou for iou in ious if iou is not None]),
    }
    return scores, ious


@pytest.mark.parametrize("classes", [3, 19], ids=["own", "cityscapes"])
def test_label_scores_match_numpy(classes: int, tmp_path: Path) -> None:
    own = {"red": [[255, 0, 0], [200, 0, 0]], "sky": [[0, 0, 255]], "tree": [[0, 99, 0]], "void": [[0, 0, 0]]}
    table = own if classes == 3 else CITYSCAPES
    (tmp_path / "p.json").write_text(json.dumps(own))
    palette = metrics.Palette.read("cityscapes" if classes == 19 else str(tmp_path / "p.json"))
    assert len(palette.names) == classes
    rng = np.random.default_rng(0)
    pool = np.array([c for name in list(table)[:7] + ["void"] for c in table[name]])
    true = pool[rng.integers(len(pool), size=(2, 9, 11))]
    wrong = rng.random((2, 9, 11, 1)) < 0.4
    noisy = np.clip(true + rng.integers(-15, 16, true.shape), 0, 255)
    found = np.where(wrong, rng.integers(0, 256, true.shape), noisy)
    x, y = (torch.from_numpy(z).permute(0, 3, 1, 2).float() / 255 for z in (true, found))
    # image by image, as an evaluation adds them up
    counts = palette.confusion(x[:1], y[:1]) + palette.confusion(x[1:], y[1:])
    scores, ious = metrics.label_scores(counts)
    expected, expected_ious = label_reference(true, found, table)
    assert scores == pytest.approx(expected, abs=1e-12)
    assert ious == [pytest.approx(iou) if iou is not None else None for iou in expected_ious]
    assert palette.distance(x) == 0 < palette.distance(y)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "road 1 2\nsky 3 4 5", "line 1 must be `name r g b`"),
        ("p.txt", "road 1 2 3", "at least two classes"),
        ("p.txt", "road 1 2 300\nsky 3 4 5", "whole numbers 0..255"),
        ("p.txt", "road 1 2 3\nsky 1 2 3", "stands for two classes"),
        ("p.json", "[1, 2]", "must be {"),
        ("p.json", '{"a": [1, 2], "b": [1, 2, 3]}', "a must be three whole numbers"),
        ("p.json", "{", "cannot be read"),
        ("absent.txt", None, "it takes cityscapes, a .json or a text file"),
    ],
)
def test_a_bad_palette_is_one_line(name: str, text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        metrics.Palette.read(str(tmp_path / name))


def test_a_palette_of_text_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# comment\ntraffic light: 250, 170, 30\nsky 70 130 180\nsky\t0 0 255\n")
    palette = metrics.Palette.read(str(tmp_path / "p.txt"))
    assert palette.names == ("traffic light", "sky") and palette.classes.tolist() == [0, 1, 1]
    with pytest.raises(UsageError, match="1 channels"):
        palette.read_image(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(("name", "said"), [("fdi", "did you mean fid"), ("zzz", "choose of l1, psnr_db")])
def test_an_unknown_measure_is_named(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        metrics.measure_of(name)
    assert metrics.measure_of("fid_B") is metrics.MEASURES["fid"]
    assert {m.needs for m in metrics.MEASURES.values()} <= metrics.NEEDS.keys()

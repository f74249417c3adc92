"""The embedded digits: exact bytes, held-out split, disjoint halves, equal pairs."""

import hashlib

import numpy as np
import pytest

from fastgan.data.digits import COLOURS, CREDIT, DigitSet, load_scans, make_colours, make_digits


def _digest(digits: DigitSet) -> str:
    sha = hashlib.sha256()
    for name in ("A", "B", "labels_A", "labels_B", "ink_A", "ink_B"):
        sha.update(np.ascontiguousarray(getattr(digits, name)).tobytes())
    return sha.hexdigest()[:32]


CHECKSUMS = {
    ("train", True): "d87d864882f2830171cf0362599cbf1a",
    ("train", False): "b022f5d61b27026bc381e7851cb16b3b",
    ("test", True): "a454d7ddb76ac9f46aefed344c07b197",
    ("test", False): "590c0accff4c2b715e0dd864b8e88cc0",
}


@pytest.mark.parametrize("split, paired", CHECKSUMS)
def test_bytes_never_change(split: str, paired: bool) -> None:
    assert _digest(make_digits(split, paired=paired)) == CHECKSUMS[split, paired]


def test_scans_are_complete() -> None:
    images, labels = load_scans()
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8 and images.max() == 16
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert "Alpaydin" in CREDIT and "CC BY 4.0" in CREDIT


def test_test_digits_are_held_out_and_unpaired_domains_are_disjoint() -> None:
    """Every scan is distinct, so the ink alone tells the digits apart."""
    scans, _ = load_scans()
    assert len({scan.tobytes() for scan in scans}) == 1797
    sets: dict[tuple[str, bool], tuple[set[bytes], set[bytes]]] = {}
    for split in ("train", "test"):
        for paired in (True, False):
            digits = make_digits(split, paired=paired)
            sets[split, paired] = (
                {ink.tobytes() for ink in digits.ink_A},
                {ink.tobytes() for ink in digits.ink_B},
            )
    for split in ("train", "test"):
        halves, (whole, same) = sets[split, False], sets[split, True]
        assert whole == same
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == whole
    assert not sets["train", True][0] & sets["test", True][0]
    assert len(sets["train", True][0]) + len(sets["test", True][0]) == 1797
    share = len(sets["test", True][0]) / 1797
    assert 0.19 < share < 0.21


def test_every_class_is_split_alike() -> None:
    _, labels = load_scans()
    total = np.bincount(labels)
    test = np.bincount(make_digits("test", paired=True).labels_A)
    np.testing.assert_allclose(test, total / 5, atol=0.5)
    halves = make_digits("train", paired=False)
    assert np.abs(np.bincount(halves.labels_A) - np.bincount(halves.labels_B)).max() <= 1


def test_pairs_share_digit_and_colour() -> None:
    digits = make_digits("test", paired=True)
    np.testing.assert_array_equal(digits.ink_A, digits.ink_B)
    np.testing.assert_array_equal(digits.labels_A, digits.labels_B)
    # A + B = (m + (1 - m) c) + (m c + (1 - m)) = 1 + c, the same at every pixel up to the two roundings
    total = digits.A.astype(np.int64) + digits.B.astype(np.int64)
    spread = total.max(axis=(1, 2)) - total.min(axis=(1, 2))
    assert spread.max() <= 1
    colour = (total.mean(axis=(1, 2)) - 255).round()
    assert (colour @ [0.299, 0.587, 0.114]).max() <= 0.6 * 255 + 1
    assert (colour.max(axis=1) - colour.min(axis=1)).min() >= 0.25 * 255 - 2


def test_domains_follow_their_formula() -> None:
    digits = make_digits("train", paired=False)
    assert digits.A.dtype == np.uint8 and digits.A.shape[1:] == (32, 32, 3)
    assert digits.ink_A.dtype == np.float32 and digits.ink_A.shape == digits.A.shape[:3]
    assert np.all(digits.A[digits.ink_A == 1] == 255)
    assert np.all(digits.B[digits.ink_B == 0] == 255)
    paper = digits.A[0][digits.ink_A[0] == 0]
    assert len(np.unique(paper, axis=0)) == 1


@pytest.mark.parametrize("size", [8, 16, 32, 256])
def test_sizes_show_the_same_scan(size: int) -> None:
    """The kernel interpolates: size 8 is the scan, a larger one keeps a block's mean near its pixel."""
    ink = make_digits("test", paired=True, size=size).ink_A
    small = make_digits("test", paired=True, size=8).ink_A
    blocks = ink.reshape(len(ink), 8, size // 8, 8, size // 8).mean(axis=(2, 4))
    # a lone bright pixel between dark ones loses up to a third of its height to the slopes
    np.testing.assert_allclose(blocks, small, atol=0 if size == 8 else 0.35)
    levels = {round(float(value) * 255) for value in np.unique(small)}
    assert levels == {(value * 255 + 8) // 16 for value in range(17)}


@pytest.mark.parametrize("arguments", [("val", 32), ("train", 30), ("train", 264)])
def test_bad_arguments_are_refused(arguments: tuple[str, int]) -> None:
    split, size = arguments
    with pytest.raises(ValueError, match="make_digits: "):
        make_digits(split, paired=True, size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "3637392848892fb45eb3aa08852c6ddd"), ("test", "f2b83cc9c930af78242a4d9a27aaf8e5")],
)
def test_coloured_digits_are_the_same_for_ever(split: str, digest: str) -> None:
    found, digits = make_colours(split), make_digits(split, paired=True)  # type: ignore[arg-type]
    sha = hashlib.sha256(found.images.tobytes() + found.colours.tobytes())
    assert sha.hexdigest()[:32] == digest
    assert np.array_equal(found.digits, digits.labels_A) and np.array_equal(found.ink, digits.ink_A)
    palette = np.array(list(COLOURS.values()))
    for image, colour, ink in zip(found.images, found.colours, found.ink):
        assert (image[ink == 0] == 255).all() and (image[ink == 1] == palette[colour]).all()
    # every colour about as often as the others, among all digits
    counts = np.array([np.bincount(found.colours[found.digits == k], minlength=5) for k in range(10)])
    assert counts.min() > 0 and np.abs(counts.sum(0) / len(found.colours) - 0.2).max() < 0.06
    away = np.linalg.norm(palette[:, None] - palette, axis=2)[~np.eye(5, dtype=bool)]
    assert away.min() > 136

"""The history pool: its rule, its statistics, no shared memory, exact resume."""

import numpy as np
import pytest
import torch

from fastgan.data.pool import ImagePool


def _numbered(first: int, count: int = 1, size: int = 4) -> torch.Tensor:
    """Make images whose every value is their number."""
    return torch.arange(first, first + count).float()[:, None, None, None].expand(-1, 3, size, size).clone()


def _numbers(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].long().tolist()


def test_fills_first_and_then_follows_the_rule() -> None:
    """The same draws through the published rule, written out for numbers instead of images."""
    pool, rng, twin = ImagePool(5), np.random.default_rng(3), np.random.default_rng(3)
    stored: list[int] = []
    exchanged = 0
    for k in range(300):
        (got,) = _numbers(pool.query(_numbered(k), rng))
        expected = k
        if len(stored) < 5:
            stored.append(k)
        elif twin.random() > 0.5:
            place = int(twin.integers(5))
            expected, stored[place] = stored[place], k
            exchanged += 1
        assert got == expected
        assert sorted(int(image[0, 0, 0, 0]) for image in pool.state().values()) == sorted(stored)
    assert len(pool) == 5
    # 295 fair draws: five standard deviations are 43
    assert abs(exchanged - 147.5) < 43


def test_statistics_of_age_and_place() -> None:
    """Every place is drawn alike, so a stored image stays 2 * size steps on average."""
    pool, rng = ImagePool(10), np.random.default_rng(0)
    ages = []
    for k in range(4000):
        (got,) = _numbers(pool.query(_numbered(k, size=1), rng))
        if got != k:
            ages.append(k - got)
    # about 2,000 geometric waiting times of mean 20 and deviation 19.5: five deviations of their mean are 2.2
    assert abs(np.mean(ages) - 20) < 2.2


@pytest.mark.parametrize("fixed", [True, False])
def test_images_of_a_batch_are_handled_one_by_one(fixed: bool) -> None:
    batched, single = ImagePool(4, fixed_size=fixed), ImagePool(4)
    rng_a, rng_b = np.random.default_rng(7), np.random.default_rng(7)
    for k in range(0, 60, 6):
        together = batched.query(_numbered(k, 6), rng_a)
        one_by_one = [single.query(_numbered(k + i), rng_b) for i in range(6)]
        torch.testing.assert_close(together, torch.cat(one_by_one), rtol=0, atol=0)


def test_size_zero_passes_through_and_draws_nothing() -> None:
    pool, rng = ImagePool(0), np.random.default_rng(1)
    before = rng.bit_generator.state
    images = _numbered(3, 2).requires_grad_()
    got = pool.query(images, rng)
    assert torch.equal(got, images) and not got.requires_grad
    assert rng.bit_generator.state == before
    assert pool.state() == {}


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("size", [0, 1, 50])
def test_nothing_is_shared(size: int, fixed: bool) -> None:
    """Overwriting input, output and state must not reach the pool, nor the input the output."""
    pool, rng = ImagePool(size, fixed_size=fixed), np.random.default_rng(2)
    buffer = _numbered(0, 2)
    for k in range(40):
        buffer.copy_(_numbered(10 * k, 2))
        got = pool.query(buffer, rng)
        expected = got.clone()
        buffer.fill_(-1)
        assert torch.equal(got, expected)
        assert (got >= 0).all()
        got.fill_(-2)
        for image in pool.state().values():
            assert (image >= 0).all()
            image.fill_(-3)


def test_layout_dtype_and_gradient() -> None:
    pool, rng = ImagePool(2), np.random.default_rng(0)
    images = torch.rand(3, 3, 8, 6).to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    for _ in range(5):
        got = pool.query(images, rng)
        assert got.dtype == torch.bfloat16 and got.shape == images.shape and not got.requires_grad
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert pool.query(images[:0], rng).shape == (0, 3, 8, 6)


@pytest.mark.parametrize("fixed", [True, False])
def test_resume_is_exact(fixed: bool) -> None:
    rng = np.random.default_rng(5)
    pool = ImagePool(6, fixed_size=fixed)
    for k in range(30):
        pool.query(_numbered(k), rng)
    # the state does not tell which of the two forms wrote it
    twin, twin_rng = ImagePool(6, fixed_size=not fixed), np.random.default_rng()
    twin.load(pool.state())
    twin_rng.bit_generator.state = rng.bit_generator.state
    for k in range(30, 90):
        assert torch.equal(pool.query(_numbered(k), rng), twin.query(_numbered(k), twin_rng))
    half = ImagePool(6)
    half.query(_numbered(0, 3), rng)
    twin.load(half.state())
    assert len(twin) == 3


def test_images_of_changing_size() -> None:
    pool, rng = ImagePool(2, fixed_size=False), np.random.default_rng(0)
    sizes = {pool.query(_numbered(k, size=4 + k % 3), rng).shape[-1] for k in range(60)}
    assert sizes == {4, 5, 6}
    with pytest.raises(ValueError, match="use batch size 1"):
        for k in range(60):
            pool.query(_numbered(k, 2, size=4 + k % 3), rng)


def test_a_plan_writes_every_place_once_and_stays_in_its_memory() -> None:
    """What a CUDA graph needs: the images move by the plan alone, at the same addresses."""
    pool, rng = ImagePool(3), np.random.default_rng(1)
    pool.query(_numbered(0, 5), rng)
    store = pool._store
    for k in range(20):
        plan = pool.plan(5, rng)
        assert len(set(plan[1])) == 5 and plan.min() >= 0 and plan.max() < 8
        pool.exchange(_numbered(5 * k, 5), torch.from_numpy(plan))
    assert pool._store is store
    with pytest.raises(ValueError, match="of the stored ones"):
        pool.query(_numbered(0, 2, size=6), rng)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="size must be 0 or more, got -1"):
        ImagePool(-1)
    pool = ImagePool(3)
    pool.query(_numbered(0, 3), np.random.default_rng(0))
    with pytest.raises(ValueError, match="holds 3 images, the pool only 2"):
        ImagePool(2).load(pool.state())

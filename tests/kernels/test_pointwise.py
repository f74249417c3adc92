import pytest
import torch
from fastgan_kernels._op import INTERPRET, tl, triton
from fastgan_kernels._pointwise import (
    ACTIVATIONS,
    _mix_torch,
    activate,
    activation,
    activation_slope,
    dropout,
    keep,
    keep_mask,
    threshold,
)
from torch import Tensor

needs_kernels = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)
DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"


@triton.jit
def _activation_kernel(z_ptr, y_ptr, slope_ptr, slope_of_y_ptr, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + i)
    y = activate(z, ACT, 0.2)
    tl.store(y_ptr + i, y)
    tl.store(slope_ptr + i, activation_slope(z, False, ACT, 0.2))
    tl.store(slope_of_y_ptr + i, activation_slope(y, True, ACT, 0.2))


@triton.jit
def _keep_kernel(seed_ptr, index_ptr, kept_ptr, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(kept_ptr + i, keep(tl.load(seed_ptr), tl.load(index_ptr + i), THRESHOLD).to(tl.int8))


@needs_kernels
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_in_a_kernel(act):
    z = torch.randn(64, dtype=torch.float64, device=DEVICE)
    z[:6] = torch.tensor([0.0, -0.0, 1e3, -1e3, 1e-3, float("nan")])
    leaf = z.clone().requires_grad_()
    expected = activation(leaf, act, 0.2)
    (slope,) = torch.autograd.grad(expected, leaf, torch.ones_like(z))
    y, found, of_y = torch.empty(3, 64, dtype=z.dtype, device=DEVICE)
    _activation_kernel[(1,)](z, y, found, of_y, ACT=act, BLOCK=64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-15, equal_nan=True)
    # the slope at a NaN is of no interest
    torch.testing.assert_close(found[:5], slope[:5], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[6:], slope[6:], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(of_y[6:], slope[6:], rtol=1e-12, atol=1e-15)


def kept_by_kernel(seed: Tensor, index: Tensor, p: float) -> Tensor:
    kept = torch.empty(len(index), dtype=torch.int8, device=DEVICE)
    _keep_kernel[(1,)](seed, index, kept, THRESHOLD=threshold(p), BLOCK=len(index))
    return kept.bool()


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_in_a_kernel(p, seed):
    seed = torch.tensor([seed], device=DEVICE)
    index = torch.arange(1024, device=DEVICE)
    assert torch.equal(kept_by_kernel(seed, index, p), keep_mask(seed, (1, 1, 32, 32), p).flatten())


@needs_kernels
def test_mask_beyond_32_bits():
    seed = torch.tensor([7], device=DEVICE)
    index = torch.arange(1024, device=DEVICE)
    low, high = kept_by_kernel(seed, index, 0.5), kept_by_kernel(seed, index + 2**32, 0.5)
    # as different as two independent masks: 512 of 1024, with a standard deviation of 16
    assert 432 < (low != high).sum() < 592


def test_hash_is_lowbias32():
    def lowbias32(h: int) -> int:
        h ^= h >> 16
        h = h * 0x7FEB352D % 2**32
        h ^= h >> 15
        h = h * 0x846CA68B % 2**32
        return h ^ (h >> 16)

    values = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789]
    assert _mix_torch(torch.tensor(values)).tolist() == [lowbias32(v) for v in values]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_random(p):
    kept = keep_mask(torch.tensor([3]), (2, 4, 125, 125), p).double()
    # five standard deviations of 125000 draws
    tolerance = 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < tolerance
    other = keep_mask(torch.tensor([4]), (2, 4, 125, 125), p).double()
    flat = kept.flatten() - (1 - p)
    for shift, second in ((0, other), (1, kept), (125, kept), (125 * 125, kept)):
        covariance = (flat * (second.flatten() - (1 - p)).roll(shift)).mean() / (p * (1 - p))
        assert abs(covariance) < 5 / kept.numel() ** 0.5


def test_dropout():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([11])
    y = dropout(x, 0.25, seed)
    kept = keep_mask(seed, x.shape, 0.25)
    torch.testing.assert_close(y, x * kept / 0.75)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy * kept / 0.75)
    # the mask belongs to the element, wherever it lies in memory
    assert torch.equal(dropout(x.contiguous(memory_format=torch.channels_last), 0.25, seed), y)
    assert torch.equal(dropout(x, 0.0, seed), x)


def test_thresholds():
    assert [threshold(p) for p in (0.0, 0.5, 1.0)] == [0, 2**31, 2**32 - 1]

import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import _block_op as block_op
from fastgan_kernels import residual_block
from fastgan_kernels._block import NONE, Layer, Plan
from fastgan_kernels._pointwise import keep_mask
from torch import Tensor

from tests.kernels.block_cases import (
    HALVES,
    Tensors,
    act,
    assert_matches,
    bias_of,
    case_id,
    normalise,
    pad,
    per_sample,
)

# n, channels, height, width, blocks, kernel, mode
SHAPES = [
    (1, 9, 2, 2, 1, 3, "reflect"),  # smallest that reflects
    (2, 10, 5, 7, 2, 3, "reflect"),  # odd, rectangular, two blocks: a skip that two layers read
    (1, 33, 5, 4, 1, 3, "zeros"),  # one channel over a block, several blocks of rows; StarGAN's padding
    (2, 4, 5, 6, 2, 3, "replicate"),  # few channels: rows that hold the columns of the kernel
    (1, 10, 6, 5, 1, 5, "reflect"),  # a wider kernel
    (1, 10, 3, 4, 1, 1, "zeros"),  # no padding at all
    (0, 10, 5, 7, 1, 3, "reflect"),  # empty batch
]
# for what does not depend on the size: a program's tile holds an image, two blocks of channels for a norm
ONE_BLOCK = (2, 9, 3, 4, 1, 3, "reflect")
TWO_BLOCKS = (2, 9, 3, 4, 2, 3, "reflect")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LISTS = ("weights", "biases", "norm_weights", "norm_biases")


def inputs(
    shape: tuple, dtype: torch.dtype, device: str, sets: int | None = None, affine: bool = False
) -> Tensors:
    n, c, h, w, blocks, k, _ = shape
    lead = () if sets is None else (sets,)
    tensors = {"x": torch.randn(n, c, h, w, device=device).to(dtype)}
    for i in range(2 * blocks):
        scale = (c * k * k) ** -0.5
        tensors[f"weights{i}"] = (scale * torch.randn(*lead, c, c, k, k, device=device)).to(dtype)
        if affine:
            for name in LISTS[1:]:
                tensors[f"{name}{i}"] = torch.randn(*lead, c, device=device).to(dtype)
    return tensors


def lists(tensors: Tensors) -> dict[str, list[Tensor]]:
    return {name: [t for k, t in tensors.items() if k.rstrip("0123456789") == name] for name in LISTS}


def functions(shape: tuple, norm: str = "instance", activation: str = "relu", sets: int = 1, **extra: object):
    """The op and the formula, of tensors by name; dropout masks are passed to the formula as `masks`."""
    *_, blocks, kernel, mode = shape
    masks = extra.pop("masks", [1] * blocks)

    def op(t: Tensors) -> Tensor:
        return residual_block(t["x"], **lists(t), padding_mode=mode, norm=norm, act=activation, **extra)

    def formula(t: Tensors) -> Tensor:
        def half(x: Tensor, i: int) -> Tensor:
            z = per_sample(pad(x, kernel // 2, mode), t[f"weights{i}"], F.conv2d)
            z = bias_of(t.get(f"biases{i}"), z)
            return normalise(z, norm, t.get(f"norm_weights{i}"), t.get(f"norm_biases{i}"), sets)

        y = t["x"]
        for block in range(blocks):
            y = y + half(act(half(y, 2 * block), activation) * masks[block], 2 * block + 1)
        return y

    return op, formula


@pytest.fixture(params=["triton", "cudnn"])
def implementation(request, monkeypatch):
    """Both candidates of the launch table, whatever was measured."""
    plain = request.param == "cudnn"
    monkeypatch.setattr(block_op, "_plain", lambda key, device: plain)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=case_id)
def test_matches_reference(shape, device):
    # float64: the only rounding is that of sums in another order
    tensors = inputs(shape, torch.float64, device)
    tensors["x"] = tensors["x"].contiguous(memory_format=LAYOUTS[shape[0] % 2])
    assert_matches(*functions(shape), tensors, 1e-11)


@pytest.mark.parametrize("norm", ["none", "instance", "batch"])
def test_affine(norm, implementation, device):
    shape = TWO_BLOCKS if norm == "instance" else ONE_BLOCK
    tensors = inputs(shape, torch.float64, device, affine=True)
    if norm == "none":
        tensors = {k: t for k, t in tensors.items() if not k.startswith("norm")}
    assert_matches(*functions(shape, norm, "leaky_relu"), tensors, 1e-11)


def test_single_precision(implementation, device):
    # sums of 81 float32 products, two convolutions deep; a GPU rounds the factors to tf32 (10 bits)
    tolerance = 5e-2 if device == "cuda" else 1e-4
    assert_matches(*functions(ONE_BLOCK), inputs(ONE_BLOCK, torch.float32, device), tolerance)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype, implementation, device):
    # each tensor between two convolutions is rounded; relu decides by the sign of one, hence tanh
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    tensors = inputs(ONE_BLOCK, dtype, device)
    assert_matches(*functions(ONE_BLOCK, activation="tanh"), tensors, tolerance)


@pytest.mark.parametrize("recompute", [False, True])
def test_weight_sets(recompute, implementation, device):
    # several samples of a set, or several blocks
    shape = TWO_BLOCKS if recompute else (4, *ONE_BLOCK[1:])
    tensors = inputs(shape, torch.float64, device, sets=2, affine=True)
    assert_matches(*functions(shape, sets=2, recompute=recompute), tensors, 1e-11)


def test_dropout(device):
    shape, p, seed = TWO_BLOCKS, 0.4, torch.tensor([11], device=device)
    # the first layer of block b draws with seed + 2 b
    masks = [keep_mask(seed + 2 * b, shape[:4], p) / (1 - p) for b in range(2)]
    tensors = inputs(shape, torch.float64, device)
    assert_matches(*functions(shape, dropout=p, seed=seed, masks=masks), tensors, 1e-11)


def test_running_statistics(device):
    tensors = inputs(TWO_BLOCKS, torch.float32, device)
    state = {
        name: [torch.full((9,), v, device=device) for _ in range(4)]
        for name, v in (("running_means", 0.0), ("running_vars", 1.0))
    }
    op, _ = functions(TWO_BLOCKS, "batch", **state)
    op(tensors)
    z = F.conv2d(pad(tensors["x"], 1, "reflect"), tensors["weights0"])
    norm = torch.nn.BatchNorm2d(9).to(device)
    norm(z)
    # a GPU may round the factors to tf32
    torch.testing.assert_close(state["running_means"][0], norm.running_mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state["running_vars"][0], norm.running_var, rtol=1e-3, atol=1e-3)
    # in eval mode they are given
    kept = [t.clone() for group in state.values() for t in group]
    y = functions(TWO_BLOCKS, "batch", training=False, **state)[0](tensors)
    x = tensors["x"]
    for i in (0, 2):
        h = x
        for j in (i, i + 1):
            h = F.conv2d(pad(h, 1, "reflect"), tensors[f"weights{j}"])
            h = F.batch_norm(h, state["running_means"][j], state["running_vars"][j])
            h = F.relu(h) if j == i else h
        x = x + h
    torch.testing.assert_close(y, x, rtol=0, atol=5e-2 if device == "cuda" else 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, (t for group in state.values() for t in group)))


def test_frozen_weights(device):
    """Only what is asked for: no weight gradients where the weights are frozen, the same dx."""
    op, _ = functions(ONE_BLOCK)
    tensors = inputs(ONE_BLOCK, torch.float64, device)
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    (expected, *_) = torch.autograd.grad(op(leaves).square().sum(), list(leaves.values()))
    x = tensors["x"].requires_grad_()
    (found,) = torch.autograd.grad(op({**tensors, "x": x}).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout, keep", [(torch.contiguous_format, "raw"), (torch.channels_last, "all")])
def test_registration(layout, keep, device):
    tensors = inputs(ONE_BLOCK, torch.float32, device, sets=1)
    x, *weights = (t.requires_grad_() for t in tensors.values())
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    layers = [
        Layer(False, 1, 1, 0, "reflect", "instance", activation, 0.2, 0.0, 1e-5, residual, False)
        for activation, residual in (("relu", NONE), ("none", 0))
    ]
    plan = Plan(tuple(layers), keep).text()
    torch.library.opcheck(
        torch.ops.fastgan.residual_block, (x, None, None, weights, [], [], [], [], [], plan)
    )


def test_no_graph_break(device):
    op, _ = functions(ONE_BLOCK)
    leaves = {k: t.requires_grad_() for k, t in inputs(ONE_BLOCK, torch.float32, device).items()}
    y = torch.compile(op, fullgraph=True, backend="aot_eager")(leaves)
    found = torch.autograd.grad(y.square().sum(), leaves["x"])[0]
    expected = torch.autograd.grad(op(leaves).square().sum(), leaves["x"])[0]
    torch.testing.assert_close(found, expected)


def test_autocast(device):
    dtype = HALVES[-1]
    op, formula = functions(ONE_BLOCK)
    tensors = inputs(ONE_BLOCK, torch.float32, device)
    with torch.autocast(device, dtype):
        y = op(tensors)
    assert y.dtype == dtype
    # bfloat16 keeps 8 bits of each factor, two convolutions deep
    torch.testing.assert_close(y.float(), formula(tensors), rtol=0, atol=0.2)


def test_non_contiguous(device):
    op, formula = functions(ONE_BLOCK)
    tensors = inputs(ONE_BLOCK, torch.float64, device)
    tensors["x"] = torch.randn(2, 9, 8, 6, dtype=torch.float64, device=device)[..., ::2].mT[..., ::2]
    torch.testing.assert_close(op(tensors), formula(tensors), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"weights": [torch.zeros(3, 3, 3, 3)]}, "weights must be two per block"),
        ({"weights": [torch.zeros(3, 3, 2, 2)] * 2}, "weights must be of an odd kernel"),
        (
            {"weights": [torch.zeros(4, 3, 3, 3), torch.zeros(5, 4, 3, 3)]},
            "weights must be back to 3 channels",
        ),
        ({"biases": [torch.zeros(3)]}, "biases must be 2, one per convolution"),
        ({"norm_weights": [torch.zeros(4)] * 2}, "norm_weights must be for 3 channels"),
        ({"padding_mode": "circular"}, "padding_mode must be one of"),
        ({"x": torch.zeros(3, 4, 4)}, "x must be"),
    ],
)
def test_bad_input(bad, message):
    arguments = {"x": torch.zeros(1, 3, 4, 4), "weights": [torch.zeros(3, 3, 3, 3)] * 2} | bad
    with pytest.raises(ValueError, match=f"^residual_block: {message}"):
        residual_block(**arguments)

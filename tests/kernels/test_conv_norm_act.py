import pytest
import torch
import torch.nn.functional as F
from fastgan_kernels import _block_op as block_op
from fastgan_kernels import conv_norm_act
from fastgan_kernels._block import NONE, Layer, Plan
from fastgan_kernels._op import runs_kernel
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

# n, channels, height, width, outputs, kernel, stride, padding, mode
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 0, "zeros"),  # smallest legal
    (2, 10, 5, 7, 12, 3, 1, 1, "reflect"),  # odd, rectangular; a residual convolution
    (2, 10, 5, 7, 12, 3, 1, 1, "replicate"),
    (1, 33, 9, 8, 65, 3, 1, 1, "zeros"),  # one channel over a block, inside and out; several blocks of rows
    (2, 9, 7, 6, 10, 3, 2, 1, "zeros"),  # stride 2 of a generator, one side odd
    (2, 9, 6, 9, 10, 4, 2, 1, "reflect"),  # stride 2 of a PatchGAN
    (2, 9, 7, 8, 10, 4, 1, 1, "zeros"),  # stride 1 of a PatchGAN
    (1, 3, 8, 6, 12, 7, 1, 3, "reflect"),  # few inputs: first layer of a ResNet
    (2, 6, 7, 8, 10, 4, 2, 1, "zeros"),  # few inputs, stride 2: first layer of a PatchGAN
    (1, 12, 8, 6, 3, 7, 1, 3, "reflect"),  # few outputs: last layer of a ResNet
    (1, 12, 6, 5, 1, 4, 1, 1, "zeros"),  # one output: last layer of a PatchGAN
    (0, 10, 5, 7, 12, 3, 1, 1, "reflect"),  # empty batch
    (2, 12, 5, 4, 10, 1, 2, 0, "zeros"),  # a kernel smaller than its stride: torch's convolution
]
# norm, affine, activation
TAILS = [
    ("none", False, "leaky_relu"),
    ("instance", False, "relu"),
    ("batch", True, "leaky_relu"),
    ("none", False, "tanh"),
]
# every shape with a norm, whose gradient needs all passes; the other tails where something differs for them
CASES = [(shape, TAILS[1]) for shape in SHAPES]
CASES += [(SHAPES[k], tail) for k in (0, 1, 7, 9, 11, 12) for tail in (TAILS[0], TAILS[2], TAILS[3])]
# for what does not depend on the size
SMALL = (2, 9, 3, 4, 10, 3, 1, 1, "reflect")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(shape: tuple, affine: bool, dtype: torch.dtype, device: str, sets: int | None = None) -> Tensors:
    n, c, h, w, o, k, *_ = shape
    lead = () if sets is None else (sets,)
    scale = (c * k * k) ** -0.5
    tensors = {
        "x": torch.randn(n, c, h, w, device=device).to(dtype),
        "weight": (scale * torch.randn(*lead, o, c, k, k, device=device)).to(dtype),
        "bias": torch.randn(*lead, o, device=device).to(dtype),
    }
    if affine:
        tensors["norm_weight"] = torch.randn(*lead, o, device=device).to(dtype)
        tensors["norm_bias"] = torch.randn(*lead, o, device=device).to(dtype)
    return tensors


def functions(shape: tuple, norm: str, activation: str, sets: int = 1, **extra: object):
    """The op and the formula, of tensors by name."""
    *_, stride, padding, mode = shape
    options = {"stride": stride, "padding": padding, "padding_mode": mode, "norm": norm, "act": activation}

    def op(t: Tensors) -> Tensor:
        return conv_norm_act(**t, **options, **extra)

    def formula(t: Tensors) -> Tensor:
        z = per_sample(pad(t["x"], padding, mode), t["weight"], lambda x, w: F.conv2d(x, w, stride=stride))
        z = normalise(bias_of(t["bias"], z), norm, t.get("norm_weight"), t.get("norm_bias"), sets)
        return act(z + t.get("residual", 0), activation)

    return op, formula


def laid_out(tensors: Tensors, layout: torch.memory_format) -> Tensors:
    return {**tensors, "x": tensors["x"].contiguous(memory_format=layout)}


@pytest.fixture(params=["triton", "cudnn"])
def implementation(request, monkeypatch):
    """Both candidates of the launch table, whatever was measured."""
    plain = request.param == "cudnn"
    monkeypatch.setattr(block_op, "_plain", lambda key, device: plain)
    return request.param


@pytest.mark.parametrize("shape, tail", CASES, ids=case_id)
def test_matches_reference(shape, tail, device):
    norm, affine, activation = tail
    # float64: the only rounding is that of sums in another order
    tensors = laid_out(inputs(shape, affine, torch.float64, device), LAYOUTS[shape[0] % 2])
    assert_matches(*functions(shape, norm, activation), tensors, 1e-11)


@pytest.mark.parametrize("shape", [SHAPES[k] for k in (1, 4, 9)])
def test_single_precision(shape, implementation, device):
    # sums of up to 490 float32 products; a GPU rounds the factors to tf32 (10 bits), and the norm's gradient
    # is a difference of such numbers
    tolerance = 2e-2 if device == "cuda" else 1e-4
    assert_matches(
        *functions(shape, "instance", "relu"), inputs(shape, False, torch.float32, device), tolerance
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [SHAPES[k] for k in (1, 4, 7)])
def test_half_precision(shape, dtype, implementation, device):
    # z and y are rounded once each, dz once more; relu decides by the sign of a rounded number, hence tanh
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert_matches(*functions(shape, "instance", "tanh"), inputs(shape, False, dtype, device), tolerance)


@pytest.mark.parametrize(
    "k, norm",
    [(1, "none"), (1, "instance"), (1, "batch"), (4, "instance"), (7, "instance"), (9, "none")],
)
def test_weight_sets(k, norm, implementation, device):
    shape = (4, *SHAPES[k][1:])
    tensors = inputs(shape, norm != "none", torch.float64, device, sets=2)
    assert_matches(*functions(shape, norm, "leaky_relu", sets=2), tensors, 1e-11)


@pytest.mark.parametrize(
    "norm, activation, recompute",
    [("instance", "relu", False), ("batch", "tanh", True), ("none", "leaky_relu", False)],
)
def test_residual(norm, activation, recompute, device):
    shape = SHAPES[1]
    tensors = inputs(shape, norm != "none", torch.float64, device)
    tensors["residual"] = torch.randn(2, 12, 5, 7, dtype=torch.float64, device=device)
    assert_matches(*functions(shape, norm, activation, recompute=recompute), tensors, 1e-11)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_dropout(norm, device):
    shape, p = SHAPES[1], 0.4
    seed = torch.tensor([7], device=device)
    op, formula = functions(shape, norm, "relu", dropout=p, seed=seed)
    tensors = inputs(shape, False, torch.float64, device)
    kept = op(tensors) != 0
    mask = keep_mask(seed, (2, 12, 5, 7), p)
    assert torch.equal(kept, mask & (formula(tensors) > 0))
    assert_matches(op, lambda t: formula(t) * mask / (1 - p), tensors, 1e-11)
    assert not torch.equal(functions(shape, norm, "relu", dropout=p, seed=seed + 1)[0](tensors) != 0, kept)


def test_drawn_dropout_follows_the_generator(device):
    op, _ = functions(SHAPES[1], "instance", "none", dropout=0.5)
    tensors = inputs(SHAPES[1], False, torch.float32, device)
    torch.manual_seed(3)
    first, second = op(tensors), op(tensors)
    torch.manual_seed(3)
    assert torch.equal(op(tensors), first)
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.parametrize("sets", [1, 2])
def test_running_statistics(sets, device):
    shape = (4, *SHAPES[1][1:])
    tensors = inputs(shape, True, torch.float32, device, sets=sets)
    norms = [torch.nn.BatchNorm2d(12, momentum=0.3).to(device) for _ in range(sets)]
    mean, var = (torch.stack([getattr(n, f"running_{k}") for n in norms]) for k in ("mean", "var"))
    op, _ = functions(shape, "batch", "none", running_mean=mean, running_var=var, momentum=0.3)
    z = per_sample(pad(tensors["x"], 1, "reflect"), tensors["weight"], F.conv2d)
    z = bias_of(tensors["bias"], z)
    for _ in range(2):
        op(tensors)
        for part, norm in zip(z.chunk(sets), norms):
            norm(part)
    # a GPU may round the factors to tf32
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if device == "cuda" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mean, torch.stack([n.running_mean for n in norms]), **tolerance)
    torch.testing.assert_close(var, torch.stack([n.running_var for n in norms]), **tolerance)


def test_given_statistics(implementation, device):
    shape = SHAPES[1]
    tensors = inputs(shape, True, torch.float64, device)
    mean, var = torch.randn(12, device=device), torch.rand(12, device=device) + 0.5
    kept = mean.clone(), var.clone()
    op, _ = functions(shape, "batch", "relu", running_mean=mean, running_var=var, training=False)

    def formula(t: Tensors) -> Tensor:
        z = bias_of(t["bias"], F.conv2d(pad(t["x"], 1, "reflect"), t["weight"]))
        scale = t["norm_weight"] / (var.double() + 1e-5).sqrt()
        return F.relu(
            (z - mean.double().view(-1, 1, 1)) * scale.view(-1, 1, 1) + t["norm_bias"].view(-1, 1, 1)
        )

    assert_matches(op, formula, tensors, 1e-11)
    assert torch.equal(mean, kept[0])
    assert torch.equal(var, kept[1])


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_gradient_penalty(norm, device):
    """The second order as WGAN-GP uses it: the parameters' gradient of a norm of the input gradient."""
    shape = SHAPES[8]
    op, formula = functions(shape, norm, "leaky_relu")
    tensors, grads = inputs(shape, False, torch.float64, device), []
    for function in (op, formula):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        (dx,) = torch.autograd.grad(function(leaves).square().sum(), leaves["x"], create_graph=True)
        penalty = (dx.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
        grads.append(torch.autograd.grad(penalty, leaves["weight"])[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "norm, layout, keep",
    [
        ("none", torch.contiguous_format, "all"),
        ("instance", torch.channels_last, "raw"),
        ("batch", torch.contiguous_format, "raw"),
    ],
)
def test_registration(norm, layout, keep, device):
    tensors = laid_out(inputs(SMALL, norm != "none", torch.float32, device, sets=1), layout)
    x, weight, bias, *affine = (t.detach().requires_grad_() for t in tensors.values())
    lists = [[weight], [bias], *([a] for a in affine)] + [[]] * (4 - len(affine))
    layer = Layer(False, 1, 1, 0, "reflect", norm, "relu", 0.2, 0.0, 1e-5, NONE, False)
    plan = Plan((layer,), keep).text()
    torch.library.opcheck(torch.ops.fastgan.conv_norm_act, (x, None, None, *lists, plan))


def test_non_contiguous(device):
    op, formula = functions(SHAPES[1], "instance", "relu")
    tensors = inputs(SHAPES[1], False, torch.float64, device)
    wide = torch.randn(2, 10, 7, 15, dtype=torch.float64, device=device)[..., ::2, 1:15:2].mT
    assert not wide.is_contiguous()
    tensors["weight"] = tensors["weight"].mT
    found = op({**tensors, "x": wide})
    torch.testing.assert_close(found, formula({**tensors, "x": wide}), rtol=0, atol=1e-11)
    y = op(tensors)
    (scalar,) = torch.autograd.grad(op(t := {**tensors, "x": tensors["x"].requires_grad_()}).sum(), t["x"])
    assert scalar.shape == tensors["x"].shape
    assert y.is_contiguous()


@pytest.mark.parametrize("sets", [1, 2])
def test_no_graph_break(sets, device):
    op, _ = functions(SMALL, "instance", "relu")
    tensors = inputs(SMALL, False, torch.float32, device, sets=sets)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    y = compiled(leaves)
    found = torch.autograd.grad(y.square().sum(), leaves["x"])[0]
    expected = torch.autograd.grad(op(leaves).square().sum(), leaves["x"])[0]
    torch.testing.assert_close(found, expected)


def test_autocast(device):
    dtype = HALVES[-1]
    op, formula = functions(SHAPES[1], "instance", "relu")
    tensors = inputs(SHAPES[1], False, torch.float32, device)
    x = tensors["x"].requires_grad_()
    with torch.autocast(device, dtype):
        y = op(tensors)
    assert y.dtype == dtype
    # bfloat16 keeps 8 bits of each factor
    torch.testing.assert_close(y.float(), formula(tensors), rtol=0, atol=0.1)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32


def test_same_result_twice(device):
    """No atomics: bitwise the same."""
    op, _ = functions(SHAPES[4], "instance", "relu")
    leaves = {k: t.requires_grad_() for k, t in inputs(SHAPES[4], False, torch.float32, device).items()}
    runs = []
    for _ in range(2):
        y = op(leaves)
        runs.append([y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_nothing_is_kept_without_gradients(device, monkeypatch):
    tensors = inputs(SHAPES[1], False, torch.float32, device, sets=1)
    if not runs_kernel(tensors["x"]):
        pytest.skip("the reference keeps what torch keeps")
    seen = []
    run = block_op._block.forward
    monkeypatch.setattr(block_op._block, "forward", lambda r: seen.append(r.plan.keep) or run(r))
    op, _ = functions(SHAPES[1], "instance", "relu")
    op(tensors)
    functions(SHAPES[1], "instance", "relu", recompute=True)[0](
        {**tensors, "x": tensors["x"].requires_grad_()}
    )
    with torch.no_grad():
        op(tensors)
    assert seen == ["none", "raw", "none"]


BAD = {
    "x must be": {"x": torch.zeros(3, 4, 4)},
    "x must be float": {"x": torch.zeros(1, 3, 4, 4, dtype=torch.int64)},
    "weight must be of 4": {"weight": torch.zeros(5, 3, 3)},
    "weight must be square": {"weight": torch.zeros(5, 3, 3, 1)},
    "weight must be for 3 input channels": {"weight": torch.zeros(5, 4, 3, 3)},
    "that 2 weight sets can share": {"weight": torch.zeros(2, 5, 3, 3, 3)},
    "bias must be for 5": {"bias": torch.zeros(4)},
    "norm_weight must be for 5": {"norm_weight": torch.zeros(2), "norm": "instance"},
    "stride must be 1 or 2": {"stride": 3},
    "padding must be an int": {"padding": -1},
    "padding must be below the size 4x4": {"padding": 4, "padding_mode": "reflect"},
    "padding_mode must be one of": {"padding_mode": "circular"},
    "norm must be one of": {"norm": "layer"},
    "act must be one of": {"act": "gelu"},
    "slope must be >= 0": {"slope": -0.1},
    "eps must be > 0": {"eps": 0.0},
    "dropout must be in": {"dropout": 1.0},
    "dropout must be 0 with a residual": {"dropout": 0.5, "residual": torch.zeros(1, 5, 2, 2)},
    "residual must be of shape": {"residual": torch.zeros(1, 5, 4, 4)},
    "seed must be": {"dropout": 0.5, "seed": torch.zeros(2)},
    "at least as large, padded, as the kernel": {"x": torch.zeros(1, 3, 2, 2)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    arguments = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(5, 3, 3, 3)} | BAD[message]
    with pytest.raises(ValueError, match=f"^conv_norm_act: .*{message}"):
        conv_norm_act(**arguments)

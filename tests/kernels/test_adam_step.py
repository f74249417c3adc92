import importlib
import math

import pytest
import torch
from fastgan_kernels import adam_step
from fastgan_kernels._op import INTERPRET, runs_kernel
from torch import Tensor

# the package names the function like its module
module = importlib.import_module("fastgan_kernels.adam_step")

# one element, a whole block, an odd one of more than a block, nothing at all, an image, a scalar
SHAPES = [(1,), (2, 1024), (3, 701), (0, 4), (2, 3, 4, 5), ()]
BETAS, EPS, LR = (0.5, 0.999), 1e-8, 2e-4
State = dict[str, list[Tensor]]


def state(
    shapes: list[tuple[int, ...]],
    device: str,
    dtype: torch.dtype = torch.float32,
    copy: torch.dtype | None = None,
) -> State:
    params = [torch.randn(s, device=device).to(dtype) for s in shapes]
    params = [p.contiguous(memory_format=torch.channels_last) if p.dim() == 4 else p for p in params]
    made: State = {"params": params, "steps": [torch.zeros((), device=device) for _ in params]}
    made |= {name: [torch.zeros_like(p) for p in params] for name in ("exp_avgs", "exp_avg_sqs")}
    return made | {"copies": [torch.empty_like(p, dtype=copy) for p in params] if copy else []}


def update(s: State, grads: list[Tensor], lr: float = LR, betas: tuple[float, float] = BETAS) -> None:
    rate = torch.full((), lr, dtype=torch.float64, device=s["steps"][0].device)
    lists = [s["exp_avgs"], s["exp_avg_sqs"], s["steps"]]
    adam_step(s["params"], grads, *lists, rate, betas=betas, eps=EPS, copies=s["copies"])


def exact(p: Tensor, grads: list[Tensor], lr: float = LR, betas: tuple[float, float] = BETAS) -> list[Tensor]:
    """Parameter and moments in float64 after the updates with these gradients, by the formula."""
    p, m, v = p.double(), torch.zeros_like(p.double()), torch.zeros_like(p.double())
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
        p = p - lr * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + EPS)
    return [p, m, v]


def check(s: State, before: list[Tensor], grads: list[list[Tensor]], tolerance: float, **options) -> None:
    for i, p in enumerate(before):
        for name, wanted in zip(
            ("params", "exp_avgs", "exp_avg_sqs"), exact(p, [g[i] for g in grads], **options)
        ):
            # a few roundings of numbers of size 1; an update is of size 2e-4
            torch.testing.assert_close(s[name][i].double(), wanted, rtol=tolerance, atol=tolerance)
        assert s["steps"][i].item() == len(grads)


@pytest.mark.parametrize(
    "dtype, grad, tolerance",
    [
        (torch.float32, torch.float32, 2.5e-7),
        (torch.float32, torch.bfloat16, 2.5e-7),
        (torch.float64, torch.float64, 1e-14),
    ],
)
def test_matches_reference(dtype, grad, tolerance, device):
    s = state(SHAPES, device, dtype)
    before = [p.clone() for p in s["params"]]
    # of unequal size, so that no factor cancels
    grads = [[(k * torch.randn(p.shape, device=device)).to(grad) for p in before] for k in (1, 10, 0.1)]
    for given in grads:
        update(s, given)
    check(s, before, grads, tolerance)


@pytest.mark.parametrize("betas", [(0.0, 0.9), (0.9, 0.0)])
def test_without_a_moment(betas, device):
    s = state([(5,)], device)
    before, grads = [s["params"][0].clone()], [[torch.randn(5, device=device)] for _ in range(2)]
    for given in grads:
        update(s, given, betas=betas)
    check(s, before, grads, 2.5e-7, betas=betas)


def test_many_parameters(device):
    # more than the table kernel takes at once; every one has an update, a step and a copy of its own
    s = state([(n % 3,) for n in range(70)], device, copy=torch.float32)
    s["steps"] = [torch.full((), float(n), device=device) for n in range(70)]
    before = [p.clone() for p in s["params"]]
    update(s, [torch.full_like(p, n + 1.0) for n, p in enumerate(before)])
    for n, (p, old) in enumerate(zip(s["params"], before)):
        corrections = (1 - BETAS[0]) / (1 - BETAS[0] ** (n + 1)), (1 - BETAS[1]) / (1 - BETAS[1] ** (n + 1))
        wanted = old.double() - LR * corrections[0] / math.sqrt(corrections[1])
        torch.testing.assert_close(p.double(), wanted, rtol=0, atol=2.5e-7)
        assert s["steps"][n].item() == n + 1 and torch.equal(s["copies"][n], p)


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_copies(copy, device):
    s = state([(3, 701), (2, 3, 4, 5)], device, copy=copy)
    update(s, [torch.randn_like(p) for p in s["params"]])
    for p, c in zip(s["params"], s["copies"]):
        if INTERPRET and copy == torch.bfloat16:
            # the interpreter rounds towards zero
            torch.testing.assert_close(c.float(), p, rtol=2**-7, atol=0)
        else:
            assert torch.equal(c, p.to(copy))


def test_gradients_in_another_layout(device):
    shape = (2, 3, 4, 5)
    s, same = state([shape], device), state([shape], device)
    same["params"] = [s["params"][0].clone()]
    g = torch.randn(shape, device=device)
    update(s, [g])
    update(same, [g.contiguous(memory_format=torch.channels_last)])
    assert torch.equal(s["params"][0], same["params"][0])
    other = g.expand(4, *shape)[1]
    update(s, [other.transpose(2, 3).contiguous().transpose(2, 3)])
    update(same, [g.contiguous(memory_format=torch.channels_last)])
    assert torch.equal(s["params"][0], same["params"][0])


def test_views_that_begin_anywhere(device):
    # 12 bytes behind the 16 that a vector of four begins at
    whole = torch.rand(4, 4100, device=device)
    s: State = {"params": [whole[0, 3:]], "exp_avgs": [whole[1, 3:]], "exp_avg_sqs": [whole[2, 3:]]}
    s |= {"copies": [], "steps": [torch.zeros((), device=device)]}
    other = {name: [t.clone() for t in tensors] for name, tensors in s.items()}
    before, grad = whole[:, :3].clone(), whole[3, 3:]
    update(s, [grad])
    update(other, [grad.clone()])
    assert torch.equal(s["params"][0], other["params"][0])
    assert torch.equal(whole[:, :3], before)


def test_what_lies_beside_a_parameter_stays(device):
    wholes = [torch.ones(3, 2, device=device) for _ in range(5)]
    p, g, m, v, c = ([whole[1]] for whole in wholes)
    s: State = {"params": p, "exp_avgs": m, "exp_avg_sqs": v, "copies": c}
    update(s | {"steps": [torch.zeros((), device=device)]}, [2 * g[0]])
    for whole in wholes:
        assert (whole[::2] == 1).all()
    assert all((part[0] != 1).all() for part in (p, m, v, c))


@pytest.mark.parametrize("copy", [None, torch.float16])
def test_registration(copy, device):
    s = state([(3,), (2, 3, 2, 2)], device, copy=copy)
    grads = [torch.randn_like(p) for p in s["params"]]
    lists = [s["params"], grads, s["exp_avgs"], s["exp_avg_sqs"], s["steps"], s["copies"]]
    arguments = (*lists, torch.tensor(LR, device=device), *BETAS, EPS)
    torch.library.opcheck(torch.ops.fastgan.adam_step.default, arguments)


def test_runs_the_kernel(device, monkeypatch):
    s = state([(2, 3)], device)
    if not runs_kernel(s["params"][0]):
        pytest.skip("the CPU outside the interpreter runs the reference")
    monkeypatch.delattr(module, "reference")
    before = s["params"][0].clone()
    update(s, [torch.ones(2, 3, device=device)])
    torch.testing.assert_close(s["params"][0], before - LR, rtol=0, atol=2.5e-7)


def test_the_learning_rate_is_a_tensor(device):
    s = state([(4,)], device)
    before, rate = s["params"][0].clone(), torch.zeros((), device=device)
    for lr, wanted in ((0.0, before), (LR, before - LR)):
        rate.fill_(lr)
        lists = [s[key] for key in ("params", "exp_avgs", "exp_avg_sqs", "steps")]
        adam_step(lists[0], [torch.ones(4, device=device)], *lists[1:], rate)
        torch.testing.assert_close(s["params"][0], wanted, rtol=0, atol=2.5e-7)


def test_no_parameters():
    adam_step([], [], [], [], [], torch.tensor(LR))


BAD = [
    ("grads", lambda s: [], "grads must be 2 tensors, got 0"),
    (
        "params",
        lambda s: [p.half() for p in s["params"]],
        "params must be float32 or float64, got torch.float16",
    ),
    ("exp_avgs", lambda s: [t.double() for t in s["exp_avgs"]], "exp_avgs must be all torch.float32, got"),
    (
        "grads",
        lambda s: [torch.zeros(3), torch.zeros(2, 3, 2, 2).half()],
        "grads must be all torch.float32, got",
    ),
    ("grads", lambda s: [torch.zeros(3), torch.zeros(2, 3)], r"of the shape \(2, 3, 2, 2\), got \(2, 3\)"),
    ("steps", lambda s: [torch.zeros(2)] * 2, r"steps must be of one element, got shape \(2,\)"),
    (
        "exp_avg_sqs",
        lambda s: [t.contiguous() for t in s["params"]],
        "exp_avg_sqs must be dense, in the layout",
    ),
    ("params", lambda s: [torch.zeros(6)[::2], s["params"][1]], "params must be dense, in the layout"),
    (
        "copies",
        lambda s: [torch.zeros(3, dtype=torch.int8)] * 2,
        "copies must be floating point, got torch.int8",
    ),
]


@pytest.mark.parametrize("name, made, message", BAD)
def test_bad_input(name, made, message, device):
    s = state([(3,), (2, 3, 2, 2)], "cpu")
    grads = [torch.zeros_like(p) for p in s["params"]]
    s |= {"grads": grads} | {name: made(s)}
    with pytest.raises(ValueError, match=f"adam_step: .*{message}"):
        lists = [s[key] for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
        adam_step(*lists, torch.tensor(LR), copies=s["copies"])

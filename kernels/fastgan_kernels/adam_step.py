"""One step of Adam on all parameters of an optimiser, in place, which also writes half-precision copies.

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps),   copy = p in the copy's dtype

torch.optim.Adam(fused=True) without weight decay (D. P. Kingma and J. Ba, arXiv 1412.6980, algorithm 1).
Not differentiable. The op works in place, because that is what an optimiser is for.

One launch updates all parameters. Before it, a launch of one program per 64 parameters writes the table that
it reads: addresses and sizes, handed over by value, and the factors of the step number. So nothing is copied
from the host, nothing waits, and a captured CUDA graph holds the addresses itself. Learning rate and step
numbers are tensors, so a graph may be replayed with other ones.

Bytes per parameter, all of them once: read p, g, m, v and write p, m, v: 28 in float32; 26 with gradients in
bfloat16; a copy in bfloat16 adds 2 and saves the cast of the next forward pass, 4 read and 2 written.
Prediction for the 57.2 M parameters of pix2pix at 4.3 TB/s, gradients in float32: 1.60 GB and 0.37 ms without
a copy, 1.72 GB and 0.40 ms with it, against 1.94 GB and 0.45 ms for update and cast. Not measured on a GPU.
Layout: any dense one; the update walks in memory order.
"""
# mypy: disable-error-code="no-untyped-def"
# (only the kernels: Triton reads their annotations)

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._op import FLOATS, require, runs_kernel, tl, triton
from ._pointwise import accumulator
from ._tune import ceil_div, power_of_two

# elements of a program, and parameters of a launch that writes the table
BLOCK = 2048
SEGMENT = 64
# values per parameter: the seven rows of the table, and where the step number lies
ROWS = 7


def adam_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    copies: Sequence[Tensor] = (),
) -> None:
    """Updates parameters, their two moments and step numbers in place, and overwrites the copies.

    params, exp_avgs, exp_avg_sqs: of one shape and layout each, dense, all float32 or all float64.
    grads: of the shape of params, one dtype; in another layout they are first brought to that of params.
    steps: of one element, float32, updates done so far. lr: of one element, float32 or float64.
    copies: empty, or of the shape and layout of params, in one floating-point dtype.
    Raises ValueError for lists of unequal length, other dtypes, shapes or layouts.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    lists |= {"copies": copies} if copies else {}
    for name, tensors in lists.items():
        require(len(tensors) == len(params), "adam_step", name, f"{len(params)} tensors", len(tensors))
    if not params:
        return
    dtype = params[0].dtype
    require(dtype in (torch.float32, torch.float64), "adam_step", "params", "float32 or float64", dtype)
    dtypes = {"params": dtype, "exp_avgs": dtype, "exp_avg_sqs": dtype, "steps": torch.float32}
    for name, tensors in {"params": params, **lists}.items():
        wanted = dtypes.get(name, tensors[0].dtype)
        require(wanted in FLOATS, "adam_step", name, "floating point", wanted)
        for p, t in zip(params, tensors):
            require(t.dtype == wanted, "adam_step", name, f"all {wanted}", t.dtype)
            if name == "steps":
                require(t.numel() == 1, "adam_step", name, "of one element", f"shape {tuple(t.shape)}")
                continue
            shape = tuple(p.shape)
            require(t.shape == shape, "adam_step", name, f"of the shape {shape}", tuple(t.shape))
            right = _dense(t) if t is p else name == "grads" or _same_layout(t, p)
            require(
                right, "adam_step", name, "dense, in the layout of its parameter", f"strides {t.stride()}"
            )
    require(lr.numel() == 1, "adam_step", "lr", "of one element", f"shape {tuple(lr.shape)}")
    grads = [g if _same_layout(g, p) else _relaid(g, p) for p, g in zip(params, grads)]
    torch.ops.fastgan.adam_step.default(
        list(params), grads, list(exp_avgs), list(exp_avg_sqs), list(steps), list(copies), lr, *betas, eps
    )


def _dense(x: Tensor) -> bool:
    """Whether the elements fill one piece of memory, each in a place of its own."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(x.shape, x.stride()) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape lie in the same memory order; the strides of size 1 say nothing."""
    return x.stride() == y.stride() or all(
        a == b for n, a, b in zip(x.shape, x.stride(), y.stride()) if n > 1
    )


def _relaid(g: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(p, dtype=g.dtype).copy_(g)


def reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    torch._foreach_add_(steps, 1)
    grads = [g.to(p.dtype) for g, p in zip(grads, params)]
    torch._fused_adam_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.0,
        eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if copies:
        torch._foreach_copy_(copies, params)


@triton.jit
def _vector(values, first: tl.constexpr, COUNT: tl.constexpr):
    # COUNT of the numbers handed over by value, as a tensor
    lane = tl.arange(0, COUNT)
    out = tl.zeros((COUNT,), tl.int64)
    for i in tl.static_range(COUNT):
        out = tl.where(lane == i, values[first + i], out)
    return out


@triton.jit
def _adam_step_table_kernel(
    table_ptr, factors_ptr, lr_ptr, values, first, count,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    # of the parameters first ... first + COUNT of `count`
    lane = tl.arange(0, COUNT)
    place = first + lane
    mask = place < count
    for row in tl.static_range(ROWS):
        tl.store(table_ptr + row * count + place, _vector(values, row * COUNT, COUNT), mask=mask)
    step_ptr = _vector(values, ROWS * COUNT, COUNT).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=mask, other=0.0) + 1
    tl.store(step_ptr, step, mask=mask)
    # 1 - beta^t loses its digits where beta is near 1
    t = step.to(tl.float64)
    size = tl.load(lr_ptr).to(tl.float64) / (1 - tl.exp(t * LOG_BETA1))
    scale = tl.sqrt(1 - tl.exp(t * LOG_BETA2))
    tl.store(factors_ptr + place, size.to(factors_ptr.dtype.element_ty), mask=mask)
    tl.store(factors_ptr + count + place, scale.to(factors_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _at(table_ptr, entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + entry).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, size, scale, mask, BETA1, BETA2, EPS, HAS_COPY: tl.constexpr):
    g = tl.load(g_ptr, mask=mask).to(p_ptr.dtype.element_ty)
    m = BETA1 * tl.load(m_ptr, mask=mask) + (1 - BETA1) * g
    v = BETA2 * tl.load(v_ptr, mask=mask) + (1 - BETA2) * g * g
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    p = tl.load(p_ptr, mask=mask) - size * m / (tl.sqrt(v) / scale + EPS)
    tl.store(p_ptr, p, mask=mask)
    if HAS_COPY:
        tl.store(c_ptr, p.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adam_step_update_kernel(
    table_ptr, factors_ptr, count,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, P_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    COPY_TYPE: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the parameter is the last one that begins at this program or before it
    lane = tl.arange(0, COUNT)
    begin = tl.load(table_ptr + lane, mask=lane < count, other=1 << 62)
    entry = tl.sum((begin <= tl.program_id(0)).to(tl.int32), 0) - 1
    first = (tl.program_id(0) - tl.load(table_ptr + entry)) * BLOCK
    left = tl.load(table_ptr + count + entry) - first
    place = tl.arange(0, BLOCK)
    p_ptr = _at(table_ptr, 2 * count + entry, P_TYPE, ALIGNED) + first + place
    g_ptr = _at(table_ptr, 3 * count + entry, G_TYPE, ALIGNED) + first + place
    m_ptr = _at(table_ptr, 4 * count + entry, P_TYPE, ALIGNED) + first + place
    v_ptr = _at(table_ptr, 5 * count + entry, P_TYPE, ALIGNED) + first + place
    HAS_COPY: tl.constexpr = COPY_TYPE is not None
    c_ptr = p_ptr
    if HAS_COPY:
        c_ptr = _at(table_ptr, 6 * count + entry, COPY_TYPE, ALIGNED) + first + place
    size, scale = tl.load(factors_ptr + entry), tl.load(factors_ptr + count + entry)
    if left >= BLOCK:
        # without a mask, so that accesses are vectors
        _update(p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, size, scale, None, BETA1, BETA2, EPS, HAS_COPY)
    else:
        _update(p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, size, scale, place < left, BETA1, BETA2, EPS, HAS_COPY)


@torch.library.custom_op(
    "fastgan::adam_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "copies")
)
def _forward(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    if not runs_kernel(params[0]):
        reference(params, grads, exp_avgs, exp_avg_sqs, steps, copies, lr, beta1, beta2, eps)
        return
    count, begins = len(params), [0]
    for p in params:
        begins.append(begins[-1] + ceil_div(p.numel(), BLOCK))
    columns = [params, grads, exp_avgs, exp_avg_sqs, copies or [], steps]
    addresses = [[t.data_ptr() for t in tensors] or [0] * count for tensors in columns]
    values = [begins[:-1], [p.numel() for p in params], *addresses]
    device, segment = params[0].device, min(SEGMENT, power_of_two(count))
    table = torch.empty((ROWS, count), dtype=torch.int64, device=device)
    factors = torch.empty((2, count), dtype=accumulator(params[0].dtype), device=device)
    with torch.cuda.device_of(params[0]):
        for first in range(0, count, segment):
            given = [row[first : first + segment] for row in values]
            flat = tuple(x for row in given for x in row + [0] * (segment - len(row)))
            _adam_step_table_kernel[(1,)](
                table, factors, lr, flat, first, count,
                LOG_BETA1=_log(beta1), LOG_BETA2=_log(beta2), ROWS=ROWS, COUNT=segment,
            )  # fmt: skip
        if begins[-1]:
            _adam_step_update_kernel[(begins[-1],)](
                table, factors, count, BETA1=beta1, BETA2=beta2, EPS=eps, P_TYPE=_type(params[0]),
                G_TYPE=_type(grads[0]), COPY_TYPE=_type(copies[0]) if copies else None,
                ALIGNED=all(a % 16 == 0 for row in addresses[:-1] for a in row),
                COUNT=power_of_two(count), BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip


@_forward.register_fake
def _forward_fake(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    return None


def _log(beta: float) -> float:
    # exp of t times this is 0 from the first step on
    return math.log(beta) if beta > 0 else -1e6


def _type(x: Tensor) -> object:
    return getattr(tl, str(x.dtype).removeprefix("torch."))

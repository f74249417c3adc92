"""Registers an op made of layers (`_block`) with torch: forward, backward, fakes and autograd.

Each op is torch.ops.fastgan.<name>(x, residual, seed, weights, biases, norm_weights, norm_biases, means,
variances, plan) -> [y, saved ...], and <name>_backward. Second order: the gradient of the backward op is that
of the reference, differentiated twice by torch; any order works.
"""

from typing import Any

import torch
from torch import Tensor

from . import _block
from ._block import Parameters, Plan, Run, Saved, parse
from ._block_op import reference
from ._op import layout, runs_kernel
from ._pointwise import accumulator


def register(name: str) -> None:
    """Defines the op fastgan::<op> and fastgan::<op>_backward."""

    def forward(
        x: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        norm_weights: list[Tensor],
        norm_biases: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        plan: str,
    ) -> list[Tensor]:
        parameters = Parameters(weights, biases, norm_weights, norm_biases, means, variances)
        if not runs_kernel(x):
            y = reference(x, residual, seed, parameters, parse(plan))
            return [y.contiguous(memory_format=layout(x)).clone()]
        run = Run(x, residual, seed, parameters, parse(plan))
        with torch.cuda.device_of(x):
            return _block.forward(run).flat()

    def forward_fake(
        x: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        norm_weights: list[Tensor],
        norm_biases: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        plan: str,
    ) -> list[Tensor]:
        parameters = Parameters(weights, biases, norm_weights, norm_biases, means, variances)
        run = Run(x, residual, seed, parameters, parse(plan))
        image = run.image(len(weights) - 1)
        size = (len(x), image.channels, image.height, image.width)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout(x))
        return _saved_fake(run, y) if runs_kernel(x) else [y]

    def backward(
        dy: Tensor,
        x: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        norm_weights: list[Tensor],
        norm_biases: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        saved: list[Tensor],
        plan: str,
        needs_x: bool,
        needs_parameters: bool,
    ) -> list[Tensor]:
        parameters = Parameters(weights, biases, norm_weights, norm_biases, means, variances)
        if not runs_kernel(x):
            outputs = _gradients_fake(x, residual, parameters, parse(plan), needs_x, needs_parameters)
            found = _reference_gradients(dy, x, residual, seed, parameters, parse(plan))
            return [o.copy_(f) if o.shape == f.shape else o for o, f in zip(outputs, found)]
        run = Run(x, residual, seed, parameters, parse(plan))
        with torch.cuda.device_of(x):
            grads = _block.backward(run, Saved.of(saved, len(weights)), dy, needs_x, needs_parameters)
        return grads.flat()

    def backward_fake(
        dy: Tensor,
        x: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        weights: list[Tensor],
        biases: list[Tensor],
        norm_weights: list[Tensor],
        norm_biases: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        saved: list[Tensor],
        plan: str,
        needs_x: bool,
        needs_parameters: bool,
    ) -> list[Tensor]:
        parameters = Parameters(weights, biases, norm_weights, norm_biases, means, variances)
        return _gradients_fake(x, residual, parameters, parse(plan), needs_x, needs_parameters)

    forward_op = torch.library.custom_op(name, forward, mutates_args=())
    forward_op.register_fake(forward_fake)
    backward_op = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())
    backward_op.register_fake(backward_fake)
    overload = getattr(torch.ops.fastgan, f"{name.removeprefix('fastgan::')}_backward").default

    def forward_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        x, residual, seed, *rest = ctx.saved_tensors
        rest, saved = rest[: sum(ctx.lengths)], rest[sum(ctx.lengths) :]
        lists = _split(rest, ctx.lengths)
        needs = ctx.needs_input_grad
        needs_parameters = any(any(need) for need in needs[3:7])
        found = overload(grads[0], x, residual, seed, *lists, saved, ctx.plan, needs[0], needs_parameters)
        dx, dresidual, *rest = found
        parts: list[Any] = _split(rest, ctx.lengths[:4])
        if not needs_parameters:
            parts = [[None] * len(part) for part in parts]
        nothing = [[None] * length for length in ctx.lengths[4:]]
        return (
            dx if needs[0] else None,
            None if residual is None else dresidual,
            None,
            *parts,
            *nothing,
            None,
        )

    forward_op.register_autograd(forward_gradient, setup_context=_setup_forward)
    backward_op.register_autograd(_backward_gradient, setup_context=_setup_backward)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, residual, seed, *lists, ctx.plan = inputs
    ctx.lengths = [len(part) for part in lists]
    ctx.mark_non_differentiable(*output[1:])
    y, *saved = output
    if not parse(ctx.plan).needs_output:
        # not kept, so that what follows may work in place on it
        y = x.new_empty(0)
    ctx.save_for_backward(x, residual, seed, *(t for part in lists for t in part), y, *saved)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    dy, x, residual, seed, *lists, saved, ctx.plan, _, _ = inputs
    ctx.lengths, ctx.saved_count = [len(part) for part in lists], len(saved)
    # the saved tensors are functions of the others, through which the second order goes
    ctx.save_for_backward(dy, x, residual, seed, *(t for part in lists for t in part))


def _backward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    dy, x, residual, seed, *rest = ctx.saved_tensors
    *learned, means, variances = _split(rest, ctx.lengths)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # fresh nodes: the gradient stops here and does not run on through dy, which may depend on x
        inputs = [x, residual, *(t for part in learned for t in part)]
        fresh: list[Any] = [t if t is None else t.view_as(t).requires_grad_() for t in (dy, *inputs)]
        dy, *inputs = fresh
        y = _evaluate(inputs, seed, means, variances, parse(ctx.plan), ctx.lengths)
        given: list[Any] = [t for t in inputs if t is not None]
        first_order = torch.autograd.grad(y, given, dy, create_graph=True, allow_unused=True)
    outputs = iter(first_order)
    filled = [None if t is None else next(outputs) for t in inputs]
    # nobody asked for an output whose gradient is empty
    pairs = [
        (o, g) for o, g in zip(filled, grads) if o is not None and o.requires_grad and o.shape == g.shape
    ]
    wanted = [dy, *given]
    found: Any = [None] * len(wanted)
    if pairs:
        first, second = zip(*pairs)
        found = torch.autograd.grad(first, wanted, second, create_graph=create_graph, allow_unused=True)
    place = iter(found)
    ddy, ddx, ddresidual, *dlists = (None if t is None else next(place) for t in fresh)
    parts: list[Any] = _split(dlists, ctx.lengths[:4])
    nothing = [[None] * length for length in (*ctx.lengths[4:], ctx.saved_count)]
    return ddy, ddx, ddresidual, None, *parts, *nothing, None, None, None


def _evaluate(
    learned: list[Any], seed: Tensor | None, means: Any, variances: Any, plan: Plan, lengths: list[int]
) -> Tensor:
    """The reference of (x, residual, then the four lists of learned tensors in a row)."""
    x, residual, *rest = learned
    weights, biases, norm_weights, norm_biases = _split(rest, lengths[:4])
    parameters = Parameters(weights, biases, norm_weights, norm_biases, means, variances)
    return reference(x, residual, seed, parameters, plan)


def _reference_gradients(
    dy: Tensor, x: Tensor, residual: Tensor | None, seed: Tensor | None, parameters: Parameters, plan: Plan
) -> list[Tensor]:
    learned = [x, residual, *(t for part in parameters.learned() for t in part)]
    given, lengths = [t for t in learned if t is not None], _lengths(parameters)

    def function(*values: Tensor) -> Tensor:
        value = iter(values)
        filled = [None if t is None else next(value) for t in learned]
        return _evaluate(filled, seed, parameters.means, parameters.variances, plan, lengths)

    # inside an op autograd is off; functorch's is not
    found = iter(torch.func.vjp(function, *given)[1](dy))
    return [x.new_empty(0) if t is None else next(found) for t in learned]


def _lengths(parameters: Parameters) -> list[int]:
    return [len(part) for part in parameters.all()]


def _split(tensors: Any, lengths: list[int]) -> list[list[Any]]:
    tensors, parts = iter(tensors), []
    for length in lengths:
        parts.append([next(tensors) for _ in range(length)])
    return parts


def _saved_fake(run: Run, y: Tensor) -> list[Tensor]:
    """What _block.forward saves, as empty tensors."""
    x, layers, keep = run.x, run.plan.layers, run.plan.keep
    saved = Saved(y, [], [], [], [])
    for i, layer in enumerate(layers):
        image = run.image(i)
        absent = keep == "none" or (i == len(layers) - 1 and layer.in_product)
        size = (0,) if absent else (run.n, image.height, image.width, image.channels)
        saved.z.append(x.new_empty(size))
        planes = (0,) if layer.norm == "none" else (run.n, image.channels)
        for statistic in (saved.mean, saved.rstd):
            kind = x.dtype if layer.norm == "none" else accumulator(x.dtype)
            statistic.append(x.new_empty(planes, dtype=kind))
    stacks = run.new_stacks([run.reads(i) for i in range(len(layers))])
    saved.stacks.extend(stacks if keep == "all" else [x.new_empty(0) for _ in stacks])
    return saved.flat()


def _gradients_fake(
    x: Tensor,
    residual: Tensor | None,
    parameters: Parameters,
    plan: Plan,
    needs_x: bool,
    needs_parameters: bool,
) -> list[Tensor]:
    """What _block.backward returns, as empty tensors."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    if residual is None:
        dresidual = x.new_empty(0)
    else:
        dresidual = torch.empty(
            residual.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
    learned = parameters.learned()
    parts = [
        torch.empty(t.shape if needs_parameters else (0,), dtype=t.dtype, device=x.device)
        for p in learned
        for t in p
    ]
    return [dx if needs_x else x.new_empty(0), dresidual, *parts]

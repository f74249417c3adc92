"""Layers of convolution + norm + residual + activation + dropout, forward and backward, from shared passes.

Forward, per layer: `write` brings the pending work of the layer before into the layout the product reads; the
product leaves the raw output z and sums for its statistics; only the last layer is written as an image.
Backward, per layer: the gradient of y becomes dz in the layout that both products of the backward read; where
the layer before has a norm and no skip, the input gradient also takes the two sums its norm needs. The weight
gradients of layers of one shape are one launch (kernels.md calls it grouped). Nothing is atomic.
"""

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _gemm, _halo, _plain
from ._layout import Conv, Layout, image_layout
from ._op import layout
from ._pointwise import Pointwise, accumulator

NONE, EXTERNAL = -2, -1


class Layer(NamedTuple):
    """y = dropout(act(norm(conv(x)) + residual)).

    norm: "none", "instance", "batch", or "fixed" for given statistics. residual: NONE, EXTERNAL for the op's
    own argument, or the number of the layer whose input is added. plain: the products are cuDNN's.
    """

    transposed: bool
    stride: int
    pad: int
    output_pad: int
    mode: str
    norm: str
    act: str
    slope: float
    dropout: float
    eps: float
    residual: int
    plain: bool

    @property
    def in_product(self) -> bool:
        """The product itself adds the bias and applies the activation."""
        return self.norm == "none" and self.residual == NONE and self.dropout == 0


class Plan(NamedTuple):
    """keep: what a backward pass finds: "all", "raw" (no laid-out activations: they are written again) or
    "none" (there will be no backward pass)."""

    layers: tuple[Layer, ...]
    keep: str

    @property
    def needs_output(self) -> bool:
        """The backward pass reads the sign of the last layer's output."""
        last = self.layers[-1]
        return last.act != "none" and (last.in_product or last.residual != NONE)

    def text(self) -> str:
        return repr((tuple(tuple(layer) for layer in self.layers), self.keep))


@cache
def parse(text: str) -> Plan:
    """The inverse of Plan.text: an op takes strings, not structures."""
    layers, keep = literal_eval(text)
    return Plan(tuple(Layer(*layer) for layer in layers), keep)


@dataclass(frozen=True)
class Parameters:
    """Per layer, each list with an entry per layer or empty. weights: (S, O, C, k, k), of a transposed layer
    (S, C, O, k, k); the others (S, channels)."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    means: Sequence[Tensor]
    variances: Sequence[Tensor]

    def learned(self) -> list[Sequence[Tensor]]:
        return [self.weights, self.biases, self.norm_weights, self.norm_biases]

    def all(self) -> list[Sequence[Tensor]]:
        return [*self.learned(), self.means, self.variances]


class Saved(NamedTuple):
    """What a backward pass needs. z is empty where it is y; the stacks are those of `places`, or empty."""

    y: Tensor
    z: list[Tensor]
    mean: list[Tensor]
    rstd: list[Tensor]
    stacks: list[Tensor]

    def flat(self) -> list[Tensor]:
        return [self.y, *self.z, *self.mean, *self.rstd, *self.stacks]

    @staticmethod
    def of(flat: Sequence[Tensor], layers: int) -> "Saved":
        z, mean, rstd = (list(flat[1 + k * layers : 1 + (k + 1) * layers]) for k in range(3))
        return Saved(flat[0], z, mean, rstd, list(flat[1 + 3 * layers :]))


def convolutions(shape: Sequence[int], weights: Sequence[Tensor], layers: Sequence[Layer]) -> list[Conv]:
    """The geometry of each layer; of a transposed one, of the convolution from its output to its input."""
    _, _, h, w = shape
    found = []
    for weight, layer in zip(weights, layers):
        _, outputs, inputs, kernel, _ = weight.shape
        if layer.transposed:
            grow = kernel + layer.output_pad - 2 * layer.pad - layer.stride
            h, w = h * layer.stride + grow, w * layer.stride + grow
        conv = Conv(h, w, inputs, outputs, kernel, layer.stride, layer.pad, layer.mode, layer.plain)
        if not layer.transposed:
            h, w = conv.out_h, conv.out_w
        found.append(conv)
    return found


def places(convs: Sequence[Conv], plan: Plan) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Layers of one geometry share a stack, so that their weight gradients are one product.

    Returns the (stack, index) of each layer, and the layers of each stack.
    """
    kinds: list[tuple[Conv, bool]] = []
    members: list[list[int]] = []
    found = []
    for i, kind in enumerate((conv, layer.transposed) for conv, layer in zip(convs, plan.layers)):
        # compared, not hashed: sizes are symbols while torch.compile traces
        if kind not in kinds:
            kinds.append(kind)
            members.append([])
        stack = kinds.index(kind)
        found.append((stack, len(members[stack])))
        members[stack].append(i)
    return found, members


def _image(matrix: Tensor) -> Tensor:
    """(N, H, W, C) as an NCHW view."""
    return matrix.permute(0, 3, 1, 2)


def _matrix(image: Tensor) -> Tensor:
    """(N, C, H, W) as a matrix with a row per pixel."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _inside(rows: Tensor, layout: Layout, n: int) -> Tensor:
    """The image inside its padded rows, as an NCHW view."""
    grid = rows.view(n, layout.grid_h, layout.grid_w, layout.columns)
    # an unrolled row holds the columns of the kernel: the one of the pixel itself lies `left` further
    shift, first = (0, layout.left * layout.pitch) if layout.sub_w > 1 else (layout.left, 0)
    inner = grid[:, layout.top : layout.top + layout.height, shift : shift + layout.width]
    return _image(inner[..., first : first + layout.channels])


class Run:
    """One pass over the layers of a plan: what forward and backward share."""

    def __init__(
        self, x: Tensor, residual: Tensor | None, seed: Tensor | None, parameters: Parameters, plan: Plan
    ) -> None:
        self.x, self.residual, self.seed, self.parameters, self.plan = x, residual, seed, parameters, plan
        self.n, self.sets = len(x), len(parameters.weights[0])
        self.convs = convolutions(x.shape, parameters.weights, plan.layers)
        self.places, self.members = places(self.convs, plan)
        self.type = accumulator(x.dtype)
        self.channels_last = layout(x) == torch.channels_last

    def reads(self, i: int) -> Layout:
        """The layout that the product of layer i reads."""
        return self.convs[i].output if self.plan.layers[i].transposed else self.convs[i].input

    def image(self, i: int) -> Layout:
        """The output of layer i as an image."""
        conv = self.convs[i]
        if self.plan.layers[i].transposed:
            return image_layout(conv.height, conv.width, conv.inputs)
        return image_layout(conv.out_h, conv.out_w, conv.outputs)

    def new_stacks(self, layouts: Sequence[Layout]) -> list[Tensor]:
        """For each stack, memory for the rows of its layers."""
        first = [(layouts[m[0]], len(m)) for m in self.members]
        return [self.x.new_empty((count, self.n * f.rows, f.columns)) for f, count in first]

    def rows_of(self, stacks: list[Tensor]) -> dict[int, Tensor]:
        """The rows of each layer in the stacks."""
        return {i: stacks[stack][index] for i, (stack, index) in enumerate(self.places)}

    def packed(self, i: int) -> Tensor:
        return self.convs[i].pack(self.parameters.weights[i].to(self.x.dtype))

    def row(self, tensors: Sequence[Tensor], i: int) -> Tensor | None:
        return tensors[i].to(self.type) if tensors else None

    def pending(self, i: int, saved: Saved) -> Pointwise:
        """The work that is due on the z of layer i."""
        layer = self.plan.layers[i]
        seed = None if self.seed is None else self.seed[i : i + 1]
        act = "none" if layer.in_product else layer.act
        if layer.norm == "none":
            return Pointwise(None, None, None, None, act, layer.slope, layer.dropout, seed)
        weight, bias = (self.row(p, i) for p in (self.parameters.norm_weights, self.parameters.norm_biases))
        mean, rstd = saved.mean[i], saved.rstd[i]
        return Pointwise(mean, rstd, weight, bias, act, layer.slope, layer.dropout, seed)

    def added(self, i: int, rows: dict[int, Tensor]) -> Tensor | None:
        """What layer i adds before its activation."""
        source = self.plan.layers[i].residual
        if source == NONE:
            return None
        if source == EXTERNAL:
            return self.residual
        return self.x if source == 0 else _inside(rows[source], self.reads(source), self.n)

    def write(self, i: int, saved: Saved, rows: dict[int, Tensor]) -> Tensor:
        """Lays out the input of layer i, in the place that `rows` has for it or in a new one."""
        at = self.reads(i)
        if i not in rows:
            rows[i] = self.x.new_empty((self.n * at.rows, at.columns))
        out = _halo.as_image(rows[i], at)
        if i == 0:
            _halo.place(self.x, at, out, Pointwise(), None)
        else:
            _halo.place(_image(saved.z[i - 1]), at, out, self.pending(i - 1, saved), self.added(i - 1, rows))
        return rows[i]

    def product(self, i: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """z of layer i, (N, H, W, C), and the partial sums for its statistics."""
        layer, conv = self.plan.layers[i], self.convs[i]
        # a norm takes any constant away again, except one with given statistics
        bias = None if layer.norm in ("instance", "batch") else self.row(self.parameters.biases, i)
        statistics = layer.norm in ("instance", "batch")
        act = layer.act if layer.in_product else "none"
        folds = conv.kind in ("unrolled", "narrow") if layer.transposed else conv.kind == "narrow"
        if conv.plain:
            z = _plain.forward(
                rows, self.parameters.weights[i], conv, layer.transposed, bias, act, layer.slope
            )
        elif folds:
            product = _gemm.input_gradient if layer.transposed else _gemm.forward
            spread, _ = product(rows, self.packed(i), conv)
            image = self.image(i)
            z = self.x.new_empty((self.n, image.height, image.width, image.channels))
            layout = conv.gradient if layer.transposed else conv.spread
            _halo.fold(spread.view(-1, layout.columns), layout, _image(z), bias, act, layer.slope)
        else:
            options: dict[str, Any] = {
                "bias": bias,
                "act": act,
                "slope": layer.slope,
                "statistics": statistics,
            }
            if layer.transposed:
                return _gemm.input_gradient(rows, self.packed(i), conv, crop=True, **options)
            return _gemm.forward(rows, self.packed(i), conv, **options)
        return z, _halo.statistics(_image(z)) if statistics else z.new_empty(0)

    def writes(self, i: int) -> Layout:
        """The layout of dz that both products of the backward pass of layer i read."""
        return self.convs[i].input if self.plan.layers[i].transposed else self.convs[i].output

    def backward_inputs(
        self, i: int, saved: Saved, rows: dict[int, Tensor]
    ) -> tuple[Pointwise, Tensor | None, Tensor | None]:
        """The pending work of layer i with z, from which its derivative follows, or with y, where the sign of
        y is needed: behind the product's own activation, and behind an added residual."""
        layer, last = self.plan.layers[i], i == len(self.plan.layers) - 1
        pending = self.pending(i, saved)
        if layer.in_product:
            if layer.act == "none":
                return pending, None, None
            y = saved.y if saved.z[i].numel() == 0 else _image(saved.z[i])
            return pending._replace(act=layer.act), None, y
        if layer.residual == NONE or layer.act == "none":
            return pending, _image(saved.z[i]), None
        y = saved.y if last else _inside(rows[i + 1], self.reads(i + 1), self.n)
        return pending, _image(saved.z[i]), y

    def means(self, i: int, sums: Tensor) -> Tensor | None:
        """The two means that the gradient of a norm subtracts, (N, 2, C)."""
        norm, image = self.plan.layers[i].norm, self.image(i)
        pixels = image.height * image.width
        if norm == "instance":
            return sums / pixels
        if norm != "batch":
            return None
        size = self.n // self.sets
        grouped = sums.view(self.sets, size, *sums.shape[1:]).sum(1) / max(1, pixels * size)
        return grouped.repeat_interleave(size, 0)

    def parameter_gradients(self, i: int, saved: Saved, sums: Tensor, grads: "Gradients") -> None:
        """Those of the bias and of the norm's affine map, from sums of g and of g * xhat per plane."""
        layer, parameters = self.plan.layers[i], self.parameters
        of_set = sums.view(self.sets, self.n // self.sets, *sums.shape[1:]).sum(1)  # (S, 2, C)
        if layer.norm != "none":
            for kind, target, given in (
                (1, grads.norm_weights, parameters.norm_weights),
                (0, grads.norm_biases, parameters.norm_biases),
            ):
                if given:
                    # a copy: an op may not return two views of one tensor
                    target.append(of_set[:, kind].to(given[i].dtype, copy=True))
        if not parameters.biases:
            return
        bias = parameters.biases[i]
        if layer.norm in ("instance", "batch"):
            grads.biases.append(torch.zeros_like(bias))
            return
        grad = of_set[:, 0]
        if layer.norm == "fixed":
            weight = self.row(parameters.norm_weights, i)
            rstd = (parameters.variances[i].to(self.type) + layer.eps).rsqrt()
            grad = grad * (rstd if weight is None else weight * rstd)
        grads.biases.append(grad.to(bias.dtype, copy=True))

    def sums_fuse(self, i: int) -> bool:
        """Whether the input gradient of layer i can take the sums of the norm before it."""
        layer, before, conv = self.plan.layers[i], self.plan.layers[i - 1], self.convs[i]
        simple = before.norm != "none" and before.residual == NONE
        return simple and not layer.transposed and conv.kind in ("wide", "narrow")

    def input_gradient(self, i: int, dz: Tensor, saved: Saved | None) -> tuple[Tensor, Layout, Tensor | None]:
        """The gradient of the input of layer i, where it lies, and, with `saved`, the sums for the norm of
        the layer before."""
        layer, conv, weight = self.plan.layers[i], self.convs[i], self.parameters.weights[i]
        partial = None
        if conv.plain:
            g = _plain.input_gradient(dz, weight, conv, layer.transposed)
        elif layer.transposed:
            g, _ = _gemm.forward(dz, self.packed(i), conv)
        elif saved is None:
            g, _ = _gemm.input_gradient(dz, self.packed(i), conv)
        else:
            pending, z = self.pending(i - 1, saved), saved.z[i - 1]
            g, partial = _gemm.input_gradient(dz, self.packed(i), conv, pending=pending, z=z)
        if not layer.transposed:
            at = conv.gradient
        else:
            at = conv.spread if conv.kind == "narrow" else image_layout(conv.out_h, conv.out_w, conv.outputs)
        return g.view(-1, at.columns), at, partial

    def weight_gradients(self, stacks: list[Tensor], dz_stacks: list[Tensor], grads: "Gradients") -> None:
        """Those of all layers, one product per stack."""
        found: list[Tensor | None] = [None] * len(self.convs)
        for stack, members in enumerate(self.members):
            conv, groups = self.convs[members[0]], len(members) * self.sets
            rows, dz = (s[stack].flatten(0, 1) for s in (stacks, dz_stacks))
            if self.plan.layers[members[0]].transposed:
                rows, dz = dz, rows
            if conv.plain:
                grad = _plain.weight_gradient(rows, dz, conv, groups)
            else:
                grad = conv.unpack(_gemm.weight_gradient(rows, dz, conv, groups))
            for i, part in zip(members, grad.chunk(len(members))):
                weight = self.parameters.weights[i]
                found[i] = part.to(weight.dtype, copy=len(members) > 1)
        grads.weights.extend(g for g in found if g is not None)


def forward(run: Run) -> Saved:
    """All layers; y is channels_last where x leans that way, else contiguous."""
    layers, keep = run.plan.layers, run.plan.keep
    stacks = run.new_stacks([run.reads(i) for i in range(len(layers))]) if keep == "all" else []
    saved, rows = Saved(run.x, [], [], [], stacks), run.rows_of(stacks) if stacks else {}
    for i, layer in enumerate(layers):
        z, partial = run.product(i, run.write(i, saved, rows))
        mean, rstd = z.new_empty(0), z.new_empty(0)
        if layer.norm in ("instance", "batch"):
            groups = run.sets if layer.norm == "batch" else None
            mean, rstd = _halo.finish(partial, z.shape[1] * z.shape[2], layer.eps, groups)
        elif layer.norm == "fixed":
            mean, variance = (p[i].to(run.type) for p in (run.parameters.means, run.parameters.variances))
            mean, rstd = (
                t.repeat_interleave(run.n // run.sets, 0) for t in (mean, (variance + layer.eps).rsqrt())
            )
        if keep == "none" and i > 0:
            saved.z[i - 1] = z.new_empty(0)
        if keep != "all":
            # what a later layer adds is still wanted
            later = {other.residual for other in layers[i:]}
            rows = {j: r for j, r in rows.items() if j in later}
        saved.z.append(z)
        saved.mean.append(mean)
        saved.rstd.append(rstd)
    last, i, z = layers[-1], len(layers) - 1, _image(saved.z[-1])
    if last.in_product and run.channels_last:
        y = z
    else:
        form = torch.channels_last if run.channels_last else torch.contiguous_format
        y = torch.empty(z.shape, dtype=z.dtype, device=z.device, memory_format=form)
        _halo.apply(z, y, run.pending(i, saved), run.added(i, rows))
    if keep == "none" or last.in_product:
        saved.z[-1] = z.new_empty(0)
    if not stacks:
        stacks = [z.new_empty(0) for _ in run.members]
    return saved._replace(y=y, stacks=stacks)


class Gradients(NamedTuple):
    """Lists as the parameters have them; an empty tensor stands where nobody asked."""

    dx: Tensor
    dresidual: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]

    def of_parameters(self) -> list[list[Tensor]]:
        return [self.weights, self.biases, self.norm_weights, self.norm_biases]

    def flat(self) -> list[Tensor]:
        return [self.dx, self.dresidual, *(t for group in self.of_parameters() for t in group)]


def backward(run: Run, saved: Saved, dy: Tensor, needs_x: bool, needs_parameters: bool) -> Gradients:
    """All gradients; those of the parameters are empty where nobody needs them (D in the step of G)."""
    layers, count = run.plan.layers, len(run.plan.layers)
    stacks = saved.stacks
    if run.plan.keep == "raw":
        stacks = run.new_stacks([run.reads(i) for i in range(count)])
        rows = run.rows_of(stacks)
        for i in range(count):
            run.write(i, saved, rows)
    rows = run.rows_of(stacks)
    dz_stacks = run.new_stacks([run.writes(i) for i in range(count)])
    dz_rows = run.rows_of(dz_stacks)
    grads = Gradients(run.x.new_empty(0), run.x.new_empty(0), *([] for _ in range(4)))
    skips: dict[int, Tensor] = {}
    g, at = _matrix(dy), run.image(count - 1)
    partial: Tensor | None = None
    for i in reversed(range(count)):
        layer = layers[i]
        pending, z, y = run.backward_inputs(i, saved, rows)
        skip = skips.pop(i + 1, None)
        total = skip is not None or layer.residual != NONE
        sums_wanted = layer.norm in ("instance", "batch") or needs_parameters
        if total or (partial is None and sums_wanted):
            partial, pre = _halo.reduce(g, at, pending, z, y, skip, total)
            if total:
                g, at, y = _matrix(pre), run.image(i), None
                pending = pending._replace(act="none", dropout=0.0)
                if layer.residual == EXTERNAL:
                    grads = grads._replace(dresidual=pre)
                elif layer.residual >= 0:
                    skips[layer.residual] = pre
        means = None
        if partial is not None and sums_wanted:
            sums = partial.sum(1)  # (N, 2, C)
            means = run.means(i, sums)
            if needs_parameters:
                run.parameter_gradients(i, saved, sums, grads)
        dz, target = dz_rows[i], run.writes(i)
        _halo.gradient_to(g, at, pending, target, _halo.as_image(dz, target), z, y, None, means)
        if i > 0 or needs_x:
            fused = i > 0 and i not in skips and run.sums_fuse(i)
            g, at, partial = run.input_gradient(i, dz, saved if fused else None)
    if needs_x:
        _, dx = _halo.reduce(g, at, Pointwise(), None, None, skips.get(0), True)
        # an empty tensor keeps its strides in contiguous()
        own = torch.empty(dx.shape, dtype=dx.dtype, device=dx.device, memory_format=layout(run.x))
        grads = grads._replace(dx=dx if dx.stride() == own.stride() else own.copy_(dx))
    if not needs_parameters:
        for group, given in zip(grads.of_parameters(), run.parameters.learned()):
            group.extend(run.x.new_empty(0, dtype=t.dtype) for t in given)
        return grads
    run.weight_gradients(stacks, dz_stacks, grads)
    for group in (grads.biases, grads.norm_weights, grads.norm_biases):
        group.reverse()
    return grads

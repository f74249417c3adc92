"""Runs of torch's layers that one op computes: how they are found in the graph of a forward, and computed.

    run     [pad] conv [norm] [+ residual] [act] [dropout]
    blocks  x + body(x), body = [pad] conv [norm] [act] [dropout] [pad] conv [norm], any number in a row

Inside a run nobody else may read what a layer returns, and no other node that might work in place may stand
between its first and its last layer. Activations may be functions (F.relu) as well as layers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from fastgan_kernels import residual_block
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastgan.layers import like_weight, norm_options, padding, refusal, run_conv

KINDS: dict[type[nn.Module], str] = {
    nn.ReflectionPad2d: "pad",
    nn.ReplicationPad2d: "pad",
    nn.ZeroPad2d: "pad",
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.InstanceNorm2d: "norm",
    nn.BatchNorm2d: "norm",
    nn.ReLU: "act",
    nn.LeakyReLU: "act",
    nn.Tanh: "act",
    nn.Dropout: "dropout",
}
# what a layer may define anew only if it is somebody else's layer
METHODS = ("forward", "__call__", "_conv_forward", "_apply_instance_norm", "_check_input_dim")
RELU = (F.relu, torch.relu, "relu")
LEAKY_RELU = (F.leaky_relu,)
TANH = (F.tanh, torch.tanh, "tanh")
ADD = (operator.add, operator.iadd, torch.add)
# pad, conv, norm, act, dropout: layers, None where there is none; act also as a name and a slope
Half = tuple[Any, Any, Any, Any, Any]


class Part(NamedTuple):
    """A layer at `path`, or an activation function, whose name and slope are `act`."""

    kind: str
    path: str = ""
    act: tuple[str, float] | None = None


class Run(NamedTuple):
    """Nodes in the order of the graph, their parts, and the add with the place of its other argument."""

    nodes: list[fx.Node]
    parts: list[Part]
    residual: tuple[fx.Node, int] | None


class Blocks(NamedTuple):
    """Nodes in the order of the graph, and the parts of each block's body."""

    nodes: list[fx.Node]
    bodies: list[list[Part]]


def touched(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its class's forward."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def kind(module: nn.Module) -> str | None:
    """The kind of a layer of torch; None for others and for subclasses that compute something else."""
    for base, name in KINDS.items():
        if isinstance(module, base):
            same = all(getattr(type(module), m, None) is getattr(base, m, None) for m in METHODS)
            return name if same else None
    return None


def objection(module: Any) -> str | None:
    """Why a layer of a known kind cannot be part of a run, None if it can."""
    if touched(module):
        return "has hooks"
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return refusal(module)
    if isinstance(module, (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d)):
        sides = set(module.padding)
        return f"padding={module.padding}" if len(sides) > 1 or min(sides) < 0 else None
    if isinstance(module, nn.LeakyReLU) and module.negative_slope < 0:
        return f"negative_slope={module.negative_slope}"
    if isinstance(module, nn.Dropout) and module.p >= 1:
        return f"p={module.p}"
    return None


class Reading:
    """The graph of one module with what its nodes are.

    Args:
        module: whose forward `graph` is.
        excluded: layers and modules that stay as they are.
        chains: for modules that are straight lines of layers, those layers.
        units: for modules that are nothing but residual blocks, their bodies.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        excluded: set[nn.Module],
        chains: dict[nn.Module, list[Part]],
        units: dict[nn.Module, list[list[Part]]],
    ) -> None:
        self.module, self.graph, self.excluded = module, graph, excluded
        self.chains, self.units = chains, units
        self.order = {node: i for i, node in enumerate(graph.nodes)}

    def child(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls on a single tensor."""
        plain = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if not plain or not isinstance(node.args[0], fx.Node):
            return None
        found = self.module.get_submodule(str(node.target))
        return None if found in self.excluded else found

    def part(self, node: fx.Node | None) -> Part | None:
        """The layer or activation function that a node is, if a run may hold it."""
        if node is None:
            return None
        child = self.child(node)
        if child is not None:
            name = kind(child)
            return Part(name, str(node.target)) if name and objection(child) is None else None
        act = _functional(node)
        return None if act is None else Part("act", act=act)

    def line(self, node: fx.Node) -> list[Part] | None:
        """The layers that a node stands for, one or those of a straight line inside."""
        part = self.part(node)
        if part is not None:
            return [part]
        child = self.child(node)
        if child not in self.chains or touched(child):
            return None
        return _prefixed(str(node.target), self.chains[child])

    def chain(self) -> list[Part] | None:
        """The layers of the whole graph, if it is a straight line of them."""
        value, *nodes = self.graph.nodes
        parts: list[Part] = []
        for node in nodes[:-1]:
            line = self.line(node)
            if line is None or next_node(value) is not node:
                return None
            parts, value = parts + line, node
        return parts if nodes and nodes[-1].args[0] is value else None

    def blocks(self) -> list[Blocks]:
        """Residual blocks, joined where one follows another."""
        found: dict[fx.Node, Blocks] = {}
        for node in self.graph.nodes:
            block = self._block(node)
            if block is None:
                continue
            value: Any = block.nodes[0].args[0]
            before = found.get(value)
            if before is not None and set(value.users) <= set(block.nodes):
                both = Blocks(before.nodes + block.nodes, before.bodies + block.bodies)
                if self.clear(both.nodes[0], node, both.nodes):
                    del found[value]
                    block = both
            found[node] = block
        return list(found.values())

    def unit(self) -> list[list[Part]] | None:
        """The bodies of all blocks, if the whole graph is nothing else."""
        blocks, nodes = self.blocks(), list(self.graph.nodes)
        whole = len(blocks) == 1 and len(blocks[0].nodes) + 2 == len(nodes)
        return blocks[0].bodies if whole and nodes[-1].args[0] is blocks[0].nodes[-1] else None

    def runs(self, taken: set[fx.Node]) -> Iterator[Run]:
        """Runs around each convolution, of nodes that are not `taken`; takes them."""
        for node in self.graph.nodes:
            part = self.part(node)
            if part is not None and part.kind == "conv" and node not in taken:
                run = self._run(node, part, taken)
                if run is not None:
                    taken.update(run.nodes)
                    yield run

    def _run(self, node: fx.Node, part: Part, taken: set[fx.Node]) -> Run | None:
        conv: Any = self.module.get_submodule(part.path)
        nodes, parts, residual = [node], [part], None
        before: Any = node.args[0]
        pad = self.part(before)
        if pad and pad.kind == "pad" and next_node(before) is node and self.takes(conv, pad, before, node):
            nodes, parts = [before, node], [pad, part]
        for wanted in ("norm", "add", "act", "dropout"):
            user = next_node(nodes[-1])
            if user is None or user in taken or not self.clear(nodes[0], user, nodes):
                break
            if wanted == "add":
                place = _added(user, nodes[-1])
                if place is not None and user.args[place] not in nodes:
                    residual = user, place
                    nodes.append(user)
                continue
            found = self.part(user)
            # the ops have no dropout behind an added residual
            if found is not None and found.kind == wanted and not (wanted == "dropout" and residual):
                nodes.append(user)
                parts.append(found)
        width, mode = padding(conv)
        return Run(nodes, parts, residual) if len(nodes) > 1 or (width > 0 and mode != "zeros") else None

    def takes(self, conv: Any, pad: Part, first: fx.Node, last: fx.Node) -> bool:
        """Whether a convolution can do the work of the padding layer in front of it."""
        alone = isinstance(conv, nn.Conv2d) and padding(conv)[0] == 0
        return alone and self.clear(first, last, [first])

    def _block(self, node: fx.Node) -> Blocks | None:
        child = self.child(node)
        if child in self.units and not touched(child):
            return Blocks([node], [_prefixed(str(node.target), body) for body in self.units[child]])
        for end in node.args[:2]:
            place = _added(node, end) if isinstance(end, fx.Node) else None
            if place is not None:
                nodes, body = self._body(node.args[place], end)  # type: ignore[arg-type]
                if body and self.clear(nodes[0], node, nodes) and _is_body(self.module, body):
                    return Blocks([*nodes, node], [body])
        return None

    def _body(self, value: fx.Node, end: fx.Node) -> tuple[list[fx.Node], list[Part]]:
        """The straight line of layers from `value` to `end`; empty if there is none."""
        nodes: list[fx.Node] = []
        parts: list[Part] = []
        while end is not value:
            line = self.line(end) if next_node(end) else None
            if line is None:
                return [], []
            nodes, parts = [end, *nodes], [*line, *parts]
            end = end.args[0]  # type: ignore[assignment]
        return nodes, parts

    def clear(self, first: fx.Node, last: fx.Node, own: Sequence[fx.Node]) -> bool:
        """No node between two that might work in place, as the run is computed where its last node stands."""
        between = list(self.graph.nodes)[self.order[first] : self.order[last]]
        return all(node in own or self.pure(node) for node in between)

    def pure(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            child = self.module.get_submodule(str(node.target))
            layer = type(child).__module__.startswith("torch.nn.modules.") and not child._modules
            return layer and not getattr(child, "inplace", False) and not touched(child)
        if any(value is True for value in (*node.args, *node.kwargs.values())):
            return False
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_operator = getattr(node.target, "__module__", None) == "_operator"
        return not (name.endswith("_") or in_operator and name.startswith("i"))


def next_node(node: fx.Node) -> fx.Node | None:
    """The only reader of a node's value, if it reads it once and as an argument of its own."""
    users = list(node.users)
    return users[0] if len(users) == 1 and list(users[0].args).count(node) == 1 else None


def _added(node: fx.Node, value: Any) -> int | None:
    """The place of the other argument where `node` adds another value to `value`."""
    args = node.args
    if node.op != "call_function" or node.target not in ADD or len(args) != 2 or node.kwargs:
        return None
    if node.target is operator.iadd and args[0] is not value:
        return None
    place = 1 if args[0] is value else 0
    return place if isinstance(args[place], fx.Node) and args[0] is not args[1] else None


def _functional(node: fx.Node) -> tuple[str, float] | None:
    if (
        not node.args
        or not isinstance(node.args[0], fx.Node)
        or set(node.kwargs) - {"negative_slope", "inplace"}
    ):
        return None
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in RELU:
        return "relu", 0.2
    if node.target in TANH:
        return "tanh", 0.2
    slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
    known = node.target in LEAKY_RELU and isinstance(slope, (int, float)) and slope >= 0
    return ("leaky_relu", float(slope)) if known else None  # type: ignore[arg-type]


def _prefixed(prefix: str, parts: Sequence[Part]) -> list[Part]:
    return [part._replace(path=f"{prefix}.{part.path}" if part.path else "") for part in parts]


def halves(body: Sequence[Part]) -> tuple[dict[str, Part], dict[str, Part]] | None:
    """The parts of a block's body by kind, up to the first convolution's dropout and from there on."""
    found: list[dict[str, Part]] = [{}]
    order = ("pad", "conv", "norm", "act", "dropout")
    last = -1
    for part in body:
        if order.index(part.kind) <= last:
            found.append({})
        last = order.index(part.kind)
        found[-1][part.kind] = part
    if len(found) != 2 or not all("conv" in half for half in found) or set(found[1]) & {"act", "dropout"}:
        return None
    return found[0], found[1]


def _is_body(module: nn.Module, body: Sequence[Part]) -> bool:
    """Whether a line of layers is what `residual_block` computes between the skip and the add."""
    both = halves(body)
    if both is None:
        return False
    convs: list[Any] = [module.get_submodule(half["conv"].path) for half in both]
    for conv, half in zip(convs, both):
        pad = module.get_submodule(half["pad"].path) if "pad" in half else None
        if not isinstance(conv, nn.Conv2d) or conv.stride != (1, 1) or conv.kernel_size[0] % 2 == 0:
            return False
        if pad is not None and padding(conv)[0] > 0 or padding(conv, pad)[0] != conv.kernel_size[0] // 2:
            return False
    return convs[0].in_channels == convs[1].out_channels


def compute_run(
    x: Tensor, pad: Any, conv: Any, norm: Any, act: Any, dropout: Any, residual: Any = None
) -> Tensor:
    """A run, from its layers; act: a layer, or the name and slope of a function."""
    if x.dim() == 3:
        residual = residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
        return compute_run(x.unsqueeze(0), pad, conv, norm, act, dropout, residual).squeeze(0)
    name, slope = _activation(act)
    p = dropout.p if dropout is not None and dropout.training else 0.0
    if residual is None or _fits(x, conv, pad, residual):
        return run_conv(x, conv, pad, norm, name, slope, p, residual)
    # torch's add broadcasts and promotes, the op's does not
    y = run_conv(x, conv, pad, norm) + residual
    if name == "none":
        return y
    return F.relu(y) if name == "relu" else F.leaky_relu(y, slope) if name == "leaky_relu" else torch.tanh(y)


def compute_blocks(x: Tensor, blocks: Sequence[tuple[Half, Half]]) -> Tensor:
    """Residual blocks, from (pad, conv, norm, act, dropout) of both halves of each: one op where all have the
    same settings, else a run per half."""
    if x.dim() == 3:
        return compute_blocks(x.unsqueeze(0), blocks).squeeze(0)
    settings = {_settings(first, second) for first, second in blocks}
    if len(settings) > 1 or None in settings:
        for first, second in blocks:
            x = compute_run(compute_run(x, *first), *second, x)
        return x
    (pad, conv, _, act, dropout), _ = blocks[0]
    halves = [half for block in blocks for half in block]
    weights, biases = [half[1].weight for half in halves], [half[1].bias for half in halves]
    norms = [norm_options(half[2]) for half in halves]
    name, slope = _activation(act)
    options = {k: norms[0][k] for k in ("norm", "eps", "training", "momentum") if k in norms[0]}
    return residual_block(
        like_weight(x, weights[0]),
        weights,
        [bias for bias in biases if bias is not None],
        [n["norm_weight"] for n in norms if n.get("norm_weight") is not None],
        [n["norm_bias"] for n in norms if n.get("norm_bias") is not None],
        running_means=[n["running_mean"] for n in norms if n.get("running_mean") is not None],
        running_vars=[n["running_var"] for n in norms if n.get("running_var") is not None],
        padding_mode=padding(conv, pad)[1],
        act=name,
        slope=slope,
        dropout=dropout.p if dropout is not None and dropout.training else 0.0,
        **{"norm": "none", **options},
    )


def _settings(first: Half, second: Half) -> tuple[Any, ...] | None:
    """What all layers of one `residual_block` have in common; None where the halves of a block differ."""
    pairs = []
    for pad, conv, norm, _, _ in (first, second):
        of_norm: tuple[Any, ...] = ()
        if norm is not None:
            affine = norm.weight is not None, norm.bias is not None
            running = norm.track_running_stats, norm.running_mean is not None, norm.training
            of_norm = (isinstance(norm, nn.BatchNorm2d), norm.eps, norm.momentum, *affine, *running)
        pairs.append((padding(conv, pad), conv.kernel_size, conv.bias is not None, of_norm))
    _, _, norm, act, dropout = first
    p = dropout.p if dropout is not None and dropout.training else 0.0
    # a cumulative average has a momentum of its own in each layer
    cumulative = isinstance(norm, nn.BatchNorm2d) and norm.momentum is None
    return None if pairs[0] != pairs[1] or cumulative else (pairs[0], _activation(act), p)


def _activation(act: Any) -> tuple[str, float]:
    if act is None or isinstance(act, tuple):
        return act or ("none", 0.2)
    if isinstance(act, nn.LeakyReLU):
        return "leaky_relu", act.negative_slope
    return ("tanh" if isinstance(act, nn.Tanh) else "relu"), 0.2


def _fits(x: Tensor, conv: Any, pad: Any, residual: Any) -> bool:
    """Whether `residual` has the shape and dtype of the convolution's output."""
    if not isinstance(residual, Tensor) or residual.dtype != x.dtype:
        return False
    kernel, stride, width = conv.kernel_size[0], conv.stride[0], padding(conv, pad)[0]
    if isinstance(conv, nn.ConvTranspose2d):
        size = [(s - 1) * stride + kernel - 2 * width + conv.output_padding[0] for s in x.shape[2:]]
    else:
        size = [(s + 2 * width - kernel) // stride + 1 for s in x.shape[2:]]
    return residual.shape == (len(x), conv.out_channels, *size)

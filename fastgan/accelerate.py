"""Fused ops inside somebody else's network.

    report = accelerate(model)     # runs of padding, convolution, norm, activation, dropout, residual add
    print(report)                  # what was swapped, what was left, and why
    report.undo()                  # the model as it was

No layer is replaced: names, parameters, state-dict keys, optimisers, .to(), .train() and hooks stay what they
are. What changes is the forward of the modules that call the layers: an nn.Sequential, or any module whose
forward can be read (`fastgan.dataflow`), gets a subclass of its own class, of the same name, which calls one
op where the layers stood in a run. Before every call it looks whether the layers of its runs are still those
that were read, without hooks; where they are not, the original forward runs. So a layer called on its own, as
in a loop over an nn.Sequential that collects features, also computes what it always did.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import fx, nn

from fastgan import dataflow
from fastgan.layers import padding
from fastgan.runs import (
    Blocks,
    Part,
    Reading,
    Run,
    compute_blocks,
    compute_run,
    halves,
    kind,
    next_node,
    objection,
    touched,
)

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
PADS = (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d)
NORMS = (nn.InstanceNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)
NAMES = {
    nn.ReflectionPad2d: "reflect pad",
    nn.ReplicationPad2d: "replicate pad",
    nn.ZeroPad2d: "zero pad",
    nn.InstanceNorm2d: "instance norm",
    nn.BatchNorm2d: "batch norm",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky relu",
    nn.Tanh: "tanh",
    nn.Dropout: "dropout",
}


@dataclass(frozen=True)
class Entry:
    """A line of a report: where, what, why (or a remark), and the paths of the layers that it speaks of."""

    path: str
    what: str
    reason: str = ""
    modules: tuple[str, ...] = ()


@dataclass
class Report:
    """What `accelerate` did to a model; `str` of it is a table, `undo` takes it back."""

    swapped: list[Entry]
    left: list[Entry]
    _changed: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every changed module its class and its forward back."""
        while self._changed:
            module = self._changed.pop()
            module.__class__ = type(module).__mro__[1]
            del module._fastgan_plan

    def __str__(self) -> str:
        lines = []
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            width = max((len(entry.path) for entry in entries), default=0)
            lines += [title] if entries else []
            for entry in entries:
                reason = f": {entry.reason}" if entry.reason else ""
                lines.append(f"  {entry.path:<{width}}  {entry.what}{reason}")
        modules = len({path for entry in self.swapped for path in entry.modules})
        lines.append(f"swapped {len(self.swapped)} runs ({modules} modules), left {len(self.left)}")
        return "\n".join(lines)


def accelerate(model: nn.Module, *, leave: Iterable[str] = ()) -> Report:
    """Let runs of torch's layers in `model` be computed by fused ops, in place.

    Outputs, gradients and state dict stay the same up to rounding; a dropout inside a run draws its mask
    differently, with the same probability. Taken are padding, 2-d convolution (also transposed),
    InstanceNorm2d or BatchNorm2d, ReLU, LeakyReLU or Tanh, Dropout and residual adds; the report names what
    is not. InstanceNorm2d with running statistics is fused in evaluation mode only. Call it when the model is
    built, before torch.compile or a wrapper such as DistributedDataParallel. copy.deepcopy keeps the runs;
    pickle and torch.save write the model as it was.

    Args:
        model: any module; its convolutions may lie anywhere below it.
        leave: names or patterns of names (`encoder.*`) of modules that stay as they are with all they hold.

    Returns:
        A `Report`.

    Raises:
        ValueError: a pattern of `leave` matches nothing.
    """
    return _Survey(model, tuple(leave)).swap()


class _Watched(NamedTuple):
    """A layer of a run, or a module around it: child `name` of the watched module number `parent`."""

    parent: int
    name: str
    cls: Any
    children: int
    # plain attributes that its forward reads
    facts: tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class _Plan:
    """A forward with fused ops, and what must hold for it to be that of the module, which is number 0."""

    function: Callable[..., Any]
    children: int
    facts: tuple[tuple[str, object], ...]
    watched: tuple[_Watched, ...]

    def holds(self, module: nn.Module) -> bool:
        # before every call, so it is written for speed: about 0.5 us a layer
        found: list[Any] = [module]
        for parent, name, cls, children, facts in self.watched:
            child: Any = found[parent]._modules.get(name)
            same = type(child) is cls and len(child._modules) == children
            if not same or touched(child):
                return False
            if isinstance(child, nn.InstanceNorm2d) and child.training and child.track_running_stats:
                return False
            if facts and not _hold(child, facts):
                return False
            found.append(child)
        return len(module._modules) == self.children and _hold(module, self.facts)


def _hold(module: nn.Module, facts: tuple[tuple[str, object], ...]) -> bool:
    for name, value in facts:
        now = getattr(module, name, None)
        if type(now) is not type(value) or now != value:
            return False
    return True


@functools.cache
def _subclass(base: Any) -> Any:
    """A class like `base` whose instances follow their plan."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._fastgan_plan
        if plan is None or not plan.holds(self):
            return base.forward(self, *args, **kwargs)
        return plan.function(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # a pickle holds the model as it was: it can be read where fastgan is not installed
        function, args, state, *rest = base.__reduce_ex__(self, protocol)
        # pickle takes copyreg.__newobj__ for the object's own class only
        function = base.__new__ if function is copyreg.__newobj__ else function  # type: ignore[attr-defined]
        args = tuple(base if arg is type(self) else arg for arg in args)
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != "_fastgan_plan"}
        return (function, args, state, *rest)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        copied = base.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    names = {"forward": forward, "_fastgan_plan": None, "__reduce_ex__": reduce, "__deepcopy__": deepcopy}
    if hasattr(base, "__deepcopy__"):
        del names["__deepcopy__"]
    about = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base)(base.__name__, (base,), {**names, **about})


class _Survey:
    """All modules of a model with their graphs, runs and reasons."""

    def __init__(self, model: nn.Module, leave: tuple[str, ...]) -> None:
        self.model = model
        self.paths: dict[nn.Module, str] = {m: path for path, m in model.named_modules()}
        self.excluded: set[nn.Module] = set()
        self.left: list[Entry] = []
        for pattern in leave:
            matches = [m for m, path in self.paths.items() if path and fnmatchcase(path, pattern)]
            if not matches:
                raise ValueError(f"accelerate: leave must match names of modules, got {pattern!r}")
            for module in matches:
                if module not in self.excluded:
                    self.left.append(Entry(self.paths[module], type(module).__name__, "named in leave"))
                self.excluded |= set(module.modules())
        self.readings: dict[nn.Module, Reading] = {}
        self.unreadable: dict[nn.Module, str] = {}
        self.chains: dict[nn.Module, list[Part]] = {}
        self.units: dict[nn.Module, list[list[Part]]] = {}
        # children come after their parents in named_modules
        for module in reversed(self.paths):
            if module not in self.excluded and _holds_convolutions(module):
                self._read(module)

    def _read(self, module: nn.Module) -> None:
        if getattr(module, "_fastgan_plan", None) is not None:
            self.unreadable[module] = "already swapped"
            return
        try:
            graph = dataflow.read(module)
        except dataflow.Unreadable as error:
            self.unreadable[module] = str(error)
            return
        reading = Reading(module, graph, self.excluded, self.chains, self.units)
        self.readings[module] = reading
        chain, unit = reading.chain(), reading.unit()
        if chain:
            self.chains[module] = chain
        if unit:
            self.units[module] = unit

    def swap(self) -> Report:
        """Change the modules; what a module is reported for is not reported again for those below it."""
        report = Report([], self.left)
        reported: set[nn.Module] = set()
        plans: dict[nn.Module, Callable[[], _Plan]] = {}
        for module in self.paths:
            if module not in self.readings:
                continue
            found = list(self._found(module))
            for step in found:
                entry, layers = self._entry(module, step)
                if not layers <= reported:
                    report.swapped.append(entry)
                    reported |= layers
            if found:
                plans[module] = self._rewrite(module, found)
        for module in plans:
            base: Any = type(module)
            module.__class__ = _subclass(base)
            report._changed.append(module)
        # the classes that a plan expects are those of now
        for module, plan in plans.items():
            module._fastgan_plan = plan()  # type: ignore[assignment]
        report.left += self._leftovers(reported)
        order = {path: i for i, path in enumerate(self.paths.values())}
        report.swapped.sort(key=lambda entry: order[entry.modules[0]])
        return report

    def _found(self, module: nn.Module) -> Iterator[Run | Blocks]:
        reading = self.readings[module]
        taken: set[fx.Node] = set()
        for blocks in reading.blocks():
            # a single child that holds nothing but blocks has a plan of its own
            if len(blocks.nodes) > 1:
                taken.update(blocks.nodes)
                yield blocks
        yield from reading.runs(taken)

    def _rewrite(self, module: nn.Module, found: list[Run | Blocks]) -> Callable[[], _Plan]:
        """Put ops where runs are in the module's graph; the plan is made when all classes are changed."""
        graph = self.readings[module].graph
        paths: dict[str, None] = {}
        for step in found:
            bodies = step.bodies if isinstance(step, Blocks) else [step.parts]
            for part in (part for body in bodies for part in body if part.path):
                names = part.path.split(".")
                paths.update(dict.fromkeys(".".join(names[: i + 1]) for i in range(len(names))))
            last = step.nodes[-1]
            with graph.inserting_before(last):
                if isinstance(step, Blocks):
                    blocks = tuple(tuple(_layers(graph, h) for h in halves(b) or ()) for b in step.bodies)
                    new = graph.call_function(compute_blocks, (step.nodes[0].args[0], blocks))
                else:
                    layers = _layers(graph, {part.kind: part for part in step.parts})
                    added = (step.residual[0].args[step.residual[1]],) if step.residual else ()
                    new = graph.call_function(compute_run, (step.nodes[0].args[0], *layers, *added))
            last.replace_all_uses_with(new)
            for node in reversed(step.nodes):
                graph.erase_node(node)
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<accelerated {type(module).__name__}>", "exec"), namespace)
        facts = {path: self._facts(module.get_submodule(path)) for path in ("", *paths)}

        def plan() -> _Plan:
            number = {path: i for i, path in enumerate(("", *paths))}
            watched = []
            for path in paths:
                child, (parent, _, name) = module.get_submodule(path), path.rpartition(".")
                watched.append(_Watched(number[parent], name, type(child), len(child._modules), facts[path]))
            return _Plan(namespace["forward"], len(module._modules), facts[""], tuple(watched))

        return plan

    def _facts(self, module: nn.Module) -> tuple[tuple[str, object], ...]:
        return tuple(dataflow.facts(module).items()) if module in self.readings else ()

    def _entry(self, module: nn.Module, step: Run | Blocks) -> tuple[Entry, set[nn.Module]]:
        bodies = step.bodies if isinstance(step, Blocks) else [step.parts]
        layers = [module.get_submodule(part.path) for body in bodies for part in body if part.path]
        convs = [layer for layer in layers if isinstance(layer, CONVOLUTIONS)]
        where = self.paths[convs[0]]
        what = self._describe(module, bodies[0])
        if isinstance(step, Blocks):
            here = self.paths[module]
            nodes = [str(n.target) for n in step.nodes if n.op == "call_module"]
            names = [nodes[0], nodes[-1]] if len(bodies) > 1 else []
            where = " ... ".join(f"{here}.{name}".strip(".") for name in names) or here
            plural = "s" if len(bodies) > 1 else ""
            what = f"{len(bodies)} residual block{plural} of {what}"
        elif step.residual:
            # the op adds in front of the activation
            *start, end = step.parts
            parts = [self._describe(module, start), "residual", self._describe(module, [end])]
            what = " + ".join(parts) if end.kind == "act" else f"{what} + residual"
        remarks = []
        if any(isinstance(layer, nn.InstanceNorm2d) and layer.track_running_stats for layer in layers):
            remarks.append("in evaluation mode only, torch updates its running statistics")
        if any(isinstance(layer, nn.Dropout) for layer in layers):
            remarks.append("dropout draws its own mask")
        after = next_node(step.nodes[-1])
        if {part.kind for part in bodies[0]} <= {"pad", "conv"} and after is not None:
            child = module.get_submodule(str(after.target)) if after.op == "call_module" else None
            if child is not None and kind(child) is None and not child._modules:
                remarks.append(f"{self.paths[child]} is not taken, {type(child).__name__}")
        paths = tuple(self.paths[layer] for layer in layers)
        return Entry(where, what, "; ".join(remarks), paths), set(layers)

    def _describe(self, module: nn.Module, parts: list[Part]) -> str:
        return " + ".join(
            part.act[0] if part.act else _describe(module.get_submodule(part.path)) for part in parts
        )

    def _leftovers(self, reported: set[nn.Module]) -> Iterator[Entry]:
        seen: set[nn.Module] = set()
        for module, path in self.paths.items():
            if not isinstance(module, (*CONVOLUTIONS, *NORMS, *PADS)):
                continue
            if module in reported or module in self.excluded:
                continue
            owner = self._owner(module)
            reason = self.unreadable.get(owner)
            if isinstance(module, PADS) and owner not in self.readings and reason is None:
                continue
            if reason is None:
                yield Entry(path, _describe(module), self._reason(module, owner), (path,))
            elif owner not in seen:
                seen.add(owner)
                yield Entry(self.paths[owner] or "(model)", type(owner).__name__, reason)

    def _owner(self, module: nn.Module) -> nn.Module:
        """The module whose forward calls a layer: lists of modules have none."""
        path = self.paths[module]
        while path:
            path = path.rpartition(".")[0]
            owner = self.model.get_submodule(path)
            if not isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
                return owner
        return module

    def _reason(self, module: nn.Module, owner: nn.Module) -> str:
        if kind(module) is None:
            own = isinstance(module, (*CONVOLUTIONS, *PADS, nn.InstanceNorm2d, nn.BatchNorm2d))
            return "a subclass with a forward of its own" if own else "not a norm that the ops have"
        why = objection(module)
        if why is not None:
            return why if why == "has hooks" else f"the ops do not take {why}"
        reading = self.readings.get(owner)
        if reading is None:
            return "alone" if owner is module else f"no convolution in {self.paths[owner]}"
        calls = [node for node in reading.graph.nodes if node.op == "call_module"]
        if not any(owner.get_submodule(str(node.target)) is module for node in calls):
            return f"not called by the forward of {self.paths.get(owner) or 'the model'}"
        if isinstance(module, CONVOLUTIONS):
            return "nothing to fuse"
        if isinstance(module, PADS):
            return "no convolution without padding follows directly"
        return "no convolution that can be fused goes directly before"


def _holds_convolutions(module: nn.Module) -> bool:
    within = any(isinstance(m, CONVOLUTIONS) for m in module.modules())
    return within and not isinstance(module, (*CONVOLUTIONS, nn.ModuleList, nn.ModuleDict))


def _layers(graph: fx.Graph, parts: dict[str, Part]) -> tuple[Any, ...]:
    """The arguments of compute_run for parts: layers as attributes of `self`, functions as they are."""
    given = [parts.get(name) for name in ("pad", "conv", "norm", "act", "dropout")]
    return tuple(graph.get_attr(p.path) if p and p.path else p and p.act for p in given)


def _describe(module: Any) -> str:
    if isinstance(module, CONVOLUTIONS):
        name = "transposed conv" if isinstance(module, nn.ConvTranspose2d) else "conv"
        height, width = module.kernel_size
        stride = f" stride {module.stride[0]}" if module.stride[0] > 1 else ""
        mode = f"{module.padding_mode} pad {padding(module)[0]} + " if module.padding_mode != "zeros" else ""
        return f"{mode}{name} {height}x{width}{stride}"
    name = next((name for cls, name in NAMES.items() if isinstance(module, cls)), type(module).__name__)
    return f"{name} {module.padding[0]}" if isinstance(module, PADS) else name

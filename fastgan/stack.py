"""Networks of one architecture run as one: two generators, or two discriminators, in each launch.

Without batch norm every sample is computed on its own, so running G_A on its images and G_B on its images as
one batch with two sets of weights is the same computation. The weights stay parameters of their networks; a
launch reads them stacked.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastgan_kernels import conv_norm_act, conv_transpose_norm_act, residual_block
from fastgan_kernels._op import runs_kernel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgan.layers import norm_options, padding

PADS = (nn.ReflectionPad2d, nn.ReplicationPad2d)
CONVS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.InstanceNorm2d, nn.BatchNorm2d)
ACTS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh"}
ORDER = ("pad", "conv", "norm", "act", "dropout")
# what is kept for the backward pass: everything; without the laid-out activations of the fused ops; the input
# of every piece alone, so that pieces are computed again
MEMORY = ("fast", "low", "least")
GROUP = 3  # residual blocks in a piece
# modules of the same place in each network
Same = tuple[Any, ...]


def set_memory(nets: Iterable[nn.Module], memory: str) -> None:
    """Choose what networks keep for their backward pass; losses and gradients do not depend on it.

    Args:
        nets: networks of `fastgan.models`.
        memory: "fast" keeps everything; "low" lays the inputs of the fused ops out again (elsewhere it is
            "fast"); "least" also computes each piece (a convolution and what follows it, or three residual
            blocks) a second time.

    Raises:
        ValueError: another name.
    """
    if memory not in MEMORY:
        raise ValueError(f"set_memory: memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    for net in nets:
        for module in net.modules():
            if hasattr(module, "memory"):
                module.memory = memory  # type: ignore[assignment]


def run_together(
    calls: Sequence[tuple[nn.Module, Sequence[Tensor]]], *, stack: bool | None = None
) -> list[list[Tensor]]:
    """Outputs of networks, each on batches of its own, in as few passes as compute the same.

    A network without batch norm takes its batches as one, if they are of one size; networks of one
    architecture are one pass. With batch norm every batch keeps its own statistics: one pass each.

    Args:
        calls: (network, batches of (N, C, H, W)).
        stack: several networks in one pass; None: where the fused ops run (a GPU).

    Returns:
        For each network the outputs of its batches.
    """
    joined = [(net, *_join(net, batches)) for net, batches in calls]
    nets, inputs = [net for net, _, _ in joined], [parts[0] for _, parts, _ in joined]
    single = all(len(parts) == 1 for _, parts, _ in joined)
    wanted = runs_fused(inputs[0]) if stack is None else stack
    if len(calls) > 1 and wanted and single and stackable(nets) and len({x.shape for x in inputs}) == 1:
        memory = getattr(nets[0], "memory", "fast")
        together = run_layers([[net] for net in nets], torch.cat(inputs), memory)
        outputs = [[y] for y in together.chunk(len(nets))]
    else:
        outputs = [[net(x) for x in parts] for net, parts, _ in joined]
    return [
        list(found[0].split(sizes)) if len(found) == 1 and len(sizes) > 1 else found
        for found, (_, _, sizes) in zip(outputs, joined)
    ]


def runs_fused(x: Tensor) -> bool:
    """Whether the fused ops' kernels run on x; elsewhere the layers themselves are as fast."""
    return runs_kernel(x)


def _join(net: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The batches as one where that changes nothing, and their lengths."""
    sizes = [len(x) for x in batches]
    mixes = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "mixes_batch", False)
        for module in net.modules()
    )
    if len(batches) == 1 or mixes or len({(x.shape[1:], x.dtype) for x in batches}) > 1:
        return list(batches), sizes
    return [torch.cat(list(batches))], sizes


def stackable(nets: Sequence[nn.Module]) -> bool:
    """Whether networks have one architecture, and none of them batch norm or a hook."""
    first = _architecture(nets[0])
    return first is not None and all(_architecture(net) == first for net in nets[1:])


def _architecture(net: nn.Module) -> list[tuple[str, str, tuple[int, ...]]] | None:
    found = []
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or module._forward_hooks:
            return None
        weight = getattr(module, "weight", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        found.append((name, f"{type(module).__name__}({module.extra_repr()})", shape))
    return found


def run_line(net: Any, x: Tensor) -> Tensor:
    """The `line` of one network on x, (N, C, H, W): fused where the kernels run, as its `memory` says."""
    return run_layers([net.line], x, net.memory) if runs_fused(x) else run_plain(net.line, x, net.memory)


def run_plain(line: Iterable[nn.Module], x: Tensor, memory: str = "fast") -> Tensor:
    """Runs a line of layers as they are, (N, C, H, W). memory: see `set_memory`; "low" is "fast" here."""
    if memory == "least":
        return _in_pieces([(layer,) for layer in _flat(line)], x, _call)
    for layer in [line] if isinstance(line, nn.Module) else line:
        x = layer(x)
    return x


def run_layers(lines: Sequence[Iterable[nn.Module]], x: Tensor, memory: str = "fast") -> Tensor:
    """Runs the same line of layers of S networks on (S * N, C, H, W), the first N samples for the first.

    Padding, convolution, norm, activation and dropout that follow each other are one op, and so are residual
    blocks (modules with a `residual_body`). A module with a `line` is its layers, one with a static method
    `stacked` runs itself; anything else treats all samples alike and is called as it is. memory: see
    `set_memory`.
    """
    places: list[Same] = list(zip(*(_flat(line) for line in lines), strict=True))
    return _in_pieces(places, x, _fuse) if memory == "least" else _fuse(places, x, None, memory == "low")


def _in_pieces(places: Sequence[Same], x: Tensor, run: Callable[..., Tensor]) -> Tensor:
    """Runs the pieces one after the other, each computed again in the backward pass."""
    for piece in _pieces(places):
        if _keeps_itself(piece[0][0]):
            x = run(piece, x)
            continue
        # drawn here, so that it is the same the second time, and the same for all blocks in a row
        seed = torch.randint(2**62, (1,), device=x.device) if run is _fuse and _drops(piece) else None
        size = GROUP if _is_block(piece[0][0]) else len(piece)
        for at in range(0, len(piece), size):
            part = piece[at : at + size]
            x = _again(partial(run, part, seed=None if seed is None else seed + 2 * at), x, part)
    return x


def _pieces(places: Sequence[Same]) -> Iterator[list[Same]]:
    """Blocks in a row; a convolution and its run, with what stands before it; what keeps by itself."""
    at, start = 0, 0
    while at < len(places):
        run, alone = len(_run(places, at)), _keeps_itself(places[at][0])
        if alone or _is_block(places[at][0]):
            if start < at:
                yield list(places[start:at])
            start = at
            run = 1 if alone else sum(1 for _ in itertools.takewhile(lambda p: _is_block(p[0]), places[at:]))
        at += max(1, run)
        if run:
            yield list(places[start:at])
            start = at
    if start < len(places):
        yield list(places[start:])


def _keeps_itself(module: nn.Module) -> bool:
    """A level runs its own pieces; what works in place keeps its output, which is the input that follows."""
    return hasattr(module, "stacked") or getattr(module, "inplace", False)


def _drops(piece: Sequence[Same]) -> bool:
    return any(isinstance(m, nn.Dropout) and m.training for (first, *_) in piece for m in first.modules())


def _call(places: Sequence[Same], x: Tensor, seed: Tensor | None = None) -> Tensor:
    for (layer,) in places:
        x = layer(x)
    return x


def _again(function: Callable[[Tensor], Tensor], x: Tensor, piece: Sequence[Same]) -> Tensor:
    """function(x), of which x alone is kept: it is computed again in the backward pass."""
    if torch.compiler.is_compiling():
        # what follows is the compiler's own business there
        return checkpoint(function, x, use_reentrant=False)
    # the fused ops have their seed; and to read the state of a GPU's generator would end a capture
    random = _drops(piece) and not runs_fused(x)
    second = KeptStatistics(each for same in piece for each in same)
    return checkpoint(
        function, x, use_reentrant=False, preserve_rng_state=random,
        context_fn=lambda: (contextlib.nullcontext(), second),
    )  # fmt: skip


class KeptStatistics:
    """While networks compute a second time: the running statistics have seen the batch.

    May be entered more than once: a gradient penalty has two backward passes.
    """

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        modules = [module for net in nets for module in net.modules()]
        norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]

    def __enter__(self) -> None:
        for norm, _, _ in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, momentum, number in self.norms:
            norm.momentum, norm.num_batches_tracked = momentum, number


def _fuse(places: Sequence[Same], x: Tensor, seed: Tensor | None = None, recompute: bool = False) -> Tensor:
    at = 0
    while at < len(places):
        same = places[at]
        if _is_block(same[0]):
            blocks = list(itertools.takewhile(lambda p: _is_block(p[0]), places[at:]))
            x = _run_blocks(blocks, x, seed, recompute)
            at += len(blocks)
        elif hasattr(same[0], "stacked"):
            x = type(same[0]).stacked(same, x)
            at += 1
        else:
            run = _run(places, at)
            x = _convolve(run, x, seed, recompute) if run else same[0](x)
            at += max(1, len(run))
    return x


def _is_block(module: nn.Module) -> bool:
    """Whether a module is a residual block of layers that the op takes: no norm over several processes."""
    body = getattr(module, "residual_body", None)
    return body is not None and all(_kind(layer) is not None for layer in _flat(body))


def _flat(line: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Layers without the sequences and the places that do nothing."""
    for module in line:
        if type(module) is nn.Sequential:
            yield from _flat(list(module))
        elif hasattr(module, "line"):
            yield from _flat(module.line)  # type: ignore[arg-type]
        elif not isinstance(module, nn.Identity):
            yield module


def _run(places: Sequence[Same], at: int) -> dict[str, Same]:
    """The layers from `at` on that are one op with a convolution, by kind; empty if there is none."""
    found: dict[str, Same] = {}
    for same in places[at : at + len(ORDER)]:
        kind = _kind(same[0])
        late = kind is None or any(ORDER.index(kind) <= ORDER.index(k) for k in found)
        if late or ("conv" not in found and kind not in ("pad", "conv")):
            break
        found[kind] = same  # type: ignore[index]
    return found if "conv" in found else {}


def _kind(module: nn.Module) -> str | None:
    for kind, classes in (("pad", PADS), ("conv", CONVS), ("norm", NORMS), ("act", tuple(ACTS))):
        if isinstance(module, classes):
            return kind
    return "dropout" if isinstance(module, nn.Dropout) else None


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Parameters with the networks in front; one network's as they are, so that buffers are written."""
    given = [t for t in tensors if t is not None]
    if not given:
        return None
    return given[0] if len(given) == 1 else torch.stack(given)


def _options(same: dict[str, Same]) -> dict[str, Any]:
    """The keyword arguments of the ops for the norm, activation and dropout of a run."""
    options: dict[str, Any] = {}
    if "norm" in same:
        each = [norm_options(norm) for norm in same["norm"]]
        options = dict(each[0])
        for key in ("norm_weight", "norm_bias", "running_mean", "running_var"):
            if key in options:
                options[key] = _stack([o[key] for o in each])
        options["act"] = getattr(same["norm"][0], "act", "none")
        options["slope"] = getattr(same["norm"][0], "slope", 0.2)
    if "act" in same:
        layer = same["act"][0]
        options["act"] = next(name for kind, name in ACTS.items() if isinstance(layer, kind))
        options["slope"] = getattr(layer, "negative_slope", 0.2)
    if "dropout" in same and same["dropout"][0].training:
        options["dropout"] = same["dropout"][0].p
    return options


def _convolve(same: dict[str, Same], x: Tensor, seed: Tensor | None, recompute: bool) -> Tensor:
    convs, options = same["conv"], _options(same)
    options |= {"seed": seed, "recompute": recompute}
    weight, bias = _stack([c.weight for c in convs]), _stack([c.bias for c in convs])
    assert weight is not None
    stride = convs[0].stride[0]
    if isinstance(convs[0], nn.ConvTranspose2d):
        options |= {"padding": convs[0].padding[0], "output_padding": convs[0].output_padding[0]}
        return conv_transpose_norm_act(x, weight, bias, stride=stride, **options)
    width, mode = padding(convs[0], same["pad"][0] if "pad" in same else None)
    return conv_norm_act(x, weight, bias, stride=stride, padding=width, padding_mode=mode, **options)


def _run_blocks(places: Sequence[Same], x: Tensor, seed: Tensor | None, recompute: bool) -> Tensor:
    """Residual blocks in a row, each place a block of every network."""
    halves: list[dict[str, Same]] = []
    for same in places:
        body: list[Same] = list(zip(*(_flat(block.residual_body) for block in same), strict=True))
        while body:
            half = _run(body, 0)
            halves.append(half)
            body = body[len(half) :]
    first, options = halves[0], [_options(half) for half in halves]
    kept = ("norm", "eps", "training", "momentum", "act", "slope", "dropout")
    shared: dict[str, Any] = {key: value for key, value in options[0].items() if key in kept}
    for name, key in (
        ("norm_weights", "norm_weight"),
        ("norm_biases", "norm_bias"),
        ("running_means", "running_mean"),
        ("running_vars", "running_var"),
    ):
        shared[name] = [o[key] for o in options if o.get(key) is not None]
    weights = [_stack([c.weight for c in half["conv"]]) for half in halves]
    biases = [_stack([c.bias for c in half["conv"]]) for half in halves]
    mode = padding(first["conv"][0], first["pad"][0] if "pad" in first else None)[1]
    return residual_block(
        x,
        [w for w in weights if w is not None],
        [b for b in biases if b is not None],
        padding_mode=mode,
        seed=seed,
        recompute=recompute,
        **{"norm": "none", **shared},
    )

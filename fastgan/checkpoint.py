"""Save and resume a run; read and recognise weights, those of the original release included.

A checkpoint is a folder `step_00000300/` with one `<network>.safetensors` per network (keys of the original
release) and one `state.safetensors` (optimisers, history pools, random generators; counters as JSON in its
header). Nothing is pickled. It is written under a temporary name, flushed to the disk and renamed, so a
folder with a final name is always whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgan.config import UsageError
from fastgan.models import GENERATORS, build
from fastgan.models.describe import describe, say
from fastgan.models.munit import MUNITGenerator, MUNITTranslator

State = dict[str, Tensor]
Label = str | Sequence[str] | Sequence[float]
EACH = "all"  # in place of a label: the caller sets the network's own each time
BEST, OLD_BEST = "best", ".old_best"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or does not fit; one line that says what to do."""


def _sync(path: Path) -> None:
    # a rename may reach the disk before the file's bytes do: flush them first
    flags = os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR
    try:
        handle = os.open(path, flags)
    except OSError:
        return  # Windows cannot open folders
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    plain = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
    save_file(plain, path, metadata={"fastgan": json.dumps(about)})
    _sync(path)


def write_weights(path: Path, weights: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write one network for `read_weights`: .safetensors with a header, any other suffix as upstream's .pth,
    or MUNIT's .pt with a state dict for each domain.

    The file appears whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = path.with_name(f".writing_{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _write(temporary, weights, about)
        else:
            tensors = {k: v.detach().to("cpu").contiguous().clone() for k, v in weights.items()}
            if {k[:2] for k in tensors} == {"a.", "b."}:
                parts = {d: {k[2:]: v for k, v in tensors.items() if k[0] == d} for d in "ab"}
                torch.save(parts, temporary)
            else:
                torch.save(tensors, temporary)
            _sync(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


def _read(path: Path) -> State:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # cloned, because a mapped file could not be replaced on Windows
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a run's `checkpoints` folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d+", p.name))


def save(
    folder: Path,
    step: int,
    nets: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    about: dict[str, Any],
    *,
    keep: int = 1,
    best: bool = False,
) -> Path:
    """Write one checkpoint and then remove all but the newest `keep` older ones.

    Args:
        folder: the run's `checkpoints` folder, made where missing.
        step: number of finished steps; names the checkpoint.
        nets: state dict per network.
        state: every other tensor needed to go on.
        about: JSON values kept with all files, read back by `header`.
        keep: older checkpoints that stay.
        best: write `best` in place of the earlier one of that name; nothing else is removed.

    Raises:
        CheckpointError: disk full or not writable; the earlier checkpoints are untouched.
    """
    name = BEST if best else f"step_{step:08d}"
    final, temporary = folder / name, folder / f".writing_{step:08d}"
    if final.exists() and not best:
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing_*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        for name, weights in nets.items():
            _write(temporary / f"{name}.safetensors", weights, about | {"network": name})
        _write(temporary / "state.safetensors", state, about)
        _sync(temporary)
        if best:
            shutil.rmtree(folder / OLD_BEST, ignore_errors=True)
            if final.exists():
                final.replace(folder / OLD_BEST)
        temporary.replace(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "disk full" if full else str(error)
        older = checkpoints(folder)
        rest = f"; {older[-1]} is untouched" if older else "; there is no earlier checkpoint"
        hint = ": free some space and run the same command again" if full else ""
        raise CheckpointError(f"checkpoint {final} could not be saved, {reason}{rest}{hint}") from error
    if best:
        shutil.rmtree(folder / OLD_BEST, ignore_errors=True)
        return final
    for old in checkpoints(folder)[: -1 - keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def best_of(folder: Path) -> dict[str, Any]:
    """What the best checkpoint in a run's `checkpoints` folder is the best by: "measure", "value" and "step";
    {} where there is none.

    Raises:
        CheckpointError: it is not readable.
    """
    final, old = folder / BEST, folder / OLD_BEST
    if old.is_dir() and not final.exists():
        # a crash came between two renames
        old.replace(final)
    found = header(final / "state.safetensors") if (final / "state.safetensors").is_file() else {}
    return found.get("best", {})


def header(path: Path) -> dict[str, Any]:
    """What was noted beside the tensors of one of our files: step, recipe, settings, channels, value ranges.

    Raises:
        CheckpointError: unreadable.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return json.loads((file.metadata() or {}).get("fastgan", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def load(path: Path) -> tuple[dict[str, State], State, dict[str, Any]]:
    """Networks, other state and header of a checkpoint folder.

    Raises:
        CheckpointError: missing or unreadable.
    """
    if not (path / "state.safetensors").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: state.safetensors is missing")
    state = _read(path / "state.safetensors")
    files = [f for f in sorted(path.glob("*.safetensors")) if f.stem != "state"]
    return {f.stem: _read(f) for f in files}, state, header(path / "state.safetensors")


def read_weights(path: Path) -> tuple[State, dict[str, Any]]:
    """State dict and header (empty for foreign files) of one network from .safetensors or the original
    release's .pth; of MUNIT's file of both domains as one, with "a." and "b." before the keys.

    Prefixes of DataParallel and torch.compile are removed, and so are the running statistics that old
    releases stored for instance norms, which never used them.

    Raises:
        CheckpointError: missing, not a plain state dict, or holding pickled objects.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    about: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        state, about = _read(path), header(path)
    else:
        try:
            with warnings.catch_warnings():
                # torch remarks on unusual files; whether it could read them is all that matters here
                warnings.simplefilter("ignore")
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch's own first line recommends the unsafe way to load
            pickled = re.search(r"(?:GLOBAL|global:?|function|class) ([\w.]*\.[\w.]+)", str(error))
            why = f"it holds a pickled {pickled[1]}" if pickled else str(error).split("\n")[0]
            raise CheckpointError(
                f"{path} is not a plain file of weights ({why}); pickled objects can run any code and are "
                "never loaded: save net.state_dict() with torch.save where that object was made"
            ) from None
        if isinstance(loaded, dict) and set(loaded) == {"a", "b"}:
            parts = {k: part for k, part in loaded.items() if isinstance(part, dict)}
            if len(parts) == 2:
                # MUNIT's file has a state dict for each domain
                loaded = {f"{k}.{key}": value for k, part in parts.items() for key, value in part.items()}
        if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
            kind = (
                "its entries are " + ", ".join(map(str, list(loaded)[:4])) if isinstance(loaded, dict) else ""
            )
            raise CheckpointError(f"{path} is not the state dict of one network {kind}".rstrip())
        state = dict(loaded)
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state.items()}
    stats = {k.rpartition(".")[0] for k in state if k.endswith("running_mean")}
    # those of AdaIN belong to MUNIT's files
    idle = {p for p in stats if f"{p}.weight" not in state and ".dec.model.0." not in p}
    return {k: v for k, v in state.items() if k.rpartition(".")[0] not in idle}, about


def load_into(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network.

    Raises:
        CheckpointError: keys or shapes differ; names some of them and the network that the file looks like.
    """
    mine = net.state_dict()
    # PyTorch before 0.4.1 counted no batches; torch then fills in a zero
    missing = [k for k in mine if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in mine]
    shapes = [k for k in mine if k in state and mine[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} keys {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for keys, word in ((missing, "missing"), (extra, "not expected"), (shapes, "of another shape"))
            if keys
        ]
        found, wanted = say(describe(state)), say(describe(mine))
        raise CheckpointError(
            f"{source} does not fit: {'; '.join(parts)}. It looks like {found}, not {wanted}"
        )
    net.load_state_dict(dict(state))


class Loaded(NamedTuple):
    """A generator of `load_generator` and what its images mean.

    net: on the CPU, in evaluation mode. weights: as the file has them, in upstream's order. channels, ranges,
    dtypes: of the input and the output, as trained; 8 bits and 0..255 where the file does not say. output:
    "tanh" or "sigmoid". path: the file. about: its header, {} for foreign files. labels: what can be asked
    for, of a generator that takes a label.
    """

    net: nn.Module
    weights: State
    channels: tuple[int, int]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    dtypes: tuple[np.dtype[Any], np.dtype[Any]]
    output: Literal["tanh", "sigmoid"]
    path: Path
    about: dict[str, Any]
    labels: Labels


class Labels(NamedTuple):
    """names: of the numbers in a label, "1", "2" ... where the file has none. named: whether it has some.
    classes: exactly one number is 1."""

    names: tuple[str, ...] = ()
    named: bool = False
    classes: bool = False

    @classmethod
    def of(cls, about: Mapping[str, Any], count: int) -> Labels:
        """Those of a generator that takes `count` numbers, by the header of its file."""
        names = tuple(about.get("labels", ()))
        if not count or len(names) != count:
            return cls(tuple(str(k + 1) for k in range(count)))
        return cls(names, True, not about.get("settings", {}).get("attributes"))

    def _parts(self, word: str) -> list[str]:
        return [word] if word in self.names else word.split("+")

    def numbers(self, label: Label | None, file: Path) -> list[float]:
        """A label as numbers, [] for none; UsageError where it does not fit the generator of the file."""
        given: list[Any] = [label] if isinstance(label, str) else list(label or ())
        # several attributes may also stand in one word
        words = [part for word in given if isinstance(word, str) for part in self._parts(word)]
        if words and not self.names:
            raise UsageError(f"{file} takes no label: leave --to out")
        if words == [EACH] and EACH not in self.names:
            return [0.0] * len(self.names)
        if words and not self.named:
            raise UsageError(f"{file} does not name its labels: give --label and {len(self.names)} numbers")
        unknown = [word for word in words if word not in self.names]
        if unknown or (self.classes and len(words) > 1):
            rule = f"{unknown[0]} is no label of {file}" if unknown else f"{file} takes one label"
            raise UsageError(f"--to {' '.join(words)}: {rule}; it has {', '.join(self.names)}")
        if words:
            return [float(name in words) for name in self.names]
        if len(given) != len(self.names):
            rule = f"a label of {len(self.names)} numbers, got {len(given)}: give --label"
            if self.named:
                rule = f"a label: give --to with one of {', '.join(self.names)}, or --label"
            raise UsageError(f"{file} takes {rule if self.names else 'no --label'}")
        return [float(number) for number in given]


def load_generator(
    path: Path | str,
    direction: Literal["AtoB", "BtoA"] | None = None,
    label: Label | None = None,
    *,
    dropout: bool = False,
) -> Loaded:
    """A generator from a run or checkpoint folder, ours or the original release's, or from one file.

    Args:
        path: a file may be .safetensors, a .pth or .ckpt of pix2pix, CycleGAN, CUT or StarGAN, or MUNIT's
            gen_*.pt. Of a folder the newest weights are taken, the averaged ones where there are some.
            Network, norm, width, depth, dropout and channels are read off keys and shapes.
        direction: in terms of the data folder; default is the direction of training.
        label: for StarGAN alone, one number per label; or the names of those that are 1, where the file
            names them; or EACH.
        dropout: a U-Net whose file does not say whether it has dropout, which has no weights, gets it.

    Raises:
        CheckpointError: nothing there, pickled objects, or not a generator.
        UsageError: a direction that was not trained or is in another file; a label that does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a run folder, a checkpoint or a file of weights")
    file = _file_in(path, direction) if path.is_dir() else path
    weights, about = read_weights(file)
    if "noise_size" in about.get("settings", {}):
        raise UsageError(f"{file} makes images from noise: python -m fastgan.sample RUN OUTPUT")
    found = describe(weights)
    if found.get("network") not in GENERATORS:
        keys = ", ".join(list(weights)[:3])
        raise CheckpointError(
            f"{file} is not a generator: it looks like {say(found)}; its keys are {keys}, ..."
        )
    settings = about.get("settings", {})
    name = (about.get("network") or _network(file)).removesuffix("_ema")
    forward = direction in (None, settings.get("direction", "AtoB"))
    if path == file and direction and name in ("G_A", "G_B") and forward != (name == "G_A"):
        raise UsageError(f"{file} is the other way: give its folder for --direction {direction}")
    # what leaves no trace in the weights comes from the header
    kept = {"resnet": ("output", "padding"), "stargan": ()}
    kept |= dict.fromkeys(("discogan", "pan", "munit"), ("output",))
    kept |= {"srresnet": ("add_bicubic",), "srcnn": ("output", "scale")}
    extra = kept.get(found["network"], ("output", "dropout"))
    if dropout and "dropout" in extra:
        found["dropout"] = True
    net = build(found | {key: settings[key] for key in extra if key in settings})
    load_into(net, weights, str(file))
    weights = {key: weights[key] for key in net.state_dict() if key in weights}
    labels = Labels.of(about, found.get("labels", 0))
    numbers = labels.numbers(label, file)
    if numbers:
        net.label = torch.tensor(numbers, dtype=torch.float32)
    # the header names domains as A and B; this generator's own order is input, output
    ends = (1, 0) if name == "G_B" else (0, 1)
    if isinstance(net, MUNITGenerator):
        ends = (0, 1) if forward else (1, 0)
        net = MUNITTranslator(net, "AB"[ends[0]], "AB"[ends[1]])
        channels = tuple(found[f"channels_{'ab'[k]}"] for k in ends)
    elif "in_channels" in found:
        channels = found["in_channels"], found["out_channels"]
    else:
        # one domain; SRCNN takes any number of channels
        channels = (found.get("channels", about.get("channels", (3,))[0]),) * 2
    ranges = [(float(low), float(high)) for low, high in about.get("ranges", [(0, 255)] * 2)]
    dtypes = [np.dtype(d) for d in about.get("dtypes", ["uint8", "uint8"])]
    return Loaded(
        net.eval(), weights, channels, (ranges[ends[0]], ranges[ends[1]]), (dtypes[ends[0]], dtypes[ends[1]]),
        settings.get("output", "sigmoid" if found["network"] == "discogan" else "tanh"), file, about, labels,
    )  # fmt: skip


class Choices(NamedTuple):
    """What a user of a checkpoint can choose.

    directions: that `load_generator` takes and that differ, the one of training first; () where nothing tells
    which way a generator goes. labels: without names but for StarGAN.
    """

    directions: tuple[Literal["AtoB", "BtoA"], ...]
    labels: Labels


def choices(path: Path | str) -> Choices:
    """What can be chosen of a run or checkpoint folder or a file, without building a network.

    Raises:
        CheckpointError: nothing there, or unreadable.
    """
    path = Path(path)
    found: dict[Literal["AtoB", "BtoA"], Path] = {}
    if path.is_dir():
        ways: tuple[Literal["AtoB", "BtoA"], ...] = ("AtoB", "BtoA")
        for way in ways:
            with contextlib.suppress(UsageError):
                found[way] = _file_in(path, way)
    differ = len(set(found.values())) == len(found)
    if differ and len(found) == 2:
        default = _file_in(path, None)
        found = dict(sorted(found.items(), key=lambda item: item[1] != default))
    file = next(iter(found.values()), path)
    weights, about = read_weights(file)
    network = describe(weights)
    if network.get("network") == "munit":
        trained = about.get("settings", {}).get("direction", "AtoB")
        return Choices(("AtoB", "BtoA") if trained == "AtoB" else ("BtoA", "AtoB"), Labels())
    labels = Labels.of(about, network.get("labels", 0))
    # between labels there is no direction
    return Choices(tuple(found) if differ and not labels.names else (), labels)


def _network(file: Path) -> str:
    """Upstream's name of the network in a file, an empty string for other names."""
    found = re.fullmatch(r"\w+_net_(G(?:_[AB])?)\.pth|\d+-(G)\.ckpt|gen_\d+\.pt", file.name)
    return (found[1] or "G") if found else ""


def _file_in(path: Path, direction: str | None) -> Path:
    whole = checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    folder = whole[-1] if whole else path
    if (folder / "state.safetensors").is_file():
        about = header(folder / "state.safetensors")
        trained, both = about["settings"]["direction"], about.get("recipe") == "munit"
        files = {f.stem: f for f in folder.glob("G*.safetensors")}
    else:
        # nothing tells which way the only generator of a foreign folder goes
        trained, both = "AtoB", True
        # by number of epochs or steps; the letters of "latest" come after digits
        age = {f: re.split(r"_net_|-|^gen_|\.pt$", f.name) for f in folder.iterdir() if _network(f)}
        ordered = sorted(age, key=lambda f: (age[f][0] or age[f][1]).zfill(12))
        files = {_network(f): f for f in ordered}
    if not files:
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run folder, a checkpoint or a file of weights"
        )
    forward = direction in (None, trained)
    names = ["G_A", "G"] if forward else ["G_B", "G"] if both else ["G_B"]
    for name in [each + end for each in names for end in ("_ema", "")]:
        if name in files:
            return files[name]
    raise UsageError(
        f"{path} holds {', '.join(sorted(files))}: --direction {direction or trained} is not possible"
    )

"""Save and resume a run; read and recognise weights, those of the original release included.

A checkpoint is a folder `step_00000300/` with one `<network>.safetensors` per network (keys of the original
release) and one `state.safetensors` (optimisers, history pools, random generators; counters as JSON in its
header). Nothing is pickled. It is written under a temporary name, flushed to the disk and renamed, so a
folder with a final name is always whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

State = dict[str, Tensor]


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
) -> Path:
    """Write one checkpoint and then remove all but the newest `keep` older ones.

    Args:
        folder: the run's `checkpoints` folder, made where missing.
        step: number of finished steps; names the checkpoint.
        nets: state dict per network.
        state: every other tensor needed to go on.
        about: JSON values kept with all files, read back by `header`.
        keep: older checkpoints that stay.

    Raises:
        CheckpointError: disk full or not writable; the earlier checkpoints are untouched.
    """
    final, temporary = folder / f"step_{step:08d}", folder / f".writing_{step:08d}"
    if final.exists():
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
    for old in checkpoints(folder)[: -1 - keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
    release's .pth.

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
            why = str(error).split("\n")[0]
            raise CheckpointError(
                f"{path} is not a plain file of weights ({why}); pickled objects are never loaded, save "
                "net.state_dict() with torch.save instead"
            ) from None
        if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
            kind = (
                "its entries are " + ", ".join(map(str, list(loaded)[:4])) if isinstance(loaded, dict) else ""
            )
            raise CheckpointError(f"{path} is not the state dict of one network {kind}".rstrip())
        state = dict(loaded)
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state.items()}
    stats = {k.rpartition(".")[0] for k in state if k.endswith("running_mean")}
    idle = {p for p in stats if f"{p}.weight" not in state}
    return {k: v for k, v in state.items() if k.rpartition(".")[0] not in idle}, about


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Network and its arguments, read off the keys and shapes of a state dict.

    Returns:
        "network" (resnet, unet, encdec, patchgan) and the keyword arguments of its class; {} where nothing
        fits. Dropout of a U-Net and reflect against replicate padding leave no trace.
    """
    conv = {k.removesuffix(".weight"): v for k, v in state.items() if k.endswith(".weight") and v.ndim == 4}
    has_batch = any(k.endswith("running_mean") for k in state)

    def norm(inner: str) -> str:
        return "batch" if has_batch else "instance" if f"{inner}.bias" in state else "none"

    if "model.model.0" in conv and "model.model.3" in conv:
        inner, outer = conv["model.model.0"], conv["model.model.3"]
        levels = max(k.count(".model.") for k in conv)
        skips = outer.shape[0] == 2 * inner.shape[0]
        return {
            "network": "unet" if skips else "encdec", "in_channels": inner.shape[1],
            "out_channels": outer.shape[1], "levels": levels, "ngf": inner.shape[0],
            "norm": norm("model.model.0"),
        }  # fmt: skip
    blocks = sorted({int(k.split(".")[1]) for k in conv if ".conv_block." in k})
    top = sorted(int(k.split(".")[1]) for k in conv if re.fullmatch(r"model\.\d+", k))
    if top and top[0] == 1:
        first, last = "model.1", f"model.{top[-1]}"
        # zero padding has no layer of its own, so the block's first convolution is its first layer
        start = f"model.{blocks[0]}.conv_block." if blocks else ""
        inside = [int(k.removeprefix(start)) for k in conv if blocks and k.startswith(start)]
        zero = inside[:1] == [0]
        return {
            "network": "resnet", "in_channels": conv[first].shape[1], "out_channels": conv[last].shape[0],
            "ngf": conv[first].shape[0], "blocks": len(blocks), "norm": norm(first),
            "padding": "zero" if zero else "reflect",
            "dropout": bool(blocks) and inside[-1] - inside[0] == (4 if zero else 5),
        }  # fmt: skip
    if "net.0" in conv or "model.0" in conv:
        head = "net" if "net.0" in conv else "model"
        fields = {("net", 3): 1, ("model", 3): 16, ("model", 4): 34, ("model", 5): 70, ("model", 6): 142,
                   ("model", 7): 286}  # fmt: skip
        entry = conv[f"{head}.0"]
        return {
            "network": "patchgan", "in_channels": entry.shape[1], "ndf": entry.shape[0],
            "receptive_field": fields.get((head, len(conv)), 0), "norm": norm(f"{head}.2"),
        }  # fmt: skip
    return {}


def say(description: Mapping[str, Any]) -> str:
    """A description as words for a person."""
    if not description:
        return "a network that is not known here"
    rest = ", ".join(f"{k} {v}" for k, v in description.items() if k != "network")
    return f"{description['network']} ({rest})"


def load_into(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network.

    Raises:
        CheckpointError: keys or shapes differ; names some of them and the network that the file looks like.
    """
    mine = net.state_dict()
    missing, extra = [k for k in mine if k not in state], [k for k in state if k not in mine]
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

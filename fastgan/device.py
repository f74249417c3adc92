"""The device, the precision and the seed of a process."""

from __future__ import annotations

import os

import torch

from fastgan.config import UsageError


def pick_device(name: str, local: int | None = None, local_size: int = 1) -> torch.device:
    """The device of a `--device` value; of several processes on this machine, number `local` of
    `local_size`.

    Raises:
        UsageError: unknown or absent device, or fewer GPUs than processes.
    """
    if local is not None:
        if name not in ("auto", "cuda", "cpu"):
            raise UsageError(f"--device {name} is for one process: leave it out, or give cuda or cpu")
        if name != "cpu" and torch.cuda.is_available():
            count = torch.cuda.device_count()
            if local_size > count:
                raise UsageError(
                    f"{local_size} processes for {count} GPUs: give torchrun --nproc-per-node {count}"
                )
            torch.cuda.set_device(local)
            return torch.device("cuda", local)
        name = "cpu" if name == "auto" else name
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of a `--precision` value: bfloat16 or None; also sets TF32 for the process."""
    fast = name in ("auto", "tf32", "bf16")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = fast
        torch.backends.cudnn.allow_tf32 = fast
    if name == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # without these instructions a CPU emulates bfloat16, slower than float32
            has_bf16 = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        return torch.bfloat16 if has_bf16 else None
    return torch.bfloat16 if name == "bf16" else None


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed torch and, with `deterministic`, allow only algorithms that give the same bits every time."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

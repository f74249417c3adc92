"""What every op shares: the optional import of Triton, the CPU rule, argument checks and memory layout."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # Windows and macOS: the kernels are still defined, as plain functions that nobody calls
    HAS_TRITON = False

    def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    triton = SimpleNamespace(jit=_plain)
    tl = SimpleNamespace(constexpr=object)

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def runs_kernel(x: Tensor) -> bool:
    """The CPU rule: kernels run on a GPU and in Triton's interpreter; elsewhere the reference runs.

    A fake tensor may stand for one on a GPU: its mode then has `runs_kernels`.
    """
    planned = getattr(getattr(x, "fake_mode", None), "runs_kernels", False)
    return INTERPRET or (HAS_TRITON and (x.is_cuda or planned))


def require(ok: bool, op: str, argument: str, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{op}: {argument} must be {rule}, got {got}")


def require_image(op: str, x: Tensor) -> None:
    require(x.dim() == 4, op, "x", "(N, C, H, W)", f"shape {tuple(x.shape)}")
    require(x.dtype in FLOATS, op, "x", "float16, bfloat16, float32 or float64", x.dtype)


def layout(x: Tensor) -> torch.memory_format:
    """The memory format an op works in and returns: channels_last where x leans that way, else contiguous."""
    if x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format

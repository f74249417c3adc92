"""Batch norm whose statistics are those of all ranks.

A module of its own, imported where there are ranks: `torch.compiler.disable` brings torch's compiler with it,
two seconds at every start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastgan.parallel import Ranks


class _AllSum(torch.autograd.Function):
    """Sum over the ranks. The loss is the sum of all ranks' losses, so the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _AllSum.apply(dy, ctx.ranks), None


class SyncBatchNorm2d(_BatchNorm):
    """`torch.nn.BatchNorm2d` whose batch is that of all ranks; differentiable any number of times.

    Not a subclass of BatchNorm2d: whatever fuses one of those would take the statistics of one rank. The
    gradients that a rank receives are those of the sum of all ranks' losses, for its own inputs, and its
    share of them for the parameters: averaged over the ranks they are those of the mean of the losses.
    """

    ranks: Ranks

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"SyncBatchNorm2d: input must be (N, C, H, W), got {tuple(input.shape)}")

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) in and out, in the dtype and layout of `input`; N may differ from rank to rank."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        y, mean, var, count = _SyncNorm.apply(input, self.weight, self.bias, self.eps, self.ranks)
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                number = self.num_batches_tracked
                if number is not None:
                    number.add_(1)
                # a momentum of None is the plain mean of all batches so far; where they are not counted, as
                # in torch, nothing is learned
                part: Tensor | float = self.momentum or 0.0
                if self.momentum is None and number is not None:
                    part = 1 / number.to(mean.dtype)
                unbiased = var * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), part)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), part)
        return y


class _SyncNorm(torch.autograd.Function):
    """Keeps the input alone for backward; where backward itself is to be differentiated it starts anew from
    functions of torch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(_wide(x), ranks)
        ctx.save_for_backward(x, weight, bias, mean, var, count)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.eps, ctx.ranks = eps, ranks
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, count = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [t if needed else None for t, needed in zip((x, weight, bias), ctx.needs_input_grad)]
            y = _normalised(x, weight, bias, ctx.eps, ctx.ranks)
            found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy, create_graph=True))
            return *(None if t is None else next(found) for t in inputs), None, None
        rstd = (var + ctx.eps).rsqrt().view(-1, 1, 1)
        g, xhat = _wide(dy), (_wide(x) - mean.view(-1, 1, 1)) * rstd
        sums = torch.stack([g.sum((0, 2, 3)), (g * xhat).sum((0, 2, 3))])
        dx = None
        if ctx.needs_input_grad[0]:
            means = (ctx.ranks.sum(sums) / count).view(2, -1, 1, 1)
            dx = (g - means[0] - xhat * means[1]) * (rstd if weight is None else rstd * weight.view(-1, 1, 1))
            dx = dx.to(x.dtype)
        return dx, None if weight is None else sums[1], None if bias is None else sums[0], None, None


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks) -> Tensor:
    mean, var, _ = _statistics(_wide(x), ranks)
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    y = (_wide(x) - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    return (y if bias is None else y + bias.view(-1, 1, 1)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _statistics(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count (C,) over all ranks: each rank's own, combined without cancellation."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    mine = torch.stack([mean, var, torch.full_like(mean, x.numel() / x.shape[1])])
    # every rank writes its row of a table of zeros
    table = F.pad(mine[None], (0, 0, 0, 0, ranks.rank, ranks.size - 1 - ranks.rank))
    means, variances, counts = _AllSum.apply(table, ranks).unbind(1)
    count = counts.sum(0)
    share = counts / count
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), count.detach()


def sync_batch_norm(net: nn.Module, ranks: Ranks) -> None:
    """Let every BatchNorm2d of a network share its statistics with the other ranks, in place.

    Parameters, buffers, names, hooks and settings stay. A norm that is part of a fused convolution
    (`fastgan.layers.Conv2d(norm=...)`) then fails at its first call.
    """
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d  # type: ignore[assignment]
            module.ranks = ranks  # type: ignore[assignment]

"""Adam as one launch, with half-precision copies of the weights for the forward pass; L-BFGS step by step.

The copies serve mixed precision: the update writes them in the pass that writes the weights, so the next
forward pass reads 2 bytes per weight and casts nothing, and gradients arrive in the precision of the copies:

    adam = Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999), copies=torch.bfloat16)
    with adam.copies_in(net):
        loss(net(x)).backward()
    adam.step()

Rounding the gradients to bfloat16 changes what 10 steps of a small pix2pix do to its weights by 0.08 %
(tests/test_optim.py, on a CPU; the bound there is 1 %). Without copies gradients stay float32: that is the
default. Several backward passes before one step add up in the precision of the copies: better without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastgan_kernels import adam_step
from torch import Tensor, nn


class Adam(torch.optim.Adam):
    """torch.optim.Adam(fused=True) without weight decay; on a GPU with Triton the fused op adam_step.

    State, state_dict and param_groups are torch's, in both directions. On the CPU the results are those of
    torch's fused Adam, bit by bit. Every step may be captured in a CUDA graph after one that was not.

    Args:
        params: float32 or float64 parameters, in one group.
        lr: a number, or a tensor of one element on the device, which a captured step reads when it runs.
        betas, eps: as torch's.
        copies: dtype of the copies of convolution weights (those of more than two dimensions); None: none.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        copies: torch.dtype | None = None,
    ) -> None:
        params = list(params)
        devices = {p.device.type for p in params}
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            fused=devices <= {"cpu", "cuda"},
            capturable="cuda" in devices,
        )
        self._copies: dict[Tensor, nn.Parameter] = {}
        if copies is not None:
            for p in params:
                if p.dim() > 2:
                    # a leaf of its own, also where the dtype is that of the parameter
                    self._copies[p] = nn.Parameter(p.detach().to(copies, copy=True))

    @property
    def has_copies(self) -> bool:
        """Whether any parameter has a copy."""
        return bool(self._copies)

    def copy_of(self, param: Tensor) -> Tensor | None:
        """The copy that stands for a parameter in the forward pass, None where it has none."""
        return self._copies.get(param)

    def grad_of(self, param: Tensor) -> Tensor | None:
        """The gradient that the next step takes for a parameter: its own, or that of its copy.

        Raises:
            ValueError: both have one.
        """
        copy = self._copies.get(param)
        if copy is None or copy.grad is None:
            return param.grad
        if param.grad is not None:
            raise ValueError("Adam: a parameter and its copy both have a gradient; call zero_grad() between")
        return copy.grad

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the copies anew, after something else than a step has changed the parameters."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))

    @contextmanager
    def copies_in(self, *nets: nn.Module) -> Iterator[None]:
        """Within the context the copies are the parameters of the networks, and their gradients arrive there.

        Backward belongs inside as well where activations are computed again in it. Names, order and tied
        weights stay as they are; a state_dict made inside holds the copies.
        """
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module in {m for net in nets for m in net.modules()}:
                for name, p in module._parameters.items():
                    if p is not None and p in self._copies:
                        swapped.append((module, name, p))
                        module._parameters[name] = self._copies[p]
            yield
        finally:
            for module, name, p in swapped:
                module._parameters[name] = p

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the parameters and of their copies."""
        super().zero_grad(set_to_none)
        for copy in self._copies.values():
            if set_to_none:
                copy.grad = None
            elif copy.grad is not None:
                copy.grad.detach_().zero_()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class or of torch.optim.Adam; the copies are written anew.

        Tensors that are here already, a learning rate among them, keep their place in memory: a captured step
        knows it.
        """
        rates, before = [group["lr"] for group in self.param_groups], dict(self.state)
        super().load_state_dict(state_dict)
        for p, entry in self.state.items():
            for key, value in entry.items():
                # moments in the memory order of the parameter, in which the update walks both
                fresh = torch.zeros((), device=p.device) if key == "step" else torch.empty_like(p)
                entry[key] = before.get(p, {}).get(key, fresh).copy_(value)
        for group, rate in zip(self.param_groups, rates):
            if isinstance(rate, Tensor):
                group["lr"] = rate.fill_(group["lr"])
        self.refresh()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, and its copy."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # one launch for each kind of gradient, with copies and without
            kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                grad = self.grad_of(p)
                if grad is not None:
                    kinds.setdefault((p.dtype, grad.dtype, p in self._copies), []).append((p, grad))
            for pairs in kinds.values():
                params, grads = zip(*pairs)
                self._update(group, params, grads)
        return loss

    def _update(self, group: dict[str, Any], params: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        if group["weight_decay"] or group["amsgrad"] or group["maximize"]:
            raise ValueError("Adam: weight_decay, amsgrad and maximize must be off")
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        exp_avgs, exp_avg_sqs, steps = (
            [self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        device = params[0].device
        # a number keeps its digits where the device has float64
        dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        lr = group["lr"]
        lr = lr.to(device) if isinstance(lr, Tensor) else torch.full((), lr, dtype=dtype, device=device)
        copies = [self._copies[p] for p in params if p in self._copies]
        adam_step(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr,
            betas=group["betas"], eps=group["eps"], copies=copies,
        )  # fmt: skip


class LBFGS(torch.optim.LBFGS):
    """torch.optim.LBFGS without a line search, one iteration a step, from the gradients that are there: the
    same updates as its own loop over `max_iter`, of the loss times the number of values. That number changes
    nothing but what torch compares with 1e-10: the gradient of a mean over a large image would stay below.

    It never stops by itself, and its state_dict holds tensors alone: the differences of the last gradients
    and of the last steps as one tensor each, (steps, values).

    Args:
        params: parameters in one group.
        lr: length of a step.
        history_size: steps that are remembered; each takes twice the memory of the parameters.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1.0, *, history_size: int = 20) -> None:
        super().__init__(
            params, lr=lr, max_iter=1, tolerance_grad=0.0, tolerance_change=0.0, history_size=history_size
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients."""
        # the loss would only be returned
        return super().step(closure or (lambda: 0.0))

    def _gather_flat_grad(self) -> Tensor:
        return super()._gather_flat_grad() * self._numel()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with tensors for lists and numbers."""
        found = super().state_dict()
        found["state"] = {k: _as_tensors(entry) for k, entry in found["state"].items()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for entry in state_dict["state"].values():
            first = self._params[0]
            self.state[first] = _from_tensors({key: value.to(first.device) for key, value in entry.items()})


# of torch's state: what is a number, a list of tensors, a tensor
COUNTS, LISTS, TENSORS = ("n_iter", "func_evals"), ("old_dirs", "old_stps", "ro"), ("d", "prev_flat_grad")


def _as_tensors(entry: dict[str, Any]) -> dict[str, Tensor]:
    out = {key: torch.tensor(entry[key]) for key in COUNTS}
    if "d" in entry:
        # a number keeps all its digits
        out |= {key: torch.as_tensor(entry[key], dtype=torch.float64) for key in ("t", "H_diag")}
        out |= {key: entry[key] for key in TENSORS}
        out |= {key: torch.stack(entry[key]) for key in LISTS if entry[key]}
    return out


def _from_tensors(entry: dict[str, Tensor]) -> dict[str, Any]:
    out: dict[str, Any] = {key: int(entry[key]) for key in COUNTS}
    if "d" in entry:
        out |= {key: entry[key].to(entry["d"].dtype) for key in ("t", "H_diag")}
        out |= {key: entry[key] for key in TENSORS}
        # each in memory of its own, as it was: sums over it are taken in the same order
        out |= {key: [row.clone() for row in entry[key]] if key in entry else [] for key in LISTS}
        out["prev_loss"] = 0.0
    return out

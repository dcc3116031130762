"""Muon with one batched orthogonalisation per shape of matrix.

`torch.optim.Muon` works matrix by matrix. The matrices here are so small that on a CPU, and more so on a busy one, most
of its time goes into starting and joining threads; together they take a fraction of it. The result is the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """The Newton-Schulz iteration on a stack of matrices, in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT.contiguous()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class BatchedMuon(torch.optim.Muon):
    """Takes the same options and keeps the same state as `torch.optim.Muon` (Nesterov momentum, original rates)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all matrices."""
        if closure is not None:
            raise ValueError("BatchedMuon takes no closure")
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                self._update(shape, params, group)

    def _update(self, shape: torch.Size, params: list[Tensor], group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        update = orthogonalised(torch.stack(torch._foreach_lerp(grads, buffers, momentum)), group["ns_steps"]).float()
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind()), alpha=-rate * math.sqrt(max(1.0, shape[0] / shape[1])))

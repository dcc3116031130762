"""What logits at masks are compared with: the text's tokens or the base's own distribution (method.md section 4).

The logits of all masks of a step (anchors x K x V numbers) are never held whole: they are made, compared and turned
into a gradient of the latents chunk by chunk. Letters: R rows that have a label, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.model import MTPModel

# Logits held at once: 64 MiB in fp32.
LOGITS_AT_ONCE = 1 << 24

# (logits (r, V) fp32, which of the R rows they are) -> loss of each row (r,)
RowLosses = Callable[[Tensor, slice], Tensor]


class _Chunked(torch.autograd.Function):
    """Sum of weighted row losses; the gradient of the latents is made in the forward, so logits are computed once."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, unembed: Callable[[Tensor], Tensor], compare: RowLosses, weights: Tensor, rows: int
    ) -> Tensor:
        total = latents.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(latents) if ctx.needs_input_grad[0] else None
        for start in range(0, latents.shape[0], rows):
            chunk = slice(start, start + rows)
            part = latents[chunk].detach()
            with torch.set_grad_enabled(gradient is not None):
                part.requires_grad_(gradient is not None)
                loss = compare(unembed(part).float(), chunk) @ weights[chunk]
                if gradient is not None:
                    (gradient[chunk],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


def row_mean(
    latents: Tensor,
    compare: RowLosses,
    unembed: Callable[[Tensor], Tensor],
    vocabulary: int,
    weights: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Weighted mean of the losses of latents (R, D), weights (R,) fp32 -> scalar fp32; zero without rows.

    `total` () is what the weighted sum is divided by where these are not all rows.
    """
    if not latents.shape[0]:
        return latents.sum().float()
    weights = latents.new_ones(latents.shape[0], dtype=torch.float32) if weights is None else weights
    summed: Tensor = _Chunked.apply(latents, unembed, compare, weights, max(1, LOGITS_AT_ONCE // vocabulary))
    return summed / (weights.sum() if total is None else total)


def cross_entropy(
    latents: Tensor,
    labels: Tensor,
    unembed: Callable[[Tensor], Tensor],
    vocabulary: int,
    weights: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Weighted mean cross-entropy of latents (R, D) to labels (R,) int64 -> scalar fp32; total as in `row_mean`."""
    return row_mean(latents, to_labels(labels), unembed, vocabulary, weights, total)


def to_labels(labels: Tensor) -> RowLosses:
    """Cross-entropy to labels (R,) int64."""
    return lambda logits, chunk: F.cross_entropy(logits, labels[chunk], reduction="none")


def to_base(objective: str, model: MTPModel, z: Tensor, at: Tensor) -> RowLosses:
    """`kl` or `tv` to the base's own distribution at its latents z (P, D), row r to z[at[r]]; at (R,) int64.

    kl is KL(base || masks). tv is half the sum of |difference|: drafts drawn in the base's race are refused with
    probability at most 2 tv / (1 + tv).
    """
    divergence = _kl if objective == "kl" else _total_variation

    def compare(logits: Tensor, chunk: slice) -> Tensor:
        with torch.no_grad():
            # Blocks overlap, so that many rows have the same position: it is unembedded once.
            positions, which = at[chunk].unique(return_inverse=True)
            wanted = model.base.unembed(z[positions]).float().log_softmax(-1)[which]
        return divergence(logits, wanted)

    return compare


def _kl(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)


def _total_variation(logits: Tensor, wanted: Tensor) -> Tensor:
    return 0.5 * (logits.softmax(-1) - wanted.exp()).abs().sum(-1)


@torch.no_grad()
def choices(model: MTPModel, latents: Tensor) -> Tensor:
    """latents (R, D) -> (R,) int64, the likeliest tokens, never all logits at once."""
    if not latents.shape[0]:
        return latents.new_zeros(0, dtype=torch.long)
    rows = max(1, LOGITS_AT_ONCE // model.base.vocab_size)
    return torch.cat([model.base.unembed(part).argmax(-1) for part in latents.split(rows)])

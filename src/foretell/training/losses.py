"""The three losses at the masks (method.md section 4).

Letters: B batch, N tokens, A anchors, K masks per block, D hidden, V vocabulary, R rows that have a label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.config import TrainConfig
from foretell.model import MTPModel

# Logits held at once: 64 MiB in fp32.
LOGITS_AT_ONCE = 1 << 24


class Targets(NamedTuple):
    """What every mask is to predict. Mask j (counted from 1) after anchor i has label x_{i+j+1} and position id i+j."""

    labels: Tensor  # (B, A, K) int64
    previous: Tensor  # (B, A, K) int64: x_{i+j}, the token before the label
    positions: Tensor  # (B, A, K) int64: i + j, where the base predicts the same token
    valid: Tensor  # (B, A, K) bool: the label exists and it and all tokens since the anchor are trained


def targets(ids: Tensor, trained: Tensor, anchors: Tensor, anchor_valid: Tensor, k: int) -> Targets:
    """ids and trained (B, N), anchors and anchor_valid (B, A). Padding must not be trained."""
    last = ids.shape[1] - 1
    offsets = torch.arange(1, k + 1, device=ids.device)
    positions = anchors[:, :, None] + offsets  # (B, A, K)
    ahead = positions.clamp(max=last - 1)

    def at(values: Tensor, where: Tensor) -> Tensor:
        return values.gather(1, where.flatten(1)).view(where.shape)

    # A label after the end of an answer would ask the block to guess the next user turn.
    reached = at(trained, anchors + 1)[:, :, None] & at(trained, ahead + 1) & (positions < last)
    valid = reached.long().cumprod(-1).bool() & anchor_valid[:, :, None]
    return Targets(at(ids, ahead + 1), at(ids, ahead), ahead, valid)


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies over rows; the gradient of the latents is made in the forward, chunk by chunk.

    So the logits are computed once and never held whole: rows R times vocabulary V is most of the memory otherwise.
    """

    @staticmethod
    def forward(ctx: Any, latents: Tensor, labels: Tensor, unembed: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        total = latents.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(latents) if ctx.needs_input_grad[0] else None
        for start in range(0, latents.shape[0], rows):
            part = latents[start : start + rows].detach()
            with torch.set_grad_enabled(gradient is not None):
                part.requires_grad_(gradient is not None)
                loss = F.cross_entropy(unembed(part).float(), labels[start : start + rows], reduction="sum")
                if gradient is not None:
                    (gradient[start : start + rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


def cross_entropy(latents: Tensor, labels: Tensor, unembed: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """Mean over rows: latents (R, D), labels (R,) -> scalar fp32; zero without rows."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    total: Tensor = _CrossEntropy.apply(latents, labels, unembed, rows)
    return total / max(1, latents.shape[0])


def latent_consistency(z_masks: Tensor, z: Tensor, at: Tensor) -> Tensor:
    """Mean over NTP positions of the mean squared distance to the masks that share the position.

    z_masks (R, D); z (P, D), used as a constant; at (R,) int64: each mask's row of z. Mean over D. Zero without rows.
    """
    if not at.numel():
        return z_masks.sum()
    error = (z_masks.float() - z.detach()[at].float()).square().mean(-1)
    sharing = torch.bincount(at, minlength=z.shape[0])
    return (error / sharing[at]).sum() / (sharing > 0).sum()


def mtp_losses(
    model: MTPModel, z_masks: Tensor, z: Tensor, target: Targets, real: Tensor, config: TrainConfig
) -> dict[str, Tensor]:
    """`base`, `sampler` and `lcm`, unweighted, and their weighted sum `loss`.

    z_masks (B, A, K, D), z (B, N, D); real (B, N) bool is false at padding. Only rows with a label are unembedded.
    """
    unembed, vocabulary = model.base.unembed, model.base.vocab_size
    valid = target.valid
    masks, labels = z_masks[valid], target.labels[valid]
    rows = torch.arange(z.shape[0], device=z.device)[:, None, None] * z.shape[1] + target.positions
    losses = {"base": cross_entropy(masks, labels, unembed, vocabulary)}
    total = config.base_weight * losses["base"]
    if model.sampler is not None:
        guess = model.sampler(model.base.embed(target.previous[valid]), masks)
        losses["sampler"] = cross_entropy(guess.to(masks.dtype), labels, unembed, vocabulary)
        total = total + config.sampler_weight * losses["sampler"]
    if config.lcm_weight:
        lcm = latent_consistency(masks, z.flatten(0, 1), rows[valid])
        if config.lcm_normalised:
            lcm = lcm / z.detach()[real].float().var(0, unbiased=False).mean().clamp_min(1e-12)
        losses["lcm"] = lcm
        total = total + config.lcm_weight * lcm
    losses["loss"] = total
    return losses


def ntp_loss(model: MTPModel, z: Tensor, ids: Tensor, anchors: Tensor, valid: Tensor) -> Tensor:
    """The base's own next-token loss at the anchors: with the gate it must stay where it began."""
    rows = z.gather(1, anchors[:, :, None].expand(-1, -1, z.shape[-1]))[valid]
    return cross_entropy(rows, ids.gather(1, anchors + 1)[valid], model.base.unembed, model.base.vocab_size)

"""The three losses at the masks (method.md section 4).

Letters: B batch, N tokens, A anchors, K masks per block, D hidden, V vocabulary, R rows that have a label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foretell.config import TrainConfig
from foretell.model import MTPModel
from foretell.training.objectives import choices, cross_entropy, row_mean, to_base, to_labels
from foretell.training.offsets import count_held


class Targets(NamedTuple):
    """What every mask is to predict. Mask j (counted from 1) after anchor i has label x_{i+j+1} and position id i+j."""

    labels: Tensor  # (B, A, K) int64
    previous: Tensor  # (B, A, K, 2) int64: x_{i+j} and x_{i+j-1}, the tokens before the label
    positions: Tensor  # (B, A, K) int64: i + j, where the base predicts the same token
    valid: Tensor  # (B, A, K) bool: the label exists and it and all tokens since the anchor are trained
    sharing: Tensor  # (B, A, K) int64: valid masks of all blocks at that position; they predict the same token

    def of_blocks(self, which: slice) -> Targets:
        """What some of the blocks are to predict; they still share positions with the others."""
        return Targets(*(tensor[:, which] for tensor in self))


def targets(
    ids: Tensor, trained: Tensor, anchors: Tensor, anchor_valid: Tensor, k: int, lengths: Tensor | None = None
) -> Targets:
    """ids and trained (B, N), anchors and anchor_valid (B, A). Padding must not be trained.

    Of block b only the first lengths[b] masks, lengths (B, A) int64, are valid; by default all k.
    """
    last = ids.shape[1] - 1
    offsets = torch.arange(1, k + 1, device=ids.device)
    positions = anchors[:, :, None] + offsets  # (B, A, K)
    ahead = positions.clamp(max=last - 1)

    def at(values: Tensor, where: Tensor) -> Tensor:
        return values.gather(1, where.flatten(1)).view(where.shape)

    # A label after the end of an answer would ask the block to guess the next user turn.
    reached = at(trained, anchors + 1)[:, :, None] & at(trained, ahead + 1) & (positions < last)
    valid = reached.long().cumprod(-1).bool() & anchor_valid[:, :, None]
    if lengths is not None:
        valid &= offsets <= lengths[:, :, None]
    rows = _rows_of_z(ahead, last + 1)
    previous = torch.stack([at(ids, ahead), at(ids, ahead - 1)], dim=-1)
    return Targets(at(ids, ahead + 1), previous, ahead, valid, _sharing(rows, rows[valid]))


class Totals(NamedTuple):
    """What the terms' sums are divided by: () fp32 each, over all sequences of an optimiser step.

    A step's sequences may be spread over processes and micro-batches; divided by these, their losses add up to the
    loss of all together. An average of averages would weigh a sequence by how few targets its neighbours have.
    """

    masks: Tensor  # masks with a label, by weight
    positions: Tensor  # the same where masks that share a position count as one
    regular: Tensor  # regular tokens with a label, for the ungated baseline
    variance: Tensor | None = None  # of the base's latents; None: of those at hand

    @classmethod
    def of(cls, target: Targets, trained: Tensor, weights: Tensor) -> Totals:
        """Of some of the sequences: target, trained (B, N) bool and weights (K,) fp32 by offset."""
        weight = weights.expand_as(target.valid)[target.valid]
        share = weight / target.sharing[target.valid]
        return cls(weight.sum(), share.sum(), trained[:, 1:].sum().float())


def _rows_of_z(positions: Tensor, tokens: int) -> Tensor:
    """positions (B, A, K) int64 -> each mask's row among the B * tokens latents of the regular tokens."""
    batch = torch.arange(len(positions), device=positions.device)
    return batch[:, None, None] * tokens + positions


def _sharing(at: Tensor, counted: Tensor) -> Tensor:
    """at and counted int64 -> like at: how many of `counted` have that value."""
    return torch.bincount(counted, minlength=int(at.max()) + 1)[at]


def latent_consistency(
    z_masks: Tensor,
    z: Tensor,
    at: Tensor,
    weights: Tensor | None = None,
    total: Tensor | None = None,
    sharing: Tensor | None = None,
) -> Tensor:
    """Mean over NTP positions of the mean squared distance to the masks that share the position.

    z_masks (R, D); z (P, D), used as a constant; at (R,) int64: each mask's row of z. Mean over D. Zero without rows.
    With weights (R,) the means are weighted, a position counting as much as its masks do. `total` () is the number of
    positions, so counted, and sharing (R,) of the masks at each one's position, where these are not all.
    """
    if not at.numel():
        return z_masks.sum()
    error = (z_masks.float() - z.detach()[at].float()).square().mean(-1)
    share = (1 if weights is None else weights) / (_sharing(at, at) if sharing is None else sharing)
    return (error * share).sum() / (share.sum() if total is None else total)


def mtp_losses(
    model: MTPModel,
    z_masks: Tensor,
    z: Tensor,
    target: Targets,
    real: Tensor,
    config: TrainConfig,
    weights: Tensor | None = None,
    totals: Totals | None = None,
) -> dict[str, Tensor]:
    """`base`, `sampler` and `lcm`, unweighted, and their weighted sum `loss`.

    z_masks (B, A, K, D), z (B, N, D); real (B, N) bool is false at padding; weights (K,) fp32 by offset, by default all
    alike; totals where these are not all sequences. Only rows with a label are unembedded. Also
    `held` (2, K), see `count_held`, if offset_weights needs it.
    """
    unembed, vocabulary = model.base.unembed, model.base.vocab_size
    valid = target.valid
    masks, labels, known = z_masks[valid], target.labels[valid], z.detach().flatten(0, 1)
    at = _rows_of_z(target.positions, z.shape[1])[valid]
    weight = None if weights is None else weights.expand_as(valid)[valid]

    def loss(latents: Tensor, objective: str) -> Tensor:
        compare = to_labels(labels) if objective == "labels" else to_base(objective, model, known, at)
        return row_mean(latents, compare, unembed, vocabulary, weight, totals and totals.masks)

    losses = {"base": loss(masks, config.base_objective)}
    total = config.base_weight * losses["base"]
    draft = masks
    if model.sampler is not None:
        draft = model.sample(target.previous[valid], masks).to(masks.dtype)
        losses["sampler"] = loss(draft, config.sampler_objective)
        total = total + config.sampler_weight * losses["sampler"]
    if config.lcm_weight:
        lcm = latent_consistency(masks, known, at, weight, totals and totals.positions, target.sharing[valid])
        if config.lcm_normalised:
            lcm = lcm / (variance(z[real]) if totals is None or totals.variance is None else totals.variance)
        losses["lcm"] = lcm
        total = total + config.lcm_weight * lcm
    if config.offset_weights == "acceptance":
        positions, which = at.unique(return_inverse=True)
        match = torch.zeros_like(valid)
        match[valid] = choices(model, draft.detach()) == choices(model, known[positions])[which]
        losses["held"] = count_held(match, valid)
    losses["loss"] = total
    return losses


def variance(z: Tensor) -> Tensor:
    """Of latents (R, D) over rows, mean over D: () fp32, above zero."""
    return z.detach().float().var(0, unbiased=False).mean().clamp_min(1e-12)


def ntp_loss(model: MTPModel, z: Tensor, ids: Tensor, anchors: Tensor, valid: Tensor) -> Tensor:
    """The base's own next-token loss at the anchors: with the gate it must stay where it began."""
    rows = z.gather(1, anchors[:, :, None].expand(-1, -1, z.shape[-1]))[valid]
    return cross_entropy(rows, ids.gather(1, anchors + 1)[valid], model.base.unembed, model.base.vocab_size)

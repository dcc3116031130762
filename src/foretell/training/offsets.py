"""How much each mask of a block counts, and how many of its masks are trained (method.md section 4).

Letters: B batch, A anchors, K masks per block; mask j is counted from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foretell.config import TrainConfig

MEMORY = 0.95  # of the running estimate, per step
LEAST = 0.05  # of the first mask's weight: nothing could recover from no weight at all


def offset_weights(config: TrainConfig, held: Tensor) -> Tensor:
    """(K,) fp32, 1 for the first mask; held (K,): the estimated chance that the first j drafts hold."""
    k = held.shape[0]
    if config.offset_weights == "decay":
        return config.offset_decay ** torch.arange(k, dtype=torch.float32, device=held.device)
    if config.offset_weights == "acceptance":
        return torch.cat([held.new_ones(1), held[:-1]]).clamp_min(LEAST).float()
    return torch.ones(k, dtype=torch.float32, device=held.device)


def block_lengths(anchors: Tensor, ids: Tensor, number: int, k: int, config: TrainConfig, ragged: bool) -> Tensor:
    """How many masks of each block are trained at step `number`, from 0: (B, A) int64 in 1..k.

    All k, or fewer during `masks_warmup`. If `ragged`, as bidirectional blocks need, half of the blocks have any length
    up to that. Which ones follows from step, position and token alone: no random state to keep, alike on any machine.
    """
    most = k
    if number < config.masks_warmup:
        most = 1 + number * k // config.masks_warmup
    lengths = torch.full_like(anchors, most)
    if ragged:
        mixed = (number + 1) * 1_000_003 + anchors * 7_919 + ids.gather(1, anchors) * 104_729
        mixed = (mixed ^ (mixed >> 7)) * 2_654_435_761 % (1 << 32) >> 8
        lengths = (1 + mixed % (2 * most)).clamp(max=most)
    return lengths


class Held:
    """Running estimate, over the steps of a training, of the chance that the first j drafts of a block hold."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.chances = torch.ones(k, dtype=torch.float32, device=device)  # nothing is known: all masks count alike

    def update(self, counts: Tensor) -> None:
        """counts (2, K) fp32 of one step, as `count_held` gives them, of all processes together."""
        held, seen = counts
        share = torch.where(seen > 0, held / seen.clamp_min(1), self.chances)
        self.chances = MEMORY * self.chances + (1 - MEMORY) * share

    def state(self) -> list[float]:
        """For a checkpoint: JSON keeps every bit of a float."""
        return [float(value) for value in self.chances]

    def load(self, state: list[float]) -> None:
        self.chances = torch.tensor(state, dtype=torch.float32, device=self.chances.device)


def count_held(match: Tensor, valid: Tensor) -> Tensor:
    """match, valid (B, A, K) bool -> (2, K) fp32: blocks whose first j drafts hold, and blocks that have j labels."""
    held = (match & valid).long().cumprod(-1)
    return torch.stack([held.sum((0, 1)), valid.sum((0, 1))]).float()

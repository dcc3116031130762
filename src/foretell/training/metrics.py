"""Which drafts would be accepted, found on given text without decoding (method.md section 4).

The base decides after every position from the text before it; a draft chain starts from its choice at the anchor. On
the base's own greedy text that is what decoding does, draft for draft (`held_out`); on other text it is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from foretell.model import MTPModel
from foretell.training.losses import Targets
from foretell.training.objectives import choices as choose


class Matches(NamedTuple):
    """Of A blocks in each of B sequences, which drafts are the base's own choice; only `valid` ones are known."""

    match: Tensor  # (B, A, K) bool, false where not valid
    valid: Tensor  # (B, A, K) bool

    def accepted(self) -> Tensor:
        """(B, A) int64: leading drafts that match, as many as a step would accept."""
        return self.match.long().cumprod(-1).sum(-1)

    def agreement(self) -> Agreement:
        """Prefixes are counted over blocks with all K labels."""
        whole = self.valid.all(-1)
        prefix = self.match[whole].long().cumprod(-1).sum(0)
        return Agreement(self.match.sum((0, 1)), self.valid.sum((0, 1)), prefix, int(whole.sum()))


@dataclass
class Agreement:
    """Counts that add up over batches: per mask (K,), and of blocks whose first j drafts all match (K,)."""

    matched: Tensor
    seen: Tensor
    prefix: Tensor
    blocks: int

    def __add__(self, other: Self) -> Agreement:
        return Agreement(
            self.matched + other.matched, self.seen + other.seen, self.prefix + other.prefix, self.blocks + other.blocks
        )

    def per_mask(self) -> list[float | None]:
        """Fraction of drafts of each mask that are the base's own choice; None of a mask that had no label."""
        shares = (self.matched / self.seen.clamp_min(1)).tolist()
        return [round(share, 4) if seen else None for share, seen in zip(shares, self.seen.tolist(), strict=True)]

    def simulated_acceptance(self) -> float | None:
        """1 + sum over j of P(the first j drafts all match), at positions drawn alike: a quick estimate.

        None without a block that has all labels. Decoding does not visit positions alike, so its tokens per step
        differ; `walk` follows it.
        """
        return round(1.0 + float(self.prefix.sum()) / self.blocks, 4) if self.blocks else None


def agreement(model: MTPModel, z_masks: Tensor, z: Tensor, anchors: Tensor, target: Targets) -> Agreement:
    """The counts of `matches`."""
    return matches(model, z_masks, z, anchors, target).agreement()


@torch.no_grad()
def matches(model: MTPModel, z_masks: Tensor, z: Tensor, anchors: Tensor, target: Targets) -> Matches:
    """z_masks (B, A, K, D), z (B, N, D), anchors (B, A). Each draft is made after the base's choice before it."""
    valid = target.valid
    needed = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
    used = valid.any(-1)
    batch = torch.arange(z.shape[0], device=z.device)
    needed[batch[:, None].expand_as(anchors)[used], anchors[used]] = True
    needed[batch[:, None, None].expand_as(valid)[valid], target.positions[valid]] = True
    choices = torch.zeros(z.shape[:2], dtype=torch.long, device=z.device)
    choices[needed] = choose(model, z[needed])

    path = torch.cat([anchors[:, :, None], target.positions], dim=2)  # i, i+1, .. i+K
    along = choices.gather(1, path.flatten(1)).view(path.shape)
    wanted, last = along[:, :, 1:], along[:, :, :-1]
    # Before its first choice stands the anchor itself.
    earlier = torch.cat([target.previous[:, :, :1, 1], last[:, :, :-1]], dim=2)
    latents = z_masks[valid]
    if model.sampler is not None:
        latents = model.sample(torch.stack([last, earlier], dim=-1)[valid], latents).to(latents.dtype)
    match = torch.zeros_like(valid)
    match[valid] = choose(model, latents) == wanted[valid]
    return Matches(match, valid)

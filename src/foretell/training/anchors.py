"""Which positions get a mask block, other than at random (method.md section 1). B batch, N tokens, A anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.data import candidates
from foretell.training.objectives import LOGITS_AT_ONCE

CHOSEN_AMONG = 2  # times as many anchors are drawn where some are then chosen by entropy


def by_entropy(choice: str) -> bool:
    """Whether anchors are chosen after the regular pass, by what the base is sure of."""
    return choice in ("uncertain", "certain")


def check_choice(choice: str, gated: bool) -> None:
    """Raises ForetellError if the base's own certainty would not be known in time."""
    if by_entropy(choice) and not gated:
        raise ForetellError(
            f"anchor_choice {choice} needs the base's own pass, which the standard adapter does not have; "
            "give --anchor-choice random or --adapter gated"
        )


def run_of_candidates(trained: Tensor, anchors: int, source: torch.Generator) -> Tensor:
    """trained (B, N) bool -> (B, N) bool: in each row `anchors` neighbouring candidates, or all if there are fewer."""
    possible = candidates(trained)
    place = possible.long().cumsum(1) - 1
    spare = (possible.sum(1) - anchors).clamp_min(0)
    start = (torch.rand(len(trained), generator=source) * (spare + 1)).long()[:, None]
    return possible & (place >= start) & (place < start + anchors)


@torch.no_grad()
def keep_by_entropy(
    model: MTPModel, z: Tensor, anchors: Tensor, valid: Tensor, count: int, choice: str
) -> tuple[Tensor, Tensor]:
    """Of anchors and valid (B, A) the `count` per row whose next position has the most, or least, entropy.

    z (B, N, D) are the base's latents: after anchor i it decides x_{i+1} itself, and at i + 1 what m1 is to foresee.
    Returns anchors and valid (B, min(count, A)), sorted by position.
    """
    ahead = (anchors + 1).clamp(max=z.shape[1] - 1)
    rows = z.gather(1, ahead[:, :, None].expand(-1, -1, z.shape[-1])).flatten(0, 1)
    parts = rows.split(max(1, LOGITS_AT_ONCE // model.base.vocab_size))
    logs = (model.base.unembed(part).float().log_softmax(-1) for part in parts)
    entropy = torch.cat([-(log.exp() * log).sum(-1) for log in logs]).view(anchors.shape)
    wanted = (entropy if choice == "uncertain" else -entropy).masked_fill(~valid, -torch.inf)
    kept = wanted.topk(min(count, anchors.shape[1]), dim=1).indices
    kept = kept.gather(1, anchors.gather(1, kept).argsort(dim=1, stable=True))
    return anchors.gather(1, kept), valid.gather(1, kept)

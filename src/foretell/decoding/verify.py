"""Which drafts hold (method.md section 5)."""

from __future__ import annotations

from itertools import takewhile
from operator import eq

import torch
from torch import Tensor


def decide(drafts: Tensor, choices: Tensor) -> list[list[int]]:
    """drafts (B, m), the base's choices (B, m+1) -> per sequence how many drafts it accepts, then the choices.

    The step's one synchronisation with the device. On a CPU numbers are compared sooner than tensors are made of them.
    """
    if choices.device.type == "cpu":
        both = zip(drafts.tolist(), choices.tolist(), strict=True)
        return [[sum(1 for _ in takewhile(bool, map(eq, own, chosen))), *chosen] for own, chosen in both]
    return torch.cat([accepted_drafts(drafts, choices)[:, None], choices], dim=1).tolist()


def accepted_drafts(drafts: Tensor, choices: Tensor) -> Tensor:
    """drafts (B, m), the base's choices (B, m+1) at [x s1..sm] -> (B,) int64: leading drafts equal to the choice.

    A draft of -1 stands for none and never holds.
    """
    return torch.cumprod(drafts == choices[:, :-1], dim=1).sum(1)

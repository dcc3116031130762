"""Which drafts hold (method.md section 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def accepted_drafts(drafts: Tensor, choices: Tensor) -> Tensor:
    """drafts (B, m), the base's choices (B, m+1) at [x s1..sm] -> (B,) int64: leading drafts equal to the choice.

    A draft of -1 stands for none and never holds.
    """
    return torch.cumprod(drafts == choices[:, :-1], dim=1).sum(1)

"""Which drafts hold (method.md section 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def accepted_drafts(drafts: Tensor, choices: Tensor) -> Tensor:
    """drafts (m,), the base's choices (m+1,) at [x s1..sm] -> () int64: leading drafts equal to the base's choice."""
    return torch.cumprod(drafts == choices[:-1], dim=0).sum()

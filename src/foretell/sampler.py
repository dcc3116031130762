"""The sampler head: which token fits a mask's latent, given the token just before it (method.md section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SamplerHead(nn.Module):
    """MLP([E_y; z]), two blocks of Linear -> SiLU -> LayerNorm with widths 2D -> D -> D; the base unembeds its output.

    `residual=True` gives z + MLP(...) with the last norm's gain at zero, so that training starts at the base's own
    choice.
    """

    def __init__(self, d_model: int, d_embedding: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.d_embedding = d_embedding
        self.first = nn.Linear(d_embedding + d_model, d_model)
        self.first_norm = nn.LayerNorm(d_model)
        self.second = nn.Linear(d_model, d_model)
        self.second_norm = nn.LayerNorm(d_model)
        if residual:
            nn.init.zeros_(self.second_norm.weight)

    def forward(self, embedding: Tensor, latent: Tensor) -> Tensor:
        """embedding (..., E) of the previous token and latent z (..., D), to the latent (..., D) to be unembedded."""
        return self.finish(self.first(torch.cat([embedding, latent], dim=-1)), latent)

    def finish(self, hidden: Tensor, latent: Tensor) -> Tensor:
        """From the first linear's output (..., D) onwards; decoding computes that output in two halves."""
        hidden = self.first_norm(nn.functional.silu(hidden))
        out = self.second_norm(nn.functional.silu(self.second(hidden)))
        return latent + out if self.residual else out

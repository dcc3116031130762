"""Drafts from a block's latents: the sampler chain of method.md section 3."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.model import MTPModel


def draft(model: MTPModel, latents: Tensor, first: Tensor, use_sampler: bool = True, shortlist: int = 0) -> Tensor:
    """latents (B, K, D) of a block each and the token before it, first (B,) int64 -> drafts (B, K) int64.

    With the sampler each draft is conditioned on the one before; the chain starts from the base's own token. Without
    it every draft is the base's argmax at its mask.

    The exact chain reads the whole unembedding K times in a row. With `shortlist` m it is read once, for all masks
    together, and the sampler chooses among the m tokens that the base likes best at each mask: cheaper, and different
    only where the sampler's choice is not among them. Either way it concerns drafts alone, never the output.
    """
    sampler = model.sampler
    if sampler is None or not use_sampler:
        return model.base.unembed(latents).argmax(-1)
    # The first linear reads [E_y; z]. Its z half needs no token, so it is done for all masks at once.
    of_token, of_latent = sampler.first.weight.split([sampler.d_embedding, latents.shape[-1]], dim=1)
    halves = F.linear(latents, of_latent, sampler.first.bias)
    short = min(shortlist, model.base.vocab_size) if isinstance(model.base.head, torch.nn.Linear) else 0
    if short:
        candidates = model.base.unembed(latents).topk(short, sorted=False).indices  # (B, K, m)
        rows = model.base.head.weight[candidates]  # (B, K, m, D)
        bias = None if model.base.head.bias is None else model.base.head.bias[candidates]
    drafts = []
    token = first
    for mask in range(latents.shape[1]):
        hidden = halves[:, mask] + F.linear(model.base.embed(token), of_token)
        sampled = sampler.finish(hidden, latents[:, mask])  # (B, D)
        if short:
            scores = (rows[:, mask] @ sampled[:, :, None])[..., 0]
            if bias is not None:
                scores = scores + bias[:, mask]
            token = candidates[:, mask].gather(1, scores.argmax(-1, keepdim=True))[:, 0]
        else:
            token = model.base.unembed(sampled).argmax(-1)
        drafts.append(token)
    return torch.stack(drafts, dim=1)

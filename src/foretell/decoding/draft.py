"""Drafts from a block's latents: the sampler chain of method.md section 3."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell.model import MTPModel


def draft(model: MTPModel, latents: Tensor, first: Tensor, use_sampler: bool = True) -> Tensor:
    """latents (K, D) of one block and the token before it, first () int64 -> drafts (K,) int64, all on the device.

    With the sampler each draft is conditioned on the one before; the chain starts from the base's own token. Without
    it every draft is the base's argmax at its mask.
    """
    sampler = model.sampler
    if sampler is None or not use_sampler:
        return model.base.unembed(latents).argmax(-1)
    # The first linear reads [E_y; z]. Its z half needs no token, so it is done for all masks at once.
    of_token, of_latent = sampler.first.weight.split([sampler.d_embedding, latents.shape[-1]], dim=1)
    halves = F.linear(latents, of_latent, sampler.first.bias)
    drafts = []
    token = first
    for half, latent in zip(halves, latents, strict=True):
        hidden = half + F.linear(model.base.embed(token), of_token)
        token = model.base.unembed(sampler.finish(hidden, latent)).argmax(-1)
        drafts.append(token)
    return torch.stack(drafts)

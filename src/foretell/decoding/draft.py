"""Drafts from a block's latents: the sampler chain of method.md section 3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.model import MTPModel


def largest(scores: Tensor, mask: int) -> Tensor:
    """(B, V or m) -> (B,): the likeliest token."""
    return scores.argmax(-1)


def draft(
    model: MTPModel,
    latents: Tensor,
    first: Tensor,
    use_sampler: bool = True,
    shortlist: int = 0,
    choose: Callable[[Tensor, int], Tensor] = largest,
) -> Tensor:
    """latents (B, K, D) of a block each and the token before it, first (B,) int64 -> drafts (B, K) int64.

    With the sampler each draft is conditioned on the one before; the chain starts from the base's own token. Without
    it every draft is the base's argmax at its mask.

    The exact chain reads the whole unembedding K times in a row. With `shortlist` m it is read once, for all masks
    together, and the sampler chooses among the m tokens that the base likes best at each mask: cheaper, and different
    only where the sampler's choice is not among them. Either way it concerns drafts alone, never the output.

    `choose` takes scores (B, V), where the shortlist leaves out a token -inf, and the mask's number from 0.
    """
    sampler = model.sampler
    if sampler is None or not use_sampler:
        scores = model.base.unembed(latents)
        return torch.stack([choose(scores[:, mask], mask) for mask in range(latents.shape[1])], dim=1)
    # The first linear reads [E_y; z]. Its z half needs no token, so it is done for all masks at once.
    of_token, of_latent = sampler.first.weight.split([sampler.d_embedding, latents.shape[-1]], dim=1)
    halves = F.linear(latents, of_latent, sampler.first.bias)
    short = Shortlist(model, latents, shortlist) if shortlist and isinstance(model.base.head, nn.Linear) else None
    drafts = []
    token = first
    for mask in range(latents.shape[1]):
        hidden = halves[:, mask] + F.linear(model.base.embed(token), of_token)
        sampled = sampler.finish(hidden, latents[:, mask])  # (B, D)
        if short is None:
            token = choose(model.base.unembed(sampled), mask)
        elif choose is largest:
            token = short.tokens[:, mask].gather(1, short.scores(sampled, mask).argmax(-1, keepdim=True))[:, 0]
        else:
            token = choose(short.all_scores(sampled, mask), mask)
        drafts.append(token)
    return torch.stack(drafts, dim=1)


class Shortlist:
    """The m tokens that the base likes best at each mask, and the rows of the unembedding that score them."""

    def __init__(self, model: MTPModel, latents: Tensor, m: int) -> None:
        self.vocab = model.base.vocab_size
        self.tokens = model.base.unembed(latents).topk(min(m, self.vocab), sorted=False).indices  # (B, K, m)
        self.rows = model.base.head.weight[self.tokens]  # (B, K, m, D)
        self.bias = None if model.base.head.bias is None else model.base.head.bias[self.tokens]

    def scores(self, sampled: Tensor, mask: int) -> Tensor:
        """(B, D) -> (B, m)."""
        scores = (self.rows[:, mask] @ sampled[:, :, None])[..., 0]
        return scores if self.bias is None else scores + self.bias[:, mask]

    def all_scores(self, sampled: Tensor, mask: int) -> Tensor:
        """(B, D) -> (B, V), -inf off the list: a draw must name tokens as the base's draw does."""
        everywhere = sampled.new_full((sampled.shape[0], self.vocab), -torch.inf)
        return everywhere.scatter(1, self.tokens[:, mask], self.scores(sampled, mask))

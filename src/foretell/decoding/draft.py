"""Drafts from a block's latents: the sampler chain of method.md section 3, all masks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from foretell.config import DecodeConfig
from foretell.decoding.pick import Picker, first_largest
from foretell.model import MTPModel
from foretell.packed import PackedLinear

LARGE_VOCABULARY, SHORTLIST = 2048, 64
ALONG = 2  # blocks' worth of masks
UNSEEN_SWEEPS = 5  # over a chain, where looking whether it has settled would stall the queue
LEAST_REACH = 0.1  # chance of drafts up to one that has changed, below which those behind it may stay

# Scores (B, K, V), or (B, K, m) of tokens (B, K, m), of all drafts of a block -> which of them, (B, K).
Choose = Callable[[Tensor, Tensor | None], Tensor]


def largest(scores: Tensor, tokens: Tensor | None) -> Tensor:
    """The likeliest tokens."""
    return first_largest(scores)


class Drafter(Protocol):
    """Where drafts come from: normally `SamplerDrafter`; a benchmark may bring its own."""

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """latents (B, K, D) of a block each -> drafts (B, K) int64, confidences.

        before (B, 2) int64 are the two tokens before each block's first draft, the latest first. logits (B, K, V) are
        the base's at the masks, where the step has read them already (see `reads_along`). Draft j of row b, from 0, is
        for new token number `places[b]` + j of prompt number `sequences[b]`. Confidences (B, K) fp32 in 0..1 are how
        sure the drafter is of each draft if the ones before it hold; None if nobody asks.
        """
        ...


@dataclass(frozen=True)
class SamplerDrafter:
    """Drafts by the model's own masks and sampler head, in the manner of `config`."""

    model: MTPModel
    config: DecodeConfig
    picker: Picker

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        choose: Choose = largest
        if self.picker.draws_drafts:
            # In which the base will pick.
            choose = self.picker.race(sequences, places, latents.shape[1], self.model.base.vocab_size)
        shortlist = shortlist_size(self.model, self.config.shortlist)
        confident = self.config.strategy == "adaptive"
        return draft(self.model, latents, before, self.config.use_sampler, shortlist, choose, confident, logits)


def shortlist_size(model: MTPModel, shortlist: int | None) -> int:
    """None: short where reading the unembedding costs more than a step's overhead, in large vocabularies."""
    if shortlist is None:
        return SHORTLIST if model.base.vocab_size >= LARGE_VOCABULARY else 0
    return shortlist


def reads_along(model: MTPModel, config: DecodeConfig, masks: int) -> bool:
    """Whether a step that hangs so many masks reads their logits along with those of the regular rows.

    One read of the unembedding then serves both. With more masks the rows that do not survive would cost more.
    """
    wanted = shortlist_size(model, config.shortlist) or model.sampler is None or not config.use_sampler
    return bool(wanted) and masks <= ALONG * (config.masks or model.max_masks)


def draft(
    model: MTPModel,
    latents: Tensor,
    before: Tensor,
    use_sampler: bool = True,
    shortlist: int = 0,
    choose: Choose = largest,
    confident: bool = False,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """latents (B, K, D) of a block each and the two tokens before it, before (B, 2) int64 -> drafts (B, K) int64.

    With the sampler each draft is conditioned on those before; the chain starts from the base's own token. Without
    it every draft is the base's argmax at its mask. If `confident`, with the drafts' own probabilities (B, K) fp32.

    The chain is not walked draft by draft: all drafts are made at once, behind a guess of those before them, at first
    what the base itself would say at the masks, then what the last sweep gave, until nothing changes. After n sweeps
    the first n drafts are the chain's, and mostly more. If `confident`, unlikely drafts are not brought to the end of
    it (`LEAST_REACH`). A sweep reads the whole unembedding once, where the chain would read it for every draft. With
    `shortlist` m only the rows of the m tokens are read that the base likes best at each mask: cheaper, and different
    only where the sampler's choice is not among them. Either way it concerns drafts alone, never the output.

    logits (B, K, V) are the base's at the masks if they were read before.
    """
    masks, sampler = latents.shape[1], model.sampler
    if sampler is None or not use_sampler:
        scores = model.base.unembed(latents) if logits is None else logits
        drafts = choose(scores, None)
        return drafts, confidence(scores, drafts) if confident else None
    short, tokens = None, None
    drafts = before[:, :1]  # of a single mask nothing is to be guessed
    if masks > 1 or shortlist:
        scores = model.base.unembed(latents) if logits is None else logits
        drafts = choose(scores, None) if masks > 1 else drafts
        if shortlist and isinstance(model.base.head, (nn.Linear, PackedLinear)):
            short = Shortlist(model, scores, shortlist)
            tokens = short.tokens
    prepared, count = sampler.prepare(latents), sampler.tokens
    first = before[:, :count].flip(1)  # the oldest first
    seen = latents.device.type == "cpu"
    for _ in range(masks if seen else min(masks, UNSEEN_SWEEPS)):
        embeddings = model.base.embed(torch.cat([first, drafts[:, :-1]], dim=1))
        latest_first = [embeddings[:, ago : ago + masks] for ago in reversed(range(count))]
        sampled = sampler.finish(prepared, torch.stack(latest_first, dim=2), latents)
        scores = model.base.unembed(sampled) if short is None else short.scores(sampled)
        index = choose(scores, tokens)
        guess, drafts = drafts, index if tokens is None else tokens.gather(2, index[..., None])[..., 0]
        sure = confidence(scores, index) if confident else None
        if seen and settled(guess, drafts, sure):
            break
    return drafts, sure


def confidence(scores: Tensor, index: Tensor) -> Tensor:
    """scores (B, K, V or m), which were chosen (B, K) -> their probabilities (B, K) fp32."""
    return scores.softmax(-1, dtype=torch.float32).gather(2, index[..., None])[..., 0]


def settled(guess: Tensor, drafts: Tensor, confidences: Tensor | None) -> bool:
    """Whether drafts (B, K) made behind a guess are what they would be behind themselves, as far as it matters."""
    sure = torch.ones_like(drafts) if confidences is None else confidences
    for guessed, made, chances in zip(guess.tolist(), drafts.tolist(), sure.tolist(), strict=True):
        reach = 1.0
        for old, new, chance in zip(guessed[:-1], made[:-1], chances[:-1], strict=True):  # nothing is behind the last
            reach *= chance
            if old != new:
                if reach >= LEAST_REACH:
                    return False
                break
    return True


class Shortlist:
    """The m tokens that the base likes best at each mask, and the rows of the unembedding that score them."""

    def __init__(self, model: MTPModel, logits: Tensor, m: int) -> None:
        self.tokens = logits.topk(min(m, model.base.vocab_size), sorted=False).indices  # (B, K, m)
        self.rows = model.base.head.weight[self.tokens]  # (B, K, m, D)
        self.bias = None if model.base.head.bias is None else model.base.head.bias[self.tokens]

    def scores(self, sampled: Tensor) -> Tensor:
        """(B, K, D) -> (B, K, m)."""
        scores = (self.rows @ sampled[..., None])[..., 0]
        return scores if self.bias is None else scores + self.bias

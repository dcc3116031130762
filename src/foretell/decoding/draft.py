"""Drafts from a block's latents: the sampler chain of method.md section 3."""

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


def largest(scores: Tensor, mask: int) -> Tensor:
    """(B, V or m) -> (B,): the likeliest token."""
    return first_largest(scores)


LARGE_VOCABULARY, SHORTLIST = 2048, 64
ALONG = 2  # blocks' worth of masks


GoOn = Callable[[Tensor], bool]  # told the confidences (B,) of one draft after another of a block


class Drafter(Protocol):
    """Where drafts come from: normally `SamplerDrafter`; a benchmark may bring its own."""

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
        go_on: GoOn | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """latents (B, K, D) of a block each -> drafts (B, K) int64, confidences.

        before (B, 2) int64 are the two tokens before each block's first draft, the latest first. logits (B, K, V) are
        the base's at the masks, where the step has read them already (see `reads_along`). Draft j of row b, from 0, is
        for new token number `places[b]` + j of prompt number `sequences[b]`. Confidences (B, K) fp32 in 0..1 are how
        sure the drafter is of each draft if the ones before it hold; None if nobody asks.
        `go_on` is told the confidences (B,) of every draft as it is made; once it is false, the rest may be left out.
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
        go_on: GoOn | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        choose = largest
        if self.picker.draws_drafts:
            # In the race in which the base will pick.
            def choose(scores: Tensor, mask: int) -> Tensor:
                return self.picker.pick(scores, list(sequences), [place + mask for place in places])

        shortlist = shortlist_size(self.model, self.config.shortlist)
        confident = self.config.strategy == "adaptive"
        return draft(self.model, latents, before, self.config.use_sampler, shortlist, choose, confident, logits, go_on)


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
    choose: Callable[[Tensor, int], Tensor] = largest,
    confident: bool = False,
    logits: Tensor | None = None,
    go_on: GoOn | None = None,
) -> tuple[Tensor, Tensor | None]:
    """latents (B, K, D) of a block each and the two tokens before it, before (B, 2) int64 -> drafts (B, K) int64.

    With the sampler each draft is conditioned on those before; the chain starts from the base's own token. Without
    it every draft is the base's argmax at its mask. If `confident`, with the drafts' own probabilities (B, K) fp32.

    The exact chain reads the whole unembedding K times in a row. With `shortlist` m it is read once, for all masks
    together, and the sampler chooses among the m tokens that the base likes best at each mask: cheaper, and different
    only where the sampler's choice is not among them. Either way it concerns drafts alone, never the output.

    `choose` takes scores (B, V), where the shortlist leaves out a token -inf, and the mask's number from 0. `logits`
    (B, K, V) are the base's at the masks if they were read before. With `go_on` the chain ends when that
    is false for a draft's confidences (B,); every draft then waits for the device.
    """
    drafts: list[Tensor] = []
    confidences: list[Tensor] = []

    def take(scores: Tensor, mask: int, tokens: Tensor | None = None) -> None:
        """From scores (B, V), or (B, m) of `tokens` (B, m)."""
        if not confident:
            index = choose(scores, mask)
        else:
            chances = scores.softmax(-1, dtype=torch.float32)
            if choose is largest:
                sure, index = chances.max(-1)
            else:
                index = choose(scores, mask)
                sure = chances.gather(1, index[:, None])[:, 0]
            confidences.append(sure)
        drafts.append(index if tokens is None else tokens.gather(1, index[:, None])[:, 0])

    sampler = model.sampler
    if sampler is None or not use_sampler:
        scores = model.base.unembed(latents) if logits is None else logits
        for mask in range(latents.shape[1]):
            take(scores[:, mask], mask)
    else:
        prepared = sampler.prepare(latents)  # what needs no token, for all masks at once
        short = None
        if shortlist and isinstance(model.base.head, (nn.Linear, PackedLinear)):
            short = Shortlist(model, model.base.unembed(latents) if logits is None else logits, shortlist)
        for mask in range(latents.shape[1]):
            embedding = model.base.embed(before[:, : sampler.tokens])
            sampled = sampler.finish(prepared[:, mask], embedding, latents[:, mask])  # (B, D)
            if short is None:
                take(model.base.unembed(sampled), mask)
            elif choose is largest:
                take(short.scores(sampled, mask), mask, short.tokens[:, mask])
            else:
                take(short.all_scores(sampled, mask), mask)
            before = torch.stack([drafts[-1], before[:, 0]], dim=1)
            if go_on is not None and not go_on(confidences[-1]):
                break
    return torch.stack(drafts, dim=1), torch.stack(confidences, dim=1) if confident else None


class Shortlist:
    """The m tokens that the base likes best at each mask, and the rows of the unembedding that score them."""

    def __init__(self, model: MTPModel, logits: Tensor, m: int) -> None:
        self.vocab = model.base.vocab_size
        self.tokens = logits.topk(min(m, self.vocab), sorted=False).indices  # (B, K, m)
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

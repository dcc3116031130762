"""Drafts from a block's latents: the sampler chain of method.md section 3, all masks at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from foretell.config import DecodeConfig
from foretell.decoding.pick import Picker, first_largest
from foretell.layout import Layout
from foretell.model import MTPModel
from foretell.packed import PackedLinear
from foretell.sampler import Sampler

SHORTLIST, SHORTLIST_FROM = 64, 2**22  # tokens; numbers of an unembedding
BEYOND = 16  # rows of an unembedding that cost less than to read it once more
UNSEEN_SWEEPS = 5  # over a chain, where looking whether it has settled would stall the queue
LEAST_REACH = 0.25  # chance of drafts up to one that has changed, below which those behind it may stay

# Scores (n, V), or (n, m) of tokens (n, m), of the drafts with these numbers (n,), block after block, or, if None, of
# all B · K -> which of them, (n,).
Choose = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def largest(scores: Tensor, tokens: Tensor | None, numbers: Tensor | None) -> Tensor:
    """The likeliest tokens."""
    return first_largest(scores)


def numbered(rows: Tensor, numbers: Tensor | None) -> Tensor:
    """(N, ...) -> (n, ...): those with these numbers, or all. A third of the time that indexing takes."""
    return rows if numbers is None else rows.index_select(0, numbers)


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
    """None: short where reading the unembedding takes longer than to find the best tokens and gather their rows."""
    if shortlist is None:
        return SHORTLIST if model.base.vocab_size * model.base.d_model >= SHORTLIST_FROM else 0
    return shortlist


def reads_along(model: MTPModel, config: DecodeConfig, layouts: Sequence[Layout]) -> bool:
    """Whether a step of these layouts reads the logits of its masks along with those of the regular rows.

    One read of the unembedding then serves both. With more masks the rows that do not survive would cost more.
    """
    most = config.masks or model.max_masks
    return sum(max(0, layout.masks - most) for layout in layouts) <= BEYOND


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
    what the base itself would say at the masks; then those again before which something has changed, until nothing
    does. After n sweeps the first n drafts are the chain's, and mostly more. If `confident`, unlikely drafts are not
    made again (`LEAST_REACH`). A sweep reads the whole unembedding once, where the chain would read it for every
    draft. With `shortlist` m only the rows of the m tokens are read that the base likes best at each mask: cheaper, and
    different only where the sampler's choice is not among them. Either way it concerns drafts alone, never the output.

    logits (B, K, V) are the base's at the masks if they were read before.
    """
    masks, sampler = latents.shape[1], model.sampler
    shape, latents = latents.shape[:2], latents.flatten(0, 1)  # (B · K, D)
    logits = None if logits is None else logits.flatten(0, 1)
    if sampler is None or not use_sampler:
        scores = model.base.unembed(latents) if logits is None else logits
        drafts = choose(scores, None, None)
        return drafts.view(shape), confidence(scores, drafts).view(shape) if confident else None
    short = None
    drafts = before[:, 0]  # of a single mask nothing is to be guessed
    if masks > 1 or shortlist:
        scores = model.base.unembed(latents) if logits is None else logits
        drafts = choose(scores, None, None) if masks > 1 else drafts
        if shortlist and isinstance(model.base.head, (nn.Linear, PackedLinear)):
            short = Shortlist(model, scores, shortlist)
    sweeps = Sweeps(model, sampler, latents, short, choose, confident)
    return (seen if latents.device.type == "cpu" else unseen)(sweeps, before[:, : sampler.tokens], drafts.view(shape))


class Sweeps:
    """Makes drafts behind all N masks of some blocks, again and again behind other tokens."""

    def __init__(
        self,
        model: MTPModel,
        sampler: Sampler,
        latents: Tensor,
        short: Shortlist | None,
        choose: Choose,
        confident: bool,
    ) -> None:
        """latents (N, D) of the masks; with a `short` list only its tokens are scored."""
        self.sampler, self.embed = sampler, model.base.embed
        self._unembed, self._latents, self._short = model.base.unembed, latents, short
        self._choose, self._confident = choose, confident
        self._prepared: Tensor | None = None
        head = model.sampled_head if latents.device.type == "cpu" else None
        self._unembeds = head is not None and head.unembeds and short is None
        self._block = None if head is None else head.block(latents, self._unembeds)

    def look(self, before: Sequence[Sequence[int]], numbers: Sequence[int] | None) -> tuple[list[int], Sequence[float]]:
        """The drafts with these numbers (n,), or at first all N, behind tokens before (n, T), the latest first; and how
        sure they are, if that is asked for."""
        block, remembered = self._block, self.sampler.remembered
        if block is not None and self._unembeds and self._choose is largest:
            tokens, chances = block.likeliest(before, numbers)
            return tokens, chances if self._confident else []
        of = None if numbers is None else torch.tensor(numbers)
        if block is not None and self._unembeds:
            made, sure = self._chosen(block.scores(before, numbers), of)
        elif block is not None:
            made, sure = self._chosen(self._scores(block.sampled(before, numbers), of), of)
        elif remembered is not None:
            made, sure = self.make(remembered.of(before, self.embed), of)
        else:
            made, sure = self.make(self.sampler.terms(self.embed(torch.tensor(before))), of)
        return made.tolist(), [] if sure is None else sure.tolist()

    def make(self, terms: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The same, and (n,) each, for `Sampler.terms` (n, Q) of the tokens before."""
        if self._prepared is None:
            self._prepared = self.sampler.prepare(self._latents)
        prepared, latents = numbered(self._prepared, numbers), numbered(self._latents, numbers)
        return self._chosen(self._scores(self.sampler.finish(prepared, terms, latents), numbers), numbers)

    def _scores(self, sampled: Tensor, numbers: Tensor | None) -> Tensor:
        return self._unembed(sampled) if self._short is None else self._short.scores(sampled, numbers)

    def _chosen(self, scores: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        of = None if self._short is None else numbered(self._short.tokens, numbers)
        sure = None
        if self._confident and self._choose is largest:
            sure, index = scores.softmax(-1, dtype=torch.float32).max(-1)  # once through them for both
        else:
            index = self._choose(scores, of, numbers)
            sure = confidence(scores, index) if self._confident else None
        return index if of is None else of.gather(1, index[:, None])[:, 0], sure


def seen(sweeps: Sweeps, before: Tensor, guessed: Tensor) -> tuple[Tensor, Tensor | None]:
    """`draft`'s chain, from the T tokens before each block, (B, T), the latest first, and a guess of its drafts (B, K).

    After each sweep it looks what has yet to settle.
    """
    texts = [[*reversed(own), *drafts] for own, drafts in zip(before.tolist(), guessed.tolist(), strict=True)]
    chain, numbers = Open(texts, before.shape[1]), None
    for _ in range(chain.masks):
        if not chain.again(*sweeps.look(chain.before, numbers)):
            break
        numbers = chain.numbers
    return torch.tensor(chain.drafts), torch.tensor(chain.sure).view(-1, chain.masks) if chain.sure else None


def unseen(sweeps: Sweeps, before: Tensor, guessed: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same without a look, which would stall a device's queue: all drafts are made again, a few times."""
    text, count, sure = torch.cat([before.flip(1), guessed], dim=1), before.shape[1], None
    for _ in range(min(text.shape[1] - count, UNSEEN_SWEEPS)):
        behind = text[:, :-1].unfold(1, count, 1).flatten(0, 1).flip(1)  # (B · K, T), the latest first
        made, sure = sweeps.make(sweeps.sampler.terms(sweeps.embed(behind)))
        text[:, count:] = made.view(len(text), -1)
    return text[:, count:], None if sure is None else sure.view(len(text), -1)


def confidence(scores: Tensor, index: Tensor) -> Tensor:
    """scores (n, V or m), which were chosen (n,) -> their probabilities (n,) fp32."""
    return scores.softmax(-1, dtype=torch.float32).gather(1, index[:, None])[:, 0]


class Open:
    """Which drafts of a chain may still change: those behind drafts that did."""

    def __init__(self, texts: Sequence[Sequence[int]], count: int) -> None:
        """B blocks of K guesses, each behind the `count` tokens before it; a draft depends on as many."""
        self.masks, self.count = len(texts[0]) - count, count
        self.texts = [list(text) for text in texts]
        self.sure: list[float] = []  # confidences of all drafts, if they are told
        self.numbers = list(range(len(texts) * self.masks))  # of the drafts to make
        self.stale: set[int] = set()  # what was made behind other tokens

    @property
    def drafts(self) -> list[list[int]]:
        """(B, K)."""
        return [text[self.count :] for text in self.texts]

    @property
    def before(self) -> list[list[int]]:
        """(n, T): the tokens before each of the drafts to make, the latest first."""
        found, count = [], self.count
        for number in self.numbers:
            block, place = divmod(number, self.masks)
            found.append(self.texts[block][place : place + count][::-1])
        return found

    def again(self, made: Sequence[int], sure: Sequence[float] = ()) -> list[int]:
        """The drafts of the numbers named last, at first of all, and their confidences -> which to make again: those
        made behind other tokens, unless it is unlikely that they are reached."""
        self.stale.difference_update(self.numbers)
        for number, token in zip(self.numbers, made, strict=True):
            block, place = divmod(number, self.masks)
            if token != self.texts[block][place + self.count]:
                self.texts[block][place + self.count] = token
                end = number - place + self.masks
                self.stale.update(range(number + 1, min(number + 1 + self.count, end)))
        if sure:
            self.sure = self.sure or [1.0] * len(sure)
            for number, chance in zip(self.numbers, sure, strict=True):
                self.sure[number] = chance
        self.numbers = sorted(self.stale)
        if self.sure:
            self.numbers = [n for n in self.numbers if math.prod(self.sure[n - n % self.masks : n]) >= LEAST_REACH]
        return self.numbers


class Shortlist:
    """The m tokens that the base likes best at each mask, and the rows of the unembedding that score them."""

    def __init__(self, model: MTPModel, logits: Tensor, m: int) -> None:
        """logits (N, V)."""
        self.tokens = logits.topk(min(m, model.base.vocab_size), sorted=False).indices  # (N, m)
        self.rows = model.base.unembedding_rows(self.tokens)  # (N, m, D)
        self.bias = None if model.base.head.bias is None else model.base.head.bias[self.tokens]

    def scores(self, sampled: Tensor, numbers: Tensor | None) -> Tensor:
        """(n, D) of the masks with these numbers, or of all -> (n, m)."""
        scores = (numbered(self.rows, numbers) @ sampled[..., None])[..., 0]
        return scores if self.bias is None else scores + numbered(self.bias, numbers)

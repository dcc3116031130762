"""How a token is chosen from the base's logits: the largest, or a draw that depends on (seed, sequence, place) alone.

A draw is an exponential race: token v arrives after e_v / p_v with e_v ~ Exp(1), the first to arrive is chosen, and it
is v with probability p_v. The e of a place come from a generator keyed by the seed, the sequence and the place, so they
are the same whoever asks and how often. Verification therefore stays what it is in greedy decoding: a draft holds if it
equals the token that the base picks there. The law of the text is the base's own, and the very same text comes out of
every strategy, batch and drafter. Drafts drawn in the same race (`drafts="drawn"`) meet the base's pick more often
than not: for distributions p and q with total variation d they agree with probability at least (1 - d) / (1 + d).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from foretell.config import DecodeConfig

BELOW_ONE = 1 - 2**-24  # the largest fp32 number there
KEPT_BYTES = 2**26  # of draws


class Picker:
    """Chooses tokens for `DecodeConfig`'s temperature, top_k, top_p, min_p, repetition_penalty and seed.

    `processors` are further transformers LogitsProcessors; they see the whole text before each token, drafts included.
    `seed_of` gives every sequence a seed of its own, with which it is drawn as if it were alone.
    """

    def __init__(
        self,
        config: DecodeConfig,
        processors: LogitsProcessorList | None = None,
        seed_of: Callable[[int], int] | None = None,
    ) -> None:
        self.seed = config.seed
        self.seed_of = seed_of
        self.greedy = config.temperature == 0
        self.draws_drafts = not self.greedy and config.drafts == "drawn"
        # (V,) fp32 by key, the latest last: a place is raced for by block after block of drafts, then by the base.
        self._waits: dict[int, Tensor] = {}
        self.processors = LogitsProcessorList(processors or [])
        if config.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            if config.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(config.temperature))
            if config.top_k:
                self.warpers.append(TopKLogitsWarper(config.top_k))
            if config.top_p < 1:
                self.warpers.append(TopPLogitsWarper(config.top_p))
            if config.min_p:
                self.warpers.append(MinPLogitsWarper(config.min_p))

    @property
    def reads_text(self) -> bool:
        """Whether choices depend on the tokens before, beyond the logits: `pick` then needs `texts`."""
        return bool(self.processors)

    def pick(
        self, logits: Tensor, sequences: Sequence[int], places: Sequence[int], texts: Sequence[Tensor] | None = None
    ) -> Tensor:
        """logits (N, V) -> tokens (N,) int64: row n is for place `places[n]` (0: first new token) of `sequences[n]`."""
        scores = self.scores(logits, texts)
        if self.greedy:
            return first_largest(scores)
        keys = [self._key(*key) for key in zip(sequences, places, strict=True)]
        return first_largest(scores - self._waits_of(keys, logits.shape[-1], logits.device))

    def race(
        self, sequences: Sequence[int], places: Sequence[int], count: int, vocab: int
    ) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        """For drafts of `count` places in a row from place `places[b]` of `sequences[b]` on, in the races of `pick`.

        It takes scores (n, V), or (n, m) of tokens (n, m), of the drafts with these numbers (n,), sequence after
        sequence, or all, to which of them wins, (n,).
        """
        starts = zip(sequences, places, strict=True)
        keys = [self._key(sequence, start + number) for sequence, start in starts for number in range(count)]
        waits: list[Tensor] = []

        def choose(scores: Tensor, tokens: Tensor | None, numbers: Tensor | None) -> Tensor:
            if not waits:
                waits.append(self._waits_of(keys, vocab, scores.device))
            rows = torch.arange(len(keys), device=scores.device) if numbers is None else numbers
            own = waits[0][rows] if tokens is None else waits[0][rows[:, None], tokens]
            return first_largest(self.scores(scores) - own)

        return choose

    def scores(self, logits: Tensor, texts: Sequence[Tensor] | None = None) -> Tensor:
        """logits (N, V) -> what is chosen from, (N, V), with the text before each row's token if processors read it."""
        if self.reads_text and texts is not None:
            # fp32 as in transformers, and copies, as some processors write into what they are given.
            rows = [
                self.processors(text[None], row[None].to(torch.float32, copy=True))[0]
                for text, row in zip(texts, logits, strict=True)
            ]
            logits = torch.stack(rows)
        return logits if self.greedy else self.warpers(None, logits.float())

    def _waits_of(self, keys: Sequence[int], vocab: int, device: torch.device) -> Tensor:
        """keys (N,) -> (N, V) fp32, as `log_waits` makes them; the latest rows are kept."""
        kept = self._waits
        if missing := [key for key in keys if key not in kept]:
            # Rows of their own: none keeps the others of its draw alive.
            kept.update(zip(missing, (row.clone() for row in log_waits(missing, vocab, device)), strict=True))
        for key in keys:
            kept[key] = kept.pop(key)
        waits = torch.stack([kept[key] for key in keys])
        for key in list(kept)[: max(0, len(kept) - KEPT_BYTES // (4 * vocab))]:
            del kept[key]
        return waits

    def _key(self, sequence: int, place: int) -> int:
        """63 bits: the same for the same (seed, sequence, place)."""
        seed, sequence = (self.seed, sequence) if self.seed_of is None else (self.seed_of(sequence), 0)
        key = hashlib.blake2b(f"{seed}/{sequence}/{place}".encode(), digest_size=8).digest()
        return int.from_bytes(key) >> 1


def log_waits(keys: Sequence[int], vocab: int, device: torch.device) -> Tensor:
    """(N, V) fp32: logarithms of Exp(1) draws, a row for each key.

    On a CPU from numpy's generators, ten times as fast as torch's. They draw 53 bits: among tens of thousands of
    numbers of 24 bits one would now and then be zero, and its token would win whatever its chance.
    """
    if device.type != "cpu":
        rows = []
        for key in keys:
            generator = torch.Generator(device).manual_seed(key)
            rows.append(torch.empty(vocab, device=device).exponential_(generator=generator))
        return torch.stack(rows).log_()
    uniform = np.empty((len(keys), vocab))
    for row, key in zip(uniform, keys, strict=True):
        np.random.Generator(np.random.SFC64(key)).random(out=row)
    # Small ones stay exact in fp32; one that would be rounded to 1 would never arrive.
    return torch.from_numpy(uniform).float().clamp_(max=BELOW_ONE).neg_().log1p_().neg_().log_()


def first_largest(scores: Tensor) -> Tensor:
    """(..., V) -> (...,) int64: `argmax`, of equal ones the first, on a CPU several times as fast."""
    return scores.max(-1).indices

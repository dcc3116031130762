"""Which examples and anchors every step trains on, so that resuming needs no state and processes need not talk.

A step's sequences and their anchors are pure functions of (seed, step, row): they are the same however the rows are
shared out among processes and micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foretell.training.anchors import CHOSEN_AMONG, by_entropy, run_of_candidates
from foretell.training.examples import Example, Examples, Part, apportion, candidates

WINDOW = 16  # batches' worth of examples that are sorted by length together
HELD_OUT_FROM, HELD_OUT_SHARE, HELD_OUT_MOST = 20, 0.05, 64


class Batch(NamedTuple):
    """B sequences padded on the right to N tokens, with A anchors each."""

    ids: Tensor  # (B, N) int64
    trained: Tensor  # (B, N) bool, false at padding
    real: Tensor  # (B, N) bool, false at padding
    anchors: Tensor  # (B, A) int64
    anchor_valid: Tensor  # (B, A) bool: false where a row had too few positions to choose from
    starts: Tensor | None = None  # (B, N) int64 if packed: the column at which each token's document begins

    def ends(self, columns: Tensor) -> Tensor:
        """columns (B, A) int64 -> (B, A): the column behind the last of the document that each lies in."""
        if self.starts is None:
            return self.real.sum(1, keepdim=True).expand_as(columns)
        return (self.starts[:, None, :] <= columns[:, :, None]).sum(-1)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


def generator(*key: int | str) -> torch.Generator:
    """A generator seeded by all parts of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def split(examples: Examples, seed: int) -> tuple[Examples, list[Example]]:
    """(training, held-out) examples; nothing is held out of fewer than 20.

    Of a mixture they are held out by weight, but never more than a share of any source.
    """
    if len(examples) < HELD_OUT_FROM:
        return examples, []
    held = min(HELD_OUT_MOST, max(1, int(len(examples) * HELD_OUT_SHARE)))
    kept, out = [], []
    for number, (part, wanted) in enumerate(zip(examples.parts, apportion(held, examples.draws()), strict=True)):
        count = min(wanted, int(len(part.chosen) * HELD_OUT_SHARE))
        source = generator(seed, "held out", number)
        order = torch.randperm(len(part.chosen), generator=source).numpy()
        kept.append(part.subset(np.sort(order[count:])))
        out += [part.items[int(i)] for i in part.chosen[order[:count]]]
    return Examples(kept), out


class Batches:
    """An endless, deterministic stream of batches: row r of `batch(s)` depends on the seed, s and r alone.

    batch_size counts all sequences of an optimiser step, over all processes.

    Every epoch visits all examples once, or as often as the weights of a mixture say, in batches of similar lengths;
    the last batch of an epoch is filled up from its beginning.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, anchors: int, seed: int, choice: str = "random"
    ) -> None:
        self.examples = examples if isinstance(examples, Examples) else Examples([Part.of(examples)])
        self.batch_size, self.anchors, self.seed, self.choice = batch_size, anchors, seed, choice
        self._draws = self.examples.draws()
        self.per_epoch = -(-sum(self._draws) // batch_size)
        self._epoch = -1
        self._order = self._batches = torch.zeros(0, dtype=torch.long)

    def batch(self, number: int) -> Batch:
        """All rows of step `number`."""
        return self._rows(number, range(self.batch_size))

    def micro_batches(self, number: int, size: int, process: int = 0, processes: int = 1) -> list[Batch]:
        """This process's rows of step `number`, `size` at a time. Rows lie by length, so each process takes every
        `processes`-th one and all have as much to do."""
        rows = range(process, self.batch_size, processes)
        return [self._rows(number, rows[start : start + size]) for start in range(0, len(rows), size)]

    def _rows(self, number: int, rows: Sequence[int]) -> Batch:
        chosen = self.chosen(number)
        return make_batch(
            [self.examples[chosen[row]] for row in rows],
            self.anchors,
            [generator(self.seed, "anchors", number, row) for row in rows],
            self.choice,
        )

    def chosen(self, number: int) -> list[int]:
        """Which examples batch `number` holds."""
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        start, place = divmod(int(self._batches[index]), WINDOW)
        window = self._order[start * WINDOW * self.batch_size :][: WINDOW * self.batch_size].numpy()
        window = window[np.argsort(self.examples.lengths[window], kind="stable")]
        return [int(i) for i in window[place * self.batch_size :][: self.batch_size]]

    def _shuffle(self, epoch: int) -> None:
        source = generator(self.seed, "order", epoch)
        drawn = torch.cat([self._drawn(number, epoch) for number in range(len(self._draws))])
        drawn = drawn[torch.randperm(len(drawn), generator=source)]
        fill = torch.arange(self.per_epoch * self.batch_size) % len(drawn)
        self._order, self._batches = drawn[fill], torch.randperm(self.per_epoch, generator=source)
        self._epoch = epoch

    def _drawn(self, number: int, epoch: int) -> Tensor:
        """What source `number` gives to an epoch: its own examples go round and round, shuffled anew each time."""
        size, draws = len(self.examples.parts[number].chosen), self._draws[number]
        first, last = epoch * draws, (epoch + 1) * draws - 1
        rounds = range(first // size, last // size + 1)
        order = torch.cat([torch.randperm(size, generator=generator(self.seed, "round", number, r)) for r in rounds])
        before = sum(len(part.chosen) for part in self.examples.parts[:number])
        return before + order[first - rounds[0] * size :][:draws]


def make_batch(
    examples: Sequence[Example],
    anchors: int,
    source: torch.Generator | Sequence[torch.Generator],
    choice: str = "random",
) -> Batch:
    """Pads the examples and draws anchors without replacement from the positions that have a label ahead.

    Each row is drawn by itself, from a `source` of its own if there are several. `choice` is TrainConfig's
    anchor_choice; by entropy there are more anchors, of which the step keeps some.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    trained, real = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        trained[row, : len(example.ids)] = example.trained
        real[row, : len(example.ids)] = True
    sources = [source] * len(examples) if isinstance(source, torch.Generator) else source
    drawn = [choose_anchors(e.trained[None], anchors, own, choice) for e, own in zip(examples, sources, strict=True)]
    width = max(1, *(row.shape[1] for row, _ in drawn))
    chosen = torch.cat([_widened(row, width) for row, _ in drawn])
    valid = torch.cat([torch.nn.functional.pad(own, (width - own.shape[1], 0)) for _, own in drawn])
    return Batch(ids, trained, real, chosen, valid, _starts(examples, longest))


def _starts(examples: Sequence[Example], longest: int) -> Tensor | None:
    if all(example.starts is None for example in examples):
        return None
    starts = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        if example.starts is not None:
            starts[row, : len(example.ids)] = example.starts
        starts[row, len(example.ids) :] = len(example.ids)  # padding is a document of its own
    return starts


def _widened(anchors: Tensor, width: int) -> Tensor:
    """(1, A) sorted -> (1, width): the first one again, in front of all."""
    first = anchors[:, :1] if anchors.shape[1] else anchors.new_zeros(1, 1)
    return torch.cat([first.expand(1, width - anchors.shape[1]), anchors], dim=1)


def choose_anchors(
    trained: Tensor, anchors: int, source: torch.Generator, choice: str = "random"
) -> tuple[Tensor, Tensor]:
    """trained (B, N) -> anchors (B, A), sorted, and which of them count (B, A).

    A shrinks to what the richest row offers; poorer rows repeat their first anchor, and the repeats don't count.
    """
    possible = run_of_candidates(trained, anchors, source) if choice == "every" else candidates(trained)
    anchors *= CHOSEN_AMONG if by_entropy(choice) else 1
    count = min(anchors, int(possible.sum(1).max()))
    rank = torch.rand(possible.shape, generator=source).masked_fill_(~possible, 2.0)
    chosen = rank.argsort(dim=1)[:, :count]
    valid = possible.gather(1, chosen)
    # Impossible positions sort behind all others, so the first column is possible wherever anything is.
    chosen = torch.where(valid, chosen, chosen[:, :1] * valid[:, :1])
    chosen, order = chosen.sort(dim=1)
    return chosen, valid.gather(1, order)

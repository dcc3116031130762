"""Which examples and anchors every step trains on, so that resuming needs no state and processes need not talk.

A step's sequences and their anchors are pure functions of (seed, step, row): they are the same however the rows are
shared out among processes and micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foretell.training.anchors import CHOSEN_AMONG, by_entropy, run_of_candidates
from foretell.training.data import Example, candidates

WINDOW = 16  # batches' worth of examples that are sorted by length together
HELD_OUT_FROM, HELD_OUT_SHARE, HELD_OUT_MOST = 20, 0.05, 64


class Batch(NamedTuple):
    """B sequences padded on the right to N tokens, with A anchors each."""

    ids: Tensor  # (B, N) int64
    trained: Tensor  # (B, N) bool, false at padding
    real: Tensor  # (B, N) bool, false at padding
    anchors: Tensor  # (B, A) int64
    anchor_valid: Tensor  # (B, A) bool: false where a row had too few positions to choose from

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def generator(*key: int | str) -> torch.Generator:
    """A generator seeded by all parts of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def split(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; nothing is held out of fewer than 20."""
    if len(examples) < HELD_OUT_FROM:
        return list(examples), []
    order = torch.randperm(len(examples), generator=generator(seed, "held out")).tolist()
    held = min(HELD_OUT_MOST, max(1, int(len(examples) * HELD_OUT_SHARE)))
    return [examples[i] for i in order[:-held]], [examples[i] for i in order[-held:]]


class Batches:
    """An endless, deterministic stream of batches: row r of `batch(s)` depends on the seed, s and r alone.

    batch_size counts all sequences of an optimiser step, over all processes.

    Every epoch visits all examples once, in batches of similar lengths; the last batch of an epoch is filled up from
    its beginning.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, anchors: int, seed: int, choice: str = "random"
    ) -> None:
        self.examples, self.batch_size, self.anchors, self.seed = examples, batch_size, anchors, seed
        self.choice = choice
        self.per_epoch = -(-len(examples) // batch_size)
        self._epoch = -1
        self._order: list[list[int]] = []

    def batch(self, number: int) -> Batch:
        """All rows of step `number`."""
        return self._rows(number, range(self.batch_size))

    def micro_batches(self, number: int, size: int, process: int = 0, processes: int = 1) -> list[Batch]:
        """This process's rows of step `number`, `size` at a time. Rows lie by length, so each process takes every
        `processes`-th one and all have as much to do."""
        rows = range(process, self.batch_size, processes)
        return [self._rows(number, rows[start : start + size]) for start in range(0, len(rows), size)]

    def _rows(self, number: int, rows: Sequence[int]) -> Batch:
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._shuffled(epoch), epoch
        chosen = [self.examples[self._order[index][row]] for row in rows]
        return make_batch(
            chosen, self.anchors, [generator(self.seed, "anchors", number, row) for row in rows], self.choice
        )

    def _shuffled(self, epoch: int) -> list[list[int]]:
        source = generator(self.seed, "order", epoch)
        order = torch.randperm(len(self.examples), generator=source).tolist()
        missing = self.per_epoch * self.batch_size - len(order)
        order += [order[i % len(order)] for i in range(missing)]
        batches = []
        for start in range(0, len(order), WINDOW * self.batch_size):
            window = sorted(order[start : start + WINDOW * self.batch_size], key=lambda i: len(self.examples[i].ids))
            batches += [window[i : i + self.batch_size] for i in range(0, len(window), self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=source).tolist()]


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
    return Batch(ids, trained, real, chosen, valid)


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

"""What the model will see: the very sequences of a training's first steps, token by token, with mask and anchors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from foretell.checkpoint import load_tokenizer
from foretell.config import TrainConfig
from foretell.errors import ForetellError
from foretell.training.batches import Batches, split
from foretell.training.data import Corpus, OnProgress, load_corpus
from foretell.training.packing import packed

CONTEXT = 8  # tokens decoded in front of others: many tokenizers drop a leading space


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    trained: bool
    anchor: bool  # a mask block hangs after this token
    begins: bool  # a document of a pack begins here


@dataclass(frozen=True)
class Shown:
    """One row of a batch; the lists have one entry per token, `anchors` one per block."""

    step: int
    row: int
    ids: list[int]
    trained: list[bool]
    anchors: list[int]
    starts: list[int]  # where the documents begin
    stretches: list[Stretch]


@dataclass(frozen=True)
class Preview:
    corpus: Corpus
    held_out: int  # examples that are measured on, not trained on
    sequences: int  # that an epoch draws, after packing
    shown: list[Shown]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `sources` as in a training's provenance, `skipped` with the first bad records, the sequences."""
        shown = [vars(s) | {"stretches": [stretch._asdict() for stretch in s.stretches]} for s in self.shown]
        return {
            "data": str(self.corpus),
            "report": vars(self.corpus.report),
            "sources": self.corpus.describe(),
            "fingerprint": self.corpus.fingerprint,
            "held_out": self.held_out,
            "sequences_per_epoch": self.sequences,
            "sequences": shown,
        }


def preview(
    data: str | Path | Sequence[str | Path],
    base: str,
    config: TrainConfig | None = None,
    *,
    records: int = 3,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
) -> Preview:
    """The first `records` sequences, or all if fewer, that `train` would draw with this config in one process.

    Of the base only the tokenizer is read. Raises ForetellError as `load_corpus` does.
    """
    config = config or TrainConfig()
    tokenizer = load_tokenizer(base, trust_remote_code)
    if tokenizer is None:
        raise ForetellError(
            f"{base} is not there or has no tokenizer; give the directory of a base with tokenizer files, or a Hub name"
        )
    corpus = load_corpus(data, tokenizer, config.seq_len, on_progress, config.packing)
    examples, held_out = split(corpus.examples, config.seed)
    if config.packing:
        examples = packed(examples, config.seq_len)
    batches = Batches(examples, config.batch_size, config.anchors, config.seed)
    records = min(records, len(examples))
    shown: list[Shown] = []
    for step in range(-(-records // config.batch_size)):
        batch = batches.batch(step)
        for row in range(min(config.batch_size, records - len(shown))):
            length = int(batch.real[row].sum())
            ids, trained = batch.ids[row, :length].tolist(), batch.trained[row, :length].tolist()
            anchors = batch.anchors[row][batch.anchor_valid[row]].tolist()
            starts = [0] if batch.starts is None else batch.starts[row, :length].unique().tolist()
            stretches = list(_stretches(tokenizer, ids, trained, set(anchors), set(starts[1:])))
            shown.append(Shown(step + 1, row + 1, ids, trained, anchors, starts, stretches))
    return Preview(corpus, len(held_out), len(examples), shown)


def _stretches(
    tokenizer: Any, ids: list[int], trained: list[bool], anchors: set[int], begins: set[int]
) -> Iterator[Stretch]:
    """Runs of equal kind are decoded together: a character may be several tokens."""
    document = 0
    kinds = []
    for place in range(len(ids)):
        document += place in begins
        kinds.append((document, trained[place], place if place in anchors else -1))
    place, shown = 0, 0
    for (document, is_trained, anchor), run in groupby(kinds):
        count = len(list(run))
        before = max(0, place - CONTEXT)
        lead, whole = (
            str(tokenizer.decode(ids[before:end], clean_up_tokenization_spaces=False)) for end in (place, place + count)
        )
        yield Stretch(whole[len(lead) :], is_trained, anchor >= 0, document > shown)
        place, shown = place + count, document

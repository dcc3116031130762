"""Texts longer than a sequence: pieces of even lengths, nothing lost, and full ones where they are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell.config import MTPConfig, TrainConfig
from foretell.training.data import Corpus, load_corpus
from foretell.training.loop import train
from foretell.training.packing import packed
from foretell.training.preview import preview
from foretell.training.tokenise import pieces

from .saved import character_tokenizer, save_base

LENGTHS = (1, 3, 8, 9, 10, 11, 16, 17, 25, 64, 65)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_hold_everything_and_none_is_tiny(length: int, full: bool) -> None:
    values = torch.arange(length)
    parts = pieces(values, 8, full)
    sizes = [len(part) for part in parts]
    assert torch.equal(torch.cat(parts), values) and max(sizes) <= 8
    assert len(parts) == -(-length // 8), "no more sequences than full ones would be"
    if full and length % 8 not in (1, 2):  # so few could not be trained on
        assert sizes == [8] * (length // 8) + [length % 8] * (length % 8 > 0)
    else:
        assert max(sizes) - min(sizes) <= 1


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def sizes(corpus: Corpus) -> list[int]:
    return [len(example.ids) for example in corpus.examples]


@pytest.mark.parametrize("kind", ["text", "input_ids"])
def test_a_long_record_is_split_evenly_unless_it_is_packed(tmp_path: Path, kind: str) -> None:
    """49 characters and an end token, or 50 tokens all of which are trained: two more than two sequences."""
    record = {"text": "x" * 49} if kind == "text" else {"input_ids": list(range(50))}
    path = write(tmp_path / "d.jsonl", record)
    corpus = load_corpus(path, character_tokenizer(), 24)
    assert sizes(corpus) == [17, 17, 16] and all(example.trained.all() for example in corpus.examples)
    assert (corpus.report.tokens, corpus.report.trained, corpus.report.split) == (50, 50, 1)
    assert sizes(load_corpus(path, character_tokenizer(), 20, packing=True)) == [20, 20, 10]
    assert sizes(load_corpus(path, character_tokenizer(), 20)) == [17, 17, 16], "the two are kept apart"


def test_packed_texts_still_fill_their_sequences(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", *({"text": "x" * (35 + n % 13)} for n in range(60)))
    corpus = load_corpus(path, character_tokenizer(), 32, packing=True)
    packs = packed(corpus.examples, 32)
    assert corpus.report.tokens > 0.95 * 32 * len(packs)
    base = str(save_base(tmp_path / "base"))
    shown = preview(path, base, TrainConfig(seq_len=32, packing=True), records=0)
    assert shown.corpus.fingerprint == corpus.fingerprint, "what is shown is what is trained on"


def test_every_mask_is_judged_on_texts_a_little_longer_than_a_sequence(tmp_path: Path) -> None:
    """Full pieces would leave a batch of remainders of 4 tokens, of which only the first two masks have labels."""
    path = write(tmp_path / "d.jsonl", *({"text": "a text of words"[:n] + "y" * (27 - n)} for n in range(12)))
    config = TrainConfig(steps=6, batch_size=4, seq_len=24, anchors=32, log_every=1)
    lines: list[dict[str, Any]] = []
    model = train(
        str(save_base(tmp_path / "base")), path, tmp_path / "out", MTPConfig(masks=6, rank=2, alpha=4.0), config,
        device="cpu", on_step=lines.append,
    )  # fmt: skip
    measured = [line["agreement"] for line in lines if "agreement" in line]
    assert len(measured) == 6 and all(None not in values for values in measured)
    assert model.provenance["data_sources"][0]["tokens"] == 12 * 28

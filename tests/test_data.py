"""What every batch holds: order, mixtures, held-out text, padding, anchors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from foretell.errors import ForetellError
from foretell.training.batches import Batches, choose_anchors, generator, split
from foretell.training.data import Example, load_corpus
from foretell.training.examples import Examples, Part, apportion

from .saved import character_tokenizer


def test_anchors_are_distinct_and_have_a_label() -> None:
    trained = torch.tensor([[False, False, True, True, True, False], [False, False, False, True, True, False]])
    for seed in range(20):
        chosen, valid = choose_anchors(trained, 2, generator(seed))
        # Position 1 is the last prompt token of row 0; x_{i+1} and x_{i+2} must both be trained.
        assert chosen[0].tolist() == [1, 2] and valid[0].all()
        assert chosen[1].tolist() == [2, 2] and valid[1].sum() == 1
    long = torch.ones(1, 50, dtype=torch.bool)
    drawn = {tuple(choose_anchors(long, 4, generator(seed))[0][0].tolist()) for seed in range(20)}
    assert len(drawn) > 10, "anchors must differ from step to step"
    assert all(len(set(anchors)) == 4 and max(anchors) <= 47 for anchors in drawn)


def examples(count: int, first: int = 0) -> list[Example]:
    return [
        Example(torch.full((5 + n % 7,), n, dtype=torch.int32), torch.ones(5 + n % 7, dtype=torch.bool))
        for n in range(first, first + count)
    ]


def mixture(*parts: tuple[int, float | None]) -> Examples:
    """Source s holds the numbers from 1000 s on."""
    return Examples([Part.of(examples(count, 1000 * s), weight) for s, (count, weight) in enumerate(parts)])


def test_batches_depend_on_seed_and_number_alone_and_cover_everything() -> None:
    pool = examples(10)
    batches = Batches(pool, 4, 3, seed=1)
    seen = [row[0].item() for number in range(3) for row in batches.batch(number).ids]
    assert set(seen) == set(range(10)) and len(seen) == 12
    later, fresh = batches.batch(7), Batches(pool, 4, 3, seed=1).batch(7)
    assert all(torch.equal(a, b) for a, b in zip(later[:5], fresh[:5], strict=True))
    other = Batches(pool, 4, 3, seed=2).batch(7)
    assert later.ids.shape != other.ids.shape or not torch.equal(later.ids, other.ids)


def test_padding_is_neither_real_nor_trained() -> None:
    batch = Batches(examples(9), 9, 3, seed=0).batch(0)
    lengths = torch.tensor([5 + int(row[0]) % 7 for row in batch.ids])
    assert torch.equal(batch.real.sum(1), lengths) and torch.equal(batch.trained, batch.real)
    assert batch.ids.shape[1] == lengths.max()
    assert (batch.anchors + 2 < lengths[:, None]).all()


def numbers(batches: Batches, count: int) -> list[int]:
    return [int(row[0]) for number in range(count) for row in batches.batch(number).ids]


def test_a_mixture_draws_by_weight_whatever_the_sizes() -> None:
    pool = mixture((90, 1.0), (10, 3.0))
    batches = Batches(pool, 4, 1, seed=0)
    epoch = numbers(batches, batches.per_epoch)
    seen = Counter(number // 1000 for number in epoch)
    assert batches.per_epoch == 25 and seen == {0: 25, 1: 75}
    small = Counter(number for number in epoch if number >= 1000)
    assert set(small.values()) <= {7, 8}, "a small source goes round and round, each example as often as the others"
    four = numbers(batches, 4 * batches.per_epoch)
    assert len({number for number in four if number < 1000}) == 90, "a large one goes on where it was in the next epoch"
    again = Batches(mixture((90, 1.0), (10, 3.0)), 4, 1, seed=0)
    assert numbers(again, 30)[-8:] == numbers(batches, 30)[-8:] and again.chosen(7) == batches.chosen(7)


def test_without_weights_every_example_of_every_source_comes_once() -> None:
    batches = Batches(mixture((9, None), (3, None)), 4, 1, seed=0)
    assert sorted(numbers(batches, 3)) == [*range(9), 1000, 1001, 1002]
    assert mixture((9, None), (3, 2.0)).draws() == [4, 8], "one weight makes the others 1"
    assert mixture((1000, 1000.0), (3, 0.001)).draws()[1] == 1, "no source is left out"
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]


def test_batches_hold_similar_lengths() -> None:
    batches = Batches(examples(64), 4, 1, seed=0)
    spread = [np.ptp(batch.real.sum(1).numpy()) for batch in map(batches.batch, range(batches.per_epoch))]
    assert np.mean(spread) < 2, "drawn blindly, four lengths of 5 to 11 would lie 4 apart"


def test_held_out_examples_are_not_trained_on() -> None:
    train, held = split(mixture((40, None)), seed=0)
    assert (len(train), len(held)) == (38, 2)
    assert {int(e.ids[0]) for e in train} | {int(e.ids[0]) for e in held} == set(range(40))
    assert split(mixture((19, None)), seed=0)[1] == []
    assert len(split(mixture((5000, None)), seed=0)[1]) == 64
    kept, held = split(mixture((1000, 1.0), (1000, 1.0)), seed=0)
    assert Counter(int(e.ids[0]) // 1000 for e in held) == {0: 32, 1: 32} and len(kept) == 2000 - 64
    small = split(mixture((1000, 1.0), (40, 9.0)), seed=0)[1]
    assert sum(int(e.ids[0]) >= 1000 for e in small) == 2, "never more than a twentieth of a source"


def test_a_mixture_is_described(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {n}"}) for n in range(4)))
    sources = [f"{tmp_path / 'a.jsonl'}:2", tmp_path / "b.jsonl"]
    corpus = load_corpus(sources, character_tokenizer(), 16)
    assert str(corpus) == "a.jsonl:2 b.jsonl" and corpus.report.examples == 8
    described = [(line["source"], line["weight"], line["share"], line["records"]) for line in corpus.describe()]
    assert described == [("a.jsonl:2", 2.0, 0.625, 4), ("b.jsonl", None, 0.375, 4)]
    assert load_corpus(sources[::-1], character_tokenizer(), 16).fingerprint != corpus.fingerprint
    with pytest.raises(ForetellError, match=r"weight in .* must be above 0"):
        load_corpus(f"{tmp_path / 'a.jsonl'}:0", character_tokenizer(), 16)
    with pytest.raises(ForetellError, match="there is no data"):
        load_corpus([], character_tokenizer(), 16)

"""Batches of prompts of different lengths: every row as if it were alone, fp32."""

from typing import Any

import pytest
import torch

from foretell.decoding import loop
from foretell.decoding.cache import StaticCache
from foretell.decoding.draft import draft
from foretell.decoding.strategies import aligned
from foretell.errors import ForetellError
from foretell.layout import Block, Layout, linear, plain, quadratic

from .models import CONFIGS, VOCAB, random_prompt, reference, tiny_model
from .test_lossless import STRATEGIES, fitted


@pytest.mark.parametrize("name", list(CONFIGS))
def test_ragged_batch_of_rejected_drafts(name: str) -> None:
    model = tiny_model(name)
    prompts = [random_prompt(length, seed=length) for length in (1, 30, 7, 12)]
    expected = [reference(model.base.lm, prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        out = model.generate_batch([prompt[0].tolist() for prompt in prompts], max_new_tokens=40, strategy=strategy)
        assert [row.token_ids for row in out] == expected, strategy


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
def test_rows_accept_their_own_number_and_leave_when_they_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts of every second row are spoiled; each row stops at the end of text where it comes."""
    model, known = fitted(name)

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        drafts = draft(*args, **kwargs)
        drafts[1::2] = (drafts[1::2] + 1) % VOCAB
        return drafts

    monkeypatch.setattr(loop, "draft", spoiled)
    prompts = [known[:, start : start + 12] for start in (0, 3, 9, 5)]
    free = model.generate_batch([prompt[0].tolist() for prompt in prompts], max_new_tokens=50)
    assert free[0].acceptance_rate > 2 > free[1].acceptance_rate
    model.base.lm.generation_config.eos_token_id = reference(model.base.lm, known, 30)[20]
    expected = [reference(model.base.lm, prompt, 50) for prompt in prompts]
    assert len({len(row) for row in expected}) > 1  # they do not end together
    for strategy in ("linear", "quadratic"):
        out = model.generate_batch([prompt[0].tolist() for prompt in prompts], max_new_tokens=50, strategy=strategy)
        assert [row.token_ids for row in out] == expected


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ForetellError, match="batch is empty"):
        tiny_model().generate_batch([])


def test_alignment_keeps_every_block_and_fills_behind() -> None:
    rows = aligned([linear(2, 2), linear(0, 2), plain(), quadratic(1, 2)], 2)
    assert {(row.regular, row.masks) for row in rows} == {(3, 4)}
    assert rows[0].blocks == (Block(2, 2), Block(0, 2))
    assert rows[1].block_rows(0) == slice(3, 5)
    assert rows[3].blocks == (Block(0, 2), Block(1, 2))
    assert aligned([plain(), plain()], 2) == [Layout(1), Layout(1)]


def test_leaving_moves_only_the_last_row() -> None:
    cache = StaticCache(1, capacity=8, batch=3)
    states = torch.arange(3.0)[:, None, None, None].expand(3, 1, 4, 2) + 1
    cache.layers[0].update(states, states)
    cache.keep([4, 2, 3])
    cache.leave(0)
    assert cache.lengths == [3, 2]
    new = torch.zeros(2, 1, 1, 2)
    keys, _ = cache.layers[0].update(new, new)
    assert keys[:, 0, :, 0].tolist() == [[3, 3, 3, 0], [2, 2, 0, 2]]  # row 1 keeps 2, then the new row, then leftovers

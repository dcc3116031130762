"""Batches of prompts of different lengths: every row as if it were alone, fp32."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.cache import StaticCache
from foretell.config import STRATEGIES, DecodeConfig
from foretell.decoding.draft import SamplerDrafter
from foretell.decoding.loop import Step, steps
from foretell.decoding.pick import Picker
from foretell.decoding.stopping import Stop
from foretell.errors import ForetellError
from foretell.layout import Block, Layout, linear, plain, quadratic
from foretell.rows import aligned

from .fitted import fitted
from .models import CONFIGS, VOCAB, random_prompt, reference, tiny_model


@pytest.mark.parametrize("name", list(CONFIGS))
def test_ragged_batch_of_rejected_drafts(name: str) -> None:
    model = tiny_model(name)
    prompts = [random_prompt(length, seed=length) for length in (1, 30, 7, 12)]
    expected = [reference(model.base.lm, prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        out = model.generate_batch([prompt[0].tolist() for prompt in prompts], max_new_tokens=40, strategy=strategy)
        assert [row.token_ids for row in out] == expected, strategy


@dataclass(frozen=True)
class EverySecondSpoiled(SamplerDrafter):
    """Every draft of the prompts with an odd number is wrong. Notes the two tokens before every block."""

    noted: list[tuple[int, int, list[int]]] = field(default_factory=list)  # prompt, place, tokens

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        drafts, confidences = super().__call__(latents, before, sequences, places, logits)
        self.noted.extend(zip(sequences, places, before.tolist(), strict=True))
        odd = torch.tensor(sequences)[:, None] % 2
        return (drafts + odd) % VOCAB, confidences


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
def test_rows_accept_their_own_number_and_leave_when_they_end(name: str) -> None:
    model, known = fitted(name)
    prompts = [known[:, start : start + 12] for start in (0, 3, 9, 5)]

    def decode(strategy: str, stop: Stop | None) -> list[list[Step]]:
        config = DecodeConfig(max_new_tokens=50, strategy=strategy)
        drafter = EverySecondSpoiled(model, config, Picker(config))
        done: list[list[Step]] = [[] for _ in prompts]
        texts = [prompt[0].tolist() for prompt in prompts]
        for batch in steps(model, [ids[0] for ids in prompts], config, Picker(config), stop, drafter=drafter):
            for step in batch:
                done[step.sequence].append(step)
                texts[step.sequence] += step.tokens
        for number, place, before in drafter.noted:
            end = prompts[number].shape[1] + place
            assert before == texts[number][end - 2 : end][::-1]
        assert drafter.noted or strategy not in ("linear", "quadratic")
        return done

    free = [sum(len(step.tokens) for step in row) / len(row) for row in decode("quadratic", None)]
    assert free[0] > 2 > free[1]
    end = reference(model.base.lm, known, 30)[20]
    model.base.lm.generation_config.eos_token_id = end
    expected = [reference(model.base.lm, prompt, 50) for prompt in prompts]
    assert len({len(row) for row in expected}) > 1  # they do not end together
    for strategy in STRATEGIES:
        rows = decode(strategy, Stop([end]))
        assert [[token for step in row for token in step.tokens] for row in rows] == expected, strategy


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ForetellError, match="batch is empty"):
        tiny_model().generate_batch([])


def test_several_prompts_given_as_one_are_sent_to_the_batch() -> None:
    several: Any = ["one", "two"]
    with pytest.raises(ForetellError, match="a text, not list; generate_batch takes several"):
        tiny_model().generate(several)


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


@pytest.mark.parametrize("lengths", [[4, 4], [3, 0, 5, 1]])
def test_rows_are_written_behind_what_each_sequence_keeps(lengths: list[int]) -> None:
    """Against the definition, row by row; layers may differ in heads, and values in size; the second call grows."""
    cache = StaticCache(2, capacity=7, batch=len(lengths))
    cache.keep(lengths)
    generator = torch.Generator().manual_seed(0)
    for rows in (2, 4, 4):
        for heads, layer in zip((1, 3), cache.layers, strict=True):
            before = [None if states is None else states.clone() for states in (layer.keys, layer.values)]
            new = [torch.randn(len(lengths), rows, heads, size, generator=generator).transpose(1, 2) for size in (4, 6)]
            found = layer.update(*new)
            for old, states, given in zip(before, found, new, strict=True):
                assert states.shape[2] == max(lengths) + rows
                for b, length in enumerate(lengths):
                    assert torch.equal(states[b, :, length : length + rows], given[b])
                    if old is not None:
                        assert torch.equal(states[b, :, :length], old[b, :, :length])
    cache.keep([1] * len(lengths))
    keys, _ = cache.layers[0].update(torch.ones(len(lengths), 1, 1, 4), torch.ones(len(lengths), 1, 1, 6))
    assert [int(keys[b, 0, length + 1, 0]) for b, length in enumerate(lengths)] == [1] * len(lengths)

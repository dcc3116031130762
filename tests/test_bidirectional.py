"""Masks that see their whole block: the same in layouts, training and decoding, and lossless (method.md section 1)."""

from __future__ import annotations

import pytest
import torch

from foretell.cache import StaticCache
from foretell.config import STRATEGIES
from foretell.decoding.loop import prefill
from foretell.layout import Block, Layout, quadratic
from foretell.training.two_pass import mask_pass, one_pass, regular_pass, visibility

from .decoded import decode
from .models import VOCAB, random_prompt, reference, tiny_model
from .test_layout import see

K = 4


def test_layout_by_hand() -> None:
    layout = Layout(2, (Block(0, 2), Block(1, 2)), bidirectional=True)
    expected = see(
        """
        #.....
        ##....
        #.##..
        #.##..
        ##..##
        ##..##
        """
    )
    assert torch.equal(layout.visible, expected)
    assert layout != Layout(2, layout.blocks)


def test_training_sees_what_the_layout_says() -> None:
    anchors, tokens = torch.tensor([[1, 4, 6]]), 12
    layout = Layout(tokens, tuple(Block(a, K) for a in (1, 4, 6)), bidirectional=True)
    ends = torch.full((1, 3), K)
    assert torch.equal(visibility(anchors, K, tokens, ends)[0], layout.visible[tokens:])
    short = visibility(anchors, K, tokens, torch.tensor([[2, 4, 1]]))[0]
    assert torch.equal(short[:2, tokens : tokens + K], torch.tensor([[True, True, False, False]] * 2))
    assert short[2 * K, tokens + 2 * K :].tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_training_and_decoding_give_a_block_the_same_latents(name: str) -> None:
    """Blocks of 1 to K masks in one step of decoding, against training with those lengths."""
    model = tiny_model(name, masks=K, mask_attention="bidirectional")
    text = random_prompt(24, seed=2)
    lengths = [4, 1, 3, 2]
    layout = Layout(4, tuple(Block(after, size) for after, size in enumerate(lengths)))
    cache = StaticCache(len(model.base.blocks), 64, 1)
    prompt = text[0, :18]
    with torch.inference_mode():
        prefill(model, [prompt], cache)
        decoded = model.step(text[:, 17:21], [layout], cache, cache.lengths)[0]
    anchors = torch.tensor([[17, 18, 19, 20]])
    trained = mask_pass(model, anchors, regular_pass(model, text), lengths=torch.tensor([lengths]))
    _, slow = one_pass(model, text, anchors, torch.tensor([lengths]))
    torch.testing.assert_close(slow, trained, atol=1e-5, rtol=1e-5)
    for after, size in enumerate(lengths):
        rows = decoded[layout.block_rows(after)]
        torch.testing.assert_close(rows, trained[0, after, :size], atol=1e-4, rtol=1e-4)
    whole = mask_pass(model, anchors, regular_pass(model, text))[0]
    assert (whole[2, 0] - trained[0, 2, 0]).abs().max() > 1e-3, "m1 must depend on how many masks follow it"
    assert torch.allclose(whole[0], trained[0, 0], atol=1e-5)


def test_masks_past_the_end_are_not_seen() -> None:
    model = tiny_model(masks=K, mask_attention="bidirectional")
    text, anchors = random_prompt(12), torch.tensor([[9]])  # two masks fit
    two = mask_pass(model, anchors, regular_pass(model, text), lengths=torch.tensor([[2]]))
    assert torch.equal(mask_pass(model, anchors, regular_pass(model, text)), two)


@pytest.mark.parametrize("masks", [1, 3, 4])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_output_is_the_bases_with_any_number_of_masks(name: str, masks: int) -> None:
    model = tiny_model(name, masks=K, mask_attention="bidirectional")
    prompt = random_prompt(20, seed=3)
    expected = reference(model.base.lm, prompt, 40)
    for strategy in ("linear", "quadratic", "adaptive"):
        out = model.generate(input_ids=prompt, max_new_tokens=40, strategy=strategy, masks=masks)
        assert out.token_ids == expected, strategy


def test_ragged_batches_with_drafts_that_hold_sometimes() -> None:
    model = tiny_model(masks=K, mask_attention="bidirectional", sampler="bigram", sampler_rank=3)
    prompts = [random_prompt(length, seed=length) for length in (3, 33)]
    expected = [reference(model.base.lm, prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        out = decode(model, prompts, strategy, 40, replayed=expected)
        assert out.texts == expected, strategy
        if strategy != "autoregressive":
            assert out.accepted > 10 and out.rejected > 10, strategy


def test_causal_blocks_do_not_change_with_their_length() -> None:
    model = tiny_model(masks=K)
    text, anchors = torch.randint(VOCAB, (1, 20)), torch.tensor([[3, 9]])
    regular = regular_pass(model, text)
    assert torch.equal(mask_pass(model, anchors, regular), mask_pass(model, anchors, regular, lengths=anchors // 3))
    assert not quadratic(2, 2).bidirectional

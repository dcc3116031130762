"""Attention of grouped heads without copies of keys and values: the same numbers, and the base is left as it was."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from foretell.base import Base
from foretell.grouped_attention import can_group, grouped, grouped_attention
from foretell.layout import quadratic
from foretell.model import step_attention

from .models import CONFIGS, random_prompt, tiny_lm


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_as_transformers_own(groups: int, masks: int, rows: int) -> None:
    """Masks for the whole batch and for each sequence."""
    torch.manual_seed(0)
    query = torch.randn(2, 2 * groups, rows, 8)
    key, value = torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    mask = torch.where(torch.rand(masks, 1, rows, 11) < 0.6, 0.0, torch.finfo(torch.float32).min)
    mask[..., 0] = 0
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = grouped_attention(module, query, key, value, mask, scaling=0.3, sliding_window=None)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, grouped_attention(module, query, key, value, mask * 0, scaling=0.3)[0])
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]  # trained: another kernel, the same gradients
    ours, _ = grouped_attention(module, *inputs, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, *inputs, mask, scaling=0.3)
    change = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, inputs, change), torch.autograd.grad(theirs, inputs, change), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rows", [1, 3])
def test_without_a_mask(rows: int) -> None:
    """One row sees all columns; several go to transformers' causal attention."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, rows, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=0.3)
    found, _ = grouped_attention(module, query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in CONFIGS if can_group(tiny_lm(name))])
def test_a_step_of_every_base_with_groups(name: str) -> None:
    base = Base(tiny_lm(name))
    layout = quadratic(2, 2)
    embeddings = base.embed(random_prompt(layout.width))
    positions, mask = step_attention([layout], [0], base)
    with torch.no_grad():
        found = base.latents(embeddings, positions, mask)
        base._groups = False
        torch.testing.assert_close(found, base.latents(embeddings, positions, mask), atol=1e-4, rtol=1e-4)


def test_which_bases_have_groups() -> None:
    assert can_group(tiny_lm("llama")) and can_group(tiny_lm("gemma3"))
    assert not can_group(tiny_lm("gpt_neox"))  # a head of keys for each
    assert not can_group(tiny_lm("gemma2"))  # eager


def test_the_base_is_left_as_it_was() -> None:
    lm = tiny_lm("llama")
    with pytest.raises(ValueError, match="broken"), grouped(lm.config):
        assert lm.config._attn_implementation != "sdpa"
        raise ValueError("broken")
    assert lm.config._attn_implementation == "sdpa"

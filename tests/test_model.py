"""The gate, the masks and the base: what must be equal bit for bit, and what must not leak."""

import pytest
import torch
from torch import Tensor

from foretell.base import Base
from foretell.cache import StaticCache
from foretell.config import MTPConfig
from foretell.errors import ForetellError
from foretell.layout import Block, Layout, linear, plain, quadratic
from foretell.model import CACHED, MTPModel, step_attention

from .models import CONFIGS, MIXTURES, random_prompt, tiny_lm, tiny_model

ARCHITECTURES = list(CONFIGS)


def run(model: MTPModel, prompt: Tensor, ids: Tensor, layout: Layout) -> Tensor:
    cache = StaticCache(len(model.base.blocks), 64)
    with torch.no_grad():
        model.prefill(prompt, cache)
        cache.keep([prompt.shape[1]])
        return model.step(ids, [layout], cache, cache.lengths)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_base_is_bit_identical_with_the_adapter_attached(name: str) -> None:
    ids = random_prompt(24)
    with torch.no_grad():
        before = tiny_lm(name)(ids, attention_mask=torch.ones_like(ids)).logits
        after = tiny_model(name).base.lm(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_regular_rows_do_not_depend_on_masks_or_adapter(name: str) -> None:
    model = tiny_model(name)
    if name in MIXTURES:  # the default kernel sorts rows by expert, so that other rows move the last bits of these
        model.base.lm.set_experts_implementation("batched_mm")
    prompt, ids = random_prompt(20), random_prompt(3, seed=1)
    first = run(model, prompt, ids, quadratic(2, 3))
    for parameter in model.own_parameters().values():
        torch.nn.init.normal_(parameter, std=3.0)
    second = run(model, prompt, ids, quadratic(2, 3))
    assert torch.equal(first[:3], second[:3])
    assert not torch.allclose(first[3:], second[3:])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masks_see_only_their_block_and_what_is_before_it(name: str) -> None:
    model = tiny_model(name)
    prompt, ids = random_prompt(20), random_prompt(3, seed=1)
    layout = quadratic(2, 3)
    whole = run(model, prompt, ids, layout)
    for after in range(3):
        alone = Layout(3, (Block(after, 3),))
        rows, alone_rows = layout.block_rows(after), alone.block_rows(after)
        assert rows is not None and alone_rows is not None
        # Without the other blocks, and with other tokens after the block's own.
        changed = ids.clone()
        changed[:, after + 1 :] = (changed[:, after + 1 :] + 1) % 97
        torch.testing.assert_close(run(model, prompt, changed, alone)[alone_rows], whole[rows], atol=2e-5, rtol=1e-4)
        changed[:, after] = (changed[:, after] + 1) % 97
        assert not torch.allclose(run(model, prompt, changed, alone)[alone_rows], whole[rows], atol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_step_logits_equal_a_plain_forward(name: str) -> None:
    model = tiny_model(name)
    prompt, ids = random_prompt(20), random_prompt(3, seed=1)
    both = torch.cat([prompt, ids], dim=1)
    with torch.no_grad():
        expected = model.base.lm(both, attention_mask=torch.ones_like(both)).logits[0, -3:]
        got = model.base.unembed(run(model, prompt, ids, quadratic(2, 3))[:3])
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)


def test_standard_adapter_changes_the_base() -> None:
    ids = random_prompt(24)
    model = tiny_model(adapter="standard")
    with torch.no_grad():
        changed = model.base.lm(ids).logits
        model.adapter.remove()
        assert not torch.allclose(changed, model.base.lm(ids).logits, atol=1e-2)


def test_fresh_adapter_leaves_masks_at_the_base() -> None:
    """B starts at zero: a mask row is the base reading the mask's vector."""
    torch.manual_seed(0)
    model = MTPModel(Base(tiny_lm()), MTPConfig(masks=2, rank=4))
    open_gate = run(model, random_prompt(8), random_prompt(1), linear(0, 2))
    model.adapter.remove()
    assert torch.equal(open_gate, run(model, random_prompt(8), random_prompt(1), linear(0, 2)))


def test_masks_without_room_for_regular_tokens_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ForetellError, match="do not fit"):
        run(model, random_prompt(4), random_prompt(2), plain(3))


def test_cache_keeps_accepted_rows_and_grows() -> None:
    model = tiny_model()
    prompt, ids = random_prompt(10), random_prompt(6, seed=1)
    cache = StaticCache(3, capacity=4)  # too small: must grow without losing what is kept
    with torch.no_grad():
        model.prefill(prompt, cache)
        cache.keep([10])
        model.step(ids[:, :3], [quadratic(2, 4)], cache, cache.lengths)
        cache.keep([2])  # x and one draft
        got = model.base.unembed(model.step(ids[:, 2:4], [quadratic(1, 4)], cache, cache.lengths))[0, :2]
        both = torch.cat([prompt, ids[:, :4]], dim=1)
        expected = model.base.lm(both, attention_mask=torch.ones_like(both)).logits[0, -2:]
    assert cache.lengths == [12]
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=1e-4)


def test_a_cast_after_the_first_step_is_followed() -> None:
    """Hooks hold views or copies of the adapter's memory; moving or casting the adapter must renew them."""
    model = tiny_model()
    prompt, ids = random_prompt(8), random_prompt(1)
    before = run(model, prompt, ids, linear(0, 2))
    model.adapter.to(torch.float64)
    for p in model.adapter.parameters():
        p.data.zero_()
    model.adapter.to(torch.float32)
    after = run(model, prompt, ids, linear(0, 2))
    assert torch.equal(before[:1], after[:1]) and not torch.equal(before, after)


@pytest.mark.parametrize("explicit", [False, True])
def test_masks_over_any_number_of_cached_tokens(explicit: bool) -> None:
    """Up to CACHED of them the mask is a view of one that is kept."""
    base, layout = tiny_model().base, linear(2, 3)
    for length in (0, 1, CACHED - 1, CACHED, CACHED + 1, CACHED + 90):
        positions, mask = step_attention([layout], [length], base, explicit)
        seen = torch.cat([torch.ones(layout.width, length, dtype=torch.bool), layout.visible], 1)
        assert isinstance(mask, torch.Tensor) and torch.equal(mask[0, 0] == 0, seen)
        assert torch.equal(positions, layout.position_offsets[None] + length)
        assert mask.is_contiguous() or not explicit

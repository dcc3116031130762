"""Lean steps: the very bits of the decoder's own modules, for the bases that are of that make, and for no others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foretell.base import Base
from foretell.cache import StaticCache
from foretell.config import MTPConfig
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.layout import Layout, linear, plain, quadratic
from foretell.lean import make_of
from foretell.model import MTPModel
from foretell.packed import why_not

from .decoded import count_compiled, decode
from .models import CONFIGS, random_prompt, reference, tiny_lm

pytestmark = pytest.mark.skipif(
    why_not(torch.device("cpu"), torch.float32) is not None, reason="PyTorch without oneDNN"
)
LEAN = ("llama", "qwen2", "mistral", "qwen3", "smollm3")


def packed(name: str, dtype: torch.dtype = torch.float32) -> Base:
    base = Base(tiny_lm(name).to(dtype))
    base.pack(lambda: tiny_lm(name).to(dtype))
    return base


def adapted(base: Base) -> MTPForCausalLM:
    torch.manual_seed(4)
    model = MTPForCausalLM(base, MTPConfig(masks=3, rank=4, alpha=8.0))
    for parameter in model.own_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return model.for_inference()


def step(model: MTPModel, layout: Layout, lengths: list[int]) -> list[torch.Tensor]:
    """Latents of a step behind so many tokens, and the keys and values that it leaves in the last layer."""
    cache = StaticCache(len(model.base.blocks), 90, len(lengths))
    with torch.inference_mode():
        model.prefill(torch.cat([random_prompt(max(lengths), seed=row) for row in range(len(lengths))]), cache)
        cache.keep(lengths)
        ids = torch.arange(len(lengths) * layout.regular).view(len(lengths), -1)
        latents = model.step(ids, [layout] * len(lengths), cache, cache.lengths)
    return [latents, cache.layers[-1].keys, cache.layers[-1].values]


def regular_of(of_step: list[torch.Tensor], layout: Layout, lengths: list[int]) -> list[torch.Tensor]:
    """Of what `step` gives, what belongs to its regular rows."""
    latents, *states = of_step
    own = [each[row, :, : length + layout.regular] for each in states for row, length in enumerate(lengths)]
    return [latents[:, : layout.regular], *own]


def check_same_bits(model: MTPModel, lengths: list[int], close: float) -> None:
    """Lean steps give the same bits as the base's own modules; masks of several sequences, which go through the linears
    together, the same numbers but for rounding."""
    for layout in (plain(), plain(4), linear(2, 3), quadratic(3, 3)):
        lean = step(model, layout, lengths)
        with model.base.by_modules():
            expected = step(model, layout, lengths)
        for one, other in zip(regular_of(lean, layout, lengths), regular_of(expected, layout, lengths), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(lean, expected, strict=True):
            if len(lengths) > 1 and layout.masks:
                assert (one - other).abs().max() <= close * other.abs().max()
            else:
                assert torch.equal(one, other)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_which_bases_are_of_the_make(name: str) -> None:
    assert (packed(name).lean is not None) == (name in LEAN)


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[9], [40], [40, 9, 23], [9, 9]])
def test_the_same_bits_in_every_layout(
    name: str, dtype: torch.dtype, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged batches, contexts beyond a window, with masks and without. Masks of several sequences, which go through
    the linears together, have the same numbers but for rounding."""
    monkeypatch.setattr("foretell.model.MOST_ROWS", 0)  # the base's own attention
    check_same_bits(adapted(packed(name, dtype)), lengths, 1e-5 if dtype == torch.float32 else 0.1)


def test_modules_are_called_where_somebody_hooks_in() -> None:
    model = adapted(packed("llama"))
    seen: list[int] = []
    down = model.base.blocks[1].mlp.down_proj
    hook = down.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    step(model, plain(2), [9])
    hook.remove()
    assert seen == [9, 2]  # the prompt and the step
    step(model, plain(2), [9])
    assert seen == [9, 2]


@pytest.mark.parametrize("where", ["input_layernorm", "self_attn", "mlp", ""])
def test_a_decoder_that_does_anything_else_is_told_apart(where: str) -> None:
    """Llama but for a factor in one place, as relatives of it have them."""
    base = packed("llama")
    assert make_of(base) is not None

    def scaled(module: nn.Module, args: object, output: object) -> object:
        return (output[0] * 1.000001, output[1]) if isinstance(output, tuple) else output * 1.000001

    hook = base.blocks[1].get_submodule(where).register_forward_hook(scaled)
    assert make_of(base) is None
    hook.remove()


def test_what_begins_at_late_positions_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bases scale their queries from a position on."""
    base = packed("llama")
    attention = base.blocks[0].self_attn
    own = attention.forward

    def late(*args: object, **kwargs: object) -> object:
        out, weights = own(*args, **kwargs)
        late_rows = kwargs["position_ids"] >= 200  # the base has 256 positions
        return torch.where(late_rows[..., None], out * 1.5, out), weights

    monkeypatch.setattr(attention, "forward", late)
    assert make_of(base) is None


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("strategy", ["autoregressive", "linear", "quadratic", "adaptive"])
def test_texts_are_the_bases_own(name: str, strategy: str) -> None:
    """Alone and in a ragged batch, with drafts that hold and such that do not."""
    model, lm = adapted(packed(name)), tiny_lm(name)
    prompts = [random_prompt(length, seed=length) for length in (11, 25, 4)]
    expected = [reference(lm, prompt, 30) for prompt in prompts]
    for replayed in (None, expected):
        assert decode(model, prompts, strategy, 30, replayed).texts == expected
        assert decode(model, prompts[:1], strategy, 30, replayed and replayed[:1]).texts == expected[:1]


def test_compiled_blocks_are_traced_from_the_bases_modules() -> None:
    model = adapted(packed("qwen3"))
    prompt = random_prompt(11, seed=3)
    expected = reference(tiny_lm("qwen3"), prompt, 30)
    assert compile_steps(model) is None
    ran = count_compiled(model)
    assert decode(model, [prompt], "quadratic", 30).texts == [expected]
    assert sum(ran.values()) > 0

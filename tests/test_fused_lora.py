"""Low-rank terms of linears that are one packed product, against the adapters one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foretell import fused_lora
from foretell.base import Base
from foretell.config import MTPConfig
from foretell.decoding.cache import StaticCache
from foretell.decoding.generate import MTPForCausalLM
from foretell.fused_lora import FusedLowRank
from foretell.gated_lora import LowRank
from foretell.layout import linear
from foretell.model import MTPModel
from foretell.packed import PackedLinear, PackedProduct, why_not

from .models import CONFIGS, random_prompt, tiny_lm

pytestmark = pytest.mark.skipif(
    why_not(torch.device("cpu"), torch.float32) is not None, reason="PyTorch without oneDNN"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [0, 10**9])
@pytest.mark.parametrize("batch", [1, 3])
def test_terms_are_those_of_the_adapters(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, diagonal: int, batch: int
) -> None:
    """Of three linears of one product the first and the last are adapted."""
    monkeypatch.setattr(fused_lora, "DIAGONAL", diagonal)
    torch.manual_seed(0)
    sizes, adapters = [24, 8, 40], {2: LowRank(16, 40, 3, 0.5), 0: LowRank(16, 24, 5, 0.5)}
    for adapter in adapters.values():
        nn.init.normal_(adapter.b)
        adapter.to(dtype)
    x, out = torch.randn(batch, 4, 16, dtype=dtype), torch.randn(batch, 6, 72, dtype=dtype)
    none = torch.zeros(batch, 4, 8, dtype=dtype)
    with torch.inference_mode():
        expected = out[:, 2:] + torch.cat([adapters[0](x), none, adapters[2](x)], dim=-1)
        before = out[:, :2].clone()
        fused = FusedLowRank(sizes, {number: (a.a, a.b) for number, a in adapters.items()}, 0.5)
        assert len(fused.parts) == (1 if diagonal and dtype == torch.bfloat16 else 2)
        fused.add_to(out[:, 2:], x)
    assert torch.equal(out[:, :2], before)
    torch.testing.assert_close(out[:, 2:], expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


def adapted(base: Base) -> MTPForCausalLM:
    torch.manual_seed(4)
    model = MTPForCausalLM(base, MTPConfig(masks=3, rank=4, alpha=8.0), check=False)
    for adapter in model.adapter.adapters.values():
        nn.init.normal_(adapter.b, std=0.3)
    return model.for_inference()


def latents(model: MTPModel, batch: int) -> torch.Tensor:
    cache = StaticCache(len(model.base.blocks), 40, batch)
    with torch.inference_mode():
        model.prefill(torch.cat([random_prompt(9, seed=row) for row in range(batch)]), cache)
        cache.keep([9] * batch)
        return model.step(torch.full((batch, 3), 7), [linear(2, 3)] * batch, cache, cache.lengths)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("batch", [1, 2])
def test_a_packed_base_is_adapted_as_one_that_is_not(name: str, batch: int) -> None:
    plain, base = adapted(Base(tiny_lm(name))), Base(tiny_lm(name))
    base.pack(lambda: tiny_lm(name))
    packed = adapted(base)
    expected, found = latents(plain, batch), latents(packed, batch)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    for adapter in packed.adapter.adapters.values():
        nn.init.zeros_(adapter.b)
    packed.adapter.float()  # moved or cast, it is read again
    without = latents(packed, batch)
    torch.testing.assert_close(without[:, :3], found[:, :3], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(without[:, 3:], found[:, 3:], atol=1e-2)


def test_two_adapters_share_a_packed_base_and_leave_it() -> None:
    base = Base(tiny_lm("llama"))
    base.pack(lambda: tiny_lm("llama"))
    first, second = adapted(base), adapted(base)
    products = {m.product for m in base.lm.modules() if isinstance(m, PackedLinear)}
    expected = latents(first, 1)
    assert torch.equal(latents(second, 1), expected) and torch.equal(latents(first, 1), expected)
    assert count(products) > 2
    first.adapter.remove()
    assert torch.equal(latents(second, 1), expected)
    second.adapter.remove()
    assert count(products) == 0 and not any(module._forward_hooks for module in base.lm.modules())


def count(products: set[PackedProduct]) -> int:
    return sum(len(product.added) for product in products)

"""Low-rank terms of linears that are one packed product, against the adapters one by one."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from foretell import fused_lora, gated_lora
from foretell import packed as packed_module
from foretell.base import Base
from foretell.cache import StaticCache
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.fused_lora import FusedLowRank
from foretell.gated_lora import LowRank
from foretell.layout import linear
from foretell.model import MTPModel
from foretell.packed import PackedLinear, PackedProduct, Way, why_not

from .lying import WAYS, in_16_bits, lying
from .models import CONFIGS, random_prompt, tiny_lm

pytestmark = pytest.mark.skipif(
    why_not(torch.device("cpu"), torch.float32) is not None, reason="PyTorch without oneDNN"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("batch", "rows"), [(1, 2), (1, 4), (3, 4)])
def test_terms_are_those_of_the_adapters(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, diagonal: bool, way: Way, batch: int, rows: int
) -> None:
    """Of three linears of one product the first and the last are adapted."""
    lying(way, monkeypatch)
    possible = [other for other in packed_module.ways(dtype) if other in packed_module.AS_TENSORS]
    laying = way if way in possible else possible[0], diagonal
    monkeypatch.setattr(fused_lora, "layings", lambda *_: (laying,))
    torch.manual_seed(0)
    sizes, adapters = [24, 8, 40], {2: LowRank(16, 40, 3, 0.5), 0: LowRank(16, 24, 5, 0.5)}
    for adapter in adapters.values():
        nn.init.normal_(adapter.b)
        adapter.to(dtype)
    x, out = torch.randn(batch, rows, 16, dtype=dtype), torch.randn(batch, rows + 2, 72, dtype=dtype)
    none = torch.zeros(batch, rows, 8, dtype=dtype)
    with torch.inference_mode():
        expected = out[:, 2:] + torch.cat([adapters[0](x), none, adapters[2](x)], dim=-1)
        before = out[:, :2].clone()
        fused = FusedLowRank(sizes, {number: (a.a, a.b) for number, a in adapters.items()}, 0.5)
        assert len(fused.laid.bs) == (1 if diagonal else 2) and fused.laid.way == laying[0]
        fused.add_to(out[:, 2:], x)
    assert torch.equal(out[:, :2], before)
    torch.testing.assert_close(out[:, 2:], expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_matrices_lie_is_timed_once_for_all_of_their_shapes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is possible is tried, and what took longest is not taken."""
    fused_lora._timed.cache_clear()
    adapters = {number: LowRank(16, size, 4, 0.5).to(dtype) for number, size in enumerate((24, 40))}
    matrices = {number: (a.a, a.b) for number, a in adapters.items()}
    tried: list[tuple[Way, bool]] = []

    def slow(self: fused_lora.LaidOut, *_: object) -> fused_lora.Add:
        laying = self.way, len(self.bs) == 1

        def add(*_: object) -> None:
            tried.append(laying)
            time.sleep(0.0 if laying == possible[1] else 0.002)

        return add

    monkeypatch.setattr(fused_lora.LaidOut, "adder", slow)
    places = (((0, 24), (0, 4)), ((24, 64), (4, 8)))
    possible = fused_lora.layings(places, torch.device("cpu"), dtype)
    assert {diagonal for _, diagonal in possible} == {False, True}
    for _ in range(2):
        fused = FusedLowRank([24, 40], matrices, 0.5)
        assert (fused.laid.way, len(fused.laid.bs) == 1) == possible[1]
    assert set(tried) == set(possible)
    assert len(tried) == len(possible) * len(fused_lora.TRIED_MASKS) * fused_lora.TRIED_ROUNDS
    fused_lora._timed.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_small_matrices_are_joined_to_the_product(
    dtype: torch.dtype, bias: bool, count: int, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(way, monkeypatch)
    torch.manual_seed(0)
    linears = [in_16_bits(nn.Linear(16, size, bias=bias)).to(dtype) for size in (24, 8, 40)[:count]]
    adapters = {number: LowRank(16, len(linears[number].weight), 3, 0.5) for number in {0, count - 1}}
    for adapter in adapters.values():
        nn.init.normal_(adapter.b)
        in_16_bits(adapter).to(dtype)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    product = PackedProduct(weights, biases)
    x = torch.randn(2, 6, 16, dtype=dtype)
    with torch.inference_mode():
        plain = [product.part(x, number) for number in range(count)]
        to = product.arithmetic
        matrices = {number: (a.a.to(to), a.b.to(to)) for number, a in adapters.items()}
        fused = FusedLowRank(product.sizes, matrices, 0.5, product)
        assert fused.joined and product.joined == 3 * len(adapters)
        assert all(torch.equal(a, b) for a, b in zip(product.weights, weights, strict=True))
        without = [product.part(x, number) for number in range(count)]
        product.added.append(lambda x, made: fused.add_to(made[:, 2:], x[:, 2:]))
        found = [product.part(x, number) for number in range(count)]
    close = {"atol": 0.1 if dtype == torch.bfloat16 else 1e-5, "rtol": 0.02}
    for number, own in enumerate(linears):
        torch.testing.assert_close(without[number], plain[number], **close)
        torch.testing.assert_close(found[number][:, :2], own(x[:, :2]), **close)
        term = adapters[number](x[:, 2:]) if number in adapters else 0.0
        torch.testing.assert_close(found[number][:, 2:], own(x[:, 2:]) + term, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masks", [1, 3, 4, 9])
def test_adders_for_steps_that_recur_add_the_same(
    dtype: torch.dtype, diagonal: bool, joined: bool, way: Way, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lying(way, monkeypatch)
    possible = [other for other in packed_module.ways(dtype) if other in packed_module.AS_TENSORS]
    laying = way if way in possible else possible[0], diagonal
    monkeypatch.setattr(fused_lora, "layings", lambda *_: (laying,))
    monkeypatch.setattr(packed_module, "JOINED_BYTES", 2**20 if joined else 0)
    torch.manual_seed(0)
    weights = [in_16_bits(nn.Linear(16, size)).to(dtype).weight for size in (24, 8, 40)]
    adapters = {number: in_16_bits(LowRank(16, size, rank, 0.5)) for number, size, rank in ((0, 24, 5), (2, 40, 3))}
    product = PackedProduct(weights, [None] * 3)
    to = product.arithmetic
    for adapter in adapters.values():
        nn.init.normal_(adapter.b)
    matrices = {number: (a.a.to(to), a.b.to(to)) for number, a in adapters.items()}
    fused, x, regular = FusedLowRank(product.sizes, matrices, 0.5, product), torch.randn(1, 2 + masks, 16).to(to), 2
    assert fused.joined == joined
    with torch.inference_mode():
        made = product.make(x.to(dtype)).to(to)
        expected = made.clone()
        fused.add_to(expected, x, regular)
        assert not torch.equal(expected[:, regular:], made[:, regular:])
        in_graph = made.clone()
        fused.in_graph().add_to(in_graph, x, regular)
        narrow = made if joined else fused.narrow(x[:, regular:])
        fused.adder(made.shape, regular)(made, narrow)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(in_graph, expected, atol=0.1 if to == torch.bfloat16 else 1e-5, rtol=0.02)


def test_rows_are_joined_once_at_a_time_and_only_where_that_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.randn(24, 16), torch.randn(3, 16)
    product, first, second = PackedProduct([weight], [None]), nn.Identity(), nn.Identity()
    assert product.join(rows, by=first) and not product.join(rows, by=second)
    assert not product.join(rows.bfloat16(), by=first)
    del first
    assert product.join(rows[:2], by=second) and product.joined == 2
    assert torch.equal(product.weights[0], weight)
    monkeypatch.setattr(packed_module, "JOINED_BYTES", rows.numel() * 4 - 1)
    assert not PackedProduct([weight], [None]).join(rows, by=second)
    monkeypatch.setattr(packed_module, "JOINED_BYTES", rows.numel() * 4)
    monkeypatch.setattr(packed_module, "JOINS_NUMBERS", weight.numel() - 1)
    assert not PackedProduct([weight], [None]).join(rows, by=second)


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
    latents(second, 1)
    joined = [term.fused.joined for model in (first, second) for term in model.adapter.terms if term.fused]
    assert any(joined[: len(joined) // 2]) and not any(joined[len(joined) // 2 :])
    torch.testing.assert_close(latents(second, 1), expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(latents(first, 1), expected)
    assert count(products) > 2
    first.adapter.remove()
    torch.testing.assert_close(latents(second, 1), expected, atol=2e-4, rtol=1e-3)
    second.adapter.remove()
    assert count(products) == 0 and not any(module._forward_hooks for module in base.lm.modules())


def count(products: set[PackedProduct]) -> int:
    return sum(len(product.added) for product in products)


def test_where_terms_lie_is_worked_out_once_for_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are put on anew for each text; and what is remembered of steps has a bound."""
    base = Base(tiny_lm("llama"))
    base.pack(lambda: tiny_lm("llama"))
    model = adapted(base)
    shapes: list[tuple[torch.Size, int]] = []

    def counted(self: FusedLowRank, shape: torch.Size, first: int) -> fused_lora.Add:
        shapes.append((shape, first))
        return adder(self, shape, first)

    adder = FusedLowRank.adder
    monkeypatch.setattr(FusedLowRank, "adder", counted)
    texts = [
        model.generate(input_ids=random_prompt(9), strategy="linear", max_new_tokens=30).token_ids for _ in range(2)
    ]
    assert texts[0] == texts[1] and shapes and not model.adapter._handles
    made = len(shapes)
    model.generate(input_ids=random_prompt(9), strategy="linear", max_new_tokens=30)
    assert len(shapes) == made
    monkeypatch.setattr(gated_lora, "KINDS", 2)
    model.adapter.forget_terms()
    model.generate(input_ids=random_prompt(9), strategy="linear", max_new_tokens=30)
    assert all(len(term.fused.adders) <= 2 for term in model.adapter.terms if term.fused is not None)

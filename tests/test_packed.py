"""Packed linears: the same products, the same text, less time; and a base that stays as it is where none was asked."""

import copy
import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

import foretell
from foretell import base as base_module
from foretell import packed as packed_module
from foretell.base import Base
from foretell.config import STRATEGIES, MTPConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA, LowRank, Target
from foretell.half_weights import available
from foretell.packed import PackedLinear, pack, ways, why_not
from foretell.packed_rows import PackedEmbedding

from .decoded import decode
from .lying import lying
from .models import CONFIGS, random_prompt, reference, tiny_lm, tiny_model

pytestmark = pytest.mark.skipif(
    why_not(torch.device("cpu"), torch.float32) is not None, reason="PyTorch without oneDNN"
)


def packed_model(name: str) -> MTPForCausalLM:
    base = Base(tiny_lm(name))
    base.pack(lambda: tiny_lm(name))
    model = MTPForCausalLM(base, MTPConfig(masks=4, rank=4, alpha=8.0))
    torch.manual_seed(1)
    for parameter in model.own_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    model.for_inference()
    return model


@pytest.fixture
def as_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which oneDNN's blocks are the slower ones."""
    lying("stored", monkeypatch)


def ways_of(model: nn.Module) -> set[str]:
    return {module.product.way for module in model.modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_writes_what_it_wrote_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "LARGE_UNEMBEDDING", 0)
    model = packed_model(name)
    assert ways_of(model) == {"blocks"}
    kinds = [type(module) for module in model.base.lm.modules()]
    assert PackedLinear in kinds and nn.Linear not in kinds
    # Of the unembedding's numbers none are there twice.
    assert (PackedEmbedding in kinds) == bool(model.base.text_config.tie_word_embeddings)
    assert isinstance(model.base.head, PackedLinear) and model.base.head.kept is None
    check_texts(model, name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])  # also Conv1D, a tied unembedding, biases
def test_weights_as_stored_write_the_same(name: str, as_stored: None) -> None:
    model = packed_model(name)
    assert ways_of(model) == {"stored"}
    assert not any(term.fused.packed for term in model.adapter.terms if term.fused)
    check_texts(model, name)


def check_texts(model: MTPForCausalLM, name: str) -> None:
    prompts = [random_prompt(length, seed=length) for length in (3, 33)]
    expected = [reference(tiny_lm(name), prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        out = decode(model, prompts, strategy, 40, replayed=expected)
        assert out.texts == expected, strategy


def test_the_ways_are_timed_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: dict[str, float] = {}
    calls: list[str] = []
    clock = [0.0]

    def takes(x: torch.Tensor, weight: str, bias: None, way: str) -> torch.Tensor:
        assert weight == way
        calls.append(way)
        clock[0] += slow[way]
        return x

    monkeypatch.setattr(packed_module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(packed_module, "laid_out", lambda weights, bias, way: way)
    monkeypatch.setattr(packed_module, "multiply", takes)
    orders = list(itertools.permutations(("stored", "blocks", "halves")))
    for d_out, order in enumerate(orders, 24):
        slow.update({way: 1.0 + place for place, way in enumerate(order)})
        timed = partial(packed_module._timed, orders[0], d_out, 16, torch.float32)
        found = timed(1)
        count = len(calls)
        assert found == order and len({calls.count(way) for way in order}) == 1
        assert timed(1) == found and len(calls) == count
        assert timed(2) == found and len(calls) == 2 * count
        calls.clear()


@pytest.mark.parametrize("supported", [False, True])
def test_a_processor_without_bfloat16_has_its_weights_as_stored(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert packed_module.ways(torch.bfloat16)[0] == ("blocks" if supported else "stored")
    assert ("halves" in packed_module.ways(torch.bfloat16)) == (available() and not supported)
    assert packed_module.ways(torch.float32)[:2] == ("stored", "blocks")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_a_linear(dtype: torch.dtype) -> None:
    linear = nn.Linear(48, 20).to(dtype)
    both = nn.ModuleDict({"packed": linear})
    pack(both, lambda: None)
    packed = both["packed"]
    assert isinstance(packed, PackedLinear) and torch.equal(packed.weight, linear.weight)
    for shape in ((48,), (1, 48), (3, 48), (2, 5, 48)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), linear(x), atol=1e-5 if dtype == torch.float32 else 0.02, rtol=1e-2)
            half = packed(x[..., None].expand(*shape, 2)[..., 0])  # not contiguous
            torch.testing.assert_close(half, packed(x))


def test_the_unembedding_keeps_its_weight_and_the_blocks_give_theirs_up() -> None:
    base = Base(tiny_lm("llama"))
    weight, count = base.head.weight.clone(), base.parameter_count
    base.pack(lambda: tiny_lm("llama"))
    assert torch.equal(base.head.weight, weight)
    held = sum(p.numel() for p in base.lm.parameters())
    assert held < count / 2 and base.parameter_count == count


def test_loading_packs_a_base_of_its_own_and_no_other(tmp_path: Path) -> None:
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    model = tiny_model("llama")
    model.base.lm.config._name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")

    assert foretell.load(tmp_path / "adapter", device="cpu").base.packed
    assert not foretell.load(tmp_path / "adapter", device="cpu", packed=False).base.packed
    own = Base(tiny_lm("llama"))
    assert not foretell.load(tmp_path / "adapter", base=own).base.packed
    with pytest.raises(ForetellError, match="stays as it is"):
        foretell.load(tmp_path / "adapter", base=own, packed=True)
    with pytest.raises(ForetellError, match="float32 and bfloat16"):
        Base(tiny_lm("llama").half()).pack(lambda: tiny_lm("llama"))


def test_a_packed_model_is_saved_and_compared_like_any(tmp_path: Path) -> None:
    tiny_lm("llama").save_pretrained(tmp_path / "base")
    model = tiny_model("llama")
    model.base.lm.config._name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = foretell.load(tmp_path / "adapter", device="cpu")
    loaded.save_pretrained(tmp_path / "again")
    again = foretell.load(tmp_path / "again", device="cpu")
    assert all(torch.equal(p, again.own_parameters()[name]) for name, p in loaded.own_parameters().items())

    plain = loaded.base.unpacked()
    assert plain is not loaded.base.lm and plain is loaded.base.unpacked()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), tiny_lm("llama").parameters(), strict=True))
    assert again.base.fingerprint() == Base(tiny_lm("llama")).fingerprint()
    own = Base(tiny_lm("llama"))
    assert own.unpacked() is own.lm


def test_no_gradient_goes_through_it() -> None:
    both = nn.ModuleDict({"packed": nn.Linear(8, 8)})
    pack(both, lambda: None)
    with pytest.raises(ForetellError, match="packed=False"):
        both["packed"](torch.randn(2, 8, requires_grad=True))


def test_wrong_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: x.new_zeros((*x.shape[:-1], self.out_features)))
    with pytest.raises(ForetellError, match="changed the logits"):
        Base(tiny_lm("llama")).pack(lambda: tiny_lm("llama"))


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_adapter_agrees_with_the_plain_one(
    pays: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that pays A is packed, however B lies, of one sequence and of several."""
    if pays and "blocks" not in ways(dtype):
        pytest.skip(f"oneDNN has no blocks of {dtype} on this processor")
    monkeypatch.setattr(packed_module, "pays", lambda *_: pays)
    rank = 16
    torch.manual_seed(2)
    linear = nn.Linear(960, 1000).to(dtype).requires_grad_(False)
    adapters = GatedLoRA({"linear": Target(linear, 960, 1000)}, rank, alpha=rank)
    (low_rank,) = cast(Iterable[LowRank], adapters.adapters.values())
    nn.init.normal_(low_rank.b, std=0.05)
    adapters.to(dtype).requires_grad_(False)
    (term,) = adapters.terms
    assert term.fused is not None and term.fused.packed == pays
    x = torch.randn(2, 5, 960, dtype=dtype)
    with torch.inference_mode(), adapters.open(regular=2, width=5):
        found = linear(x), torch.cat([linear(x[:1]), linear(x[1:])])
    base = torch.nn.functional.linear(x, linear.weight, linear.bias)
    for out in found:
        assert torch.equal(out[:, :2], base[:, :2])
        assert not torch.equal(out[:, 2:], base[:, 2:])
        expected = base[:, 2:] + low_rank(x[:, 2:])
        torch.testing.assert_close(out[:, 2:], expected, atol=0.02 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)


def test_adapter_that_is_trained_is_never_packed() -> None:
    linear = nn.Linear(1000, 1000)
    (term,) = GatedLoRA({"linear": Target(linear, 1000, 1000)}, rank=128, alpha=128).terms
    assert term.fused is None


def test_linears_that_get_the_same_rows_are_one_product() -> None:
    base = Base(tiny_lm("llama"))
    base.pack(lambda: tiny_lm("llama"))
    block = base.blocks[0]
    attention, mlp = block.self_attn, block.mlp
    assert attention.q_proj.product is attention.k_proj.product is attention.v_proj.product
    assert mlp.gate_proj.product is mlp.up_proj.product
    assert attention.o_proj.product not in (attention.q_proj.product, mlp.gate_proj.product)
    own = tiny_lm("llama").model.layers[0]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(getattr(attention, name).weight, getattr(own.self_attn, name).weight)


@pytest.mark.parametrize("bias", [True, False])
def test_of_one_product_each_linear_may_be_asked_for_anything(bias: bool) -> None:
    """In any order, with rows of its own, twice with the same."""
    torch.manual_seed(0)
    parent = nn.ModuleDict({name: nn.Linear(16, size, bias=bias) for name, size in (("a", 8), ("b", 24), ("c", 8))})
    plain = copy.deepcopy(parent)
    first, second = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    pack(parent, lambda: [linear(first) for linear in parent.values()])
    assert len({id(linear.product) for linear in parent.values()}) == 1
    with torch.no_grad():
        for name, x in (("c", first), ("a", first), ("b", second), ("b", second), ("b", first), ("a", second)):
            torch.testing.assert_close(parent[name](x), plain[name](x))


def test_linears_with_inputs_of_their_own_stay_apart() -> None:
    parent = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8), "c": nn.Linear(16, 8, bias=False)})
    x = torch.randn(2, 16)
    pack(parent, lambda: [parent["a"](x), parent["b"](x + 0), parent["c"](x)])
    assert len({id(linear.product) for linear in parent.values()}) == 3

"""Weights of 16 bits multiplied in float32: no number changed, the same text, and left alone where a number would."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from foretell import base as base_module
from foretell import half_weights
from foretell.base import Base
from foretell.config import STRATEGIES, MTPConfig
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.half_weights import HalfWeight, available, scale_of
from foretell.lean import make_of
from foretell.packed import PackedLinear, PackedProduct
from foretell.packed_rows import PackedEmbedding, RoundRows, round_rows_of

from .decoded import decode
from .lying import in_16_bits, lying
from .models import CONFIGS, random_prompt, reference, tiny_lm
from .test_lean import LEAN, check_same_bits
from .test_packed_rows import tied_lm

pytestmark = pytest.mark.skipif(not available(), reason="PyTorch without FBGEMM")


@pytest.fixture(autouse=True)
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    lying("halves", monkeypatch)


def numbers(spread: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(40, 64), rounded to dtype, in float32."""
    return (torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * spread).to(dtype).float()


@pytest.mark.parametrize("spread", [1e-30, 1e-9, 1e-4, 0.02, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_numbers_of_any_size_are_kept(spread: float, bias: bool) -> None:
    weight = numbers(spread)
    scale = scale_of(weight)
    assert scale is not None and scale_of(weight.bfloat16()) == scale
    half = HalfWeight(weight, torch.full((40,), 8 * spread) if bias else None, scale)
    lost = (half.to_dense() - weight).abs().sum(1) / weight.abs().sum(1)
    assert lost.max() <= 2.0**-24
    x = torch.randn(3, 64)
    expected = x.double() @ weight.double().t() + (8 * spread if bias else 0)
    torch.testing.assert_close(half.multiply(x).double(), expected, rtol=1e-5, atol=1e-5 * spread)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 5, 64), (0, 64), (2, 2, 3, 64)])
def test_rows_of_any_shape_and_stride_are_multiplied(shape: tuple[int, ...]) -> None:
    weight = numbers(0.1)
    half, x = HalfWeight(weight, None, 1.0), torch.randn(*shape, 2)
    for given in (x[..., 0], x[..., 0].contiguous()):
        torch.testing.assert_close(half.multiply(given), given @ weight.t())


def test_a_large_weight_is_laid_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = numbers(1e-6), torch.randn(3, 64)
    scale = scale_of(weight)
    assert scale is not None and scale != 1.0
    bias = torch.arange(40.0)
    whole = HalfWeight(weight, bias, scale)
    monkeypatch.setattr(half_weights, "PART_NUMBERS", 64 * 7)
    parts = HalfWeight(weight, bias, scale)
    assert len(whole.parts) == 1 and len(parts.parts) == 6
    assert torch.equal(parts.multiply(x), whole.multiply(x))
    assert torch.equal(parts.to_dense(), weight) and torch.equal(copy.deepcopy(parts).to_dense(), weight)


def test_no_thread_outlives_its_weight() -> None:
    # One that has computed keeps helpers, and with too many of those OpenMP's no longer wait awake for the next task.
    for _ in range(5):
        HalfWeight(numbers(0.1), None, 1.0)
    half_weights.finish()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("foretell-half-weights")]
    model_of("llama").generate(input_ids=random_prompt(5), max_new_tokens=4)
    assert not half_weights._on_their_way  # which would keep weights of a model that is gone
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("foretell-half-weights")]


@pytest.mark.parametrize("spread", [1e-7, 0.02, 100.0])
def test_float16_numbers_are_kept(spread: float) -> None:
    weight = numbers(spread, torch.float16)
    scale = scale_of(weight)
    assert scale is not None and torch.equal(HalfWeight(weight, None, scale).to_dense(), weight)


def test_other_numbers_are_refused() -> None:
    weight = numbers(1.0)
    for number in (1 + 2.0**-12, float("nan"), float("inf")):
        other = weight.clone()
        other[30, 5] = number
        assert scale_of(other) is None
    assert scale_of(numbers(0.02, torch.float32)) is None
    wide = torch.diag(2.0 ** torch.arange(-60.0, 60.0))  # every row has a size of its own
    assert scale_of(wide) is None
    assert scale_of(torch.zeros(3, 4)) == 1.0


def model_of(name: str, dtype: torch.dtype = torch.float32, packs: bool = True) -> MTPForCausalLM:
    """A base and an adapter whose numbers are of 16 bits; `packs`: in which the base's weights lie as `lying` says."""
    base = Base(in_16_bits(tiny_lm(name)).to(dtype))
    if packs:
        base.pack(lambda: in_16_bits(tiny_lm(name)).to(dtype))
    model = MTPForCausalLM(base, MTPConfig(masks=4, rank=4, alpha=8.0))
    torch.manual_seed(1)
    for parameter in model.own_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    in_16_bits(model.adapter)
    return model.for_inference()  # type: ignore[return-value]


def products(model: MTPForCausalLM) -> list[PackedProduct]:
    linears = (module for module in model.base.lm.modules() if isinstance(module, PackedLinear))
    return list(dict.fromkeys(linear.product for linear in linears))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_writes_what_it_wrote_before(name: str) -> None:
    model = model_of(name)
    assert {product.way for product in products(model)} == {"halves"}
    prompts = [random_prompt(length, seed=length) for length in (3, 33)]
    expected = [reference(in_16_bits(tiny_lm(name)), prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        assert decode(model, prompts, strategy, 40, replayed=expected).texts == expected, strategy
    joined = [term.fused.joined for term in model.adapter.terms if term.fused]
    assert any(joined) or not any(isinstance(term.site, PackedProduct) for term in model.adapter.terms)
    assert {product.way for product in products(model)} == {"halves"}


@pytest.mark.parametrize("name", LEAN)
def test_bfloat16_steps_are_lean_and_adapted_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that has no instructions for bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr("foretell.model.MOST_ROWS", 0)  # the base's own attention
    model = model_of(name, torch.bfloat16)
    assert {product.way for product in products(model)} == {"halves"} and make_of(model.base) is not None
    assert {term.fused.dtype for term in model.adapter.terms if term.fused} == {torch.float32}
    check_same_bits(model, [40, 9], 0.1)


def test_rows_that_need_more_bits_are_not_joined() -> None:
    linear = in_16_bits(nn.Linear(16, 24))
    product = PackedProduct([linear.weight], [linear.bias])
    by = nn.Identity()
    assert product.way == "halves" and product.arithmetic == torch.float32
    assert not product.join(torch.full((3, 16), 1 + 2.0**-20), by)
    assert product.joined == 0 and torch.equal(product.weights[0], linear.weight)
    assert product.join(torch.ones(3, 16), by) and product.joined == 3
    x = torch.randn(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(product.part(x, 0), linear(x))
        torch.testing.assert_close(product.make(x)[:, -3:], x.sum(1, keepdim=True).expand(2, 3))


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_code_gets_tensors(bias: bool) -> None:
    linears = [in_16_bits(nn.Linear(16, size, bias=bias)) for size in (24, 8)]
    product = PackedProduct([linear.weight for linear in linears], [linear.bias for linear in linears])
    with pytest.raises(ForetellError, match="no tensor"):
        _ = product.tensors
    assert product.join(torch.ones(3, 16), nn.Identity())
    product.to_tensors()
    assert product.way != "halves" and len(product.tensors) == 1 + bias and product.joined == 0
    x = torch.randn(2, 16)
    with torch.no_grad():
        for number, linear in enumerate(linears):
            torch.testing.assert_close(product.part(x, number), linear(x))


def test_a_model_is_compiled_and_writes_the_same() -> None:
    model = model_of("llama")
    prompt = random_prompt(9)
    expected = [reference(in_16_bits(tiny_lm("llama")), prompt, 30)]
    reason = compile_steps(model)
    if reason and "no C++ compiler" in reason:
        pytest.skip("no C++ compiler")
    assert reason is None
    for strategy in ("autoregressive", "quadratic"):
        assert decode(model, [prompt], strategy, 30, replayed=expected).texts == expected


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # Gemma scales what it looks up
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_embedding_of_16_bits_is_kept_in_as_many(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_module, "LARGE_UNEMBEDDING", 0)
    rounded = tied_lm(name).to(dtype).float()
    plain, base = Base(copy.deepcopy(rounded)), Base(copy.deepcopy(rounded))
    base.pack(lambda: rounded)
    ids = torch.arange(base.vocab_size)
    assert isinstance(base.head, PackedLinear) and base.head.kept is None and isinstance(base.head.read, RoundRows)
    assert base.head.read.rounded.dtype == dtype and isinstance(base.embedding, PackedEmbedding)
    assert torch.equal(base.embed(ids), plain.embed(ids))
    assert torch.equal(base.unembedding_rows(ids), plain.unembedding_rows(ids))
    assert base.fingerprint() == plain.fingerprint()


def test_an_embedding_that_needs_more_bits_stays() -> None:
    weight = torch.ones(2000, 4)
    assert round_rows_of(weight) is not None and round_rows_of(weight.bfloat16()) is None
    weight[1500, 2] = 1 + 2.0**-20
    assert round_rows_of(weight) is None


def test_it_can_be_copied() -> None:
    half = HalfWeight(numbers(1.0), None, 1.0)
    assert torch.equal(copy.deepcopy(half).to_dense(), half.to_dense())

"""Weights that are streamed: the products of a plain reference, rows that don't hang on each other, the same text."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from foretell import base as base_module
from foretell import native, packed, streamed
from foretell.commands.common import load_model
from foretell.config import STRATEGIES, MTPConfig
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.gated_lora import LowRank
from foretell.lean import make_of
from foretell.packed import PackedLinear, PackedProduct
from foretell.packed_rows import PackedEmbedding
from foretell.streamed import StreamedLowRank, StreamedWeight

from .decoded import decode
from .lying import in_16_bits, lying
from .models import CONFIGS, random_prompt, reference, tiny_lm
from .test_fused_lora import latents
from .test_half_weights import model_of, products
from .test_lean import LEAN, check_same_bits

pytestmark = pytest.mark.skipif(not streamed.available(), reason=f"no kernel: {native.why_not()}")
DTYPES = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    lying("streamed", monkeypatch)


def near(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (16, 2), (100, 37), (129, 64), (576, 192), (40, 5000)])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 12, 13, 24, 27, 29, 100])
def test_products_are_those_of_the_reference(shape: tuple[int, int], rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    weight = (torch.randn(shape) / shape[1] ** 0.5).bfloat16().to(dtype)
    added = torch.randn(shape[0]).to(dtype) if bias else None
    x = torch.randn(rows, shape[1]).to(dtype)
    found = StreamedWeight(weight, added).multiply(x)
    expected = x.double() @ weight.double().t() + (0.0 if added is None else added.double())
    torch.testing.assert_close(found.double(), expected, **near(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = StreamedWeight(torch.randn(200, 300).bfloat16().to(dtype)), torch.randn(80, 300).to(dtype)
    alone = torch.cat([weight.multiply(row[None]) for row in x])
    for count in (2, 6, 7, 12, 13, 25, 28, 29, 57, 80):
        assert torch.equal(weight.multiply(x[:count]), alone[:count]), count
    assert torch.equal(weight.multiply(x.repeat(40, 1)), alone.repeat(40, 1))  # a long prompt


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64), (2, 5, 64), (0, 64), (2, 2, 3, 64)])
def test_rows_of_any_shape_and_stride_are_multiplied(shape: tuple[int, ...]) -> None:
    weight = torch.randn(40, 64).bfloat16().float()
    laid, x = StreamedWeight(weight), torch.randn(*shape, 2)
    for given in (x[..., 0], x[..., 0].contiguous()):
        torch.testing.assert_close(laid.multiply(given), given @ weight.t(), **near(torch.float32))
    odd = torch.randn(65).bfloat16()[1:]  # not where pairs of numbers begin
    torch.testing.assert_close(laid.multiply(odd.float()).bfloat16(), StreamedWeight(weight.bfloat16()).multiply(odd))


def test_rows_that_do_not_fit_are_refused() -> None:
    laid = StreamedWeight(torch.ones(4, 6))
    for x in (torch.ones(2, 5), torch.ones(2, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.float16)):
        with pytest.raises(ValueError, match="not for rows"):
            laid.multiply(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40, 3.4e38])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_ends_of_the_range(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[value, 0.0]], dtype=dtype)
    found = StreamedWeight(torch.eye(2, dtype=dtype)).multiply(x)
    expected = x @ torch.eye(2, dtype=dtype)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-38, rtol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (40, 64), (33, 7)])
def test_no_number_is_changed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).bfloat16().to(dtype)
    laid = StreamedWeight(weight)
    assert torch.equal(laid.to_dense(), weight) and laid.numel() == weight.numel()
    ids = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
    assert torch.equal(laid.rows(ids), weight[ids]) and torch.equal(laid.rows(ids[0, 0]), weight[0])
    assert torch.equal(copy.deepcopy(laid).to_dense(), weight)


def test_weights_that_need_more_bits_lie_otherwise() -> None:
    weight = torch.full((3, 16), 1 + 2.0**-20)
    assert not streamed.fits(weight) and packed.laid_out([weight], None, "streamed") is None
    product = PackedProduct([weight], [None])
    assert product.way in packed.AS_TENSORS and torch.equal(product.weights[0], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "regular", "masks"), [(1, 2, 4), (3, 1, 5), (2, 0, 3), (1, 30, 30), (5, 300, 8), (2, 1500, 4)]
)
def test_low_rank_rows_get_what_their_adapters_make(batch: int, regular: int, masks: int, dtype: torch.dtype) -> None:
    """Of three linears of one product the first and the last are adapted; the other rows keep every bit."""
    torch.manual_seed(0)
    linears = [in_16_bits(nn.Linear(16, size)).to(dtype) for size in (24, 8, 40)]
    adapters = {number: LowRank(16, len(linears[number].weight), rank, 0.5) for number, rank in ((0, 5), (2, 3))}
    for adapter in adapters.values():
        nn.init.normal_(adapter.b)
        in_16_bits(adapter).to(dtype)
    product = PackedProduct([one.weight for one in linears], [one.bias for one in linears])
    assert isinstance(product.weight, StreamedWeight) and not product.join(torch.ones(3, 16, dtype=dtype), product)
    low = StreamedLowRank.of(product.sizes, {n: (a.a, a.b) for n, a in adapters.items()}, 0.5)
    opened: list[tuple[int, int] | None] = [None]
    x, width = torch.randn(batch, regular + masks, 16).to(dtype), regular + masks
    with torch.inference_mode():
        without = product.make(x)
        product.weight.low_rank.append((low, lambda rows: opened[0]))
        assert torch.equal(product.make(x), without)  # the gate is closed
        opened[0] = regular, width
        found = product.make(x)
        exact = x.double()
        terms = [adapters[0].double()(exact), exact.new_zeros(*x.shape[:2], 8), adapters[2].double()(exact)]
    assert torch.equal(found[:, :regular], without[:, :regular])
    expected = without.double() + torch.cat(terms, -1)
    # Rows of drafts may be rounded on the way to what they are multiplied with.
    torch.testing.assert_close(found[:, regular:].double(), expected[:, regular:], **near(torch.bfloat16))


def test_low_rank_rows_are_rounded_and_nothing_else_is() -> None:
    model, whole = model_of("llama"), model_of("llama", packs=False)
    for one in (model, whole):
        torch.manual_seed(2)
        for adapter in one.adapter.adapters.values():
            nn.init.normal_(adapter.b, std=0.3)
        one.adapter.forget_terms()
    found, exact = latents(model, 1), latents(whole, 1)
    torch.testing.assert_close(found[:, :3], exact[:, :3], atol=2e-4, rtol=1e-3)
    assert not torch.allclose(found[:, 3:], exact[:, 3:], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found[:, 3:], exact[:, 3:], atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_writes_what_it_wrote_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "LARGE_UNEMBEDDING", 0)
    model = model_of(name)
    assert {product.way for product in products(model)} == {"streamed"}
    kinds = [type(module) for module in model.base.lm.modules()]
    assert (PackedEmbedding in kinds) == bool(model.base.text_config.tie_word_embeddings)
    assert isinstance(model.base.head, PackedLinear) and model.base.head.kept is None
    prompts = [random_prompt(length, seed=length) for length in (3, 33)]
    expected = [reference(in_16_bits(tiny_lm(name)), prompt, 40) for prompt in prompts]
    for strategy in STRATEGIES:
        assert decode(model, prompts, strategy, 40, replayed=expected).texts == expected, strategy


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("batch", [1, 2])
def test_a_streamed_base_is_adapted_as_one_that_is_not_packed(name: str, batch: int) -> None:
    model, whole = model_of(name), model_of(name, packs=False)
    sites = [term for term in model.adapter.terms if isinstance(term.site, PackedProduct)]
    assert {type(term.fused) for term in sites} <= {StreamedLowRank}
    found, exact = latents(model, batch), latents(whole, batch)
    torch.testing.assert_close(found[:, :3], exact[:, :3], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found[:, 3:], exact[:, 3:], atol=5e-2, rtol=5e-2)  # rows of drafts may be rounded
    model.adapter.remove()
    assert not any(product.weight.low_rank for product in products(model) if isinstance(product.weight, StreamedWeight))


def test_two_adapters_share_a_base_and_leave_it() -> None:
    first = model_of("llama")
    second = MTPForCausalLM(first.base, MTPConfig(masks=4, rank=4, alpha=8.0), check=False)
    for adapter in second.adapter.adapters.values():
        nn.init.normal_(in_16_bits(adapter).b, std=0.3)
    in_16_bits(second.adapter)
    second.for_inference()
    expected, other = latents(first, 1), latents(second, 1)
    assert not torch.allclose(expected[:, 3:], other[:, 3:], atol=1e-2)
    assert torch.equal(latents(first, 1), expected) and torch.equal(latents(second, 1), other)
    first.adapter.remove()
    assert torch.equal(latents(second, 1), other) and torch.equal(latents(first, 1), expected)


def test_an_adapter_refuses_rows_of_other_steps() -> None:
    model = model_of("llama")
    with pytest.raises(ForetellError, match="whole number of 5-row steps"), model.adapter.open(2, 5):
        latents(model, 1)  # behind a prompt of 9 rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LEAN)
def test_steps_are_lean(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foretell.model.MOST_ROWS", 0)  # the base's own attention
    model = model_of(name, dtype)
    assert {product.way for product in products(model)} == {"streamed"} and make_of(model.base) is not None
    check_same_bits(model, [40, 9], 0.1)


def test_compiled_code_gets_tensors() -> None:
    model, prompt = model_of("llama"), random_prompt(9)
    with pytest.raises(ForetellError, match="no tensor"):
        _ = products(model)[0].tensors
    expected = [reference(in_16_bits(tiny_lm("llama")), prompt, 30)]
    assert compile_steps(model) is None
    for strategy in ("autoregressive", "quadratic"):
        assert decode(model, [prompt], strategy, 30, replayed=expected).texts == expected


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was loaded is loaded anew, and again after the test."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


@pytest.mark.parametrize(
    ("command", "reason"),
    [("/no/such/compiler", "no C\\+\\+ compiler"), ("false", "could not make it"), ("true", "could not make it")],
)
def test_without_a_compiler_weights_lie_otherwise(
    command: str, reason: str, forgotten: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", command)
    assert native.library() is None
    assert re.search(reason, str(native.why_not()))
    assert "streamed" not in packed.ways(torch.float32) + packed.ways(torch.bfloat16)
    assert load_model(None, None, "float32", "cpu").base.packed
    assert re.search(f"steps could be faster.*{reason}", capsys.readouterr().err)


def test_it_is_compiled_once_for_all_processes(tmp_path: Path) -> None:
    there = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    code = "from foretell import native; assert native.library() is not None, native.why_not()"
    subprocess.run([sys.executable, "-c", code], check=True, env=there)
    (made,) = (tmp_path / "foretell" / "native").iterdir()
    before = made.stat()
    subprocess.run([sys.executable, "-c", code], check=True, env=there)
    assert [path.stat().st_mtime_ns for path in made.parent.iterdir()] == [before.st_mtime_ns]


def test_where_nothing_can_be_kept_it_leaves_nothing(
    tmp_path: Path, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert native.library() is not None, native.why_not()
    torch.testing.assert_close(StreamedWeight(torch.eye(3)).multiply(torch.ones(2, 3)), torch.ones(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_openmp_is_not_let_in(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    seen = iter([{"/torch/libgomp.so.1"}, {"/torch/libgomp.so.1", "/usr/lib/libgomp.so.1"}])
    monkeypatch.setattr(native, "_openmp", lambda: next(seen))
    assert native.library() is None and "OpenMP" in str(native.why_not())

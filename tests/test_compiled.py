"""Compiled steps: the same text, and a base that stays as it was, with the reason, where they can't be had."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import foretell
from foretell import cli, compiled
from foretell.base import Base
from foretell.block_graph import Call, Parts, Traced
from foretell.cache import StaticCache
from foretell.compiled import Form
from foretell.config import STRATEGIES, MTPConfig
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.layout import linear
from foretell.packed import why_not

from .decoded import count_compiled, decode
from .models import random_prompt, reference, tiny_lm, tiny_model


def packed_model(name: str, dtype: torch.dtype = torch.float32) -> MTPForCausalLM:
    base = Base(tiny_lm(name).to(dtype))
    if why_not(torch.device("cpu"), dtype) is None:
        base.pack(lambda: tiny_lm(name).to(dtype))
    model = MTPForCausalLM(base, MTPConfig(masks=4, rank=4, alpha=8.0))
    torch.manual_seed(1)
    for parameter in model.own_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return model.for_inference()  # type: ignore[return-value]


def compiled_or_skip(model: MTPForCausalLM) -> Counter[Form]:
    """Compiles; counts the blocks that run compiled from then on."""
    reason = compile_steps(model)
    if reason and ("no C++ compiler" in reason or "no instructions for bfloat16" in reason):
        pytest.skip(reason)
    assert reason is None and model.compiled is not None
    return count_compiled(model)


@pytest.fixture(scope="module")
def llama() -> tuple[MTPForCausalLM, Counter[Form]]:
    model = packed_model("llama")
    return model, compiled_or_skip(model)


def test_every_strategy_writes_the_bases_text(llama: tuple[MTPForCausalLM, Counter[Form]]) -> None:
    model, ran = llama
    # All blocks are of one kind, so three graphs serve them.
    assert set(model.compiled.blocks[0].graphs) == {Form(False, False), Form(True, False), Form(True, True)}
    prompt = random_prompt(33)
    expected = reference(tiny_lm("llama"), prompt, 60)
    for strategy in STRATEGIES:
        out = decode(model, [prompt], strategy, 60, replayed=[expected])
        assert out.texts == [expected], strategy
        assert strategy == "autoregressive" or (out.accepted and out.rejected)
    assert ran[Form(False, False)] and ran[Form(True, True)]
    # A batch, and a step that reads the prompt, take the eager way.
    prompts = [random_prompt(length, seed=length) for length in (1, 9)]
    texts = [reference(tiny_lm("llama"), ids, 30) for ids in prompts]
    assert decode(model, prompts, "quadratic", 30, replayed=texts).texts == texts
    assert decode(model, prompts[:1], "linear", 30, replayed=texts[:1]).texts == texts[:1]
    assert model.base.fingerprint() == Base(tiny_lm("llama")).fingerprint()


@torch.inference_mode()
def test_a_step_for_which_the_cache_must_grow_runs_eager_and_the_next_compiled(
    llama: tuple[MTPForCausalLM, Counter[Form]],
) -> None:
    model, ran = llama
    ids = random_prompt(24)
    cache = StaticCache(3, 12)
    model.prefill(ids[:, :9], cache)
    cache.keep([9])
    expected = model.base.latents(model.base.embed(ids))
    counts = []
    for start in (9, 11, 13, 15):
        before = ran.total()
        latents = model.step(ids[:, start : start + 2], [linear(1, 4)], cache, cache.lengths)
        torch.testing.assert_close(latents[:, :2], expected[:, start : start + 2], rtol=1e-4, atol=1e-4)
        cache.keep([2])
        counts.append(ran.total() - before)
    assert counts == [0, 3, 3, 3] and cache.layers[0].keys.shape[2] == 24


# What is special: an empty part of rotated columns and fused linears; two kinds of layers, soft caps and eager
# attention; blocks that give attention weights too, learned positions, a number for what is not seen; linears of a
# class of their own, which are not packed.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("phi3", "bfloat16"), ("gemma2", "float32"), ("gpt_neo", "float32"), ("falcon", "float32")],
)
def test_architectures(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gemma2":  # and weights as stored, as on a machine that multiplies them faster
        monkeypatch.setattr("foretell.packed.pays", lambda d_out, d_in, dtype: False)
    compile_traced, compiled_forms = Traced.compiled, []
    monkeypatch.setattr(Traced, "compiled", lambda own: (compiled_forms.append(own), compile_traced(own))[1])
    model = packed_model(name, getattr(torch, dtype))
    ran = compiled_or_skip(model)
    assert len(compiled_forms) == 3  # layers with a window and without, or with numbers, come to the same graph
    prompt = random_prompt(33)
    expected = reference(tiny_lm(name).to(model.base.dtype), prompt, 40)
    for strategy in ("autoregressive", "quadratic"):
        text = decode(model, [prompt], strategy, 40, replayed=[expected]).texts[0]
        assert text == expected or dtype == "bfloat16", strategy
    assert ran[Form(False, False)] and ran[Form(True, True)]


def wrong(parts: Parts, calls: Sequence[Call], past: Sequence[Tensor], columns: int, regular: int | None) -> Any:
    hidden = len(parts.weights(regular is not None))

    class Wrong:
        key = ()

        def compiled(self) -> Callable[..., Any]:
            return lambda *tensors: tensors[hidden] + 1

    return Wrong()


def broken(*args: Any) -> Any:
    raise RuntimeError("boom\nand more")


def unwritable(*args: Any) -> Any:
    raise PermissionError(13, "Permission denied", "/somewhere")


@pytest.mark.parametrize(
    ("tracer", "reason"),
    [
        (wrong, "they differ from eager ones by"),
        (broken, r"its blocks can't be compiled \(RuntimeError: boom\)"),
        (unwritable, "Permission denied: '/somewhere'.; name another directory in TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_what_compiles_wrongly_or_not_at_all_stays_eager(
    tracer: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "trace_block", tracer)
    monkeypatch.setattr(compiled, "why_not", lambda base, adapter: None)
    model = tiny_model("qwen2")
    classes = [type(block) for block in model.base.blocks]
    said = compile_steps(model)
    assert said is not None and re.search(reason, said) and "\n" not in said
    assert model.compiled is None and [type(block) for block in model.base.blocks] == classes
    expected = reference(tiny_lm("qwen2"), random_prompt(9), 12)
    assert decode(model, [random_prompt(9)], "quadratic", 12, replayed=[expected]).texts == [expected]


def test_graphs_need_a_directory_to_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    model = tiny_model()
    said = compile_steps(model) or ""
    assert "TORCHINDUCTOR_CACHE_DIR" in said or "no C++ compiler" in said


def test_blocks_keep_their_names_and_copies_their_own_class() -> None:
    model = tiny_model()
    before, block = list(model.base.lm.state_dict()), model.base.blocks[0]
    reason = compiled.why_not(model.base, model.adapter)
    if reason and "no C++ compiler" in reason:
        pytest.skip("no C++ compiler")
    steps = compiled.CompiledSteps(model.base, model.adapter)
    assert list(model.base.lm.state_dict()) == before and isinstance(block, LlamaDecoderLayer)
    twin = copy.deepcopy(model.base.lm)
    assert type(block) is not LlamaDecoderLayer and type(twin.model.layers[0]) is LlamaDecoderLayer
    assert reference(twin, random_prompt(9), 12) == reference(tiny_lm(), random_prompt(9), 12)
    other = MTPForCausalLM(model.base, MTPConfig(masks=2))  # on the very same base: eager steps, as ever
    assert list(other.own_parameters()) == list(model.own_parameters())
    assert "another model has compiled this base" in (compile_steps(other) or "")
    steps.remove()
    assert type(block) is LlamaDecoderLayer


def test_an_ungated_adapter_is_not_compiled() -> None:
    model = tiny_model(adapter="standard")
    assert "its adapter is not gated" in (compile_steps(model) or "")


def test_without_a_compiler_it_warns_and_decodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "why_not", lambda base, adapter: "there is no C++ compiler; install g++ or clang++")
    with pytest.warns(RuntimeWarning, match="goes on without compiled steps: there is no C\\+\\+ compiler"):
        model = foretell.load(device="cpu", compiled=True)
    assert model.compiled is None and model.generate("def f", strategy="linear", max_new_tokens=4).new_tokens == 4
    capsys.readouterr()
    few = ["--max-new-tokens", "4", "--strategy", "linear"]
    assert cli.main(["generate", "-p", "def f", *few, "--device", "cpu", "--compiled"]) == 0
    assert "goes on without compiled steps: there is no C++ compiler" in capsys.readouterr().err


def test_bfloat16_without_instructions_for_it_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model("llama", torch.bfloat16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    reason = compile_steps(model)
    assert reason is not None and "load it in float32" in reason and model.compiled is None

"""Compiled steps: the same text, and a base that stays as it was, with the reason, where they can't be had."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foretell
from foretell import cli, compiled
from foretell.base import Base
from foretell.block_graph import Call, Parts
from foretell.compiled import CompiledBlock, Form
from foretell.config import STRATEGIES, MTPConfig
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.packed import why_not

from .decoded import decode
from .models import random_prompt, reference, tiny_lm, tiny_model


def packed_model(name: str) -> MTPForCausalLM:
    base = Base(tiny_lm(name))
    if why_not(torch.device("cpu"), torch.float32) is None:
        base.pack(lambda: tiny_lm(name))
    model = MTPForCausalLM(base, MTPConfig(masks=4, rank=4, alpha=8.0))
    torch.manual_seed(1)
    for parameter in model.own_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return model.for_inference()  # type: ignore[return-value]


def compiled_or_skip(model: MTPForCausalLM) -> Counter[Form]:
    """Compiles; counts the blocks that run compiled from then on."""
    reason = compile_steps(model)
    if reason and "no C++ compiler" in reason:
        pytest.skip("no C++ compiler")
    assert reason is None and model.compiled is not None
    ran: Counter[Form] = Counter()

    def counted(form: Form, graph: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            ran[form] += 1
            return graph(*tensors)

        return call

    for block in model.compiled.blocks:
        block.graphs = {form: counted(form, graph) for form, graph in block.graphs.items()}
    return ran


def test_every_strategy_writes_the_bases_text() -> None:
    model = packed_model("llama")
    before = model.base.fingerprint()
    ran = compiled_or_skip(model)
    # All blocks are of one kind, so three graphs serve them.
    assert set(model.compiled.blocks[0].graphs) == {Form(False, False), Form(True, False), Form(True, True)}
    prompt = random_prompt(33)
    expected = reference(tiny_lm("llama"), prompt, 60)
    for strategy in STRATEGIES:
        out = decode(model, [prompt], strategy, 60, replayed=[expected])
        assert out.texts == [expected], strategy
        assert strategy == "autoregressive" or (out.accepted and out.rejected)
    assert ran[Form(False, False)] and ran[Form(True, True)]
    # A batch, and a prompt without a prefill, take the eager way.
    prompts = [random_prompt(length, seed=length) for length in (1, 9)]
    texts = [reference(tiny_lm("llama"), ids, 30) for ids in prompts]
    assert decode(model, prompts, "quadratic", 30, replayed=texts).texts == texts
    assert decode(model, prompts[:1], "linear", 30, replayed=texts[:1]).texts == texts[:1]
    assert model.base.fingerprint() == before


def wrong(parts: Parts, calls: Sequence[Call], keys: Tensor, columns: int, regular: int | None) -> Callable[..., Any]:
    hidden = len(parts.weights(regular is not None))
    return lambda *tensors: (tensors[hidden] + 1,)


def broken(*args: Any) -> Callable[..., Any]:
    raise RuntimeError("boom\nand more")


@pytest.mark.parametrize(("compiler", "reason"), [(wrong, "they differ from eager ones by"), (broken, "Error: boom")])
def test_what_compiles_wrongly_or_not_at_all_stays_eager(
    compiler: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "compile_block", compiler)
    monkeypatch.setattr(compiled, "why_not", lambda base, adapter: None)
    model = tiny_model("qwen2")
    blocks = list(model.base.blocks)
    said = compile_steps(model)
    assert said is not None and reason in said and "\n" not in said
    assert model.compiled is None and list(model.base.blocks) == blocks
    expected = reference(tiny_lm("qwen2"), random_prompt(9), 12)
    assert decode(model, [random_prompt(9)], "quadratic", 12, replayed=[expected]).texts == [expected]


def test_a_copy_of_the_base_holds_its_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "why_not", lambda base, adapter: None)
    model = tiny_model()
    compiled.CompiledSteps(model.base, model.adapter)
    twin = copy.deepcopy(model.base.lm)
    assert any(isinstance(module, CompiledBlock) for module in model.base.modules())
    assert not any(isinstance(module, CompiledBlock) for module in twin.modules())
    assert reference(twin, random_prompt(9), 12) == reference(tiny_lm(), random_prompt(9), 12)


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

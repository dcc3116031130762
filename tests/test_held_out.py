"""Simulated acceptance: the walk by hand, and against real decoding, step for step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell.cli import main
from foretell.config import TrainConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation import foreseen as module
from foretell.evaluation.foreseen import foreseen
from foretell.evaluation.measure import Method, run
from foretell.training.data import Example
from foretell.training.held_out import HeldOut, Table, answered, by_masks, prompt_of, table
from foretell.training.metrics import Agreement
from foretell.training.walk import acceptance_rate, linear_steps, quadratic_steps

from .fitted import fitted
from .models import random_prompt, reference, tiny_model
from .saved import save_model

NEW = 26


@pytest.fixture(scope="module")
def texts() -> tuple[MTPForCausalLM, list[torch.Tensor]]:
    """Prompts that the adapter foresees well, badly, and from somewhere on."""
    model, ids = fitted("llama")
    mixed = torch.cat([random_prompt(6, seed=3), ids[:, :4]], dim=1)
    return model, [ids, ids[:, :9], mixed, random_prompt(5, seed=1), random_prompt(12, seed=2)]


def test_the_walk_by_hand() -> None:
    # 1 token; block 0 accepts 2: tokens 2-4, block 3 accepts 0: token 5, block 4 accepts 1: tokens 6-7, then 8.
    accepted = [2, 9, 9, 0, 1, 9, 0, 0]
    assert quadratic_steps(accepted, 8) == 5
    # With one mask: 1, 2-3 (block 0 cut to 1), block 2 cut to 1: 4-5, block 4 accepts 1: 6-7, 8.
    assert quadratic_steps(accepted, 1) == 5
    # Linear, 2 masks: 1, 2-4 all held, block 3 none: 5 and without drafts 6, block 5 cut to 2: 7-8.
    assert linear_steps(accepted, 2) == 5
    # With 8 masks block 0 misses too: 1, 2-4, 5 without drafts, block 4 misses: 6-7, 8.
    assert linear_steps(accepted, 8) == 5
    assert quadratic_steps([0], 4) == linear_steps([0], 4) == 1, "the first step gives one token"
    assert acceptance_rate([accepted, [0]], "quadratic", 8) == 9 / 6
    counts = Agreement(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0)
    assert by_masks(Table([[1, 0, 0, 0]], counts), "linear") == [round(4 / 3, 4), 1.3333]


def test_simulation_equals_decoding(texts: tuple[MTPForCausalLM, list[torch.Tensor]]) -> None:
    """For every strategy and number of masks, and every text alone: the very number of steps."""
    model, prompts = texts
    for length in (NEW, 7):
        found = table(model, answered(model, [ids[0] for ids in prompts], length, 2), 2)
        assert any(held == model.max_masks for own in found.accepted for held in own)
        assert any(0 < held < model.max_masks for own in found.accepted for held in own)
        for strategy, steps in (("linear", linear_steps), ("quadratic", quadratic_steps)):
            for masks in range(1, model.max_masks + 1):
                decoded = run(model, prompts, Method(strategy, masks), length)
                expected = [len(sizes) for sizes in decoded.sizes]
                assert [steps(own, masks) for own in found.accepted] == expected, (strategy, masks, length)


def test_answers_are_the_bases_own_and_end_with_it() -> None:
    model = tiny_model()
    prompts = [random_prompt(n, seed=n)[0] for n in (3, 7, 5)]
    kept = model.base.lm.generation_config
    expected = [reference(model.base.lm, prompt[None], 12) for prompt in prompts]
    kept.repetition_penalty = 3.0  # is set aside
    made = answered(model, prompts, 12, 3)
    assert [text.ids[text.trained].tolist() for text in made] == expected
    assert all(text.ids[~text.trained].tolist() == prompt.tolist() for text, prompt in zip(made, prompts, strict=True))
    assert model.base.lm.generation_config is kept
    kept.eos_token_id = expected[0][4]
    assert answered(model, prompts, 12, 3)[0].ids[3:].tolist() == expected[0][: expected[0].index(expected[0][4]) + 1]


def test_a_prompt_without_room_is_left_out() -> None:
    model = tiny_model()
    limit = model.base.max_positions
    assert limit is not None
    made = answered(model, [random_prompt(limit)[0], random_prompt(limit - 3)[0]], 12, 1)
    assert [int(text.trained.sum()) for text in made] == [3]


def test_prompts_of_conversations_and_of_texts() -> None:
    ids = torch.arange(8, dtype=torch.int32)
    answer = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert prompt_of(Example(ids, answer)).tolist() == [0, 1, 2]
    assert prompt_of(Example(ids, torch.ones(8, dtype=torch.bool))).tolist() == [0, 1]


def test_the_ungated_baseline_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from foretell.training import held_out

    asked: list[int] = []
    real = held_out.answered
    monkeypatch.setattr(held_out, "answered", lambda *a: (asked.append(1), real(*a))[1])
    example = Example(torch.arange(9, dtype=torch.int32), torch.ones(9, dtype=torch.bool))
    for adapter, times in (("gated", 1), ("standard", 2)):
        asked.clear()
        measured = HeldOut(tiny_model(masks=2, adapter=adapter), [example], TrainConfig(evaluate_tokens=6))
        first, second = measured.evaluate(), measured.evaluate()
        assert first == second and len(asked) == times
        assert first["held_out_simulated_acceptance"] == first["held_out_quadratic"][-1] >= 1


def test_foreseen(texts: tuple[MTPForCausalLM, list[torch.Tensor]]) -> None:
    model, prompts = texts
    report = foreseen(model, [ids[0].tolist() for ids in prompts], max_new_tokens=NEW)
    assert report.largest_difference < 1e-4 and report.passed
    assert (
        report.tokens == NEW * len(prompts) and report.simulated_quadratic[-1] == report.comparisons[1].simulated > 1.5
    )
    json.dumps(report.to_dict())
    with pytest.raises(ForetellError, match="ungated"):
        foreseen(tiny_model(adapter="standard"), [[1, 2]])


def test_check_fails_where_simulation_and_decoding_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("one\nanother one\n")
    line = ["check", "--model", str(save_model(tmp_path)), "--prompts", str(tmp_path / "p.txt"), "--simulated"]
    line += ["--max-new-tokens", "9", "--device", "cpu", "--dtype", "float32"]
    assert main(line) == 0
    assert "linear 1.000 simulated, 1.000 decoded (+0.0 %)" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(module, "by_masks", lambda *a: [1.1])
    assert main([*line, "--json"]) == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "identical" and found["simulated_acceptance"]["largest_difference"] > 0.09

"""The comparison of decoding methods: rows, baselines, points of a sweep, and taking a sweep up again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from foretell.decoding import loop
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation import bench as bench_module
from foretell.evaluation.baselines import huggingface_generate, load_draft_model
from foretell.evaluation.bench import bench, filled, sweep
from foretell.evaluation.measure import Run, count, encode_prompts, first_difference, run
from foretell.evaluation.methods import ADAPTIVE, ASSISTED, HUGGINGFACE, PROMPT_LOOKUP, Method, default_masks
from foretell.evaluation.report import Point, Report, digest, in_words
from foretell.evaluation.saved import load

from .fitted import fitted
from .models import CONFIGS, random_prompt, reference, tiny_lm, tiny_model

FIXED = ("linear", "quadratic")
Repeating = tuple[MTPForCausalLM, torch.Tensor]


@pytest.fixture(scope="module")
def repeating() -> Repeating:
    """A model whose drafts mostly hold, and its text (1, 23)."""
    return fitted("llama")


def prompts(*lengths: int) -> list[Any]:
    return [random_prompt(n, seed=n)[0].tolist() for n in lengths]


def small(**settings: Any) -> Report:
    """A comparison of few methods on two sets."""
    usual = {"strategies": ["quadratic"], "masks": [3], "prompt_lookup": (), "max_new_tokens": 12, "rounds": 1}
    return bench(tiny_model(masks=3), {"one": prompts(5, 9), "two": prompts(4)}, **(usual | settings))


def test_rows_agree_with_each_other_and_with_generate() -> None:
    calls: list[tuple[int, int, str]] = []
    report = bench(
        tiny_model(masks=3),
        {"one": prompts(5, 9), "two": prompts(1)},
        strategies=FIXED,
        masks=(1, 3),
        prompt_lookup=(2,),
        max_new_tokens=24,
        rounds=2,
        on_progress=lambda *call: calls.append(call),
    )
    one, two = report.cells
    assert [str(row.method) for row in one.rows] == [
        "huggingface generate", "prompt lookup of 2 tokens", "plain decoding", "linear with 1 mask",
        "linear with 3 masks", "quadratic with 1 mask", "quadratic with 3 masks",
    ]  # fmt: skip
    assert [call[0] for call in calls] == list(range(1, len(calls) + 1))
    assert calls[-1][:2] == (calls[0][1],) * 2 == (7 * (1 + 2 * 2) + 7 * (1 + 2),) * 2
    for cell, size in ((one, 2), (two, 1)):
        assert cell.prompts == size
        for row in cell.rows:
            counts = row.counts
            assert row.identical and row.difference is None and row.point == cell.point
            assert counts.tokens == 24 * size
            assert sum(counts.acceptance_histogram) == counts.steps
            assert sum(h * (i + 1) for i, h in enumerate(counts.acceptance_histogram)) == counts.tokens
            assert counts.acceptance_rate == counts.tokens / counts.steps == row.speedup_in_steps
            prefills = 0 if row.method.of_transformers else size  # their first step reads the prompt and says a token
            assert counts.acceptance_rate_with_prefill == counts.tokens / (counts.steps + prefills)
            assert row.seconds.minimum <= row.seconds.median <= row.seconds.maximum
            assert row.tokens_per_second.maximum == pytest.approx(counts.tokens / row.seconds.minimum)
            assert row.ms_per_step is not None and row.decode_tokens_per_second is not None
            assert 0 < row.ms_to_first_token.median < 1000 * row.seconds.maximum
            assert len(counts.draft_acceptance) >= row.method.masks
        huggingface, _, plain = cell.rows[:3]
        assert plain.speedup.median == huggingface.speedup_over_huggingface.median == 1.0  # type: ignore[union-attr]
        assert cell.best().speedup.median == max(row.speedup.median for row in cell.rows[3:])
        assert "output identical" in cell.sentence()
    values = json.loads(json.dumps(report.to_dict()))
    assert values["threads"] == torch.get_num_threads() and values["dtype"] == "float32"
    row = values["cells"][0]["rows"][3]
    assert [row[key] for key in ("set", "method", "masks", "lookup", "batch", "temperature", "context")] == [
        "one", "linear", 1, 0, 1, 0.0, None
    ]  # fmt: skip
    assert Report.from_dict(values) == report


def test_times_after_the_first_token() -> None:
    done = Run(
        tokens=[[1, 2, 3, 4], [5, 6], [7]],
        sizes=[[1, 3], [2], [1]],
        seconds=3.0,
        first_token_seconds=[0.5, 0.5],
        steps=[2, 1],  # a batch of two and one of a single prompt
    )
    assert (done.decode_seconds, done.decode_tokens, done.decode_steps) == (2.0, 3, 1)
    assert done.seconds_per_token == 3 / 7


def test_a_text_of_one_step_has_no_decoding_to_time() -> None:
    row = small(max_new_tokens=1).cells[0].rows[-1]
    assert row.ms_per_step is None and row.decode_tokens_per_second is None and row.ms_to_first_token.median > 0


@pytest.mark.parametrize("hf_too", [True, False])
def test_wrong_output_is_found(hf_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(drafts: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        return torch.full(drafts.shape[:-1], drafts.shape[-1])

    model = tiny_model(masks=3)
    monkeypatch.setattr(loop, "accepted_drafts", accept_all)
    report = bench(model, {"set": prompts(5)}, strategies=["linear"], masks=[3], max_new_tokens=24, rounds=1, hf=hf_too)
    (cell,) = report.cells
    *baselines, wrong = cell.rows
    assert all(row.identical for row in baselines) and len(baselines) == 1 + 2 * hf_too
    assert not wrong.identical and wrong.difference is not None
    expected = reference(model.base.lm, random_prompt(5, seed=5), 24)
    assert wrong.difference.expected == expected[wrong.difference.position] != wrong.difference.found
    assert wrong.difference.logit_gap > 0
    assert "output differs from prompt 1" in cell.sentence()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_first_difference_of_texts_that_end_early() -> None:
    model, ids = tiny_model(), random_prompt(6)
    tokens = reference(model.base.lm, ids, 8)
    assert first_difference(model, [ids], [tokens], [tokens]) is None
    short = first_difference(model, [ids], [tokens], [tokens[:5]])
    assert short is not None and (short.position, short.expected, short.found) == (5, tokens[5], None)
    assert short.logit_gap > 0  # over the best other token


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_transformers_batches_are_what_it_writes_alone(name: str) -> None:
    model = tiny_model(name)
    ids = [random_prompt(n, seed=n) for n in (3, 20, 11)]
    expected = [reference(model.base.lm, own, 24) for own in ids]
    ends = {expected[1][9]}
    model.base.lm.generation_config.eos_token_id = next(iter(ends))
    wanted = [own[: next((i + 1 for i, t in enumerate(own) if t in ends), 24)] for own in expected]
    assert len({len(own) for own in wanted}) > 1  # some end early
    done = huggingface_generate(model, ids, 24)
    assert done.tokens == wanted and done.steps == max(map(len, wanted))
    assert done.sizes == [[1] * len(own) for own in wanted]
    assert 0 < done.first_token_seconds < done.seconds


@pytest.mark.parametrize("speculation", [PROMPT_LOOKUP, ASSISTED])
def test_what_transformers_drafts_is_counted(speculation: str, repeating: Repeating) -> None:
    """Prompt lookup on a text that repeats, and a draft model that is the base itself: drafts hold."""
    model, ids = repeating
    method = Method(speculation, lookup=3 if speculation == PROMPT_LOOKUP else 0)
    done = run(model, [ids], method, 24, draft_model=copy.deepcopy(model.base.lm))
    counts = count(done, 0)
    assert done.tokens == [reference(model.base.lm, ids, 24)]
    assert sum(done.sizes[0]) == 24 and len(done.drafts[0]) == len(done.sizes[0]) == done.steps[0]
    assert all(0 <= a <= d for a, d in zip(done.accepted[0], done.drafts[0], strict=True))
    if speculation == PROMPT_LOOKUP:
        assert max(done.drafts[0]) == 3 == len(counts.draft_acceptance)
    else:
        assert counts.acceptance_rate > 3 and counts.draft_acceptance[0] == 1.0


def test_what_takes_one_prompt_is_left_out_of_batches() -> None:
    report = small(prompt_lookup=(2, 3), draft_model=tiny_lm(seed=3), batch=(1, 2))
    single, pair, *_ = report.cells
    assert not single.left_out and [str(row.method) for row in single.rows][1:4] == [
        "prompt lookup of 2 tokens", "prompt lookup of 3 tokens", "assisted"
    ]  # fmt: skip
    assert set(pair.left_out) == {"prompt lookup of 2 tokens", "prompt lookup of 3 tokens", "assisted"}
    assert set(pair.left_out.values()) == {"batch 1 only"} and len(pair.rows) == 3
    assert all(row.identical for cell in report.cells for row in cell.rows)


def test_the_baseline_ignores_other_wishes_of_the_generation_config() -> None:
    model, ids = tiny_model(), random_prompt(6)
    expected = reference(model.base.lm, ids, 40)
    config = hf.GenerationConfig(repetition_penalty=5.0, eos_token_id=expected[20], do_sample=True, temperature=3.0)
    model.base.lm.generation_config = config
    end = expected.index(expected[20]) + 1
    assert huggingface_generate(model, [ids], 40).tokens == [expected[:end]]
    assert model.generate(input_ids=ids, max_new_tokens=40).token_ids == expected[:end]
    assert model.base.lm.generation_config is config


def test_transformers_draws_by_the_seed_and_leaves_the_callers_draws_alone() -> None:
    model, ids = tiny_model(), [random_prompt(6)]
    before = torch.random.get_rng_state()
    texts = [huggingface_generate(model, ids, 24, temperature=1.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drafts_of_a_batch_are_counted_without_filler(repeating: Repeating) -> None:
    """Rows of a batch share one layout: a row with fewer drafts than its neighbour didn't verify as many."""
    model, text = repeating
    ids = [text[:, :12], random_prompt(9, seed=4), text[:, 3:15]]
    method = Method("linear", 4)
    alone, together = run(model, ids, method, 24), run(model, ids, method, 24, batch=3)
    assert together.tokens == alone.tokens and together.sizes == alone.sizes
    assert together.drafts == alone.drafts and together.accepted == alone.accepted
    assert len({sum(own) for own in alone.drafts}) > 1  # or there was no filler
    assert together.steps == [max(alone.steps)] and len(together.first_token_seconds) == 1


def test_drawn_texts_are_compared_with_plain_decoding() -> None:
    (greedy, drawn) = small(temperature=(0, 0.9), seed=3).cells[:2]
    assert (greedy.point, drawn.point) == (Point("one"), Point("one", 1, 0.9))
    huggingface, plain, quadratic = drawn.rows
    assert plain.identical and quadratic.identical and huggingface.identical is None
    assert huggingface.speedup.median > 0 and "with the same seed" in drawn.sentence()


def test_temperature_and_seed_reach_our_loop() -> None:
    model, ids = tiny_model(), [random_prompt(6)]
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 1.0, "seed": 1}]
    texts = [run(model, ids, Method("linear", 2), 24, **own).tokens[0] for own in settings]
    assert texts[0] == reference(model.base.lm, ids[0], 24) and len(set(map(tuple, texts))) == 3


def test_drawn_texts_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_seed(self: Any, settings: dict[str, Any]) -> Any:
        seed = 1 if settings.get("strategy") == "quadratic" else 0
        return original(self, settings | {"seed": seed})

    original = type(tiny_model()).decode_config
    monkeypatch.setattr(type(tiny_model()), "decode_config", other_seed)
    assert [row.identical for row in small(temperature=(1,)).cells[0].rows] == [None, True, False]


def test_points_of_a_sweep() -> None:
    points = sweep(["a", "b"], [1, 2, 1], [0, 1], [8])
    assert len(points) == len(set(points)) == 2 * 2 * 2 and points[0] == Point("a", 1, 0.0, 8)
    assert [str(point) for point in points[:4]] == [
        "a, context 8", "a, temperature 1, context 8", "a, batch 2, context 8", "a, batch 2, temperature 1, context 8"
    ]  # fmt: skip


def test_batches_are_full() -> None:
    ids = [random_prompt(n) for n in (1, 2, 3)]
    assert [own.shape[1] for own in filled(ids, 2)] == [1, 2, 3, 1]
    assert [own.shape[1] for own in filled(ids, 8)] == [1, 2, 3, 1, 2, 3, 1, 2]
    report = small(batch=(2,))
    assert [cell.prompts for cell in report.cells] == [2, 2]
    assert all(row.identical and row.counts.tokens == 24 for cell in report.cells for row in cell.rows)


def test_every_prompt_of_a_context_has_its_length() -> None:
    model = tiny_model()
    (ids, other) = encode_prompts(model, prompts(5, 30), 8, context=12)
    assert ids.shape == other.shape == (1, 12)
    assert other.tolist()[0] == prompts(30)[0][-12:]
    assert ids.tolist()[0] == prompts(30)[0][-7:] + prompts(5)[0]
    with pytest.raises(ForetellError, match="one, prompt 1: the prompt is too long"):
        small(context=(250,))


def test_counts_of_known_steps() -> None:
    done = Run(
        tokens=[[1, 2, 3, 4, 5, 6], [7, 8]],
        sizes=[[1, 3, 2], [1, 1]],
        drafts=[[0, 2, 2], [0, 1]],
        accepted=[[0, 2, 1], [0, 0]],
    )
    counts = count(done, 2)
    assert (counts.tokens, counts.steps) == (8, 5)
    assert counts.acceptance_histogram == [3, 1, 1]
    assert counts.draft_acceptance == [2 / 3, 1 / 2]
    assert counts.acceptance_rate_per_prompt == (2 + 1) / 2
    looping = Run(tokens=[[1] * 8, [1, 2]], sizes=[[8], [2]], drafts=[[0], [0]], accepted=[[0], [0]])
    assert count(looping, 0).repeated_4gram_share == (4 / 5 + 0) / 2
    assert count(done, 0) == counts  # what drafts without masks is told by its drafts


class Interruption:
    """Stands for a measurement: counts the points, and Ctrl-C comes at point number `at`."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.points, self.measure = at, list[Point](), bench_module._measure

    def __call__(self, model: Any, point: Point, *arguments: Any) -> Any:
        if len(self.points) == self.at:
            raise KeyboardInterrupt
        self.points.append(point)
        return self.measure(model, point, *arguments)


def test_an_interrupted_sweep_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "report.json"

    def attempt(at: int | None = None, **settings: Any) -> tuple[list[Point], Report | None]:
        watch = Interruption(at)
        monkeypatch.setattr(bench_module, "_measure", watch)
        try:
            return watch.points, small(output=output, resume=True, **settings)
        except KeyboardInterrupt:
            return watch.points, None
        finally:
            monkeypatch.setattr(bench_module, "_measure", watch.measure)

    points, report = attempt(2, batch=(1, 2))
    assert report is None and len(points) == 2 and [cell.point for cell in load(output).cells] == points
    kept = load(output).cells
    points, report = attempt(batch=(1, 2))
    assert report is not None and report.cells[:2] == kept and len(points) == 2 and len(report.cells) == 4
    assert load(output).cells == report.cells
    points, report = attempt(batch=(4, 2))  # a wider sweep
    assert report is not None and [point.batch for point in points] == [4, 4]
    assert [cell.point.batch for cell in report.cells] == [4, 2, 4, 2, 1, 1]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rounds": 2}, "it was measured with rounds 1, not 2"),
        ({"masks": [2]}, "it was measured with methods"),
        ({"max_new_tokens": 9}, "it was measured with max_new_tokens 12, not 9"),
    ],
)
def test_what_would_not_compare_is_not_resumed(settings: dict[str, Any], fault: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    small(output=output)
    before = output.read_text()
    with pytest.raises(ForetellError, match=fault):
        small(output=output, resume=True, **settings)
    assert output.read_text() == before
    with pytest.raises(ForetellError, match="exists already; go on from it with --resume"):
        small(output=output)
    assert output.read_text() == before


def test_other_prompts_models_and_files_are_not_resumed(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    settings: dict[str, Any] = {"strategies": ["linear"], "masks": [1], "max_new_tokens": 2, "rounds": 1, "hf": False}
    bench(tiny_model(), {"set": prompts(5)}, output=output, **settings)
    with pytest.raises(ForetellError, match="it has set with other prompts"):
        bench(tiny_model(), {"set": prompts(6)}, output=output, resume=True, **settings)
    trained = tiny_model()
    trained.mask_vectors.data[0, 0] += 1
    with pytest.raises(ForetellError, match="it was measured with adapter"):
        bench(trained, {"set": prompts(5)}, output=output, resume=True, **settings)
    for content in ("{", "[]", '{"settings": {}}'):
        output.write_text(content)
        with pytest.raises(ForetellError, match="is not a report"):
            bench(tiny_model(), {"set": prompts(5)}, output=output, resume=True, **settings)


def test_digest() -> None:
    one, two = torch.arange(6), torch.arange(6).view(2, 3)
    assert digest([one]) == digest([one.clone()]) != digest([two])
    assert digest([one, one + 1]) != digest([one + 1, one])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"masks": [0]}, "masks must be at least 1"),
        ({"masks": [5]}, "masks must be at most 4"),
        ({"masks": []}, "at least one strategy"),
        ({"strategies": ["cubic"]}, "strategy must be one of"),
        ({"strategies": ["autoregressive"]}, "at least one strategy"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1000}, "set, prompt 1: the prompt is too long"),
        ({"prompt_lookup": [0]}, "prompt_lookup must be at least 1"),
        ({"batch": [0]}, "batch must be at least 1"),
        ({"batch": []}, "batch is empty"),
        ({"temperature": [-1.0]}, "temperature must be at least 0"),
        ({"temperature": [float("nan")]}, "temperature must be at least 0"),
        ({"context": [0]}, "context must be at least 1"),
        ({"context": []}, "context is empty"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"resume": True}, "give output too"),
        ({"draft_model": "absent/absent/absent"}, "there is no base at"),
        ({"draft_model": "absent", "hf": False}, "leave it out, or allow hf"),
    ],
)
def test_bad_settings(settings: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(loop, "prefill", None)  # nothing may run
    with pytest.raises(ForetellError, match=fault):
        bench(model, {"set": prompts(5)}, **settings)


def test_empty_sets() -> None:
    with pytest.raises(ForetellError, match="at least one set"):
        bench(tiny_model(), {})
    with pytest.raises(ForetellError, match="mine holds no prompts"):
        bench(tiny_model(), {"mine": []})


def test_a_draft_model_of_another_vocabulary() -> None:
    other = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": 50}))
    with pytest.raises(ForetellError, match="vocabulary of 50 tokens and the base one of 97"):
        load_draft_model(other, tiny_model())


def test_default_masks() -> None:
    assert default_masks(tiny_model(masks=8)) == (1, 2, 4, 8)
    assert default_masks(tiny_model(masks=3)) == (1, 2, 3)


def test_method_names() -> None:
    assert str(Method(HUGGINGFACE)) == HUGGINGFACE and str(Method("quadratic", 1)) == "quadratic with 1 mask"
    assert str(Method(ADAPTIVE, 4)) == "adaptive, up to 4 masks" and str(Method(ASSISTED)) == "assisted"
    assert str(Method(PROMPT_LOOKUP, lookup=1)) == "prompt lookup of 1 token"


def test_ratios_in_words() -> None:
    words = [in_words(r) for r in (1.62, 0.5, 1.0, 1.05)]
    assert words == ["1.6x faster than", "2.0x slower than", "as fast as", "1.05x faster than"]

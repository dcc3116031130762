"""Prompt sets, exact answers, and the comparison of decoding methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from foretell.decoding import loop
from foretell.decoding.text import TextStream
from foretell.errors import ForetellError
from foretell.evaluation.answers import answer_in, exact_answers
from foretell.evaluation.bench import bench, default_masks
from foretell.evaluation.measure import HUGGINGFACE, Method, Run, count, first_difference, huggingface_generate
from foretell.evaluation.prompts import load_prompts, read_records
from foretell.evaluation.report import in_words

from .models import random_prompt, reference, tiny_model
from .saved import character_tokenizer


def prompts(*lengths: int) -> list[Any]:
    return [random_prompt(n, seed=n)[0].tolist() for n in lengths]


def test_rows_agree_with_each_other_and_with_generate() -> None:
    model = tiny_model(masks=3)
    calls: list[tuple[int, int, str]] = []
    report = bench(
        model,
        {"one": prompts(5, 9), "two": prompts(1)},
        masks=(1, 3),
        max_new_tokens=24,
        rounds=2,
        on_progress=lambda *call: calls.append(call),
    )
    names = [str(row.method) for row in report.sets["one"]]
    assert names == ["huggingface generate", "plain decoding", "linear with 1 mask", "linear with 3 masks",
                     "quadratic with 1 mask", "quadratic with 3 masks"]  # fmt: skip
    assert [call[0] for call in calls] == list(range(1, len(calls) + 1))
    assert calls[-1][:2] == (calls[0][1],) * 2 == (6 * (1 + 2 * 2) + 6 * (1 + 2),) * 2
    for name, size in (("one", 2), ("two", 1)):
        for row in report.sets[name]:
            counts = row.counts
            assert row.identical and row.difference is None
            assert counts.tokens == 24 * size
            assert sum(counts.acceptance_histogram) == counts.steps
            assert sum(h * (i + 1) for i, h in enumerate(counts.acceptance_histogram)) == counts.tokens
            assert counts.acceptance_rate == counts.tokens / counts.steps == row.speedup_in_steps
            assert counts.acceptance_rate_with_prefill == counts.tokens / (counts.steps + size)
            assert row.seconds.minimum <= row.seconds.median <= row.seconds.maximum
            assert row.tokens_per_second == pytest.approx(counts.tokens / row.seconds.median)
            assert row.ms_per_step == pytest.approx(1000 * row.seconds.median / counts.steps)
            assert len(counts.draft_acceptance) == row.method.masks
        huggingface, plain = report.sets[name][:2]
        assert plain.speedup.median == huggingface.speedup_over_huggingface.median == 1.0  # type: ignore[union-attr]
        assert huggingface.ms_to_first_token is None and plain.ms_to_first_token > 0  # type: ignore[operator]
        assert report.best(name).speedup.median == max(row.speedup.median for row in report.sets[name][2:])
        assert "output identical" in report.sentence(name)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["threads"] == torch.get_num_threads() and values["dtype"] == "float32"
    assert values["sets"]["one"]["rows"][2]["method"] == "linear" and values["settings"]["prompts"] == {
        "one": 2,
        "two": 1,
    }


@pytest.mark.parametrize("hf_too", [True, False])
def test_wrong_output_is_found(hf_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(drafts: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        return torch.full(drafts.shape[:-1], drafts.shape[-1])

    model = tiny_model(masks=3)
    monkeypatch.setattr(loop, "accepted_drafts", accept_all)
    report = bench(model, {"set": prompts(5)}, strategies=["linear"], masks=[3], max_new_tokens=24, rounds=1, hf=hf_too)
    *baselines, wrong = report.sets["set"]
    assert all(row.identical for row in baselines) and len(baselines) == 1 + hf_too
    assert not wrong.identical and wrong.difference is not None
    expected = reference(model.base.lm, random_prompt(5, seed=5), 24)
    assert wrong.difference.expected == expected[wrong.difference.position] != wrong.difference.found
    assert wrong.difference.logit_gap > 0
    assert "output differs from prompt 1" in report.sentence("set")
    json.dumps(report.to_dict())


def test_first_difference_of_texts_that_end_early() -> None:
    model, ids = tiny_model(), random_prompt(6)
    tokens = reference(model.base.lm, ids, 8)
    assert first_difference(model, [ids], [tokens], [tokens]) is None
    short = first_difference(model, [ids], [tokens], [tokens[:5]])
    assert short is not None and (short.position, short.expected, short.found) == (5, tokens[5], None)
    assert short.logit_gap > 0  # over the best other token


def test_the_baseline_ignores_other_wishes_of_the_generation_config() -> None:
    model, ids = tiny_model(), random_prompt(6)
    expected = reference(model.base.lm, ids, 40)
    config = hf.GenerationConfig(repetition_penalty=5.0, eos_token_id=expected[20], do_sample=True, temperature=3.0)
    model.base.lm.generation_config = config
    end = expected.index(expected[20]) + 1
    assert huggingface_generate(model, ids, 40) == expected[:end]
    assert model.generate(input_ids=ids, max_new_tokens=40).token_ids == expected[:end]
    assert model.base.lm.generation_config is config


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


def test_default_masks() -> None:
    assert default_masks(tiny_model(masks=8)) == (1, 2, 4, 8)
    assert default_masks(tiny_model(masks=3)) == (1, 2, 3)


def test_ratios_in_words() -> None:
    words = [in_words(r) for r in (1.62, 0.5, 1.0, 1.05)]
    assert words == ["1.6x faster than", "2.0x slower than", "as fast as", "1.05x faster than"]


def test_answers() -> None:
    assert answer_in("Two.\nAnswer: 12\n") == "12"
    assert answer_in("Answer: 12\nand more") is None and answer_in("") is None and answer_in("Answer:") is None
    assert exact_answers(["x\nAnswer: 3", "Answer: 4", "no"], [3, "5", "7"]) == 1 / 3
    with pytest.raises(ForetellError):
        exact_answers(["x"], [])


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"prompt": "a\\u2028b\\n"}\n\n{"question": "c", "answer": "1"}\n', encoding="utf-8")
    assert load_prompts(lines) == ["a\u2028b\n", "c"]
    assert load_prompts(lines, limit=1) == ["a\u2028b\n"]
    assert [number for number, _ in read_records(lines)] == [1, 3]
    text = tmp_path / "mine.txt"
    text.write_text("first \n\n  second\r\n")
    assert load_prompts(text) == ["first ", "  second"]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}]
    path.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "yo"}\n')
    first, second = load_prompts(path, tokenizer=tokenizer)
    assert tokenizer.decode(first) == "<hi>!" and second == "yo"
    assert tokenizer.decode(load_prompts(path, tokenizer=tokenizer, chat=True)[1]) == "<yo>!"
    with pytest.raises(ForetellError, match="line 1: messages need a base with a chat template"):
        load_prompts(path, tokenizer=character_tokenizer())


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: needs a field prompt, question or messages; it has text"),
        (b"[1]\n", "line 1: needs a field"),
        (b"{nope\n", "line 1: not valid JSON"),
        (b'{"prompt": 3}\n', "line 1: the prompt must be a non-empty text"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "line 1: messages has no user message"),
        (b'{"messages": "x"}\n', "line 1: messages must be a list"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_prompt_files(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ForetellError) as caught:
        load_prompts(path, tokenizer=character_tokenizer())
    assert str(path) in str(caught.value) and fault in str(caught.value)


def test_missing_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match=r"there is no file .*problems, code"):
        load_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ForetellError, match=r"must end in \.jsonl or \.txt"):
        load_prompts(tmp_path / "a.csv")
    with pytest.raises(ForetellError, match="limit must be at least 1"):
        read_records("problems", limit=0)


def test_pieces_of_text_join_to_the_whole() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "naïve: 你好 \U0001f600\n  end"
    stream = TextStream(fast, fast("before ")["input_ids"])
    ids = fast(text)["input_ids"]
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text and "" in pieces and not any("\ufffd" in piece for piece in pieces)
    half = TextStream(fast)
    for token in fast("é")["input_ids"][:1]:
        assert half.push(token) == ""
    assert half.flush() == "\ufffd"


def test_method_names() -> None:
    assert str(Method(HUGGINGFACE)) == HUGGINGFACE and str(Method("quadratic", 1)) == "quadratic with 1 mask"

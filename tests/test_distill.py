"""`foretell distill`: the base's own answers, whatever the batch, after a kill, and with what can't be answered."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import foretell
from foretell import cli
from foretell.decoding.generate import MTPForCausalLM
from foretell.distillation import Distillation, Progress
from foretell.distillation.journal import Journal
from foretell.errors import ForetellError
from foretell.training.data import load_corpus

from .models import reference
from .saved import character_tokenizer, save_model

Captured = pytest.CaptureFixture[str]
TEMPLATE = (
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('no such word') }}{% endif %}"
    "{{ m.role[0] }}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}a<{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def model(saved: Path) -> MTPForCausalLM:
    return foretell.load(saved)


@pytest.fixture
def talking(model: MTPForCausalLM, monkeypatch: pytest.MonkeyPatch) -> MTPForCausalLM:
    """The same base with a chat template."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    return model


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [{"question": f"{n} " + "x" * (n * 7 % 23), "answer": "no matter"} for n in range(11)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[str]:
    return [record["completion"] for record in records(path)]


def some_eos(model: MTPForCausalLM, prompts: Path) -> int:
    """A token that some answers of 20 tokens hold and others don't, and not at once."""
    answers = [reference(model.base.lm, model.encode(line["question"]), 20) for line in records(prompts)]
    shares = {t: sum(t in answer for answer in answers) for answer in answers for t in answer[4:]}
    return min(shares, key=lambda t: abs(shares[t] - len(answers) / 2))


def test_answers_are_what_the_base_says_alone_whatever_the_batch(
    model: MTPForCausalLM, saved: Path, prompts: Path, tmp_path: Path
) -> None:
    eos = some_eos(model, prompts)
    seen: list[Progress] = []
    first = tmp_path / "first.jsonl"
    done = foretell.distill(
        prompts, first, model=model, batch_size=3, max_new_tokens=20, eos_token_id=eos, on_progress=seen.append
    )
    expected = [
        model.generate(line["question"], max_new_tokens=20, eos_token_id=eos, strategy="autoregressive")
        for line in records(prompts)
    ]
    assert texts(first) == [one.text for one in expected]
    origins = [record["distilled"] for record in records(first)]
    assert [o["tokens"] for o in origins] == [one.new_tokens for one in expected]
    assert {o["finish_reason"] for o in origins} == {"eos", "length"}
    assert [o["finish_reason"] == "eos" for o in origins] == [one.token_ids[-1] == eos for one in expected]
    assert [o["prompt"] for o in origins] == [f"p.jsonl:{n}" for n in range(1, 12)]
    assert origins[0]["settings"]["base_fingerprint"] == model.base.fingerprint()
    assert (done.answers, done.prompts, done.skipped) == (11, 11, [])
    assert done.cut == sum(o["finish_reason"] == "length" for o in origins)
    assert (seen[-1].done, seen[-1].total, seen[-1].tokens) == (11, 11, sum(o["tokens"] for o in origins))
    for name, settings in {
        "one": {"model": model, "batch_size": 1},
        "all": {"model": model, "batch_size": 50, "strategy": "quadratic", "masks": 2},
        "base": {"base": str(saved.parent / "base"), "batch_size": 4},
        "directory": {"base": str(saved), "batch_size": 4, "strategy": "linear"},
    }.items():
        foretell.distill(prompts, tmp_path / name, max_new_tokens=20, eos_token_id=eos, **settings)
        assert texts(tmp_path / name) == texts(first), name
    assert not list(tmp_path.glob("*.part"))


def test_samples_have_seeds_of_their_own(model: MTPForCausalLM, prompts: Path, tmp_path: Path) -> None:
    drawn = {"temperature": 1.0, "samples": 3, "limit": 4, "max_new_tokens": 9, "seed": 5}
    for batch_size in (2, 5):
        foretell.distill(prompts, tmp_path / str(batch_size), model=model, batch_size=batch_size, **drawn)
    lines = records(tmp_path / "2")
    assert lines == records(tmp_path / "5") and len(lines) == 12
    origins = [line["distilled"] for line in lines]
    assert [(o["prompt"], o["sample"]) for o in origins] == [(f"p.jsonl:{p}", s) for p in range(1, 5) for s in range(3)]
    assert len({o["seed"] for o in origins}) == 12 and len({line["completion"] for line in lines[:3]}) == 3
    again = model.generate(lines[4]["prompt"], max_new_tokens=9, temperature=1.0, seed=origins[4]["seed"])
    assert again.text == lines[4]["completion"]
    with pytest.raises(ForetellError, match="give a temperature"):
        foretell.distill(prompts, tmp_path / "greedy", model=model, samples=2)


def test_conversations_become_records_that_training_takes(talking: MTPForCausalLM, tmp_path: Path) -> None:
    source, output = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "and?"), ("assistant", "left out")]
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "left out"}]},
        {"instruction": "add", "input": "1 2", "output": "left out"},
        {"prompt": "a prompt"},
        {"text": "a text"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    foretell.distill(source, output, model=talking, max_new_tokens=6)
    made = [record["messages"] for record in records(output)]
    assert [[m["content"] for m in messages[:-1]] for messages in made] == [
        ["hi", "ho", "and?"], ["one"], ["add\n\n1 2"], ["a prompt"], ["a text"]
    ]  # fmt: skip
    asked = talking.generate(input_ids=talking.tokenizer("u<hi>a<ho>u<and?>a<")["input_ids"], max_new_tokens=6)
    assert made[0][-1] == {"role": "assistant", "content": asked.text}
    corpus = load_corpus(output, talking.tokenizer, 64)
    assert corpus.report.examples == 5
    trained = corpus.examples[1].ids[corpus.examples[1].trained]
    assert talking.decode(trained.tolist()).startswith(made[1][-1]["content"])


def test_prompts_and_completions_can_be_trained_on(model: MTPForCausalLM, prompts: Path, tmp_path: Path) -> None:
    foretell.distill(prompts, tmp_path / "a.jsonl", model=model, max_new_tokens=6)
    corpus = load_corpus(tmp_path / "a.jsonl", model.tokenizer, 64)
    assert corpus.report.records == corpus.report.examples == 11
    first = records(tmp_path / "a.jsonl")[0]
    assert model.tokenizer.decode(corpus.examples[0].ids).startswith(first["prompt"] + first["completion"])


def test_what_cannot_be_answered_is_named(talking: MTPForCausalLM, tmp_path: Path) -> None:
    source, output = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts = ["good", " ", "x" * 300, "a forbidden word", "half of a \ud800 pair", "also good"]
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    done = foretell.distill(source, output, model=talking, max_new_tokens=6)
    assert [record["distilled"]["prompt"] for record in records(output)] == ["p.jsonl:1", "p.jsonl:6"]
    assert (done.answers, done.prompts) == (2, 6)
    assert [(one["prompt"], one["reason"][:24]) for one in done.skipped] == [
        ("p.jsonl:2", "the prompt is empty"), ("p.jsonl:3", "the prompt is too long: "),
        ("p.jsonl:4", "the base's chat template"), ("p.jsonl:5", "the prompt is not valid "),
    ]  # fmt: skip
    source.write_text('{"prompt": ""}\n')
    with pytest.raises(ForetellError, match=r"none of the 1 prompts can be answered; the first, p.jsonl:1: .* empty"):
        foretell.distill(source, tmp_path / "none.jsonl", model=talking)
    assert not list(tmp_path.glob("none*"))


def test_answers_cut_off_by_the_length_can_be_left_out(model: MTPForCausalLM, prompts: Path, tmp_path: Path) -> None:
    settings = {"model": model, "max_new_tokens": 20, "eos_token_id": some_eos(model, prompts)}
    whole = foretell.distill(prompts, tmp_path / "whole", **settings)
    some = foretell.distill(prompts, tmp_path / "some", **settings, only_finished=True)
    kept = [record for record in records(tmp_path / "whole") if record["distilled"]["finish_reason"] == "eos"]
    assert 0 < len(kept) == some.answers < whole.answers == 11
    assert records(tmp_path / "some") == kept and some.left_out == some.cut == whole.cut == 11 - len(kept)
    text = kept[-1]["completion"]
    foretell.distill(prompts, tmp_path / "stopped", **settings | {"stop": [text[2:4]]})
    reasons = {record["distilled"]["finish_reason"] for record in records(tmp_path / "stopped")}
    assert "stop" in reasons


def interrupted(prompts: Path, output: Path, after: int, **settings: Any) -> None:
    """Leaves the journal of a run that was stopped with so many answers."""

    def stop(now: Progress) -> None:
        if now.done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        foretell.distill(prompts, output, on_progress=stop, **settings)
    assert not output.exists() and output.with_name(output.name + ".part").exists()


def test_resumed_wherever_the_file_was_cut(model: MTPForCausalLM, prompts: Path, tmp_path: Path) -> None:
    settings = {"model": model, "max_new_tokens": 8, "temperature": 0.7, "samples": 2, "batch_size": 4}
    foretell.distill(prompts, tmp_path / "whole", **settings)
    output, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    interrupted(prompts, output, 9, **settings)
    journal = part.read_bytes()
    ends = [0] + [i + 1 for i, byte in enumerate(journal) if byte == 10]
    cuts = {0, 1, ends[1] - 1, ends[1], ends[4] - 1, ends[4], ends[4] + 1, ends[6] + 200, len(journal)}
    for cut in sorted(cuts):
        part.write_bytes(journal[:cut])
        done = foretell.distill(prompts, output, resume=True, **settings | {"batch_size": 3, "strategy": "linear"})
        assert output.read_bytes() == (tmp_path / "whole").read_bytes() and not part.exists()
        assert done.resumed == max(0, sum(end <= cut for end in ends) - 2) and done.answers == 22
        output.unlink()
    # A kill between the output's appearance and the journal's end leaves both.
    part.write_bytes(journal)
    output.write_bytes(b"what was written last")
    assert foretell.distill(prompts, output, resume=True, **settings).answers == 22
    assert output.read_bytes() == (tmp_path / "whole").read_bytes()
    again = foretell.distill(prompts, output, resume=True, **settings)
    assert (again.answers, again.resumed, again.tokens) == (22, 22, 0)
    part.write_bytes(journal[: ends[2]] + b"{nonsense\n" + journal[ends[3] :])
    with pytest.raises(ForetellError, match=r"a\.jsonl\.part, line 3: damaged"):
        foretell.distill(prompts, output, resume=True, **settings)


def test_nothing_is_overwritten_or_mixed(model: MTPForCausalLM, prompts: Path, tmp_path: Path) -> None:
    settings = {"model": model, "max_new_tokens": 5, "batch_size": 2}
    output = tmp_path / "a.jsonl"
    interrupted(prompts, output, 3, **settings)
    before = Path(f"{output}.part").read_bytes()

    def refused(match: str, **other: Any) -> None:
        with pytest.raises(ForetellError, match=match):
            foretell.distill(prompts, output, **settings | other)

    refused("holds unfinished answers; go on with --resume")
    refused("were made with max_new_tokens 5, not 6", resume=True, max_new_tokens=6)
    refused("were made with prompts_sha256", resume=True, limit=5)
    refused("were made with temperature 0.0, not 1.0", resume=True, temperature=1.0)
    assert Path(f"{output}.part").read_bytes() == before
    assert foretell.distill(prompts, output, **settings, resume=True).resumed >= 3
    refused("exists already")
    refused("were made with seed 0, not 1", resume=True, seed=1)
    output.write_text("mine\n")
    refused("was not made by `foretell distill`", resume=True)
    assert output.read_text() == "mine\n"


def test_resumed_after_a_real_kill(saved: Path, prompts: Path, tmp_path: Path) -> None:
    output, part, whole = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part", tmp_path / "whole.jsonl"
    options = ["--model", str(saved), "--prompts", str(prompts), "--max-new-tokens", "200", "--device", "cpu"]
    command = [sys.executable, "-m", "foretell", "distill", *options, "--output", str(output)]
    process = subprocess.Popen([*command, "--batch-size", "1", "--strategy", "autoregressive"], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if part.exists() and part.read_bytes().count(b"\n") > 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(30) == -signal.SIGKILL and not output.exists()
    assert cli.main(["distill", *options, "--output", str(whole)]) == 0
    assert cli.main(["distill", *options, "--output", str(output), "--resume"]) == 0
    assert output.read_bytes() == whole.read_bytes() and not part.exists()


def test_ctrl_c_says_where_to_go_on(
    saved: Path, prompts: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Journal.add

    def pressed(journal: Journal, record: dict[str, Any]) -> None:
        add(journal, record)
        if len(journal.done) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Journal, "add", pressed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    options = ["distill", "--base", str(saved.parent / "base"), "--prompts", str(prompts), "--max-new-tokens", "5"]
    assert cli.main([*options, "--output", str(tmp_path / "a.jsonl")]) == 130
    out, err = capsys.readouterr()
    assert out == "" and "a.jsonl.part; --resume goes on from there" in err and "Traceback" not in err
    assert cli.main([*options, "--output", str(tmp_path / "a.jsonl"), "--resume", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) >= {field for field in Distillation.__dataclass_fields__}
    assert (values["answers"], values["resumed"], values["acceptance_rate"]) == (11, 3, 1.0)


def test_the_command_in_words(saved: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "d" / "q.jsonl").write_text('{"prompt": ""}\n' * 7)
    options = ("distill", "--model", saved, "--prompts", tmp_path / "d", "--max-new-tokens", 5)
    assert cli.main([str(o) for o in (*options, "--output", tmp_path / "a.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "2 answers to 9 prompts" in out and "tokens per step" in out and "2 were cut off by the length" in out
    assert "7 prompts were skipped" in out and "q.jsonl:1: the prompt is empty" in out and "and 2 more" in out
    assert "foretell train --base" in out
    assert cli.main([str(o) for o in (*options, "--only-finished", "--output", tmp_path / "b.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "nothing to train on" in out and "foretell train" not in out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--batch-size 0", "--batch-size"),
        ("--limit 0", "--limit"),
        ("--chat", "no chat template"),
        ("--prompts absent.jsonl", "there is no file absent.jsonl"),
        ("--output absent/a.jsonl", "there is no directory absent"),
        ("--samples 2", "give a temperature"),
        ("--max-new-tokens 300", "none of the 11 prompts can be answered"),
        ("--masks 9", "masks must be at most 4"),
    ],
)
def test_bad_settings(options: str, named: str, saved: Path, prompts: Path, tmp_path: Path, capsys: Captured) -> None:
    given = ["--model", str(saved), "--prompts", str(prompts), "--output", str(tmp_path / "a.jsonl")]
    assert cli.main(["distill", *given, *options.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("foretell: ") and err.count("\n") == 1 and named in err, err
    assert not list(tmp_path.iterdir())


def test_a_base_alone_has_no_masks(saved: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match="is a base without an adapter"):
        foretell.distill(prompts, tmp_path / "a", base=str(saved.parent / "base"), strategy="quadratic")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"answer": "b"}', "line 1: needs a field messages, conversations"),
        ('{"prompt": 3}', "bad.jsonl:1: prompt must be a text"),
        ('{"messages": "x"}', "bad.jsonl:1: messages must be a list"),
        ('{"messages": [{"role": "user"}]}', "bad.jsonl:1: a message needs role and content"),
        ("{nope", "line 1: not valid JSON"),
        (" ", "is empty"),
    ],
)
def test_bad_prompts(line: str, fault: str, model: MTPForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(ForetellError) as caught:
        foretell.distill(tmp_path / "bad.jsonl", tmp_path / "a.jsonl", model=model)
    assert fault in str(caught.value)
    assert not (tmp_path / "a.jsonl.part").exists()


def test_a_full_disk_loses_nothing(
    model: MTPForCausalLM, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, settings = tmp_path / "a.jsonl", {"model": model, "max_new_tokens": 5, "batch_size": 2}
    foretell.distill(prompts, tmp_path / "whole", **settings)
    replace = os.replace

    def full(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ForetellError, match="make room for it, then go on with --resume"):
        foretell.distill(prompts, output, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.part", "whole"]
    monkeypatch.setattr(os, "replace", replace)
    assert foretell.distill(prompts, output, resume=True, **settings).tokens == 0
    assert output.read_bytes() == (tmp_path / "whole").read_bytes()

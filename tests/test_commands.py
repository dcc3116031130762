"""The commands generate, bench and demo as a user meets them, on a tiny model on disk."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import transformers as hf

import foretell
from foretell import cli
from foretell.decoding import generate as generate_module
from foretell.evaluation import bench as bench_module
from foretell.evaluation import prompts as prompts_module

from .saved import character_tokenizer, save_base, save_model

FIELDS = {
    "text", "token_ids", "prompt_tokens", "new_tokens", "steps", "acceptance_rate", "acceptance_histogram",
    "repeated_4gram_share", "seconds", "tokens_per_second", "strategy", "masks", "model",
}  # fmt: skip
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter's directory."""
    return save_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def embedded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model and two tiny prompt sets in place of those that ship with foretell."""
    for name in ("problems", "code"):
        records = [{"prompt": f"{name} {i}:", "answer": str(i)} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(prompts_module, "PACKAGED", tmp_path)
    monkeypatch.setattr(generate_module, "EMBEDDED", saved)


def succeed(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def generated(capsys: Captured) -> str:
    return capsys.readouterr().out


def test_generate_as_json(saved: Path, capsys: Captured) -> None:
    succeed("generate", "--model", saved, "--prompt", "a b", "--max-new-tokens", 12, "--masks", 2, "--json")
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    values = json.loads(out)
    assert set(values) >= FIELDS
    again = foretell.load(saved).generate("a b", max_new_tokens=12, masks=2)
    assert values["token_ids"] == again.token_ids and values["text"] == again.text
    assert (values["prompt_tokens"], values["new_tokens"], values["masks"]) == (3, 12, 2)
    assert values["model"] == str(saved) and values["strategy"] == "adaptive"


def test_all_ways_to_give_a_prompt_and_all_strategies_give_the_same_text(
    saved: Path, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt"
    file.write_text("a\nb\n")
    common = ("generate", "--model", saved, "--max-new-tokens", 12)
    succeed(*common, "--prompt", "a\nb")
    out, err = capsys.readouterr()
    assert out == foretell.load(saved).generate("a\nb", max_new_tokens=12).text + "\n"
    assert err.startswith("12 tokens in ") and err.count("\n") == 1
    ways = [("--prompt-file", file), ("--prompt", "-"), ("--prompt", "a\nb", "--stream")]
    ways += [("--prompt", "a\nb", "--strategy", "linear"), ("--prompt", "a\nb", "--no-use-sampler")]
    for way in ways:
        monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
        succeed(*common, *way)
        assert generated(capsys) == out, way


def test_generate_in_colour(saved: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    succeed("generate", "--model", saved, "--prompt", "abc", "--max-new-tokens", 12)
    out = generated(capsys)
    assert "\x1b[1;" in out and out.startswith("\x1b[2mabc\x1b[0m")


def test_chat(saved: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(saved.parent, tmp_path / "copy")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "copy" / "base")
    arguments = (
        "generate",
        "--model",
        tmp_path / "copy" / "adapter",
        "--prompt",
        "hi",
        "--max-new-tokens",
        3,
        "--json",
    )
    succeed(*arguments, "--chat")
    assert json.loads(generated(capsys))["prompt_tokens"] == len("<hi>")


@pytest.mark.usefixtures("embedded")
def test_bench_as_json_on_the_packaged_sets(capsys: Captured, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    succeed("bench", "--json", "--limit", 2, "--masks", "1,4", "--strategies", "quadratic", "--rounds", 1,
            "--prompt-lookup", "2,3", "--max-new-tokens", 8, "--output", output)  # fmt: skip
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert err == "" and json.loads(output.read_text()) == values
    assert [cell["set"] for cell in values["cells"]] == ["problems", "code"] and values["model"] == "embedded"
    for cell in values["cells"]:
        assert [(row["method"], row["masks"], row["lookup"]) for row in cell["rows"]] == [
            ("huggingface generate", 0, 0), ("prompt lookup", 0, 2), ("prompt lookup", 0, 3), ("autoregressive", 0, 0),
            ("quadratic", 1, 0), ("quadratic", 4, 0)
        ]  # fmt: skip
        assert all(row["identical"] for row in cell["rows"]) and cell["prompts"] == 2


def test_bench_in_words(saved: Path, capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one\ntwo\n")
    few = ("--masks", "2", "--strategies", "linear", "--rounds", 1, "--max-new-tokens", 8)
    succeed("bench", "--model", saved, "--prompts", file, *few, "--no-hf")
    out = generated(capsys)
    assert "mine: 2 prompts" in out and "plain decoding" in out and "huggingface" not in out
    sentence = " ".join(out.split())
    assert "tokens per step" in out and "output identical; " in sentence and "% of 4-grams repeat" in sentence


def test_a_sweep_with_a_draft_model_and_a_picture(saved: Path, capsys: Captured, tmp_path: Path) -> None:
    file, output, picture = tmp_path / "mine.txt", tmp_path / "report.json", tmp_path / "report.png"
    file.write_text("one\ntwo\n")
    arguments = ("bench", "--model", saved, "--prompts", file, "--draft-model", saved.parent / "base", "--masks", 2,
                 "--strategies", "linear", "--rounds", 1, "--max-new-tokens", 4, "--output", output)  # fmt: skip
    succeed(*arguments, "--batch", "1,2", "--temperature", "0,1", "--context", 6, "--plot", picture)
    out, err = capsys.readouterr()
    assert err == "" and picture.read_bytes().startswith(b"\x89PNG")
    for title in ("mine, context 6: 2 prompts", "mine, batch 2, temperature 1, context 6: 2 prompts"):
        assert title in out
    lines = [line.split() for line in out.splitlines() if line.startswith("assisted ")]
    assert len(lines) == 4 and [line[-1] for line in lines[:2]] == ["identical", "–"]
    assert [line[-3:] for line in lines[2:]] == [["batch", "1", "only"]] * 2
    before = json.loads(output.read_text())["cells"]
    succeed(*arguments, "--batch", "4,1", "--context", 6, "--resume", "--json")
    cells = json.loads(generated(capsys))["cells"]
    assert [cell["batch"] for cell in cells] == [4, 1, 1, 2, 2]
    assert [cell for cell in cells if cell["batch"] < 4] == before


def test_bench_overwrites_nothing(saved: Path, capsys: Captured, tmp_path: Path) -> None:
    file, output = tmp_path / "mine.txt", tmp_path / "report.json"
    file.write_text("one\n")
    output.write_text("hours of work")
    fails(capsys, "bench", "--model", saved, "--prompts", file, "--output", output, named="go on from it with --resume")
    assert output.read_text() == "hours of work"


def test_an_interrupted_bench_says_where_to_go_on(
    saved: Path, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, output: Path, **settings: object) -> None:
        output.write_text("a finished part")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "bench", interrupted)
    file = tmp_path / "mine.txt"
    file.write_text("one\n")
    code = cli.main(["bench", "--model", str(saved), "--prompts", str(file), "--output", str(tmp_path / "r.json")])
    out, err = capsys.readouterr()
    assert code == 130 and out == "" and "r.json; --resume goes on from there" in err


@pytest.mark.usefixtures("embedded")
def test_demo_without_a_terminal(capsys: Captured, tmp_path: Path) -> None:
    picture = tmp_path / "demo.svg"
    succeed("demo", "--prompts", 3, "--max-new-tokens", 10, "--rounds", 1, "--svg", picture)
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    assert out.startswith("You are watching a language model")
    assert "unseen school problem 2 of 2" in out and "unseen Python function 1 of 1" in out
    shown, account = out.split("problems 0:")[1].split("\n   ")[:2]
    shown = shown.replace("\n", "")
    text = foretell.load().generate("problems 0:", max_new_tokens=10)
    assert shown.replace("│", "").replace("|", "") == text.text.replace("\n", "").replace("|", "")
    steps = int(account.split("tokens in ")[1].split()[0])  # not those of `text`: the planner goes by time
    assert max(shown.count("│"), shown.count("|") - text.text.count("|")) == steps
    assert "Where to go next" in out and "foretell bench" in out
    assert picture.read_text().startswith("<svg") and "school&#160;problem" in picture.read_text()


def fails(capsys: Captured, *arguments: object, named: str) -> None:
    """Exit code 2, nothing on standard output, one sentence on standard error."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("foretell: ") and err.count("\n") == 1, err
    assert named in err, err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--prompt a --masks 0", "--masks"),
        ("--prompt a --masks 9", "masks must be at most 4"),
        ("--prompt a --max-new-tokens 300", "the prompt is too long"),
        ("--prompt a --strategy cubic", "--strategy"),
        ("--prompt a --dtype int3", "--dtype"),
        ("--prompt a --device nowhere", "there is no device 'nowhere'"),
        ("--prompt a --chat", "no chat template"),
        ("--prompt=", "the prompt is empty"),
        ("", "--prompt"),
        ("--prompt a --prompt-file b", "either --prompt"),
        ("--prompt-file absent.txt", "absent.txt cannot be read"),
        ("--prompt \udcff", "--prompt cannot be read: it is not UTF-8 text"),
        ("--prompt -", "standard input cannot be read: it is not UTF-8 text"),
        ("--prompt a --top-p 2", "--top-p"),
    ],
)
def test_bad_generate(options: str, named: str, saved: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff"))  # what Python makes of a wrong byte in a C locale
    fails(capsys, "generate", "--model", saved, *options.split(), named=named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--masks 0", "masks must be at least 1"),
        ("--masks 9", "masks must be at most 4"),
        ("--masks one", "--masks takes whole numbers"),
        ("--strategies cubic", "strategy must be one of"),
        ("--rounds 0", "rounds must be at least 1"),
        ("--limit 0", "limit must be at least 1"),
        ("--prompts absent.jsonl", "there is no file absent.jsonl"),
        ("--output absent/report.json", "there is no directory absent"),
        ("--plot absent/report.png", "there is no directory absent"),
        ("--plot report.txt", "it must end in .png, .svg, .pdf"),
        ("--batch 0", "batch must be at least 1"),
        ("--batch 1.5", "--batch takes whole numbers"),
        ("--temperature hot", "--temperature takes numbers"),
        ("--temperature=-1", "temperature must be at least 0"),
        ("--context 0", "context must be at least 1"),
        ("--context 400", "the prompt is too long"),
        ("--prompt-lookup 0", "prompt_lookup must be at least 1"),
        ("--draft-model ./absent", "there is no base at"),
        ("--resume", "give output too"),
    ],
)
def test_bad_bench(options: str, named: str, saved: Path, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one\n")
    given = [] if "--prompts" in options else ["--prompts", file]
    fails(capsys, "bench", "--model", saved, *given, *options.split(), named=named)


def test_prompts_with_a_wrong_field(saved: Path, tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    fails(capsys, "bench", "--model", saved, "--prompts", file, named="wrong.jsonl, line 2")


def test_models_that_cannot_be_loaded(saved: Path, tmp_path: Path, capsys: Captured) -> None:
    def attempt(model: Path, *more: object, named: str) -> None:
        fails(capsys, "generate", "--prompt", "a", "--model", model, *more, named=named)

    attempt(tmp_path / "absent", named="there is no model at")
    attempt(saved.parent / "base", named="has no foretell.json")
    attempt(saved, "--base", save_base(tmp_path / "other", seed=5), named="was trained for")
    attempt(saved, "--base", tmp_path / "absent", named="there is no base at")
    for name, content in (("foretell.safetensors", b"\x00" * 40), ("foretell.json", b'{"format": 1,')):
        copy = tmp_path / name / "adapter"
        shutil.copytree(saved.parent, copy.parent)
        (copy / name).write_bytes(content)
        attempt(copy, named="is damaged")
    (copy / "foretell.json").write_text('{"format": 1}')
    attempt(copy, named="lacks base")


def test_an_unsupported_base(saved: Path, tmp_path: Path, capsys: Captured) -> None:
    config = hf.MambaConfig(vocab_size=97, hidden_size=16, state_size=4, num_hidden_layers=2)
    hf.MambaForCausalLM(config).save_pretrained(tmp_path / "base")
    shutil.copytree(saved, tmp_path / "adapter")
    path = tmp_path / "adapter" / "foretell.json"
    description = json.loads(path.read_text())
    from foretell.base import load_base

    description["base_fingerprint"] = load_base(str(tmp_path / "base")).fingerprint()
    path.write_text(json.dumps(description))
    capsys.readouterr()
    fails(
        capsys, "generate", "--prompt", "a", "--model", tmp_path / "adapter", named="MambaForCausalLM is not supported"
    )


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from foretell.commands import render

    now = 100.0
    monkeypatch.setattr(render.time, "monotonic", lambda: now)
    with render.progress_bar() as on_progress:
        for now, done in ((101.0, 1), (131.0, 2), (140.0, 3), (165.0, 4)):  # noqa: B007
            on_progress(done, 9, "linear [8]")
    assert capsys.readouterr().err.splitlines() == ["2/9 measuring linear [8]", "4/9 measuring linear [8]"]

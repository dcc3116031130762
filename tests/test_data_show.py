"""`foretell data show`: the sequences that training draws, marked and counted; and `--data` with several sources."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foretell.cli import main
from foretell.commands.data import _print_sequence
from foretell.config import TrainConfig
from foretell.training import preview
from foretell.training.batches import Batches, split
from foretell.training.data import load_corpus

from .saved import character_tokenizer, save_base
from .test_data_records import PLAIN


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shown")
    save_base(place / "base")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(place / "base")
    (place / "a.jsonl").write_text('{"question": "how?", "answer": "so it is."}\n{"txt": 1}\n')
    (place / "b.txt").write_text("\n<|endoftext|>\n".join(f"document {n}" for n in range(30)))
    return place


def show(place: Path, *arguments: str) -> list[str]:
    return ["data", "show", "--base", str(place / "base"), *arguments]


def test_it_marks_what_is_learnt_and_where_blocks_hang(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(show(place, str(place / "a.jsonl"), "--anchors", "99")) == 0
    out = capsys.readouterr().out
    assert "-- step 1, sequence 1: 19 tokens, 10 trained, 9 anchors" in out
    assert "u:how?\na:^[[s^o^ ^i^t^ ^i^s^.\n]]" in out
    assert "2 records, 1 sequences, 19 tokens (10 trained); 1 bad records skipped" in out and "line 2: found txt" in out


def test_json_has_the_sequences_of_the_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{place / 'a.jsonl'}:1", f"{place / 'b.txt'}:3", "--batch-size", "2", "--records", "3", "--seed", "4"]
    assert main([*show(place, *arguments), "--anchors", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = PLAIN
    corpus = load_corpus(arguments[:2], tokenizer, TrainConfig().seq_len)
    batches = Batches(split(corpus.examples, 4)[0], 2, 2, 4)
    assert [(s["step"], s["row"]) for s in shown["sequences"]] == [(1, 1), (1, 2), (2, 1)]
    for sequence in shown["sequences"]:
        batch, row = batches.batch(sequence["step"] - 1), sequence["row"] - 1
        assert sequence["ids"] == batch.ids[row][batch.real[row]].tolist()
        assert sequence["anchors"] == batch.anchors[row][batch.anchor_valid[row]].tolist()
        assert "".join(stretch["text"] for stretch in sequence["stretches"]) == tokenizer.decode(sequence["ids"])
    assert shown["data"] == "a.jsonl:1 b.txt:3" and shown["fingerprint"] == corpus.fingerprint
    assert [source["share"] for source in shown["sources"]] == [0.2581, 0.7419] and shown["report"]["bad"] == 1


def test_packs_show_their_documents_and_a_terminal_gets_colours(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(show(place, str(place / "b.txt"), "--packing", "--seq-len", "32", "--records", "1")) == 0
    out = capsys.readouterr().out
    assert ", 2 documents" in out and out.count("-- next document") == 1
    found = preview(place / "a.jsonl", str(place / "base"), TrainConfig(anchors=2), records=1)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80, no_color=False)
    _print_sequence(console, found.shown[0])
    coloured = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[32m" in coloured and "\x1b[2m" in coloured and "[[" not in coloured


def test_what_is_wrong_is_a_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(show(place, str(place / "missing.jsonl"))) == 2
    assert "missing.jsonl does not exist" in capsys.readouterr().err
    assert main(["data", "show", str(place / "b.txt"), "--base", str(place)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_training_takes_several_sources(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"masks": 2, "rank": 2, "steps": 1, "batch-size": 2, "seq-len": 32, "anchors": 2, "device": "cpu"}
    sizes = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    where = ["--base", str(place / "base"), "--output", str(tmp_path / "out")]
    data = ["--data", f"{place / 'a.jsonl'}:2", str(place / "b.txt"), "--data", f"{place / 'b.txt'}:0.5"]
    assert main(["train", *where, *data, *sizes, "--json"]) == 0
    shown = capsys.readouterr()
    assert sorted(json.loads(shown.out)["data"].split()) == ["a.jsonl:2", "b.txt", "b.txt:0.5"]
    assert "a.jsonl, line 2: found txt" in shown.err.replace("\n", "")
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["line"] == 2


def test_words_keep_the_spaces_in_front_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoded by itself a token of a sentencepiece tokenizer loses its space, and the text would look damaged."""
    words = ["<eos>", "▁one", "▁two", "▁three", "▁four"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    save_base(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "base")
    (tmp_path / "d.txt").write_text("one two three four")
    assert main(show(tmp_path, str(tmp_path / "d.txt"), "--anchors", "99")) == 0
    assert "one^ two^ three" in capsys.readouterr().out

"""Every form of record from every kind of file; what is trained; what is bad is named and counted, the rest goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from foretell.errors import ForetellError
from foretell.training.data import Corpus, Example, load_corpus
from foretell.training.records import BadRecord, parse_record
from foretell.training.sources import DOCUMENT_MOST, Source, _documents
from foretell.training.tokenise import PIECE, conversation_example

from .saved import character_tokenizer

PROMPT = "{% if add_generation_prompt %}a:{% endif %}"
PLAIN = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}a:{% generation %}{{ m['content'] }}\n{% endgeneration %}"
    "{% else %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endif %}{% endfor %}" + PROMPT
)
# Earlier answers are rendered without what the last one gets in front, as templates of thinking models do.
THINKING = (
    "{% for m in messages %}{{ m['role'][0] }}:"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}\n{% endfor %}" + PROMPT
)
RAISING = (
    "{% for m in messages %}{% if m['content'] == 'hi' %}{{ raise_exception('no greetings') }}{% endif %}x{% endfor %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes."},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no."},
]
ASK, TELL = "how?", "so."


def tokenizer_with(template: str | None = PLAIN) -> Any:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def load(source: Any, seq_len: int = 64, template: str | None = PLAIN) -> Corpus:
    return load_corpus(source, tokenizer_with(template), seq_len)


def text_of(example: Example) -> str:
    return str(character_tokenizer().decode(example.ids.tolist()))


def trained_of(example: Example) -> str:
    return text_of(Example(example.ids[example.trained], example.trained[example.trained]))


PAIR = ("u:how?\na:so.\n", "so.\n")
IDS = character_tokenizer()(ASK + TELL)["input_ids"]


@pytest.mark.parametrize(
    ("record", "template", "expected"),
    [
        ({"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": TELL}]}, PLAIN, PAIR),
        ({"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": TELL}]}, PLAIN, PAIR),
        (
            {"conversations": [{"from": "system", "value": "be"}, {"from": "human", "value": ASK},
                               {"from": "gpt", "value": TELL}]},
            PLAIN,
            ("s:be\nu:how?\na:so.\n", "so.\n"),
        ),
        ({"instruction": ASK, "input": "", "output": TELL, "text": "all of it"}, PLAIN, PAIR),
        ({"instruction": "add", "input": "1 2", "output": "3!"}, PLAIN, ("u:add\n\n1 2\na:3!\n", "3!\n")),
        ({"system_prompt": "be", "question": ASK, "response": TELL}, PLAIN, ("s:be\nu:how?\na:so.\n", "so.\n")),
        ({"question": ASK, "answer": TELL}, PLAIN, PAIR),
        ({"prompt": ASK, "response": TELL, "messages": None}, PLAIN, PAIR),
        (
            {"prompt": [{"role": "user", "content": ASK}], "completion": [{"role": "assistant", "content": TELL}]},
            PLAIN,
            PAIR,
        ),
        ({"prompt": ASK, "completion": TELL}, PLAIN, ("how?so.<eos>", "so.<eos>")),
        ({"question": ASK, "answer": TELL}, None, ("how?\nso.<eos>", "so.<eos>")),
        ({"text": ASK}, PLAIN, ("how?<eos>", "how?<eos>")),
        ({"input_ids": IDS}, None, (ASK + TELL, ASK + TELL)),
        ({"input_ids": IDS, "labels": [-100] * 4 + IDS[4:]}, None, (ASK + TELL, TELL)),
        ({"input_ids": IDS, "loss_mask": [0] * 4 + [1] * 3}, None, (ASK + TELL, TELL)),
    ],
)  # fmt: skip
def test_every_form_is_detected(tmp_path: Path, record: dict, template: str | None, expected: tuple[str, str]) -> None:
    (example,) = load(write(tmp_path / "d.jsonl", record), template=template).examples[:]
    assert (text_of(example), trained_of(example)) == expected


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"txt": "hello"}, 'found txt; a record must be {"messages"'),
        ({"text": 5}, "found text; a record must be"),
        ({"text": " "}, "text is empty"),
        ([1, 2], "found list"),
        ({"messages": []}, "found messages"),
        ({"messages": [{"role": "user"}]}, 'needs "role" and "content"'),
        ({"messages": TALK[:1]}, "has no answer"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "has no answer"),
        ({"instruction": ASK, "output": ""}, 'has no answer: "output" is empty'),
        ({"instruction": ASK}, 'has "instruction" but no answer'),
        ({"question": 3, "answer": TELL}, "must be texts"),
        ({"input_ids": [1, "a"]}, "must be a list of token ids"),
        ({"input_ids": [1, 2], "labels": [1]}, '"labels" must hold one number for each of the 2'),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "must repeat the input_ids, unshifted"),
    ],
)
def test_why_a_record_is_bad(record: Any, complaint: str) -> None:
    with pytest.raises(BadRecord, match=complaint.replace("{", r"\{")):
        parse_record(record)


def test_all_file_formats_hold_the_same_records(tmp_path: Path) -> None:
    records = [{"question": f"q{n}", "answer": f"a{n}."} for n in range(5)]
    write(tmp_path / "d.jsonl", *records)
    (tmp_path / "d.json").write_text(json.dumps(records, indent=1))
    write(tmp_path / "lines.json", *records)
    mixed = [{**record, "messages": None} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(mixed), tmp_path / "d.parquet")
    found = {name: load(tmp_path / name) for name in ("d.jsonl", "d.json", "lines.json", "d.parquet")}
    assert {name: corpus.report.bad for name, corpus in found.items()} == dict.fromkeys(found, 0)
    assert len({corpus.fingerprint for corpus in found.values()}) == 1
    assert trained_of(found["d.parquet"].examples[4]) == "a4.\n"


def test_directories_are_read_in_order_and_text_files_hold_several_documents(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "hidden.txt", "hidden")
    write(tmp_path / "b" / "code.py", "x = 1", "", "y = 2")
    write(tmp_path / "a.txt", "one", "<|endoftext|>", "two", "", "three", "<|endoftext|>", "")
    write(tmp_path / "c.jsonl", {"text": "four"})
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    found = [(str(place).removeprefix(f"{tmp_path}/"), record) for place, record in Source(str(tmp_path)).records()]
    assert found == [
        ("a.txt, line 1", "one"), ("a.txt, line 3", "two\n\nthree"), ("b/code.py, line 1", "x = 1\n\ny = 2"),
        ("c.jsonl, line 1", "four"),
    ]  # fmt: skip


def test_a_text_file_is_never_held_whole() -> None:
    class Endless:
        """Lines of a megabyte without end; whoever gathers more than a document of them fails."""

        def __init__(self) -> None:
            self.given = 0

        def __iter__(self) -> Any:
            while self.given < DOCUMENT_MOST + (3 << 20):
                self.given += 1 << 20
                yield b"a" * ((1 << 20) - 1) + b"\n"
            raise AssertionError("held whole")

    _, document = next(_documents(Path("big.txt"), Endless()))  # type: ignore[arg-type]
    assert isinstance(document, str) and len(document) == DOCUMENT_MOST - 1


def test_names_and_weights(tmp_path: Path) -> None:
    odd = tmp_path / "run:2"
    odd.mkdir()
    cases = {
        "a.jsonl": ("a.jsonl", None),
        "a.jsonl:2": ("a.jsonl", 2.0),
        "owner/name:main": ("owner/name:main", None),
        "owner/name:main:0.5": ("owner/name:main", 0.5),
        "C:\\data\\a.jsonl": ("C:\\data\\a.jsonl", None),
        "C:\\data\\a.jsonl:3": ("C:\\data\\a.jsonl", 3.0),
        str(odd): (str(odd), None),
        f"{odd}:3": (str(odd), 3.0),
    }
    for given, (name, weight) in cases.items():
        assert Source.parse(given) == Source(name, weight), given


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ForetellError, match="neither a file nor a Hub data set"):
        load("no-such-data-set-of-foretell")
    rows = [{"question": "q", "answer": "yes."}, {"question": "q", "answer": None}]

    def load_dataset(name: str, configuration: str | None, split: str) -> Any:
        assert (name, configuration, split) == ("owner/name", "main", "train")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report = load("owner/name:main:2").report
    assert (report.records, report.examples) == (2, 1)
    assert report.first_bad[0].startswith('owner/name:main, row 2: has "question" but no answer')


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_answers_are_trained(template: str) -> None:
    (example,), lost = conversation_example(TALK, tokenizer_with(template), 99)
    assert (text_of(example), trained_of(example), lost) == ("u:hi\na:yes.\nu:more\na:no.\n", "yes.\nno.\n", 0)


def test_answers_are_found_where_a_template_writes_earlier_ones_differently() -> None:
    (example,), _ = conversation_example(TALK, tokenizer_with(THINKING), 99)
    assert trained_of(example) == "yes.<think></think>no.\n"


def test_texts_end_with_eos_and_long_ones_are_split(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "d.jsonl", {"text": "abcdefghij"}, {"text": "xyz"}), 8)
    assert [text_of(example) for example in corpus.examples] == ["abcdef", "ghij<eos>", "xyz<eos>"]
    assert all(example.trained.all() for example in corpus.examples)
    report = corpus.report
    assert (report.records, report.split, report.truncated, report.tokens) == (2, 1, 0, 15)


def test_truncation_is_reported(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl", {"messages": TALK}, {"messages": TALK[:2]}, {"prompt": "p" * 20, "completion": "no."}
    )
    corpus = load(path, 12)
    assert [text_of(example) for example in corpus.examples] == ["u:hi\na:yes.\n"] * 2
    report = corpus.report
    assert (report.truncated, report.lost, report.bad) == (1, 13, 1)
    assert "1 records truncated, 13 tokens lost; 1 bad records skipped" in str(report)
    assert "line 3: no answer within the first 12 tokens; give more --seq-len" in str(report)


def test_bad_records_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    lines = [
        {"text": "good"}, '{"text": "cut off"', b'{"text": "bad \xff"}', {"txt": "x"}, {"messages": TALK},
        {"messages": TALK[:1]}, {"input_ids": [5, 6, 7000]}, {"text": "a"}, {"question": "other", "answer": "fine"},
    ]  # fmt: skip
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
    )
    corpus = load(path, template=RAISING)
    corpus.write_skipped(tmp_path / "skipped.jsonl")
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    expected = {
        2: "not JSON", 3: "not UTF-8 text", 4: "found txt", 5: "chat template refuses the conversation (no greetings",
        6: "has no answer", 7: "token id 7000 is not one of the base's 97", 8: "nothing to train on",
        9: "nothing to train on",
    }  # fmt: skip
    assert {entry["line"]: entry["file"] for entry in skipped} == dict.fromkeys(expected, str(path))
    assert all(expected[entry["line"]] in entry["reason"] for entry in skipped)
    assert (corpus.report.records, corpus.report.examples, corpus.report.bad) == (9, 1, 8)
    shown = str(corpus.report).splitlines()
    assert "8 bad records skipped" in shown[0] and "d.jsonl, line 2: not JSON" in shown[1] and "and 5 more" in shown[4]


def test_a_bad_document_or_table_leaves_the_rest_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n<|endoftext|>\nso far\nbad \xff\n<|endoftext|>\nfine again\n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not a table")
    (tmp_path / "c.json").write_text('[{"text": "x"},\n oops]')
    (tmp_path / "d.txt").touch()
    report = load(tmp_path).report
    assert (report.examples, report.bad) == (2, 4)
    assert (
        "a.txt, line 4: not UTF-8" in report.first_bad[0]
        and "b.parquet, row 1: the file is damaged" in report.first_bad[1]
    )
    assert "c.json, line 2: not JSON" in report.first_bad[2] and "and 1 more" in str(report)


def test_nothing_to_train_on_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    write(tmp_path / "wrong.jsonl", {"a": 1}, {"b": 2})
    write(tmp_path / "talk.jsonl", {"messages": TALK})
    cases = {
        "empty.jsonl": "its one record is bad: .*empty.jsonl, line 1: the file is empty",
        "blank.txt": "holds no text; give records like",
        "folder": "has no .jsonl",
        "table.csv": "is not a .jsonl",
        "missing.txt": "does not exist",
        "wrong.jsonl": "all 2 records are bad, the first: .*wrong.jsonl, line 1: found a; a record must be",
    }
    for source, complaint in cases.items():
        with pytest.raises(ForetellError, match=complaint):
            load(tmp_path / source)
    with pytest.raises(ForetellError, match=r"refuses the conversation \(no greetings"):
        load(tmp_path / "talk.jsonl", template=RAISING)
    with pytest.raises(ForetellError, match="the base has no chat template"):
        load(tmp_path / "talk.jsonl", template=None)
    with pytest.raises(ForetellError, match="no tokenizer"):
        load_corpus(tmp_path / "talk.jsonl", None, 32)


@pytest.mark.parametrize("form", ["text", "messages", "turns"])
def test_a_record_of_a_million_tokens(tmp_path: Path, form: str) -> None:
    """It must take seconds, so nothing in it may be done once per turn or tokenised in one piece."""
    size = 1_000_000
    turns = [{"role": role, "content": "word " * 10} for _ in range(size // 110) for role in ("user", "assistant")]
    record = {
        "text": {"text": "x" * size},
        "messages": {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * (size // 5)}]
        },
        "turns": {"messages": turns},
    }[form]
    seen: list[int] = []
    tokenizer = tokenizer_with()
    plain = type(tokenizer).__call__

    class Watched(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **kwargs: Any) -> Any:
            seen.append(len(text))
            return plain(self, text, **kwargs)

    tokenizer.__class__ = Watched
    report = load_corpus(write(tmp_path / "d.jsonl", record, {"text": "short"}), tokenizer, 512).report
    assert max(seen) <= PIECE and sum(seen) < size * 1.1, "every character is tokenised once"
    if form == "text":
        assert (report.split, report.lost, report.tokens) == (1, 0, size + 1 + 6)
    else:
        assert (report.truncated, report.examples) == (1, 2) and 0.9 * size < report.lost < size * 1.1


def test_tokens_are_kept_and_found_again_until_something_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "d.jsonl", {"text": "one"}, {"text": "two"}, {"txt": "bad"})
    first = load(path)
    made = list((tmp_path / "cache" / "foretell" / "data").iterdir())
    assert len(made) == 1 and str(load(path).report) == str(first.report)
    assert load(path).fingerprint == first.fingerprint
    assert len(list(made[0].parent.iterdir())) == 1, "neither made again nor anything left over"
    load(path, 32)
    load(path, template=MARKED)
    write(path, {"text": "one"}, {"text": "two"}, {"text": "three"})
    assert load(path).report.bad == 0 and len(list(made[0].parent.iterdir())) == 4
    (made[0] / "about.json").write_text("{")
    write(path, {"text": "one"}, {"text": "two"}, {"txt": "bad"})
    assert load(path).fingerprint == first.fingerprint


def test_a_full_disk_or_an_interrupt_while_reading_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "d.jsonl", *({"text": f"text {n}"} for n in range(9)))
    with monkeypatch.context() as patch:

        def full(*args: Any) -> Any:
            raise OSError(28, "No space left on device")

        patch.setattr("foretell.training.store.os.replace", full)
        with pytest.raises(ForetellError, match=r"No space left.*free some space there, or set XDG_CACHE_HOME"):
            load(path)
    monkeypatch.setattr("foretell.training.data.PROGRESS_SECONDS", -1)

    def press(report: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_corpus(path, tokenizer_with(), 64, on_progress=press)
    assert list((tmp_path / "cache" / "foretell" / "data").iterdir()) == []
    (tmp_path / "cache" / "foretell" / "data").rmdir()
    (tmp_path / "cache" / "foretell" / "data").write_text("a file is in the way")
    with pytest.raises(ForetellError, match="tokenised data can't be kept in"):
        load(path)

"""Reading text and conversations, answer masks, and what every batch holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foretell.errors import ForetellError
from foretell.training.batches import Batches, choose_anchors, generator, split
from foretell.training.data import Example, conversation_example, load_corpus
from foretell.training.sources import read_records

from .saved import character_tokenizer

PROMPT = "{% if add_generation_prompt %}a:{% endif %}"
PLAIN = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}a:{% generation %}{{ m['content'] }}\n{% endgeneration %}"
    "{% else %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endif %}{% endfor %}" + PROMPT
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes."},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no."},
]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def text_of(example: Example) -> str:
    return str(character_tokenizer().decode(example.ids.tolist()))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"txt": "hello"}', r'line 2: found txt; a record must be \{"text"'),
        ('{"text": "hello"', "line 2: not JSON"),
        ('{"text": 5}', "line 2: found text; a record must be"),
        ("[1, 2]", "line 2: found list"),
        ('{"messages": []}', "line 2: found messages"),
        ('{"messages": [{"role": "user"}]}', 'line 2: a message needs "role" and "content"'),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path / "d.jsonl", {"text": "good"}, line)
    with pytest.raises(ForetellError, match=f"d.jsonl, {complaint}"):
        list(read_records(path))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(ForetellError, match=r"d\.txt, line 2: not UTF-8"):
        list(read_records(tmp_path / "d.txt"))


def test_empty_missing_and_foreign_sources_are_refused(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    for source, complaint in {
        "empty.jsonl": "holds no text",
        "folder": "has no .jsonl",
        "table.csv": "is not a .jsonl",
        "missing.txt": "does not exist",
    }.items():
        with pytest.raises(ForetellError, match=complaint):
            load_corpus(tmp_path / source, tokenizer, 32)
    write(tmp_path / "short.jsonl", {"text": "a"})
    with pytest.raises(ForetellError, match="no record with anything to train on"):
        load_corpus(tmp_path / "short.jsonl", tokenizer, 32)


def test_a_data_set_that_is_nowhere_is_a_sentence() -> None:
    with pytest.raises(ForetellError, match="neither a file nor a Hub data set"):
        list(read_records("no-such-data-set-of-foretell"))


def test_directories_are_read_in_order_and_text_files_hold_several_documents(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "code.py", "x = 1", "", "y = 2")
    write(tmp_path / "a.txt", "one", "<|endoftext|>", "two", "", "three", "<|endoftext|>", "")
    write(tmp_path / "c.jsonl", {"text": "four"})
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert list(read_records(tmp_path)) == ["one", "two\n\nthree", "x = 1\n\ny = 2", "four"]


def test_texts_end_with_eos_and_long_ones_are_split(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    corpus = load_corpus(write(tmp_path / "d.jsonl", {"text": "abcdefghij"}, {"text": "xyz"}), tokenizer, 8)
    assert [text_of(example) for example in corpus.examples] == ["abcdefgh", "ij<eos>", "xyz<eos>"]
    assert all(example.trained.all() for example in corpus.examples)
    assert (corpus.report.records, corpus.report.cut, corpus.report.tokens) == (2, 1, 15)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_answers_are_trained(template: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    example = conversation_example(TALK, tokenizer)
    assert text_of(example) == "u:hi\na:yes.\nu:more\na:no.\n"
    trained = "".join(c for c, kept in zip(text_of(example), example.trained.tolist(), strict=True) if kept)
    assert trained == "yes.\nno.\n"


def test_conversations_are_cut_and_the_empty_ones_counted(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    path = write(tmp_path / "d.jsonl", {"messages": TALK}, {"messages": TALK[:1]})
    with pytest.raises(ForetellError, match="no chat template"):
        load_corpus(path, tokenizer, 12)
    tokenizer.chat_template = PLAIN
    corpus = load_corpus(path, tokenizer, 12)
    assert [text_of(example) for example in corpus.examples] == ["u:hi\na:yes.\n"]
    assert (corpus.report.cut, corpus.report.skipped) == (1, 1)


def test_a_template_that_refuses_is_a_sentence() -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ForetellError, match=r"refuses a conversation \(roles must alternate"):
        conversation_example(TALK, tokenizer)


def test_anchors_are_distinct_and_have_a_label() -> None:
    trained = torch.tensor([[False, False, True, True, True, False], [False, False, False, True, True, False]])
    for seed in range(20):
        chosen, valid = choose_anchors(trained, 2, generator(seed))
        # Position 1 is the last prompt token of row 0; x_{i+1} and x_{i+2} must both be trained.
        assert chosen[0].tolist() == [1, 2] and valid[0].all()
        assert chosen[1].tolist() == [2, 2] and valid[1].sum() == 1
    long = torch.ones(1, 50, dtype=torch.bool)
    drawn = {tuple(choose_anchors(long, 4, generator(seed))[0][0].tolist()) for seed in range(20)}
    assert len(drawn) > 10, "anchors must differ from step to step"
    assert all(len(set(anchors)) == 4 and max(anchors) <= 47 for anchors in drawn)


def examples(count: int) -> list[Example]:
    return [
        Example(torch.full((5 + n % 7,), n, dtype=torch.int32), torch.ones(5 + n % 7, dtype=torch.bool))
        for n in range(count)
    ]


def test_batches_depend_on_seed_and_number_alone_and_cover_everything() -> None:
    pool = examples(10)
    batches = Batches(pool, 4, 3, seed=1)
    seen = [row[0].item() for number in range(3) for row in batches.batch(number).ids]
    assert set(seen) == set(range(10)) and len(seen) == 12
    later, fresh = batches.batch(7), Batches(pool, 4, 3, seed=1).batch(7)
    assert all(torch.equal(a, b) for a, b in zip(later, fresh, strict=True))
    other = Batches(pool, 4, 3, seed=2).batch(7)
    assert later.ids.shape != other.ids.shape or not torch.equal(later.ids, other.ids)


def test_padding_is_neither_real_nor_trained() -> None:
    batch = Batches(examples(9), 9, 3, seed=0).batch(0)
    lengths = torch.tensor([5 + int(row[0]) % 7 for row in batch.ids])
    assert torch.equal(batch.real.sum(1), lengths) and torch.equal(batch.trained, batch.real)
    assert batch.ids.shape[1] == lengths.max()
    assert (batch.anchors + 2 < lengths[:, None]).all()


def test_held_out_examples_are_not_trained_on() -> None:
    train, held = split(examples(40), seed=0)
    assert (len(train), len(held)) == (38, 2)
    assert {int(e.ids[0]) for e in train} | {int(e.ids[0]) for e in held} == set(range(40))
    assert split(examples(19), seed=0)[1] == []
    assert len(split(examples(5000), seed=0)[1]) == 64

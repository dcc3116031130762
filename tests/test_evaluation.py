"""Prompt sets, exact answers, and text as it comes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from foretell.decoding.text import TextStream
from foretell.errors import ForetellError
from foretell.evaluation.answers import answer_in, exact_answers
from foretell.evaluation.prompts import load_prompts, read_records, to_context

from .saved import character_tokenizer


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


def test_prompts_of_one_length() -> None:
    def fitted(length: int, bos: int | None = None) -> list[list[int]]:
        prompts = [torch.tensor([ids]) for ids in ([9, 1, 2], [9, 3], [9, 4, 5, 6])]
        return [ids[0].tolist() for ids in to_context(prompts, length, bos)]

    assert fitted(2) == [[1, 2], [9, 3], [5, 6]]
    assert fitted(5) == [[5, 6, 9, 1, 2], [9, 1, 2, 9, 3], [3, 9, 4, 5, 6]]
    assert fitted(12)[1] == [2, 9, 3, 9, 4, 5, 6, 9, 1, 2, 9, 3]
    assert fitted(4, bos=9) == [[9, 6, 1, 2], [9, 1, 2, 3], [9, 4, 5, 6]]
    assert fitted(1, bos=9) == [[9]] * 3
    with pytest.raises(ForetellError, match="no text"):
        to_context([torch.tensor([[9]])], 3, bos=9)


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

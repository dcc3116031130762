"""What leaves the recipe: the base in bfloat16, held-out prompts, and training text for the adapter."""

import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import problems
import stdlib_code
import tokenizer
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LARGEST_BASE = 16_000_000  # bytes; it ships inside the package
PROMPT_SEED = 11
ADAPTER_SEED = 21  # other problems than those of the base's training, from the same training split


def export_base(checkpoint: Path, tokenizer_folder: Path, out: Path) -> None:
    """Write the base with weights rounded to bfloat16, with its tokenizer.

    The configuration says bfloat16 too; loading with `dtype=torch.float32` gives exactly the rounded values.
    """
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    tok = tokenizer.load(tokenizer_folder)
    model.generation_config.update(
        do_sample=False, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id, pad_token_id=tok.pad_token_id
    )
    model.save_pretrained(out)
    tok.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner may read
    size = sum(file.stat().st_size for file in out.iterdir())
    if size > LARGEST_BASE:
        raise ValueError(f"the base takes {size} bytes, more than {LARGEST_BASE}")
    print(f"base: {size} bytes in {out}")


def write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count} records in {path}")


def export_prompts(out: Path) -> None:
    """Held-out prompts: `problems.jsonl` with their answers, and `code.jsonl`."""
    asked = problems.held_out_problems(200, PROMPT_SEED)
    write_lines(out / "problems.jsonl", ({"prompt": p.prompt, "answer": str(p.answer)} for p in asked))
    prompts = stdlib_code.held_out_functions(60, PROMPT_SEED)
    write_lines(out / "code.jsonl", ({"prompt": prompt} for prompt in prompts))


def chunks(text: str, tok: PreTrainedTokenizerFast, most: int = 400) -> Iterator[str]:
    """Consecutive pieces of at most about `most` tokens, cut before an unindented line where the piece has one."""
    lines = text.splitlines(keepends=True)
    sizes = [len(ids) for ids in tok(lines, add_special_tokens=False)["input_ids"]]
    start = 0
    while start < len(lines):
        end, total = start, 0
        while end < len(lines) and (end == start or total + sizes[end] <= most):
            total += sizes[end]
            end += 1
        if end < len(lines):
            tops = [i for i in range(start + (end - start) // 2, end) if lines[i][0] not in " \t\n#)]}"]
            end = tops[-1] if tops and tops[-1] > start else end
        yield "".join(lines[start:end])
        start = end


def export_text(tokenizer_folder: Path, folder: Path, plain_problems: int = 1000, plain_code: int = 1500) -> None:
    """`code.jsonl`, all training code in pieces; in `adapter_data` the plain part of the adapter's training text."""
    tok = tokenizer.load(tokenizer_folder)
    pieces = [piece for text in stdlib_code.training_documents() for piece in chunks(text, tok) if len(piece) > 200]
    random.Random(ADAPTER_SEED).shuffle(pieces)
    write_lines(folder / "code.jsonl", ({"text": piece} for piece in pieces))
    out = folder / "adapter_data"
    write_lines(out / "code.jsonl", ({"text": piece} for piece in pieces[:plain_code]))
    fresh = itertools.islice(problems.training_problems(ADAPTER_SEED), plain_problems)
    write_lines(out / "problems.jsonl", ({"text": problem.text} for problem in fresh))

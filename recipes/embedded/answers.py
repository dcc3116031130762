"""The base's own text, for the adapter to learn: an adapter must foresee what this base says, not what people wrote.

Prompts are taken from the training split; each record is a prompt with the base's continuation. A part is sampled, so
that the adapter also knows the neighbourhood of the greedy text.
"""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import problems
import tokenizer
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT_SEED = 31  # other problems than those of the base's and of the adapter's plain text
BATCH = 96
NEW_TOKENS = {"problems": 170, "code": 160}
SAMPLED = 0.25  # of the batches, at temperature 0.8


def code_prompts(adapter_code: Path, tok: PreTrainedTokenizerFast) -> Iterator[str]:
    """Beginnings of training code, 20 to 140 tokens, ending before a line end as the held-out prompts do."""
    with adapter_code.open(encoding="utf-8") as file:
        for index, line in enumerate(file):
            text = json.loads(line)["text"]
            size = 20 + index * 37 % 120
            lines = text.splitlines(keepends=True)
            sizes = itertools.accumulate(len(ids) for ids in tok(lines, add_special_tokens=False)["input_ids"])
            count = sum(total <= size for total in sizes)
            if 0 < count < len(lines):
                yield "".join(lines[:count]).rstrip("\n")


@torch.inference_mode()
def continuations(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, prompts: list[str], new_tokens: int, sampled: bool
) -> list[str]:
    """Prompts with the base's continuation."""
    inputs = tok(prompts, return_tensors="pt", padding=True, padding_side="left")
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0} if sampled else {"do_sample": False}
    whole = model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=tok.pad_token_id, **settings)
    new = whole[:, inputs["input_ids"].shape[1] :]
    return [prompt + tok.decode(ids, skip_special_tokens=True) for prompt, ids in zip(prompts, new, strict=True)]


def write_answers(base: Path, adapter_data: Path, out: Path, count: int = 4000) -> None:
    """`problems.jsonl` and `code.jsonl` in `out`, `{"text": ...}` per line; by length, so that padding is small."""
    tok = tokenizer.load(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    asked = {
        "problems": [p.prompt for p in itertools.islice(problems.training_problems(PROMPT_SEED), count)],
        "code": list(itertools.islice(code_prompts(adapter_data / "code.jsonl", tok), count)),
    }
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(PROMPT_SEED)
    for name, prompts in asked.items():
        prompts = sorted(prompts, key=len)
        start, part = time.monotonic(), out / f"{name}.part"
        with part.open("w", encoding="utf-8") as file:
            for index in range(0, len(prompts), BATCH):
                sampled = index // BATCH % round(1 / SAMPLED) == 0
                for text in continuations(model, tok, prompts[index : index + BATCH], NEW_TOKENS[name], sampled):
                    file.write(json.dumps({"text": text}) + "\n")
                print(f"{name}: {index + BATCH} of {len(prompts)}, {time.monotonic() - start:.0f} s", flush=True)
        part.rename(out / f"{name}.jsonl")

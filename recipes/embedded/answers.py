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
from transformers import PreTrainedTokenizerFast

from foretell.base import load_base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM

PROMPT_SEED = 31  # other problems than those of the base's and of the adapter's plain text
COUNTS = {"problems": 3500, "code": 3500}
NEW_TOKENS = {"problems": 170, "code": 160}
BATCH = 96
ONE_SAMPLED_IN = 4  # batches; the others are greedy


def code_prompts(code: Path, tok: PreTrainedTokenizerFast) -> Iterator[str]:
    """Beginnings of training code, 20 to 140 tokens, ending before a line end as the held-out prompts do."""
    with code.open(encoding="utf-8") as file:
        for index, line in enumerate(file):
            text = json.loads(line)["text"]
            size = 20 + index * 37 % 120
            lines = text.splitlines(keepends=True)
            sizes = itertools.accumulate(len(ids) for ids in tok(lines, add_special_tokens=False)["input_ids"])
            count = sum(total <= size for total in sizes)
            if 0 < count < len(lines):
                yield "".join(lines[:count]).rstrip("\n")


def write_answers(base: Path, adapter_data: Path, counts: dict[str, int] = COUNTS) -> None:
    """`answers_problems.jsonl` and `answers_code.jsonl` in `adapter_data`, `{"text": ...}` per line."""
    tok = tokenizer.load(base)
    loaded = load_base(str(base))
    loaded.pack(lambda: load_base(str(base)).lm)
    model = MTPForCausalLM(loaded, MTPConfig(masks=1, rank=1), tok)  # decodes plainly: no adapter yet
    sources = {
        "problems": (problem.prompt for problem in problems.training_problems(PROMPT_SEED)),
        "code": code_prompts(adapter_data.with_name("code.jsonl"), tok),
    }
    adapter_data.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        # Neighbours of one length: short attention, little padding.
        prompts = sorted(itertools.islice(sources[name], count), key=len)
        start, part = time.monotonic(), adapter_data / f"{name}.part"
        with part.open("w", encoding="utf-8") as file:
            for first in range(0, len(prompts), BATCH):
                group = prompts[first : first + BATCH]
                temperature = 0.8 if first // BATCH % ONE_SAMPLED_IN == 0 else 0.0
                for prompt, out in zip(
                    group,
                    model.generate_batch(
                        group,
                        max_new_tokens=NEW_TOKENS[name],
                        strategy="autoregressive",
                        temperature=temperature,
                        seed=first,
                    ),
                    strict=True,
                ):
                    file.write(json.dumps({"text": prompt + out.text}) + "\n")
                print(f"{name}: {first + len(group)} of {len(prompts)}, {time.monotonic() - start:.0f} s", flush=True)
        part.rename(adapter_data / f"answers_{name}.jsonl")

"""Texts to token arrays: everything is tokenised once, before training, and kept as uint16."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import problems
import stdlib_code
import tokenizer
from transformers import PreTrainedTokenizerFast

PROBLEM_SEED = 1
VALIDATION_SEED = 2
PROBLEM_TOKENS = 9_000_000  # more than a run of an hour sees on two cores, so that no problem comes twice


def tokenizer_texts() -> Iterable[str]:
    """What the tokenizer learns from: all training code and about half as much text of problems."""
    for problem in itertools.islice(problems.training_problems(PROBLEM_SEED), 15_000):
        yield problem.text
    yield from stdlib_code.training_documents()


def tokenised(texts: Iterable[str], tok: PreTrainedTokenizerFast, limit: int | None = None) -> np.ndarray:
    """All texts, each followed by the end token, at most `limit` tokens."""
    parts: list[np.ndarray] = []
    count = 0
    texts = iter(texts)
    while (limit is None or count < limit) and (batch := list(itertools.islice(texts, 512))):
        for ids in tok(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            parts.append(np.array([*ids, tok.eos_token_id], dtype=np.uint16))
            count += len(ids) + 1
    return np.concatenate(parts)[:limit]


def prepare(folder: Path, problem_tokens: int = PROBLEM_TOKENS) -> None:
    """Write the tokenizer and the four token arrays; what exists is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "tokenizer"
    if not (home / "tokenizer.json").exists():
        tokenizer.train(tokenizer_texts()).save_pretrained(home)
    tok = tokenizer.load(home)
    sources = {
        "code_train": (stdlib_code.training_documents, None),
        "code_valid": (stdlib_code.held_out_documents, None),
        "problems_valid": (lambda: (p.text for p in problems.held_out_problems(600, VALIDATION_SEED)), None),
        "problems_train": (lambda: (p.text for p in problems.training_problems(PROBLEM_SEED)), problem_tokens),
    }
    for name, (texts, limit) in sources.items():
        path = folder / f"{name}.npy"
        if not path.exists():
            array = tokenised(texts(), tok, limit)
            np.save(path, array)
            print(f"{name}: {len(array)} tokens", flush=True)

"""Measure a base model: exact answers, validation losses, and how far greedy code falls into repetition."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pretrain
import problems
import stdlib_code
import tokenizer
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EVALUATION_SEED = 7
ANSWER = re.compile(r"^Answer: (\d+)\s*$", re.MULTILINE)


def answer_in(text: str) -> int | None:
    """The number of the first answer line, if there is one."""
    found = ANSWER.search(text)
    return int(found[1]) if found else None


def repeated_share(ids: list[int], size: int = 4) -> float:
    """The share of the n-grams that occurred before in the same output."""
    grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def complete(
    model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, prompts: list[str], new_tokens: int, batch: int = 20
) -> list[list[int]]:
    """Greedy continuations as token ids, without the end token."""
    outputs: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        inputs = tok(prompts[start : start + batch], return_tensors="pt", padding=True, padding_side="left")
        whole = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tok.pad_token_id)
        for row in whole[:, inputs["input_ids"].shape[1] :].tolist():
            outputs.append(row[: row.index(tok.eos_token_id)] if tok.eos_token_id in row else row)
    return outputs


def evaluate(model_folder: Path, data: Path, count: int = 200, functions: int = 30) -> dict[str, Any]:
    """All measurements of one model folder; `data` holds the validation arrays."""
    tok = tokenizer.load(model_folder if (model_folder / "tokenizer.json").exists() else data / "tokenizer")
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    asked = problems.held_out_problems(count, EVALUATION_SEED)
    solved = complete(model, tok, [p.prompt for p in asked], 220)
    texts = [tok.decode(ids) for ids in solved]
    right = [answer_in(text) == p.answer for text, p in zip(texts, asked, strict=True)]
    equations = [m for text in texts for m in problems.EQUATION.findall(text)]
    prompts = stdlib_code.held_out_functions(functions, EVALUATION_SEED)
    code = complete(model, tok, prompts, 128)
    repeated = [repeated_share(ids) for ids in code]
    return {
        "exact_answers": sum(right),
        "problems": count,
        "correct_equations": sum(problems.equation_holds(*m) for m in equations) / max(1, len(equations)),
        "valid_problems": pretrain.validation(model, np.load(data / "problems_valid.npy"), 48),
        "valid_code": pretrain.validation(model, np.load(data / "code_valid.npy"), 48),
        "code_repeated_4grams": float(np.mean(repeated)),
        "code_mostly_repeated": int(sum(share > 0.5 for share in repeated)),
        "functions": len(code),
        "problem_tokens": float(np.mean([len(ids) for ids in solved])),
        "problem_repeated_4grams": float(np.mean([repeated_share(ids) for ids in solved])),
        "samples": {
            "problems": [p.prompt + text for p, text in zip(asked[:4], texts, strict=False)],
            "wrong": [p.text + "\n>>>" + t for p, t, ok in zip(asked, texts, right, strict=True) if not ok][:4],
            "code": [prompt + tok.decode(ids) for prompt, ids in zip(prompts[:6], code, strict=False)],
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with a saved model")
    parser.add_argument("--data", type=Path, default=Path(".build/embedded/data"), help="tokenizer and token arrays")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--functions", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    args = parser.parse_args()
    report = evaluate(args.model, args.data, args.problems, args.functions)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    samples = report.pop("samples")
    for kind, texts in samples.items():
        for text in texts:
            print(f"--- {kind}", text, sep="\n")
    for name, value in report.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    main()

"""Eager and compiled steps side by side: seconds per token of every method in both modes, and what compiling took.

One process, the modes by turns within every round; ratios are of rounds, so that a busy minute strikes both. Writes
one JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import foretell
from foretell.checkpoint import write_text
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.measure import count, encode_prompts, run
from foretell.evaluation.methods import ADAPTIVE, AUTOREGRESSIVE, HUGGINGFACE, Method
from foretell.evaluation.prompts import load_prompts
from foretell.evaluation.report import environment

RESULT = Path(__file__).parent / "results" / "compiled.json"
SETS = ("problems", "code")
REFERENCE = "huggingface"
Times = dict[tuple[str, str], list[float]]  # seconds per token of every round, by method and mode


def measure(models: dict[str, MTPForCausalLM], name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every method in both modes on the prompts of a set."""
    eager = models["eager"]
    masks = eager.max_masks
    methods = [Method(AUTOREGRESSIVE), Method(ADAPTIVE, masks), Method("linear", min(6, masks)),
               Method("quadratic", min(3, masks))]  # fmt: skip
    ids = encode_prompts(eager, load_prompts(name, limit=args.prompts), args.max_new_tokens)
    reference = Method(HUGGINGFACE)
    runs = [(reference, REFERENCE, eager)] + [(method, mode, m) for method in methods for mode, m in models.items()]
    for method, _, model in runs:
        run(model, ids[:1], method, 16)  # costs are timed here, not below
    times: Times = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    expected: list[list[int]] = []
    for _ in range(args.rounds):
        for method, mode, model in runs:
            done = run(model, ids, method, args.max_new_tokens)
            expected = expected or done.tokens
            key = (str(method), mode)
            times.setdefault(key, []).append(done.seconds_per_token)
            same = rows.get(key, {}).get("identical", True) and done.tokens == expected
            rows[key] = {"tokens_per_step": count(done, method.masks).acceptance_rate, "identical": same}
        say(f"{name}: a round of {len(runs)} runs")
    for (method, mode), row in rows.items():
        row["ms_per_token"] = 1000 * statistics.median(times[method, mode])
        row["over_huggingface"] = ratio(times, (str(reference), REFERENCE), (method, mode))
        if mode != REFERENCE:
            row["over_plain"] = ratio(times, (str(methods[0]), mode), (method, mode))
            row["over_eager"] = ratio(times, (method, "eager"), (method, mode))
    return {"prompts": len(ids), "rows": [{"method": key[0], "mode": key[1], **row} for key, row in rows.items()]}


def ratio(times: Times, slow: tuple[str, str], fast: tuple[str, str]) -> float:
    """How many times as fast: median over rounds."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a trained model; without it the embedded one")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=5, help="prompts per set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {"eager": foretell.load(args.model, device="cpu"), "compiled": foretell.load(args.model, device="cpu")}
    start = time.perf_counter()
    if reason := compile_steps(models["compiled"]):
        raise ForetellError(reason)
    result: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    say(f"compiled in {result['compile_seconds']:.1f} s")
    for name in SETS:
        result[name] = measure(models, name, args)
        for row in result[name]["rows"]:
            say(" ".join(f"{key}={v:.3g}" if isinstance(v, float) else f"{v}" for key, v in row.items()))
    result["run"] = {**environment(models["compiled"]), "rounds": args.rounds, "max_new_tokens": args.max_new_tokens}
    write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", args.output)
    say(f"written to {args.output}")


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"compiled.py: {error}")

"""Eager and compiled steps side by side: seconds per token of every method in both modes, and what compiling took.

One process, the modes by turns within every round; ratios are of rounds, so that a busy minute strikes both. With
`--shape` seconds of single steps instead, on a model of that shape with random weights. Writes one JSON file; what an
earlier run wrote of other things is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import foretell
from foretell.checkpoint import write_text
from foretell.config import DTYPES
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.measure import count, encode_prompts, run
from foretell.evaluation.methods import ADAPTIVE, AUTOREGRESSIVE, HUGGINGFACE, Method
from foretell.evaluation.prompts import load_prompts
from foretell.evaluation.random_models import SHAPES, random_model
from foretell.evaluation.report import environment
from foretell.evaluation.step_cost import StepBench, alternate
from foretell.layout import linear, plain, quadratic

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
    table = [{"method": method, "mode": mode, **row} for (method, mode), row in rows.items()]
    for row in table:
        say(f"{name}: " + line(row))
    settings = {"prompts": len(ids), "max_new_tokens": args.max_new_tokens, "rounds": args.rounds}
    return {**settings, "rows": table, "run": environment(models["compiled"])}


@torch.inference_mode()
def steps(models: dict[str, MTPForCausalLM], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps behind a context in both modes."""
    layouts = {"plain": plain(), "linear 2": linear(2, 2), "linear 4": linear(4, 4), "linear 8": linear(8, 8),
               "quadratic 4": quadratic(4, 4), "quadratic 8": quadratic(8, 8)}  # fmt: skip
    benches = {mode: StepBench(model, args.context) for mode, model in models.items()}
    tasks = {
        (name, mode): partial(bench.forward, layout)
        for name, layout in layouts.items()
        for mode, bench in benches.items()
    }
    times = alternate(tasks, torch.device("cpu"), args.rounds)
    rows = []
    for name, layout in layouts.items():
        row: dict[str, Any] = {"step": name, "width": layout.width}
        row |= {f"{mode}_ms": 1000 * statistics.median(times[name, mode]) for mode in models}
        row["over_eager"] = ratio(times, (name, "eager"), (name, "compiled"))
        rows.append(row)
        say(line(row))
    return {"context": args.context, "rounds": args.rounds, "rows": rows, "run": environment(models["compiled"])}


def line(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={v:.3g}" if isinstance(v, float) else f"{v}" for key, v in row.items())


def ratio(times: Times, slow: tuple[str, str], fast: tuple[str, str]) -> float:
    """How many times as fast: median over rounds."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a trained model; without it the embedded one")
    parser.add_argument("--shape", choices=SHAPES, help="single steps of a random model of this shape instead")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the random model")
    parser.add_argument("--context", type=int, default=256, help="cached tokens of single steps")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=5, help="prompts per set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def load() -> MTPForCausalLM:
        if args.shape is None:
            return foretell.load(args.model, device="cpu")
        return random_model(args.shape, dtype=args.dtype, device="cpu", rank=16)

    models = {"eager": load(), "compiled": load()}
    start = time.perf_counter()
    if reason := compile_steps(models["compiled"]):
        raise ForetellError(reason)
    seconds = time.perf_counter() - start
    say(f"compiled in {seconds:.1f} s")
    result: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if args.shape:
        found = {f"{args.shape} {args.dtype}": steps(models, args)}
    else:
        found = {name: measure(models, name, args) for name in SETS}
    for name, part in found.items():
        result[name] = {"compile_seconds": seconds, **part}
    write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", args.output)
    say(f"written to {args.output}")


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"compiled.py: {error}")

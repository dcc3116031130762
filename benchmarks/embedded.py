"""The embedded model's figures: exact answers, acceptance by number of masks, identity, and seconds.

Writes one JSON file. `--part` runs one part and keeps the others of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import foretell
from foretell.checkpoint import write_text
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.answers import exact_answers
from foretell.evaluation.bench import bench
from foretell.evaluation.measure import count, encode_prompts, first_difference, run
from foretell.evaluation.methods import HUGGINGFACE, STRATEGIES, Method
from foretell.evaluation.prompts import load_prompts, read_records
from foretell.evaluation.report import environment

RESULT = Path(__file__).parent / "results" / "embedded.json"
SETS = ("problems", "code")
NEW_TOKENS = 128
SPEED_MASKS = (1, 2, 3, 4, 6, 8)


def answers(model: MTPForCausalLM, limit: int) -> dict[str, Any]:
    """Exact answers of plain decoding and of quadratic decoding with all masks."""
    references = [str(record["answer"]) for _, record in read_records("problems", limit=limit)]
    ids = encode_prompts(model, load_prompts("problems", limit=limit), 220)
    result: dict[str, Any] = {"problems": len(ids), "max_new_tokens": 220}
    for method in (Method("autoregressive"), Method("quadratic", model.max_masks)):
        done = run(model, ids, method, 220)
        texts = [model.decode(tokens) for tokens in done.tokens]
        counts = count(done, method.masks)
        result[method.name] = {"exact_answers": exact_answers(texts, references), **counts.to_dict()}
    return result


def acceptance(model: MTPForCausalLM, limit: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Tokens per step for every strategy and number of masks, and without the sampler; each output is compared."""
    result: dict[str, Any] = {}
    for name in SETS:
        ids = encode_prompts(model, load_prompts(name, limit=limit), NEW_TOKENS)
        expected = run(model, ids, Method(HUGGINGFACE), NEW_TOKENS).tokens
        rows = []
        for sampler in (True, False):
            for strategy in ("linear", "quadratic"):
                # What the sampler adds is asked at all masks only.
                for masks in numbers if sampler else (model.max_masks,):
                    done = run(model, ids, Method(strategy, masks, sampler), NEW_TOKENS)
                    difference = first_difference(model, ids, expected, done.tokens)
                    counts = count(done, masks)
                    rows.append(
                        {
                            "strategy": strategy,
                            "masks": masks,
                            "use_sampler": sampler,
                            **counts.to_dict(),
                            "identical": difference is None,
                            "difference": vars(difference) if difference else None,
                        }
                    )
                    say(f"{name} {strategy} k={masks} sampler={sampler}: {counts.acceptance_rate:.3f} tokens per step")
        result[name] = {"prompts": len(ids), "max_new_tokens": NEW_TOKENS, "rows": rows}
    return result


def speed(model: MTPForCausalLM, limit: int, rounds: int) -> dict[str, Any]:
    """`bench` over every strategy and the numbers of masks in SPEED_MASKS."""
    sets = {name: load_prompts(name, limit=limit) for name in SETS}

    def on_progress(done: int, total: int, name: str) -> None:
        if done % 100 == 0 or done == total:
            say(f"speed, {name}: {done} of {total} generations")

    masks = [k for k in SPEED_MASKS if k <= model.max_masks]
    return bench(
        model,
        sets,
        strategies=STRATEGIES,  # adaptive among them
        masks=masks,
        max_new_tokens=NEW_TOKENS,
        rounds=rounds,
        on_progress=on_progress,
    ).to_dict()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a trained model; without it the embedded one")
    parser.add_argument("--part", choices=("answers", "acceptance", "speed"), action="append", help="only this part")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed part")
    parser.add_argument("--problems", type=int, default=200, help="problems answered")
    parser.add_argument("--prompts", type=int, default=50, help="prompts per set for acceptance and identity")
    parser.add_argument("--masks", type=int, nargs="+", help="numbers of masks for acceptance [1 to k]")
    parser.add_argument("--speed-prompts", type=int, default=10, help="prompts per set for speed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = foretell.load(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    parts = {
        "answers": lambda: answers(model, args.problems),
        "acceptance": lambda: acceptance(model, args.prompts, args.masks or range(1, model.max_masks + 1)),
        "speed": lambda: speed(model, args.speed_prompts, args.rounds),
    }
    for name in args.part or parts:
        start = time.perf_counter()
        result[name] = parts[name]()
        minutes = (time.perf_counter() - start) / 60
        result[name]["run"] = {**environment(model), "minutes": minutes}
        write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", args.output)
        say(f"{name}: {minutes:.1f} minutes; written to {args.output}")


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"embedded.py: {error}")

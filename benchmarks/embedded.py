"""The embedded model's figures: exact answers, acceptance by number of masks, identity, and seconds.

Writes one JSON file. `--part` runs one part and keeps the others of an earlier run. A part that is interrupted goes on
where it was when the same command is given again; until it is whole, the file keeps what it had.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from unfinished import Unfinished, joined, say, stoppable

import foretell
from foretell.checkpoint import write_text
from foretell.decoding.generate import MTPForCausalLM
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
PROMPT_LOOKUP = (3, 5, 10)  # tokens drafted: transformers' own prompt lookup at its best


def answers(model: MTPForCausalLM, limit: int, kept: Unfinished) -> dict[str, Any]:
    """Exact answers of plain decoding and of quadratic decoding with all masks."""
    references = [str(record["answer"]) for _, record in read_records("problems", limit=limit)]
    ids = encode_prompts(model, load_prompts("problems", limit=limit), 220)
    result: dict[str, Any] = {"problems": len(ids), "max_new_tokens": 220}

    def row(method: Method) -> dict[str, Any]:
        done = run(model, ids, method, 220)
        texts = [model.decode(tokens) for tokens in done.tokens]
        return {"exact_answers": exact_answers(texts, references), **count(done, method.masks).to_dict()}

    for method in (Method("autoregressive"), Method("quadratic", model.max_masks)):
        result[method.name] = kept.get(method.name, partial(row, method))
    return result


def acceptance(model: MTPForCausalLM, limit: int, numbers: Sequence[int], kept: Unfinished) -> dict[str, Any]:
    """Tokens per step for every strategy and number of masks, and without the sampler; each output is compared."""

    def row(ids: list[Tensor], expected: list[list[int]], method: Method) -> dict[str, Any]:
        done = run(model, ids, method, NEW_TOKENS)
        difference = first_difference(model, ids, expected, done.tokens)
        return {
            "strategy": method.name,
            "masks": method.masks,
            "use_sampler": method.use_sampler,
            **count(done, method.masks).to_dict(),
            "identical": difference is None,
            "difference": vars(difference) if difference else None,
        }

    def generate(ids: list[Tensor]) -> list[list[int]]:
        return run(model, ids, Method(HUGGINGFACE), NEW_TOKENS).tokens

    result: dict[str, Any] = {}
    for name in SETS:
        ids = encode_prompts(model, load_prompts(name, limit=limit), NEW_TOKENS)
        expected = kept.get(f"{name} generate()", partial(generate, ids))
        rows = []
        for sampler in (True, False):
            for strategy in ("linear", "quadratic"):
                # What the sampler adds is asked at all masks only.
                for masks in numbers if sampler else (model.max_masks,):
                    label = f"{name} {strategy} k={masks} sampler={sampler}"
                    method = Method(strategy, masks, sampler)
                    rows.append(kept.get(label, partial(row, ids, expected, method)))
                    say(f"{label}: {rows[-1]['acceptance_rate']:.3f} tokens per step")
        result[name] = {"prompts": len(ids), "max_new_tokens": NEW_TOKENS, "rows": rows}
    return result


def speed(model: MTPForCausalLM, limit: int, rounds: int, kept: Unfinished) -> dict[str, Any]:
    """`bench` over every strategy and the numbers of masks in SPEED_MASKS."""

    def on_progress(done: int, total: int, name: str) -> None:
        if done % 100 == 0 or done == total:
            say(f"speed, {name}: {done} of {total} generations")

    masks = [k for k in SPEED_MASKS if k <= model.max_masks]

    def report(name: str) -> dict[str, Any]:
        return bench(
            model,
            {name: load_prompts(name, limit=limit)},
            strategies=STRATEGIES,  # adaptive among them
            masks=masks,
            prompt_lookup=PROMPT_LOOKUP,
            max_new_tokens=NEW_TOKENS,
            rounds=rounds,
            on_progress=on_progress,
        ).to_dict()

    return joined([kept.get(name, partial(report, name)) for name in SETS])


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
    parser.add_argument("--fresh", action="store_true", help="don't go on with an interrupted run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = foretell.load(args.model)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    numbers = args.masks or range(1, model.max_masks + 1)
    settings = {
        "answers": {"prompts": args.problems},
        "acceptance": {"prompts": args.prompts, "new_tokens": NEW_TOKENS},
        "speed": {"prompts": args.speed_prompts, "rounds": args.rounds, "new_tokens": NEW_TOKENS},
    }
    for name in args.part or settings:
        kept = Unfinished(args.output, name, model, settings[name], args.fresh)
        if name == "answers":
            result[name] = answers(model, args.problems, kept)
        elif name == "acceptance":
            result[name] = acceptance(model, args.prompts, numbers, kept)
        else:
            result[name] = speed(model, args.speed_prompts, args.rounds, kept)
        result[name]["run"] = {**environment(model), "minutes": kept.seconds / 60}
        write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", args.output)
        kept.finish()
        say(f"{name}: {kept.seconds / 60:.1f} minutes; written to {args.output}")


if __name__ == "__main__":
    stoppable(main)

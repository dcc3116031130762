"""Does the planner pay where no single strategy suits, and does it harm where drafts never hold?

The embedded model on a mixed stream (problems, code and chat by turns) and on prompts that are hard on it: random
tokens, another language, and an adapter that was never trained. Every strategy in alternation, beside plain decoding;
the planner keeps its experience from text to text, as it does in use. An interrupted run goes on with the next set when
the same command is given again.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from unfinished import Unfinished, joined, say, stoppable

import foretell
from foretell.base import load_base
from foretell.checkpoint import write_text
from foretell.config import MTPConfig
from foretell.decoding.generate import EMBEDDED, MTPForCausalLM
from foretell.evaluation.bench import bench
from foretell.evaluation.prompts import Prompt, load_prompts
from foretell.evaluation.report import Report, environment

RESULT = Path(__file__).parent / "results" / "streams.json"
MASKS = (2, 4, 8)
CHAT = (
    "User: What should I cook tonight? I have rice, eggs and a few tomatoes.\nAssistant:",
    "User: My train is late again. How do I ask my boss to start an hour later?\nAssistant:",
    "User: Explain to a child why the sky is blue.\nAssistant:",
    "User: Can you recommend a quiet hobby for long winters?\nAssistant:",
    "User: Write two lines to thank a neighbour who fed my cat.\nAssistant:",
)
GERMAN = (
    "Gestern ging ich mit meiner Schwester am Fluss entlang, und plötzlich",
    "Die Bürgermeisterin erklärte am Montag, dass die neue Brücke",
    "Man nehme zwei Zwiebeln, schneide sie fein und",
    "Im Winter fahren hier nur wenige Züge, weil",
)


def mixed(each: int) -> list[Prompt]:
    """Problems, code and chat by turns."""
    kinds = [load_prompts("problems", limit=each), load_prompts("code", limit=each), list(CHAT[:each])]
    return [prompt for turn in zip(*kinds, strict=False) for prompt in turn]


def random_tokens(vocabulary: int, count: int = 4, length: int = 40) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for _ in range(count)]


def untrained() -> MTPForCausalLM:
    """The embedded base with a fresh adapter of the same form."""
    trained = foretell.load()
    base = load_base(trained.base.name)
    if trained.base.packed:
        base.pack(lambda: load_base(trained.base.name).lm)
    torch.manual_seed(0)
    model = MTPForCausalLM(base, MTPConfig.from_dict(trained.config.to_dict()), trained.tokenizer)
    model.source = f"{EMBEDDED.parent.name}, adapter untrained"
    return model.for_inference()


def measure(
    model: MTPForCausalLM, sets: dict[str, list[Prompt]], new: int, rounds: int, kept: Unfinished
) -> dict[str, Any]:
    """`bench` of every strategy, and for each set how the planner stands to the best fixed one and to plain."""

    def on_progress(done: int, total: int, name: str) -> None:
        if done % 50 == 0 or done == total:
            say(f"{name}: {done} of {total}")

    masks = [k for k in MASKS if k <= model.max_masks]

    def one(name: str) -> dict[str, Any]:
        own = {name: sets[name]}
        return bench(
            model, own, masks=masks, max_new_tokens=new, rounds=rounds, prompt_lookup=(), on_progress=on_progress
        ).to_dict()

    report = Report.from_dict(joined([kept.get(name, partial(one, name)) for name in sets]))
    verdicts = {}
    for cell in report.cells:
        rate = {row.method: row.tokens_per_second.median for row in cell.rows if not row.method.of_transformers}
        fixed = {method: value for method, value in rate.items() if method.name != "adaptive"}
        best = max(fixed, key=lambda method: fixed[method])
        adaptive = next(value for method, value in rate.items() if method.name == "adaptive")
        plain = next(value for method, value in rate.items() if method.name == "autoregressive")
        verdicts[cell.point.set] = {
            "best_fixed": str(best),
            "adaptive_over_best_fixed": adaptive / fixed[best],
            "adaptive_over_plain": adaptive / plain,
        }
    return {"verdicts": verdicts, "report": report.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=4, help="prompts of each kind in the mixed stream, at most 5")
    parser.add_argument("--new", type=int, default=96, help="tokens generated per prompt")
    parser.add_argument("--fresh", action="store_true", help="don't go on with an interrupted run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = foretell.load()
    sets = {
        "mixed": mixed(args.each),
        "random tokens": random_tokens(model.base.vocab_size),
        "another language": list(GERMAN),
    }
    models = {"trained": (model, sets), "untrained": (untrained(), {"problems": sets["mixed"][::3]})}
    settings = {"rounds": args.rounds, "each": args.each, "new": args.new}
    parts = {name: Unfinished(args.output, name, own, settings, args.fresh) for name, (own, _) in models.items()}
    result = {name: measure(*models[name], args.new, args.rounds, kept) for name, kept in parts.items()}
    minutes = sum(kept.seconds for kept in parts.values()) / 60
    run = {**environment(model), "rounds": args.rounds, "new": args.new, "minutes": minutes}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({"run": run, **result}, indent=1, ensure_ascii=False) + "\n", args.output)
    for kept in parts.values():
        kept.finish()
    for part in result.values():
        for name, verdict in part["verdicts"].items():
            print(
                f"{name}: adaptive {verdict['adaptive_over_best_fixed']:.2f}× {verdict['best_fixed']}, "
                f"{verdict['adaptive_over_plain']:.2f}× plain"
            )


if __name__ == "__main__":
    stoppable(main)

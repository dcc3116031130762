"""Simulated acceptance, as training prints it, against decoding on the same held-out prompts: linear and quadratic.

Without --model: the embedded model on the packaged prompts. A result replaces that of the same model and prompt set in
the JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

import foretell
from foretell.commands.render import progress_bar
from foretell.evaluation.foreseen import foreseen
from foretell.evaluation.prompts import NAMES, load_prompts, set_name

RESULT = Path(__file__).parent / "results" / "simulated.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub name of an adapter [the embedded one]")
    parser.add_argument("--prompts", nargs="+", default=list(NAMES), help="packaged sets, or files of held-out prompts")
    parser.add_argument("--limit", type=int, default=50, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    model = foretell.load(args.model)
    name = Path(args.model).name if args.model else "embedded"
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    for source in args.prompts:
        prompts = load_prompts(source, tokenizer=model.tokenizer, limit=args.limit)
        with progress_bar() as on_progress:
            report = foreseen(model, prompts, max_new_tokens=args.max_new_tokens, on_progress=on_progress)
        found = report.to_dict()
        found["environment"]["model"] = name
        results[f"{name}, {set_name(source)}"] = found
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table(title="tokens per step, simulated and decoded")
    for title in ("model, prompts", "tokens", "strategy", "simulated", "decoded", "difference", "mean over places"):
        table.add_column(title, justify="left" if title in ("model, prompts", "strategy") else "right")
    for label, found in results.items():
        for row in found["comparisons"]:
            known = row["strategy"] == "quadratic" and found["mean_over_places"] is not None
            mean = f"{found['mean_over_places']:.3f}" if known else ""
            difference = f"{100 * row['relative_difference']:+.2f} %"
            cells = (label, str(found["tokens"]), row["strategy"], f"{row['simulated']:.3f}", f"{row['decoded']:.3f}")
            table.add_row(*cells, difference, mean)
    Console().print(table)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()

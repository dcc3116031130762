"""The planner in simulation: tokens per second against the exact optimum and the best fixed strategies.

Steps cost what was measured on two machines (relative to a plain step), drafts hold as on two data sets (method.md
section 7). The planner starts without experience and with costs measured 5 % wrong. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from foretell.evaluation.acceptance_profiles import ACCEPTANCE, named_profile
from foretell.evaluation.optimum import by_width, fixed_rate, optimum
from foretell.evaluation.simulation import simulate

RESULT = Path(__file__).parent / "results" / "planner.json"
COSTS = {
    "135M on 2 cores": {1: 1.0, 9: 1.31, 17: 1.52, 25: 1.92, 81: 3.71},
    "1B on 2 cores": {1: 1.0, 9: 1.05, 17: 1.21, 25: 1.52, 45: 2.19, 81: 3.64},
    "width nearly free": {1: 1.0, 81: 1.3},
}
NOISE, INFORMED = 0.05, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for machine, table in COSTS.items():
        cost = by_width(table)
        for name in ACCEPTANCE:
            profile = named_profile(name)
            fixed = {s: max(fixed_rate(s, k, profile, cost) for k in range(1, 9)) for s in ("linear", "quadratic")}
            runs = {
                label: [
                    simulate(profile, cost, args.steps, informed=informed, cost_noise=NOISE, seed=seed)
                    for seed in range(args.seeds)
                ]
                for label, informed in (("planner", 0.0), ("informed", INFORMED))
            }
            best = optimum(profile, cost).rate
            rows.append(
                {
                    "costs": machine, "profile": name, "best_linear": fixed["linear"],
                    "best_quadratic": fixed["quadratic"], "optimum": best,
                    **{label: statistics.median(values) for label, values in runs.items()},
                    **{f"{label}_range": [min(values), max(values)] for label, values in runs.items()},
                    "of_optimum": statistics.median(runs["planner"]) / best,
                }
            )  # fmt: skip
    nothing = {m: simulate([0.01] * 8, by_width(t), args.steps, cost_noise=NOISE) for m, t in COSTS.items()}
    result = {"steps": args.steps, "seeds": args.seeds, "cost_noise": NOISE, "rows": rows, "nothing_holds": nothing}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table(title="tokens in the time of one plain step")
    columns = ("best_linear", "best_quadratic", "optimum", "planner", "of_optimum", "informed")
    for column in ("costs", "profile", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column in ("costs", "profile") else "right")
    for row in rows:
        table.add_row(str(row["costs"]), str(row["profile"]), *(f"{row[column]:.2f}" for column in columns))
    Console().print(table)
    for machine, rate in nothing.items():
        print(f"nothing ever holds, {machine}: {rate:.3f} of plain decoding")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()

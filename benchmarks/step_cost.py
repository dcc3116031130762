"""What a step costs against its width, on models of well-known shapes with random weights: no trained adapter needed.

Measures steps of every strategy at several contexts, and what stands outside the base's blocks; `--profile` profiles
quadratic steps of the real loop instead, and keeps what an earlier run measured. Writes JSON after every part, and a
picture of the steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foretell.checkpoint import write_text
from foretell.config import DTYPES
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.overhead import Overhead, overhead
from foretell.evaluation.random_models import SHAPES, random_model
from foretell.evaluation.report import environment
from foretell.evaluation.step_cost import StepBench, strategy_layouts

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (64, 256, 512, 4096)
COLOURS = {"linear": "#0072b2", "quadratic": "#d55e00"}


def measure_steps(model: MTPForCausalLM, context: int, batch: int, rounds: int) -> dict[str, Any]:
    """Every layout's step at one context, by name."""
    layouts = strategy_layouts(model.max_masks)
    found = StepBench(model, context, batch).steps(layouts, rounds)
    return {
        name: {"regular": layout.regular, "masks": layout.masks, "width": layout.width, **found[name].to_dict()}
        for name, layout in layouts.items()
    }


def measure_parts(model: MTPForCausalLM, context: int, batch: int, rounds: int) -> dict[str, Any]:
    """Everything outside the base's blocks, by name."""
    parts = StepBench(model, context, batch).parts(strategy_layouts(model.max_masks), rounds)
    return {"context": context, **{name: timing.to_dict() for name, timing in parts.items()}}


def show_steps(result: dict[str, Any]) -> Table:
    """Ratios to plain by width, a column per context."""
    contexts = result["steps"]
    table = Table(title=f"{result['shape']}, {result['run']['dtype']}: a step's seconds over those of a plain one")
    for column in ("step", "width", *(f"context {context}" for context in contexts)):
        table.add_column(column, justify="left" if column == "step" else "right")
    rows = next(iter(contexts.values()))
    for name in sorted(rows, key=lambda name: (rows[name]["width"], name)):
        cells = [spread(own[name]["ratio"], "×") for own in contexts.values()]
        table.add_row(name, str(rows[name]["width"]), *cells)
    baseline = [f"{1000 * own['plain']['seconds']['median']:.2f} ms" for own in contexts.values()]
    table.add_row("plain, seconds", "1", *baseline, style="dim")
    return table


def show_parts(parts: dict[str, Any]) -> Table:
    """Milliseconds of the parts, and as a share of a plain step."""
    table = Table(title=f"outside the base's blocks, at context {parts['context']}")
    for column in ("part", "ms", "of a plain step"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, part in parts.items():
        if name != "context":
            table.add_row(name, f"{1000 * part['seconds']['median']:.3f}", f"{100 * part['ratio']['median']:.1f} %")
    return table


def show_profile(found: list[Overhead]) -> Table:
    """Where the time of quadratic steps of the real loop goes."""
    table = Table(title="quadratic steps of the real loop: milliseconds, and the share outside the base's own forward")
    for column in ("masks", "shortlist", "step", "forward", "of it adapter", "unembed", "drafts", "rest", "outside",
                   "with adapter, unembed", "memory", "first text"):  # fmt: skip
        table.add_column(column, justify="right")
    for o in found:
        times = (o.step_ms, o.forward_ms, o.adapter_ms, o.unembed_ms, o.draft_ms, o.rest_ms)
        shares = (o.outside_share, o.outside_share_strict)
        peaks = [f"{memory.ratio:.3f}×" if memory else "unknown" for memory in (o.memory, o.first_memory)]
        cells = [*(f"{ms:.2f}" for ms in times), *(f"{100 * share:.1f} %" for share in shares), *peaks]
        table.add_row(str(o.masks), str(o.shortlist or "exact"), *cells)
    return table


def spread(value: dict[str, float], unit: str) -> str:
    return f"{value['median']:.2f}{unit} ({value['minimum']:.2f}–{value['maximum']:.2f})"


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratio to a plain step against width, a panel per context, a line per strategy, bars from least to most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    contexts = result["steps"]
    figure = Figure(figsize=(3.6 * len(contexts), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for axes, (context, rows) in zip(panels, contexts.items(), strict=True):
        for strategy, colour in COLOURS.items():
            own = [rows["plain"], *(row for name, row in rows.items() if name.startswith(strategy))]
            middle = [row["ratio"]["median"] for row in own]
            below = [row["ratio"]["median"] - row["ratio"]["minimum"] for row in own]
            above = [row["ratio"]["maximum"] - row["ratio"]["median"] for row in own]
            widths = [row["width"] for row in own]
            axes.errorbar(widths, middle, yerr=[below, above], color=colour, marker="o", ms=3, lw=1.2, label=strategy)
        axes.set_title(f"context {context}", fontsize=10)
        axes.set_xlabel("width: tokens in the step")
        axes.grid(color="#e3e3e3")
    figure.axes[0].set_ylabel("seconds ÷ plain step")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False)
    run = result["run"]
    figure.suptitle(f"{result['shape']}, {run['dtype']}, {run['device_name']}, batch {result['batch']}", fontsize=11)
    figure.savefig(path, dpi=130)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(result, indent=1) + "\n", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="135M")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", help="cpu, cuda, ... [a GPU if there is one]")
    parser.add_argument("--no-packed", dest="packed", action="store_const", const=False, help="weights as they are")
    parser.add_argument("--compiled", action="store_true", help="compiled steps on a CPU, CUDA graphs on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--batch", type=int, default=1, help="sequences side by side, of different lengths")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens in the cache")
    parser.add_argument("--masks", type=int, default=8, help="widest strategies measured")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds; the median counts")
    parser.add_argument("--profile", action="store_true", help="only the profile of quadratic steps of the loop")
    parser.add_argument("--profile-masks", type=int, default=4)
    parser.add_argument("--profile-shortlists", type=int, nargs="+", default=(0, 64), help="0: the exact chain")
    parser.add_argument("--output", type=Path, help="[benchmarks/results/step_cost_SHAPE_DEVICE.json]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # loaded from a file, as users' bases are
        model = random_model(
            args.shape,
            dtype=args.dtype,
            device=args.device,
            masks=args.masks,
            rank=args.rank,
            packed=args.packed,
            directory=Path(directory) if args.profile else None,
        )
    if args.compiled and (reason := compile_steps(model)):
        raise ForetellError(reason)
    kind = "_compiled" * args.compiled + f"_batch{args.batch}" * (args.batch > 1)
    path = args.output or RESULTS / f"step_cost_{args.shape}_{model.base.device.type}{kind}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = {**environment(model), "rounds": args.rounds, "rank": args.rank}
    console = Console(width=max(140, Console().width))

    if args.profile:
        found = []
        for shortlist in args.profile_shortlists:
            found.append(overhead(model, masks=args.profile_masks, shortlist=shortlist, rounds=args.rounds))
            result["profile"] = {"run": run, "rows": [row.to_dict() for row in found]}
            write(path, result)
            say(f"profile, shortlist {shortlist or 'off'}: done")
        console.print(show_profile(found))
        return
    result.pop("parts", None)  # of an earlier run, which the new header would claim
    result |= {"shape": args.shape, "batch": args.batch, "run": run, "steps": {}}
    for context in args.contexts:
        result["steps"][str(context)] = measure_steps(model, context, args.batch, args.rounds)
        write(path, result)
        seconds = result["steps"][str(context)]["plain"]["seconds"]["median"]
        say(f"context {context}: a plain step takes {1000 * seconds:.2f} ms")
    result["parts"] = measure_parts(model, 256 if 256 in args.contexts else args.contexts[0], args.batch, args.rounds)
    write(path, result)
    plot(result, path.with_suffix(".png"))
    console.print(show_parts(result["parts"]))
    console.print(show_steps(result))
    say(f"written to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"step_cost.py: {error}")

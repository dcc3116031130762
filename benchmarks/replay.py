"""Decoding at real sizes without a trained adapter: random weights, and drafts that hold as often as a profile says.

The drafter knows the plain continuation and spoils drafts by the profile; the loop, masks, sampler chain and planner
are the real ones, and paid for. Beside the measured speed-up stand what a fixed strategy should reach by the costs of
this very run, and the exact optimum that no planner can beat without knowing which drafts will hold. Writes JSON after
every round and keeps the cells (profile and batch) of earlier runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foretell.checkpoint import write_text
from foretell.config import DTYPES, DecodeConfig
from foretell.decoding import loop
from foretell.decoding.compiling import compile_steps
from foretell.decoding.draft import Drafter, SamplerDrafter, reads_along
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pick import Picker
from foretell.errors import ForetellError
from foretell.evaluation.acceptance_profiles import ACCEPTANCE, Profile, named_profile
from foretell.evaluation.baselines import huggingface_generate
from foretell.evaluation.optimum import Cost, DraftCost, by_width, fixed_rate, optimum
from foretell.evaluation.random_models import SHAPES, random_model
from foretell.evaluation.replay import ReplayDrafter
from foretell.evaluation.report import Spread, environment
from foretell.evaluation.step_cost import StepBench, now, strategy_layouts
from foretell.layout import Block, Layout

RESULTS = Path(__file__).parent / "results"
PLAIN, ADAPTIVE, TRANSFORMERS = "autoregressive", "adaptive", "huggingface generate"


@dataclass(frozen=True)
class Row:
    """A strategy and its masks."""

    strategy: str
    masks: int = 0

    def __str__(self) -> str:
        return "plain" if self.strategy == PLAIN else f"{self.strategy} {self.masks or ''}".rstrip()


@dataclass
class Pass:
    """One row over all prompts. Seconds run from the end of every batch's first step: no prefill."""

    texts: list[list[int]]
    tokens: int = 0  # in those seconds
    steps: int = 0  # of a sequence
    rows: int = 0  # widths of those steps together
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of all sequences together."""
        return self.tokens / self.seconds


@dataclass
class Cell:
    """One profile at one batch size."""

    model: MTPForCausalLM
    prompts: list[Tensor]
    profile: Profile
    batch: int
    new: int
    shortlist: int
    informative: bool
    reference: list[list[int]] = field(default_factory=list)

    def decode(self, row: Row, seed: int) -> Pass:
        """All prompts, `batch` at a time, with drafts of luck `seed`."""
        if row.strategy == TRANSFORMERS:
            return self._transformers()
        config = DecodeConfig(
            strategy=row.strategy,
            masks=row.masks or None,
            max_new_tokens=self.new,
            shortlist=self.shortlist,
            lookup=False,  # what random weights repeat is no profile's
        )
        done = Pass([[] for _ in self.prompts])
        for start in range(0, len(self.prompts), self.batch):
            self._decode_batch(config, slice(start, start + self.batch), seed, done)
        return done

    def _transformers(self) -> Pass:
        """The base's own `generate()`, as transformers loads it; there every step of a batch decides a token each."""
        done = Pass([])
        for start in range(0, len(self.prompts), self.batch):
            prompts = [prompt[None] for prompt in self.prompts[start : start + self.batch]]
            decoded = huggingface_generate(self.model, prompts, self.new)
            done.texts += decoded.tokens
            done.steps += sum(len(text) - 1 for text in decoded.tokens)
            done.seconds += decoded.seconds - decoded.first_token_seconds
        done.tokens = done.rows = done.steps
        return done

    def _decode_batch(self, config: DecodeConfig, which: slice, seed: int, done: Pass) -> None:
        picker, texts, device = Picker(config), done.texts[which], self.model.base.device
        drafter: Drafter | None = None
        if config.strategy != PLAIN:
            drafter = ReplayDrafter(
                SamplerDrafter(self.model, config, picker),
                self.reference[which],
                self.profile,
                self.model.base.vocab_size,
                device=device,
                seed=seed * len(self.prompts) + which.start,
                informative=self.informative,
            )
        begin = None
        for steps in loop.steps(self.model, self.prompts[which], config, picker, drafter=drafter):
            for step in steps:
                texts[step.sequence] += step.tokens
                if begin is not None:
                    done.tokens += len(step.tokens)
                    done.steps += 1
                    done.rows += step.layout.width
            begin = begin or now(device)
        assert begin is not None
        done.seconds += now(device) - begin

    def measure(self, rows: Sequence[Row], rounds: int) -> Iterator[dict[Row, list[Pass]]]:
        """Every row in every round, in an order that rotates; each round brings other luck. A first round warms up.

        Yields what was measured so far after every round that counts.
        """
        self.reference = self.decode(Row(PLAIN), 0).texts
        passes: dict[Row, list[Pass]] = {row: [] for row in rows}
        for number in range(rounds + 1):
            turn = number % len(rows)
            for row in (*rows[turn:], *rows[:turn]):
                done = self.decode(row, number)
                if number:
                    passes[row].append(done)
                say(f"  round {number} of {rounds}, {row}: {done.rate:.2f} tokens/s")
            if number:
                yield passes


def measured_costs(
    model: MTPForCausalLM, context: int, batch: int, shortlist: int, rounds: int
) -> tuple[Cost, DraftCost, dict[str, Any]]:
    """Seconds of steps and of drafting for the optimum, measured now, and what was measured for the record.

    A step is its width's forward, the choices and verification of its regular rows, and with a shortlist the masks'
    logits, read along or apart as the loop does it; drafting is the rest of the sampler chain.
    """
    bench, layouts, k = StepBench(model, context, batch), strategy_layouts(model.max_masks), model.max_masks
    forwards = {name: timing.seconds.median for name, timing in bench.steps(layouts, rounds, forward_only=True).items()}
    parts = {name: timing.seconds.median for name, timing in bench.parts({}, rounds).items()}
    unembed = by_width({rows: parts[f"unembed {rows}"] for rows in (*range(1, k + 2), 2 * k + 1, 3 * k + 1, 4 * k + 1)})
    chain = [0.0, *(parts[f"rescore {n}, {shortlist}" if shortlist else f"chain {n}, exact"] for n in range(1, k + 1))]
    widths: dict[int, list[float]] = {}
    for name, layout in layouts.items():
        widths.setdefault(layout.width, []).append(forwards[name])
    forward = by_width({width: sum(values) / len(values) for width, values in widths.items()})
    config = DecodeConfig(masks=k, shortlist=shortlist)

    def cost(regular: int, masks: int) -> float:
        read = masks if shortlist else 0  # the exact chain's time holds that of reading them
        along = read > 0 and reads_along(model, config, [Layout(1, (Block(0, masks),))] * batch)
        seconds = forward(regular, masks) + unembed(regular, read if along else 0) + parts[f"verify {regular}"]
        return seconds + unembed(k, 0) if read and not along else seconds

    return cost, lambda masks: chain[masks], {"forward": forwards, "parts": parts}


def summarise(cell: Cell, passes: dict[Row, list[Pass]], cost: Cost, draft_cost: DraftCost) -> dict[str, Any]:
    """The cell's rows: measured, and expected from the measured costs."""
    plain = passes[Row(PLAIN)]
    plain_rate = 1 / cost(1, 0)
    best = optimum(cell.profile, cost, draft_cost)
    rows = []
    for row, done in passes.items():
        expected = None
        if row.strategy in ("linear", "quadratic"):
            expected = fixed_rate(row.strategy, row.masks, cell.profile, cost, draft_cost) / plain_rate
        rows.append(
            {
                "strategy": row.strategy,
                "masks": row.masks,
                "tokens_per_second": asdict(Spread.of([one.rate for one in done])),
                "speedup": asdict(Spread.of([one.rate / base.rate for one, base in zip(done, plain, strict=True)])),
                "tokens_per_step": sum(one.tokens for one in done) / sum(one.steps for one in done),
                "mean_width": sum(one.rows for one in done) / sum(one.steps for one in done),
                "expected_speedup": expected,
                # Where rounding flips a tie, the drafter's knowledge ends and the rest of that text counts for nothing.
                "identical": sum(
                    text == own for one in done for text, own in zip(one.texts, cell.reference, strict=True)
                ),
                "texts": sum(len(one.texts) for one in done),
            }
        )
    return {
        "profile": list(cell.profile),
        "optimum_speedup": best.rate / plain_rate,
        "optimum_policy": [[layout.regular - 1, [list(block) for block in layout.blocks]] for layout in best.policy],
        "rows": rows,
    }


def show(name: str, cell: dict[str, Any]) -> Table:
    table = Table(title=f"{name}: the exact optimum by this run's costs is {cell['optimum_speedup']:.2f}× plain")
    for column in ("strategy", "tokens/s", "× plain", "expected", "tokens per step", "width", "identical"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in cell["rows"]:
        speedup, rate = row["speedup"], row["tokens_per_second"]
        table.add_row(
            str(Row(row["strategy"], row["masks"])),
            f"{rate['median']:.2f} ({rate['minimum']:.2f}–{rate['maximum']:.2f})",
            f"{speedup['median']:.2f} ({speedup['minimum']:.2f}–{speedup['maximum']:.2f})",
            f"{row['expected_speedup']:.2f}" if row["expected_speedup"] else "–",
            f"{row['tokens_per_step']:.2f}",
            f"{row['mean_width']:.1f}",
            f"{row['identical']} of {row['texts']}",
        )
    return table


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="135M")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", help="cpu, cuda, ... [a GPU if there is one]")
    parser.add_argument("--no-packed", dest="packed", action="store_const", const=False, help="weights as they are")
    parser.add_argument("--compiled", action="store_true", help="compiled steps, or CUDA graphs on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--profile", choices=(*ACCEPTANCE, "all"), default="all")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded side by side")
    parser.add_argument("--linear", type=int, nargs="*", default=(3, 5, 8), help="masks of the linear rows")
    parser.add_argument("--quadratic", type=int, nargs="*", default=(2, 3, 4, 8), help="masks of the quadratic rows")
    parser.add_argument("--no-hf", action="store_true", help="leave out transformers' generate(), a second copy")
    parser.add_argument("--no-adaptive", action="store_true", help="leave the planner out")
    parser.add_argument("--shortlist", type=int, default=64, choices=(0, 32, 64, 128), help="of the chain; 0: exact")
    parser.add_argument("--informative", action="store_true", help="confidences that tell something of each draft")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter")
    parser.add_argument("--prompts", type=int, help="prompts per round [2, or one batch]")
    parser.add_argument("--context", type=int, default=256, help="tokens halfway through a text")
    parser.add_argument("--new", type=int, default=128, help="tokens generated per prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="[benchmarks/results/replay_SHAPE_DEVICE.json]")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ForetellError(f"rounds must be at least 1, not {args.rounds}")
    if args.context <= args.new // 2:
        raise ForetellError(f"the context must exceed half of the {args.new} new tokens, {args.context} does not")
    torch.set_num_threads(args.threads)
    model = random_model(args.shape, dtype=args.dtype, device=args.device, rank=args.rank, packed=args.packed)
    if args.compiled and (reason := compile_steps(model)):
        raise ForetellError(reason)
    path = args.output or RESULTS / f"replay_{args.shape}_{model.base.device.type}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    generator = torch.Generator().manual_seed(0)
    count, length = args.prompts or max(2, args.batch), args.context - args.new // 2
    prompts = torch.randint(0, model.base.vocab_size, (count, length), generator=generator).to(model.base.device)
    rows = [] if args.no_hf else [Row(TRANSFORMERS)]
    rows += [Row(PLAIN), *(Row("linear", k) for k in args.linear), *(Row("quadratic", k) for k in args.quadratic)]
    if not args.no_adaptive:
        rows.append(Row(ADAPTIVE, model.max_masks))
    settings = {name: getattr(args, name) for name in ("shortlist", "rank", "context", "new", "rounds", "informative")}
    console = Console(width=max(120, Console().width))
    for name in ACCEPTANCE if args.profile == "all" else (args.profile,):
        start, key = time.perf_counter(), f"{name}, batch {args.batch}"
        key += ", compiled" * args.compiled + ", not packed" * (args.packed is False)
        say(f"{key}: costs")
        cost, draft_cost, costs = measured_costs(model, args.context, args.batch, args.shortlist, args.rounds)
        cell = Cell(model, list(prompts), named_profile(name), args.batch, args.new, args.shortlist, args.informative)
        for passes in cell.measure(rows, args.rounds):
            found = summarise(cell, passes, cost, draft_cost)
            run = {**environment(model), **settings, "prompts": count, "minutes": (time.perf_counter() - start) / 60}
            result.setdefault("cells", {})[key] = {"run": run, "costs": costs, **found}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(result, indent=1) + "\n", path)
        console.print(show(f"{args.shape}, {key}", result["cells"][key]))
    say(f"written to {path}")


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"replay.py: {error}")

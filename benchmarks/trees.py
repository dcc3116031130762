"""Would trees of drafts (several candidates per mask) beat chains? A simulation on the base's own greedy answers.

    python benchmarks/trees.py

Every draft's rank is found after every token, as simulated acceptance finds whether it holds: which of the sampler's
candidates the base would have chosen, the tokens before it being right. A tree of N nodes holds the N likeliest paths
of ranks, and blocks of K masks hang behind the B nodes where a step most often ends; chains are the trees of rank 0
alone. Shapes are chosen on one half of the prompts by the seconds of their steps' widths, and walked on the other.
Drafting costs nothing here, which favours trees: they would run the sampler for more candidates.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import foretell
from foretell.decoding.generate import MTPForCausalLM
from foretell.evaluation.measure import encode_prompts
from foretell.evaluation.optimum import by_width
from foretell.evaluation.prompts import NAMES, load_prompts
from foretell.evaluation.report import environment
from foretell.layout import linear, plain, quadratic
from foretell.training.batches import generator, make_batch
from foretell.training.held_out import EVERYWHERE, answered
from foretell.training.step import forward

RESULTS = Path(__file__).parent / "results"
CANDIDATES = 8  # ranks beyond are as good as wrong
NODES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 33)
WIDEST = 81  # of a step: a quadratic one with 8 masks
BATCH = 8

Ranks = list[tuple[int, ...]]  # of one answer: after every token, the drafts' ranks as far as all are candidates
Cost = Callable[[int], float]  # seconds of a step by its width


class Shape(NamedTuple):
    """A tree as paths of ranks, the paths with a block behind them (`()` is the root), and the masks of a block."""

    nodes: frozenset[tuple[int, ...]]
    hung: frozenset[tuple[int, ...]]
    masks: int

    @property
    def width(self) -> int:
        return 1 + len(self.nodes) + len(self.hung) * self.masks

    def accepted(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """The longest path of the tree that holds."""
        depth = 0
        while depth < len(ranks) and ranks[: depth + 1] in self.nodes:
            depth += 1
        return ranks[:depth]


class Walk(NamedTuple):
    """Tokens, steps with drafts and steps without."""

    tokens: int
    drafted: int
    alone: int

    @property
    def steps(self) -> int:
        return self.drafted + self.alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub name of an adapter [the embedded one]")
    parser.add_argument("--prompts", nargs="+", default=list(NAMES), help="packaged sets, or files of held-out prompts")
    parser.add_argument("--limit", type=int, default=50, help="prompts of each set")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS / "trees.json")
    args = parser.parse_args()
    model = foretell.load(args.model)
    report: dict[str, Any] = {"environment": environment(model), "rows": []}
    for source in args.prompts:
        prompts = load_prompts(source, tokenizer=model.tokenizer, limit=args.limit)
        texts = ranks_of(model, [ids[0].cpu() for ids in encode_prompts(model, prompts, args.max_new_tokens)], args)
        for kind in ("chain", "tree"):
            shapes = candidates(texts[::2], kind, model.max_masks)
            walked = {shape: walk(texts[::2], shape) for shape in shapes}
            for name, cost in cost_curves().items():
                best = max(walked, key=lambda shape: speedup(walked[shape], shape, cost))
                held_out = walk(texts[1::2], best)
                report["rows"].append(
                    {
                        "prompts": source, "costs": name, "drafts": kind, "nodes": len(best.nodes),
                        "blocks": len(best.hung), "masks": best.masks, "width": best.width,
                        "tokens_per_step": round(held_out.tokens / held_out.steps, 3),
                        "speedup": round(speedup(held_out, best, cost), 3),
                    }
                )  # fmt: skip
    report["rows"].sort(key=lambda row: (row["prompts"], row["costs"]))
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report["rows"])
    print(f"written to {args.output}")


@torch.inference_mode()
def ranks_of(model: MTPForCausalLM, prompts: Sequence[torch.Tensor], args: argparse.Namespace) -> list[Ranks]:
    """The ranks at every place of the base's greedy answers."""
    texts = answered(model, prompts, args.max_new_tokens, BATCH)
    found: list[Ranks] = []
    for start in range(0, len(texts), BATCH):
        chosen = texts[start : start + BATCH]
        batch = make_batch(chosen, EVERYWHERE, generator("trees")).to(model.base.device)
        latents = forward(model, batch)
        rows, places, masks = latents.target.valid.nonzero(as_tuple=True)
        z = latents.z_masks[rows, places, masks]
        if model.sampler is not None:
            z = model.sampler(model.base.embed(latents.target.previous[rows, places, masks]), z).to(z.dtype)
        wanted = latents.target.labels[rows, places, masks]
        ranks = torch.full(latents.target.valid.shape, CANDIDATES)
        for part in torch.arange(len(rows)).split(2048):
            logits = model.base.unembed(z[part])
            own = logits.gather(1, wanted[part, None])
            ranks[rows[part], places[part], masks[part]] = (logits > own).sum(-1).clamp(max=CANDIDATES)
        for number, text in enumerate(chosen):
            first = int(text.trained.long().argmax()) - 1  # the prompt's last token
            own_ranks: Ranks = [()] * int(text.trained.sum())
            for anchor, counted, row in zip(
                batch.anchors[number].tolist(), batch.anchor_valid[number].tolist(), ranks[number].tolist(), strict=True
            ):
                if counted:
                    known = next((i for i, rank in enumerate(row) if rank >= CANDIDATES), len(row))
                    own_ranks[anchor - first] = tuple(row[:known])
            found.append(own_ranks)
    return found


def candidates(texts: Sequence[Ranks], kind: str, most_masks: int) -> set[Shape]:
    """All shapes to choose among, from what is likeliest on these texts."""
    shapes = set()
    everywhere = [ranks for text in texts for ranks in text]
    for masks in range(1, most_masks + 1):
        paths = Counter(ranks[:depth] for ranks in everywhere for depth in range(1, min(masks, len(ranks)) + 1))
        likeliest = [path for path, _ in paths.most_common() if kind == "tree" or not any(path)]
        for nodes in NODES:
            tree = Shape(frozenset(likeliest[:nodes]), frozenset(), masks)
            ends = [path for path, _ in Counter(map(tree.accepted, everywhere)).most_common()]
            shapes |= {tree._replace(hung=frozenset(ends[:blocks])) for blocks in BLOCKS}
    return {shape for shape in shapes if shape.width <= WIDEST}


def walk(texts: Sequence[Ranks], shape: Shape) -> Walk:
    """Steps as decoding takes them: one that ends where no block hangs is followed by one without drafts."""
    drafted = alone = 0
    for text in texts:
        place, drafts = -1, False  # place + 1 tokens are decided
        while place + 1 < len(text):
            end = shape.accepted(text[place]) if drafts else ()
            drafted, alone = drafted + drafts, alone + (not drafts)
            place += len(end) + 1
            drafts = not drafts or end in shape.hung
    return Walk(sum(map(len, texts)), drafted, alone)


def speedup(walked: Walk, shape: Shape, cost: Cost) -> float:
    """Over plain decoding, by the seconds of the steps alone."""
    seconds = walked.drafted * cost(shape.width) + walked.alone * cost(1 + shape.masks)
    return walked.tokens * cost(1) / seconds


def cost_curves() -> dict[str, Cost]:
    """Seconds by width as the replay measured them, and a machine where width is free."""
    curves: dict[str, Cost] = {}
    for shape in ("135M", "1B"):
        cell = json.loads((RESULTS / f"replay_{shape}_cpu.json").read_text(encoding="utf-8"))["cells"]["gsm8k, batch 1"]
        seconds = cell["costs"]["forward"]
        layouts = {"plain": plain()}
        for masks in range(1, 9):
            layouts |= {f"linear {masks}": linear(masks, masks), f"quadratic {masks}": quadratic(masks, masks)}
        by_layout = by_width({layout.width: seconds[name] for name, layout in layouts.items()})
        curves[f"{shape}, two cores"] = lambda width, by_layout=by_layout: by_layout(width, 0)
    curves["width is free"] = lambda width: 1.0
    return curves


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="best chain and best tree on held-out prompts")
    for title in ("prompts", "costs", "drafts", "nodes", "blocks × masks", "width", "tokens per step", "× plain"):
        table.add_column(title, justify="left" if title in ("prompts", "costs", "drafts") else "right")
    for row in rows:
        cells = [row[key] for key in ("prompts", "costs", "drafts", "nodes")]
        cells += [f"{row['blocks']} × {row['masks']}", row["width"]]
        table.add_row(*map(str, cells), f"{row['tokens_per_step']:.2f}", f"{row['speedup']:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""The real strategies on recorded texts, with steps whose cost is known: what planning is worth, and what it costs.

Texts of the embedded model are decoded plainly once, with a block of drafts and its confidences recorded at every
place. On them the strategies then run as they are, against a clock that adds up what their steps took on one machine,
so that a change of the planner shows within a percent in two minutes, on a machine as busy as it likes. Writes one JSON
file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from streams import CHAT
from torch import Tensor

import foretell
from foretell.config import DecodeConfig
from foretell.decoding.cache import StaticCache
from foretell.decoding.calibration import Experience
from foretell.decoding.costs import Costs
from foretell.decoding.draft import SamplerDrafter
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pausing import Pause
from foretell.decoding.pick import Picker
from foretell.decoding.planner import Planner
from foretell.decoding.strategies import Adaptive, Fixed, Running, Strategy, aligned
from foretell.evaluation.measure import encode_prompts
from foretell.evaluation.prompts import load_prompts
from foretell.layout import linear

RESULT = Path(__file__).parent / "results" / "recorded.json"
# Of the embedded model on two cores of a Xeon with AMX, eager, milliseconds, by width and by number of drafts.
COSTS = Costs(
    regular={1: 2.0, 2: 2.5, 3: 2.6, 5: 2.95, 9: 3.42},
    masked={2: 3.0, 5: 3.28, 9: 3.6, 12: 4.0, 16: 4.45, 25: 5.5, 45: 7.6, 81: 11.0},
    drafts={1: 0.42, 4: 0.6, 8: 1.1},
)
BOOKS, SOLUTION = 0.25, 1.3  # milliseconds: of a step that is planned, beside its work, and of a solution
NOISE, CHAINS = 0.05, 0.25  # deviations of the logarithms of steps and of chains
MASKS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Text:
    """new (n,) tokens after a prompt, and the block after each: drafts (n, k) and their confidences."""

    prompt: list[int]
    new: list[int]
    drafts: Tensor
    confidences: Tensor


@torch.inference_mode()
def record(model: MTPForCausalLM, prompt: Tensor, new: int, temperature: float) -> Text:
    """One text, decoded plainly, with all masks after every token."""
    config = DecodeConfig(max_new_tokens=new, temperature=temperature, strategy="adaptive", seed=1)
    tokens = model.generate(
        input_ids=prompt, strategy="autoregressive", max_new_tokens=new, temperature=temperature, seed=config.seed
    ).token_ids
    text = [*prompt[0].tolist(), *tokens]
    cache = StaticCache(len(model.base.blocks), len(text) + model.max_masks + 1)
    model.prefill(prompt[:, :-1], cache)
    cache.keep([prompt.shape[1] - 1])
    drafter, made = SamplerDrafter(model, config, Picker(config)), []
    for place in range(prompt.shape[1] - 1, len(text) - 1):
        latents = model.step(
            torch.tensor([text[place : place + 1]]), [linear(0, model.max_masks)], cache, cache.lengths
        )
        before = torch.tensor([[text[place + 1], text[place]]])
        made.append(drafter(latents[:, 1:], before, [0], [place], model.base.unembed(latents[:, 1:])))
        cache.keep([1])
    drafts, confidences = zip(*made, strict=True)
    return Text(
        prompt[0].tolist(), list(tokens), torch.cat(drafts), torch.cat([own for own in confidences if own is not None])
    )


class Clock:
    """Plays texts to strategies; `free`: planning takes no time."""

    def __init__(self, masks: int, seed: int = 0, free: bool = False) -> None:
        self.steps, self.drafting = COSTS.steps(masks), COSTS.drafting(masks)
        self.experience, self.pause, self.masks = Experience(masks), Pause(), masks
        self.planner = Planner(COSTS, self.experience)
        self.random, self.free, self.solutions = random.Random(seed), free, 0
        solve = self.planner.solve

        def counted() -> None:
            self.solutions += 1
            solve()

        self.planner.solve = counted  # type: ignore[method-assign]

    def adaptive(self) -> Strategy:
        """For a new text."""
        self.experience.begin_text()
        self.planner.begin_text()
        self.pause.begin_text(1)
        return Adaptive(lambda sequences: self.planner, self.experience, pause=self.pause)

    def play(self, text: Text, strategy: Strategy) -> float:
        """Milliseconds."""
        row = Running(0, len(text.new), list(text.prompt))
        at_hand: list[int] = []
        total, first = 0.0, True
        while row.remaining:
            solved = self.solutions
            (layout,) = aligned(strategy.layouts([row]), self.masks)
            tokens = text.new[row.place :][: layout.regular]
            held = 0
            while held < min(layout.regular - 1, len(at_hand), len(tokens) - 1) and at_hand[held] == tokens[held]:
                held += 1
            tokens = tokens[: held + 1]
            row.text += tokens
            row.place, row.remaining = row.place + len(tokens), row.remaining - len(tokens)
            strategy.decided(row, tokens)
            planned = isinstance(strategy, Adaptive) and not strategy.paused
            seconds = self.steps[layout.regular - 1, layout.masks] * self.random.lognormvariate(0, NOISE)
            seconds += 0.0 if self.free or not planned else BOOKS + SOLUTION * (self.solutions - solved)
            chain = 0.0
            if row.remaining:
                block = layout.block_rows(held)
                row.drafts = 0 if block is None else min(block.stop - block.start, row.remaining - 1)
                chain = self.drafting[row.drafts] * self.random.lognormvariate(0, CHAINS)
                place = slice(row.place - 1, row.place)
                own = text.drafts[place, : row.drafts], text.confidences[place, : row.drafts]
                drafts = strategy.drafted([row], own[0], own[1] if row.drafts else None)
                at_hand = drafts[0, : row.drafts].tolist()
                strategy.took(layout, None if first else seconds + chain, chain)
            total, first = total + seconds + chain, False
        return total


def gain(texts: Sequence[Text], clock: Clock, fixed: Strategy | None = None) -> float:
    """× plain decoding."""
    plain = sum(len(text.new) for text in texts) * clock.steps[0, 0]
    return float(plain / sum(clock.play(text, fixed or clock.adaptive()) for text in texts))


def passes(texts: Sequence[Text], clocks: Sequence[Clock]) -> list[float]:
    """The mean gain of adaptive decoding on these clocks, the first time over the texts and the second."""
    return [sum(gain(texts, clock) for clock in clocks) / len(clocks) for _ in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=32, help="texts of problems and of code")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    model = foretell.load()
    k = model.max_masks
    rows = []
    table = Table(title="× plain decoding; adaptive: first and second time over the texts")
    for column in ("texts", "temperature", "best linear", "adaptive", "planning free"):
        table.add_column(column)
    for temperature in (0.0, 1.0):
        sets = {"problems": load_prompts("problems", limit=args.limit), "code": load_prompts("code", limit=args.limit)}
        sets["chat"] = list(CHAT)
        texts = {
            name: [record(model, ids, args.new, temperature) for ids in encode_prompts(model, prompts, args.new, name)]
            for name, prompts in sets.items()
        }
        turns = zip(texts["problems"], texts["code"], texts["chat"] * 4, strict=False)
        texts["mixed"] = [text for turn in turns for text in turn]
        for name, own in texts.items():
            best, masks = max((gain(own, Clock(k), Fixed("linear", masks)), masks) for masks in MASKS)
            adaptive, free = (
                passes(own, [Clock(k, seed, free) for seed in range(args.seeds)]) for free in (False, True)
            )
            of_linear = {"masks": masks, "gain": best}
            row = {"texts": name, "temperature": temperature, "linear": of_linear, "adaptive": adaptive, "free": free}
            rows.append(row)
            cells = (" ".join(f"{value:.2f}" for value in values) for values in (adaptive, free))
            table.add_row(name, str(temperature), f"{best:.2f} ({masks} masks)", *cells)
    settings = {"limit": args.limit, "new": args.new, "seeds": args.seeds, "books_ms": BOOKS, "solution_ms": SOLUTION}
    args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()

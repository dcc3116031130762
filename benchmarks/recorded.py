"""The real strategies on recorded texts, with steps whose cost is known: what planning is worth, and what it costs.

Texts of the embedded model are decoded plainly once, with a block of drafts and its confidences recorded at every
place. On them the strategies then run as they are, singly and in batches, against a clock that adds up what their steps
took on one machine, so that a change of the planner shows within a percent in some minutes, on a machine as busy as it
likes. Writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from streams import CHAT
from torch import Tensor

import foretell
from foretell.cache import StaticCache
from foretell.config import DecodeConfig
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Experience
from foretell.decoding.costs import Costs, of_batch, plain_steps
from foretell.decoding.draft import SamplerDrafter
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pausing import Pause
from foretell.decoding.pick import Picker
from foretell.decoding.planner import Planner
from foretell.decoding.strategies import Fixed, Running, Strategy
from foretell.evaluation.measure import encode_prompts
from foretell.evaluation.prompts import load_prompts
from foretell.layout import linear
from foretell.rows import aligned

RESULT = Path(__file__).parent / "results" / "recorded.json"
NOISE, CHAINS = 0.05, 0.25  # deviations of the logarithms of steps and of chains
MASKS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Machine:
    """What steps of the embedded model take on two cores of it, eager: milliseconds."""

    costs: dict[int, Costs]  # by width and by number of drafts; of one sequence and of four
    books: float  # of a step that is planned, beside its work
    further: float  # of that for every further sequence
    solution: float
    reading: float  # of masks hung in the step that reads the prompt, more than in another


MACHINES = {
    "xeon": Machine(  # with AMX
        {
            1: Costs(
                regular={1: 2.0, 2: 2.5, 3: 2.6, 5: 2.95, 9: 3.42},
                masked={2: 3.0, 5: 3.28, 9: 3.6, 12: 4.0, 16: 4.45, 25: 5.5, 45: 7.6, 81: 11.0},
                drafts={1: 0.42, 4: 0.6, 8: 1.1},
            ),
            4: Costs(
                regular={1: 3.35, 2: 4.1, 3: 4.25, 5: 4.9, 9: 6.35},
                masked={2: 5.9, 5: 7.0, 9: 8.7, 12: 9.7, 16: 11.2, 25: 14.3, 45: 21.7, 81: 36.5},
                drafts={1: 0.7, 4: 1.25, 8: 2.25},
            ),
        },
        books=0.25,
        further=0.03,
        solution=1.3,
        reading=3.5,
    ),
    "avx2": Machine(  # an EPYC without AVX-512, at a restless hour
        {
            1: Costs(
                regular={1: 7.6, 2: 8.1, 3: 8.3, 5: 8.8, 9: 10.3},
                masked={2: 11.1, 5: 13.2, 9: 14.7, 12: 14.9, 16: 16.5, 25: 19.4, 45: 21.9, 81: 28.2},
                drafts={1: 1.1, 4: 2.0, 8: 2.9},
            ),
            4: Costs(
                regular={1: 9.6, 2: 11.4, 3: 11.8, 5: 15.7, 9: 19.2},
                masked={2: 17.3, 5: 23.5, 9: 27.4, 12: 29.4, 16: 34.4, 25: 46.5, 45: 63.8, 81: 101.0},
                drafts={1: 2.2, 4: 4.7, 8: 5.6},
            ),
        },
        books=0.7,
        further=0.08,
        solution=3.5,
        reading=5.0,
    ),
    "zen5": Machine(  # an EPYC with AVX-512 that multiplies bf16
        {
            1: Costs(
                regular={1: 1.48, 2: 1.52, 3: 1.55, 5: 1.65, 9: 1.9},
                masked={2: 2.15, 5: 2.42, 9: 2.8, 12: 3.2, 16: 3.45, 25: 4.45, 45: 6.7, 81: 9.4},
                drafts={1: 0.28, 4: 0.4, 8: 0.6},
            ),
            4: Costs(
                regular={1: 2.1, 2: 2.35, 3: 2.6, 5: 3.15, 9: 4.4},
                masked={2: 3.65, 5: 4.95, 9: 6.6, 12: 7.75, 16: 8.8, 25: 12.4, 45: 19.1, 81: 30.4},
                drafts={1: 0.3, 4: 0.6, 8: 0.85},
            ),
        },
        books=0.15,
        further=0.06,
        solution=1.1,
        reading=1.5,
    ),
}


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
    """Plays texts to strategies, up to four side by side; `free`: planning takes no time."""

    def __init__(self, machine: Machine, masks: int, seed: int = 0, free: bool = False) -> None:
        self.machine = machine
        self.tables = {size: of_batch(machine.costs, size) for size in range(1, max(machine.costs) + 1)}
        self.costs = {size: (table.steps(masks), table.drafting(masks)) for size, table in self.tables.items()}
        self.experience, self.pause, self.masks = Experience(masks), Pause(), masks
        self._planner, self._sequences = Planner(machine.costs[1], self.experience), 1
        self.random, self.free, self.solutions = random.Random(seed), free, 0
        solve = self._planner.solve

        def counted() -> None:
            self.solutions += 1
            solve()

        self._planner.solve = counted  # type: ignore[method-assign]

    def planner(self, sequences: int) -> Planner:
        if sequences != self._sequences:
            self._sequences = sequences
            self._planner.reprice(self.tables[sequences], plain_steps(self.machine.costs, sequences))
        return self._planner

    def adaptive(self, sequences: int) -> Strategy:
        """For so many new texts."""
        self.experience.begin_text(sequences)
        self.planner(sequences).begin_text()
        self.pause.begin_text(sequences)
        return Adaptive(self.planner, self.experience, pause=self.pause)

    def plain(self, texts: Sequence[Text]) -> float:
        """Milliseconds of plain decoding."""
        lengths = sorted(len(text.new) for text in texts)
        steps = zip(lengths, [0, *lengths], range(len(texts), 0, -1), strict=False)
        return sum(float((length - before) * self.costs[count][0][0, 0]) for length, before, count in steps)

    def play(self, texts: Sequence[Text], strategy: Strategy) -> float:
        """Milliseconds."""
        running = [Running(number, len(text.new), list(text.prompt)) for number, text in enumerate(texts)]
        at_hand: dict[int, list[int]] = {row.sequence: [] for row in running}
        total, first = 0.0, True
        while running:
            solved, sequences = self.solutions, len(running)
            layouts = aligned(strategy.layouts(running), self.masks)
            layout, left = layouts[0], []
            planned = isinstance(strategy, Adaptive) and not strategy.paused
            seconds = self.costs[sequences][0][layout.regular - 1, layout.masks] * self.random.lognormvariate(0, NOISE)
            seconds += self.machine.reading if first and layout.masks else 0.0
            if planned and not self.free:
                seconds += self.machine.books + self.machine.further * (sequences - 1)
                seconds += self.machine.solution * (self.solutions - solved)
            for row, own in zip(running, layouts, strict=True):
                tokens = texts[row.sequence].new[row.place :][: layout.regular]
                drafts = at_hand[row.sequence][: len(tokens) - 1]
                held = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafts, tokens, strict=False)))
                tokens = tokens[: held + 1]
                row.text += tokens
                row.place, row.remaining = row.place + len(tokens), row.remaining - len(tokens)
                strategy.decided(row, tokens)
                block = own.block_rows(held)
                row.drafts = 0 if block is None else min(block.stop - block.start, row.remaining - 1)
                left += [row] if row.remaining else []
            running = left
            chain = self._draft(running, texts, strategy, at_hand) if running else 0.0
            if running:
                strategy.took(layout, None if first else seconds + chain, chain)
            total, first = total + seconds + chain, False
        return total

    def _draft(
        self, running: list[Running], texts: Sequence[Text], strategy: Strategy, at_hand: dict[int, list[int]]
    ) -> float:
        """Puts the drafts to go on with into `at_hand`; milliseconds."""
        most = max(row.drafts for row in running)
        drafts, confidences = torch.zeros(len(running), most, dtype=torch.long), torch.zeros(len(running), most)
        for number, row in enumerate(running):
            text, place = texts[row.sequence], row.place - 1
            drafts[number, : row.drafts] = text.drafts[place, : row.drafts]
            confidences[number, : row.drafts] = text.confidences[place, : row.drafts]
        chosen = strategy.drafted(running, drafts, confidences if most else None).tolist()
        at_hand.update((row.sequence, own[: row.drafts]) for row, own in zip(running, chosen, strict=True))
        return float(self.costs[len(running)][1][most] * self.random.lognormvariate(0, CHAINS))


def gain(batches: Sequence[Sequence[Text]], clock: Clock, fixed: Strategy | None = None) -> float:
    """× plain decoding."""
    played = sum(clock.play(texts, fixed or clock.adaptive(len(texts))) for texts in batches)
    return sum(map(clock.plain, batches)) / played


def passes(batches: Sequence[Sequence[Text]], clocks: Sequence[Clock]) -> list[float]:
    """The mean gain of adaptive decoding on these clocks, the first time over the texts and the second."""
    return [sum(gain(batches, clock) for clock in clocks) / len(clocks) for _ in range(2)]


def batches_of(texts: dict[str, list[Text]], size: int) -> dict[str, list[list[Text]]]:
    """Each set in whole batches, and one of each set in turn."""
    found = {name: [own[at : at + size] for at in range(0, len(own) - size + 1, size)] for name, own in texts.items()}
    turns = zip(found["problems"], found["code"], found["chat"] * len(found["code"]), strict=False)
    return found | {"mixed": [batch for turn in turns for batch in turn]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=32, help="texts of problems and of code")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--batch", type=int, nargs="+", choices=range(1, 5), default=(1, 4))
    parser.add_argument("--machine", choices=MACHINES, default="xeon", help="whose costs the clock adds up")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    model = foretell.load()
    clock = partial(Clock, MACHINES[args.machine], model.max_masks)
    rows = []
    table = Table(title="× plain decoding; adaptive: first and second time over the texts")
    for column in ("texts", "batch", "temperature", "best linear", "adaptive", "planning free"):
        table.add_column(column)
    for temperature in (0.0, 1.0):
        sets = {"problems": load_prompts("problems", limit=args.limit), "code": load_prompts("code", limit=args.limit)}
        sets["chat"] = list(CHAT)
        texts = {
            name: [record(model, ids, args.new, temperature) for ids in encode_prompts(model, prompts, args.new, name)]
            for name, prompts in sets.items()
        }
        for size in args.batch:
            for name, batches in batches_of(texts, size).items():
                best, masks = max((gain(batches, clock(), Fixed("linear", masks)), masks) for masks in MASKS)
                adaptive, free = (
                    passes(batches, [clock(seed, free) for seed in range(args.seeds)]) for free in (False, True)
                )
                of_linear = {"masks": masks, "gain": best}
                row = {"texts": name, "batch": size, "temperature": temperature, "linear": of_linear}
                rows.append(row | {"adaptive": adaptive, "free": free})
                cells = (" ".join(f"{value:.2f}" for value in values) for values in (adaptive, free))
                table.add_row(name, str(size), str(temperature), f"{best:.2f} ({masks} masks)", *cells)
    settings = {
        "limit": args.limit,
        "new": args.new,
        "seeds": args.seeds,
        "machine": args.machine,
    }
    args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()

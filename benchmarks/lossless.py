"""Is the output the base's own? Every architecture, strategy, batch and kind of drafts against `generate()`, in fp32.

Tiny random models on a CPU, those of the tests: nothing is downloaded. Writes benchmarks/results/lossless.json and ends
with exit code 1 if a single token differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import foretell
from foretell.config import STRATEGIES
from foretell.decoding.generate import MTPForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the architectures are those of the tests

from tests.decoded import decode  # noqa: E402
from tests.fitted import fitted  # noqa: E402
from tests.models import CONFIGS, random_prompt, reference, tiny_model  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "lossless.json"
LENGTHS = (1, 7, 24, 40)  # of prompts; windows are of 16
# Drafts of a random adapter (nearly all are rejected), of one that knows the text by heart, and replayed ones, of which
# a known share holds.
DRAFTS = ("random", "fitted", "replayed")


@dataclass
class Count:
    """What one strategy came to: tokens compared and different, and steps of all sequences."""

    tokens: int = 0
    different: int = 0
    steps: int = 0

    def add(self, expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]], steps: int) -> None:
        self.steps += steps
        for wanted, got in zip(expected, found, strict=True):
            self.tokens += len(wanted)
            self.different += abs(len(wanted) - len(got)) + sum(a != b for a, b in zip(wanted, got, strict=False))


@dataclass
class Row:
    """One architecture with one kind of drafts."""

    architecture: str
    drafts: str
    batch: str  # single or ragged
    strategies: dict[str, Count] = field(default_factory=dict)
    distinct_tokens: int = 0  # in the expected texts: the same token over and over would prove little


def model_and_prompts(architecture: str, drafts: str) -> tuple[MTPForCausalLM, list[Tensor]]:
    if drafts != "fitted":
        return tiny_model(architecture), [random_prompt(length, seed=length) for length in LENGTHS]
    model, known = fitted(architecture)
    # Known text is continued with accepted drafts, unknown text with accepted and rejected ones.
    return model, [known, known[:, 5:17], *(random_prompt(length, seed=length) for length in LENGTHS[1:3])]


def compare(architecture: str, drafts: str, new: int) -> list[Row]:
    """A row for the prompts one by one, and one for all of them as a ragged batch."""
    model, prompts = model_and_prompts(architecture, drafts)
    expected = [reference(model.base.lm, prompt, new) for prompt in prompts]
    distinct = len(set().union(*expected))
    rows = []
    for batch, groups in (("single", [[i] for i in range(len(prompts))]), ("ragged", [list(range(len(prompts)))])):
        row = Row(architecture, drafts, batch, {strategy: Count() for strategy in STRATEGIES}, distinct)
        for strategy, group in ((strategy, group) for strategy in STRATEGIES for group in groups):
            wanted = [expected[i] for i in group]
            replayed = wanted if drafts == "replayed" else None
            out = decode(model, [prompts[i] for i in group], strategy, new, replayed)
            row.strategies[strategy].add(wanted, out.texts, out.steps)
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> Table:
    """A line per architecture: tokens compared and different, and tokens per step by strategy and kind of drafts."""
    drafting = [strategy for strategy in STRATEGIES if strategy != "autoregressive"]
    kinds = list(dict.fromkeys(row.drafts for row in rows))
    shown = Table(
        box=None,
        padding=(0, 2, 0, 0),
        caption=f"tokens per step with drafts: {' / '.join(kinds)}",
        caption_justify="left",
    )
    shown.add_column("architecture")
    for title in ("tokens", "different", *drafting):
        shown.add_column(title, justify="right", no_wrap=True)
    for architecture in dict.fromkeys(row.architecture for row in rows):
        own = [row for row in rows if row.architecture == architecture]
        counts = [count for row in own for count in row.strategies.values()]
        different = sum(count.different for count in counts)
        rates = []
        for strategy in drafting:
            of_kinds = [[row.strategies[strategy] for row in own if row.drafts == kind] for kind in kinds]
            rates.append(" / ".join(f"{sum(c.tokens for c in cs) / sum(c.steps for c in cs):.1f}" for cs in of_kinds))
        shown.add_row(
            architecture,
            str(sum(count.tokens for count in counts)),
            str(different),
            *rates,
            style="bold red" if different else "",
        )
    return shown


def result(rows: Sequence[Row], new: int, seconds: float) -> dict[str, Any]:
    counts = [count for row in rows for count in row.strategies.values()]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": sum(count.tokens for count in counts),
        "different": sum(count.different for count in counts),
        "architectures": len({row.architecture for row in rows}),
        "strategies": list(STRATEGIES),
        "max_new_tokens": new,
        "seconds": round(seconds),
        "dtype": "float32",
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "foretell": foretell.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [asdict(row) for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--architectures", nargs="+", choices=CONFIGS, default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, default=list(DRAFTS), metavar="KIND")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    start, rows = time.perf_counter(), []
    pairs = [(architecture, drafts) for architecture in options.architectures for drafts in options.drafts]
    for architecture, drafts in track(pairs, "comparing", console=Console(stderr=True), transient=True):
        rows += compare(architecture, drafts, options.max_new_tokens)
    values = result(rows, options.max_new_tokens, time.perf_counter() - start)
    options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console.width = 110
    console.print(table(rows))
    console.print(f"{values['tokens']} tokens compared, {values['different']} different; {options.output}")
    sys.exit(1 if values["different"] else 0)


if __name__ == "__main__":
    main()

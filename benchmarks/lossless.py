"""Is the output the base's own? Every architecture, strategy, batch and kind of drafts against `generate()`, in fp32.

Tiny random models on a CPU, those of the tests: nothing is downloaded. Writes benchmarks/results/lossless.json, with
`--packed WAY` lossless_packed.json, with `--compiled` lossless_compiled.json, after every architecture, and ends with
exit code 1 if a single token differs.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import foretell
from foretell.base import Base
from foretell.compiled import Form
from foretell.config import STRATEGIES
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generate import MTPForCausalLM
from foretell.packed import PackedLinear

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the architectures are those of the tests

from tests.decoded import count_compiled, decode  # noqa: E402
from tests.fitted import fitted  # noqa: E402
from tests.lying import WAYS, lying  # noqa: E402
from tests.models import CONFIGS, random_prompt, reference, tiny_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = (1, 7, 24, 40)  # of prompts; windows are of 16
# Drafts of a random adapter (nearly all are rejected), of one that knows the text by heart, and replayed ones, of which
# a known share holds.
DRAFTS = ("random", "fitted", "replayed")
FORMS = {Form(False, False): "one row", Form(True, False): "several rows", Form(True, True): "with masks"}


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
    eager: str | None = None  # why its steps were not compiled
    graphs: int = 0  # compiled for its blocks
    blocks_run: dict[str, int] = field(default_factory=dict)  # compiled, by the form of their step
    ways: dict[str, int] = field(default_factory=dict)  # packed products, by how their weights lie
    date: str = ""


def kept(path: Path, names: Sequence[str], new: int) -> tuple[list[Row], float]:
    """Rows of other architectures in an earlier result, and its seconds; nothing if all are named.

    Raises ValueError if that result is of another number of tokens.
    """
    if set(names) == set(CONFIGS) or not path.exists():
        return [], 0.0
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["max_new_tokens"] != new:
        made = earlier["max_new_tokens"]
        raise ValueError(f"{path} is of --max-new-tokens {made}: give the same, or another --output")
    rows = [row for row in earlier["rows"] if row["architecture"] not in names]
    for row in rows:
        row["strategies"] = {strategy: Count(**count) for strategy, count in row["strategies"].items()}
    return [Row(**row) for row in rows], earlier["seconds"]


def model_and_prompts(architecture: str, drafts: str) -> tuple[MTPForCausalLM, list[Tensor]]:
    if drafts != "fitted":
        return tiny_model(architecture), [random_prompt(length, seed=length) for length in LENGTHS]
    model, known = fitted(architecture)
    # Known text is continued with accepted drafts, unknown text with accepted and rejected ones.
    return model, [known, known[:, 5:17], *(random_prompt(length, seed=length) for length in LENGTHS[1:3])]


@torch.no_grad()
def rounded(model: MTPForCausalLM) -> None:
    """Gives all weights numbers of 16 bits, as published models have them."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def packed(model: MTPForCausalLM) -> MTPForCausalLM:
    """The same model, its base packed."""
    base = Base(copy.deepcopy(model.base.lm))
    base.pack(lambda: model.base.lm)
    other = MTPForCausalLM(base, model.config)
    for own, given in zip(other.own_parameters().values(), model.own_parameters().values(), strict=True):
        own.data.copy_(given)
    other.for_inference()
    return other


def compare(architecture: str, drafts: str, new: int, packing: bool, compiling: bool) -> list[Row]:
    """A row for the prompts one by one, and one for all of them as a ragged batch."""
    model, prompts = model_and_prompts(architecture, drafts)
    if packing:
        rounded(model)
    expected = [reference(model.base.lm, prompt, new) for prompt in prompts]
    distinct = len(set().union(*expected))
    model = packed(model) if packing or compiling else model
    eager = compile_steps(model) if compiling else None
    products = {module.product for module in model.base.modules() if isinstance(module, PackedLinear)}
    ways = dict(Counter(product.way for product in products))
    blocks = model.compiled.blocks if model.compiled else []
    graphs = len({id(graph) for block in blocks for graph in block.graphs.values()})
    ran = count_compiled(model)
    rows = []
    for batch, groups in (("single", [[i] for i in range(len(prompts))]), ("ragged", [list(range(len(prompts)))])):
        row = Row(architecture, drafts, batch, {strategy: Count() for strategy in STRATEGIES}, distinct, eager, graphs)
        row.ways = ways
        row.date = datetime.now(UTC).isoformat(timespec="seconds")
        for strategy, group in ((strategy, group) for strategy in STRATEGIES for group in groups):
            wanted = [expected[i] for i in group]
            replayed = wanted if drafts == "replayed" else None
            out = decode(model, [prompts[i] for i in group], strategy, new, replayed)
            row.strategies[strategy].add(wanted, out.texts, out.steps)
        row.blocks_run = {name: ran.pop(form) for form, name in FORMS.items() if form in ran}
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
    compiling = any(row.eager or row.graphs for row in rows)
    shown.add_column("architecture")
    for title in (*(["graphs"] if compiling else []), "tokens", "different", *drafting):
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
            *([str(own[0].graphs or "eager")] if compiling else []),
            str(sum(count.tokens for count in counts)),
            str(different),
            *rates,
            style="bold red" if different else "",
        )
    return shown


def result(rows: Sequence[Row], new: int, seconds: float) -> dict[str, Any]:
    """What is written: what was compared, with what, and the rows."""
    counts = [count for row in rows for count in row.strategies.values()]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": sum(count.tokens for count in counts),
        "different": sum(count.different for count in counts),
        "architectures": len({row.architecture for row in rows}),
        "compiled": len({row.architecture for row in rows if row.graphs}),
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
    parser.add_argument(
        "--architectures",
        nargs="+",
        choices=CONFIGS,
        default=list(CONFIGS),
        metavar="NAME",
        help="only these; rows of others stay in the result",
    )
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS, metavar="KIND", help="all; with --compiled: replayed")
    parser.add_argument("--packed", choices=(*WAYS, "streamed"), help="with packed bases of 16-bit numbers that lie so")
    parser.add_argument("--compiled", action="store_true", help="with packed bases, and compiled steps where possible")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    kind = "_compiled" if options.compiled else "_packed" if options.packed else ""
    path = options.output or RESULTS / f"lossless{kind}.json"
    start, new = time.perf_counter(), options.max_new_tokens
    try:
        rows, seconds = kept(path, options.architectures, new)
    except ValueError as error:
        parser.error(str(error))
    if options.packed:
        lying(options.packed, pytest.MonkeyPatch())  # tiny weights are multiplied fastest as stored
    kinds = options.drafts or (("replayed",) if options.compiled else DRAFTS)
    pairs = [(architecture, drafts) for architecture in options.architectures for drafts in kinds]
    for architecture, drafts in track(pairs, "comparing", console=Console(stderr=True), transient=True):
        rows += compare(architecture, drafts, new, bool(options.packed), options.compiled)
        rows.sort(key=lambda row: list(CONFIGS).index(row.architecture))
        values = result(rows, new, seconds + time.perf_counter() - start)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console.width = 110
    console.print(table(rows))
    for architecture, reason in {row.architecture: row.eager for row in rows if row.eager}.items():
        console.print(f"{architecture}: {reason}")
    console.print(f"{values['tokens']} tokens compared, {values['different']} different; {path}")
    sys.exit(1 if values["different"] else 0)


if __name__ == "__main__":
    main()

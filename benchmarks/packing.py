"""What packing does to the speed of training on short records: steps with and without it, in alternation.

The embedded base. Both forms have about the same records per step and mask blocks per token. Counted are tokens of the
records, never padding, and masks that have a label, per second of this process's processor time, which waits of a busy
machine leave alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from foretell.base import load_base
from foretell.checkpoint import load_tokenizer, write_text
from foretell.config import MTPConfig, TrainConfig
from foretell.decoding.generate import EMBEDDED
from foretell.model import MTPModel
from foretell.training.batches import Batches
from foretell.training.data import load_corpus
from foretell.training.packing import packed
from foretell.training.step import Stepper

RESULT = Path(__file__).parent / "results" / "packing.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="sources as training takes them")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--records", type=int, default=16, help="per step")
    parser.add_argument("--anchors-per-token", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=8, help="of each form")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = EMBEDDED.parent / "base"
    model = MTPModel(load_base(str(base)), MTPConfig(), load_tokenizer(str(base)))
    alone = load_corpus(args.data, model.tokenizer, args.seq_len).examples
    forms = {"alone": alone, "packed": packed(alone, args.seq_len)}
    batches, lengths = {}, {name: float(examples.lengths.mean()) for name, examples in forms.items()}
    for name, examples in forms.items():
        size = max(1, round(args.records * lengths["alone"] / lengths[name]))
        batches[name] = Batches(examples, size, max(1, round(args.anchors_per_token * lengths[name])), seed=0)
    stepper = Stepper(model, TrainConfig(seq_len=args.seq_len, steps=args.steps + 1))
    counted: dict[str, list[tuple[float, int, int, int]]] = {name: [] for name in forms}
    for number in range(args.steps + 1):
        for name, own in batches.items():
            start, batch = time.process_time(), own.batch(number)
            _, latents = stepper.step([batch], number)
            seconds = time.process_time() - start
            if number:
                real, masks = int(batch.real.sum()), int(latents.target.valid.sum())
                counted[name].append((seconds, real, batch.real.numel(), masks))
    result, table = {}, Table("form", "length", "sequences a step", "padding", "tokens/s", "masks/s")
    for name, steps in counted.items():
        seconds, real, columns, masks = (sum(column) for column in zip(*steps, strict=True))
        result[name] = {
            "mean_length": lengths[name], "sequences_per_step": batches[name].batch_size,
            "anchors_per_sequence": batches[name].anchors, "padding_share": 1 - real / columns,
            "tokens_per_second": real / seconds, "masks_per_second": masks / seconds,
            "median_tokens_per_second": statistics.median(r / s for s, r, _, _ in steps),
        }  # fmt: skip
        own_result = result[name]
        table.add_row(
            name, f"{lengths[name]:.0f}", str(batches[name].batch_size), f"{own_result['padding_share']:.1%}",
            f"{own_result['tokens_per_second']:.0f}", f"{own_result['masks_per_second']:.0f}",
        )  # fmt: skip
    options = {name: value for name, value in vars(args).items() if name not in ("data", "output")}
    options["data"] = [Path(source.split(":")[0]).name for source in args.data]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({"run": options, **result}, indent=1) + "\n", args.output)
    Console().print(table)


if __name__ == "__main__":
    main()

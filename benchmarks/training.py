"""Two-pass training against one pass over everything with the same anchors: tokens per second and peak memory.

A model of a well-known shape with random weights; a step is forward, losses and gradients (the optimiser's part is the
same for all). Speed alternates the forms in one process; memory is the peak of a process per form, over what the loaded
model takes. Writes JSON after every part.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foretell.base import Base
from foretell.checkpoint import write_text
from foretell.config import DTYPES, MTPConfig, TrainConfig
from foretell.decoding.generate import resolve_device
from foretell.errors import ForetellError
from foretell.evaluation.shapes import SHAPES, random_llama
from foretell.model import MTPModel
from foretell.training.batches import Batch, generator, make_batch
from foretell.training.data import Example
from foretell.training.step import Latents, all_losses, forward, make_plan
from foretell.training.two_pass import one_pass

RESULTS = Path(__file__).parent / "results"
FORMS = ("one pass", "two passes", "two passes, checkpointing")


class Steps:
    """Steps of either form on the same batch: one sequence of `tokens` with `anchors` blocks."""

    def __init__(self, args: argparse.Namespace, anchors: int) -> None:
        torch.manual_seed(0)
        device, self.dtype = resolve_device(args.device), getattr(torch, args.dtype)
        base = Base(random_llama(args.shape, self.dtype, device))
        self.model = MTPModel(base, MTPConfig(masks=args.masks, rank=args.rank), check=False)
        self.config = TrainConfig(dtype=args.dtype)
        ids = torch.randint(0, base.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(1))
        example = Example(ids, torch.ones(args.tokens, dtype=torch.bool))
        self.batch: Batch = make_batch([example] * args.batch, anchors, generator("benchmark")).to(device)

    def step(self, form: str) -> tuple[float, float]:
        """Seconds of the whole step, and of it the base's forward and backward; gradients are then thrown away."""
        start = self._now()
        with torch.autocast(self.model.base.device.type, self.dtype, enabled=self.dtype != torch.float32):
            latents = self._latents(form)
            forwarded = self._now()
            loss = all_losses(self.model, self.batch, latents, self.config)["loss"]
        computed = self._now()
        loss.backward()
        end = self._now()
        self.model.zero_grad(set_to_none=True)
        return end - start, end - computed + forwarded - start

    def _latents(self, form: str) -> Latents:
        if form != "one pass":
            return forward(self.model, self.batch, checkpointing=form.endswith("checkpointing"))
        plan = make_plan(self.model, self.batch)
        z, z_masks = one_pass(self.model, self.batch.ids, plan.anchors)
        return Latents(z_masks, z, plan.target, plan.anchors, plan.valid)

    def _now(self) -> float:
        if self.model.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Alternating rounds after a warm-up of each form; ratios are taken within a round."""
    steps = Steps(args, args.anchors)
    rounds: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    for number in range(args.rounds + 1):
        for form in FORMS:
            seconds = steps.step(form)
            if number:
                rounds[form].append(seconds)
        say(f"speed: round {number} of {args.rounds}")
    tokens, found = args.tokens * args.batch, {}
    for form, own in rounds.items():
        whole = [first / second for (first, _), (second, _) in zip(rounds["one pass"], own, strict=True)]
        base = [first / second for (_, first), (_, second) in zip(rounds["one pass"], own, strict=True)]
        found[form] = {
            "seconds": summary([seconds for seconds, _ in own]),
            "tokens_per_second": summary([tokens / seconds for seconds, _ in own]),
            "times_one_pass": summary(whole),
            "times_one_pass_without_losses": summary(base),
        }
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def peak(args: argparse.Namespace, form: str, anchors: int) -> int:
    """Bytes over the loaded model at the peak of one step, in a process of its own."""
    passed = ("shape", "dtype", "device", "tokens", "batch", "masks", "rank", "threads")
    options = [f"--{name}={getattr(args, name)}" for name in passed if getattr(args, name) is not None]
    command = [sys.executable, __file__, *options, f"--form={form}", f"--anchors={anchors}"]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def own_peak(args: argparse.Namespace) -> int:
    """What `peak` asks for, in this process. Needs Linux on a CPU, whose kernel keeps the high-water mark."""
    steps = Steps(args, args.anchors)
    if steps.model.base.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps.step(args.form)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    steps.step(args.form)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def show(result: dict[str, Any]) -> list[Table]:
    run = result["run"]
    title = f"{run['shape']}, {run['dtype']}, {run['batch']} × {run['tokens']} tokens, k = {run['masks']}"
    first = Table(title=f"{title}, {run['anchors']} anchors")
    for column in ("form", "seconds", "tokens/s", "× one pass", "without losses", "peak MiB", "of one pass"):
        first.add_column(column, justify="left" if column == "form" else "right")
    memory = result.get("memory", {})
    for form, own in result.get("speed", {}).items():
        bytes_ = memory.get(form, {}).get(str(run["anchors"]))
        whole = memory.get("one pass", {}).get(str(run["anchors"]))
        cells = [spread(own[name]) for name in list(own)]
        first.add_row(form, *cells, f"{bytes_ / 2**20:.0f}" if bytes_ else "", f"{bytes_ / whole:.2f}" if whole else "")
    second = Table(title="peak MiB over the loaded model by number of anchors")
    second.add_column("form")
    counts = next(iter(memory.values()), {})
    for count in counts:
        second.add_column(count, justify="right")
    for form, own in memory.items():
        second.add_row(form, *(f"{value / 2**20:.0f}" for value in own.values()))
    return [first, second]


def spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['least']:.2f}–{value['most']:.2f})"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="135M")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", help="cpu, cuda, ... [a GPU if there is one]")
    parser.add_argument("--threads", type=int, default=2, help="torch threads, one per core")
    parser.add_argument("--tokens", type=int, default=512, help="per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--anchors", type=int, help="mask blocks per sequence [a quarter of the tokens]")
    parser.add_argument("--masks", type=int, default=8, help="per block")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; the median counts")
    parser.add_argument("--part", choices=("all", "speed", "memory"), default="all", help="the other part is kept")
    parser.add_argument("--form", choices=FORMS, help="only print the peak bytes of one step of this form")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.anchors = args.anchors or args.tokens // 4
    if args.form:
        print(own_peak(args))
        return
    named = ("shape", "dtype", "threads", "tokens", "batch", "anchors", "masks", "rank", "rounds")
    run = {name: getattr(args, name) for name in named}
    device = resolve_device(args.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.part != "all" and args.output.exists() else {}
    result["run"] = {**run, "device": device.type, "hardware": hardware, "torch": torch.__version__}

    def write() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(result, indent=1) + "\n", args.output)

    if args.part != "memory":
        result["speed"] = speed(args)
        write()
    if args.part != "speed":
        memory = result["memory"] = {form: {} for form in FORMS}
        for form in FORMS:
            for count in (args.anchors // 4, args.anchors // 2, args.anchors):
                memory[form][str(count)] = peak(args, form, count)
                write()
                say(f"memory: {form}, {count} anchors: {memory[form][str(count)] / 2**20:.0f} MiB")
    for table in show(result):
        Console(width=max(140, Console().width)).print(table)


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"training.py: {error}")

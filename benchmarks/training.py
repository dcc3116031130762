"""Two-pass training against one pass over everything with the same anchors: tokens per second and peak memory.

A model of a well-known shape with random weights; a step is forward, losses and gradients (the optimiser's part is the
same for all). Speed alternates the forms in one process; memory is the peak of a process per form, over what the loaded
model takes. With fewer `--layers`, seconds are also told for the shape's own depth: what a layer takes, and what the
losses take, which have no layers. Adds to the JSON after every part; a setting measured again is replaced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foretell.base import Base, resolve_device
from foretell.checkpoint import write_text
from foretell.config import DTYPES, MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.evaluation.random_models import SHAPES, random_llama
from foretell.grouped_attention import grouped
from foretell.hardware import device_name
from foretell.model import MTPModel
from foretell.training.batches import Batch, generator, make_batch
from foretell.training.data import Example
from foretell.training.losses import Totals
from foretell.training.step import Latents, Stepper, all_losses, make_plan
from foretell.training.two_pass import anchor_groups, groups_needed, one_pass

RESULTS = Path(__file__).parent / "results"
FORMS = ("one pass", "one pass, checkpointing", "two passes", "two passes, smaller groups")


class Steps:
    """Steps of either form on the same batch: one sequence of `tokens` with `anchors` blocks."""

    def __init__(self, args: argparse.Namespace, anchors: int) -> None:
        torch.manual_seed(0)
        device, dtype = resolve_device(args.device), getattr(torch, args.dtype)
        lm = random_llama(args.shape, dtype, device)
        self.depth = len(lm.model.layers)
        del lm.model.layers[args.layers :]
        lm.config.num_hidden_layers = self.layers = len(lm.model.layers)
        self.model = MTPModel(Base(lm), MTPConfig(masks=args.masks, rank=args.rank), check=False)
        self.steppers = {
            form: Stepper(self.model, TrainConfig(dtype=args.dtype, masks_at_once=64 if "smaller" in form else None))
            for form in FORMS
        }
        ids = torch.randint(0, self.model.base.vocab_size, (args.tokens,), generator=torch.Generator().manual_seed(1))
        example = Example(ids, torch.ones(args.tokens, dtype=torch.bool))
        self.batch: Batch = make_batch([example] * args.batch, anchors, generator("benchmark")).to(device)
        self.plan = make_plan(self.model, self.batch)
        self.weights = torch.ones(args.masks, device=device)
        self.totals = Totals.of(self.plan.target, self.batch.trained, self.weights)

    def step(self, form: str) -> tuple[float, float]:
        """Seconds of the whole step and of its losses; gradients are then thrown away."""
        start, stepper = self._now(), self.steppers[form]
        if form.startswith("one"):
            losses = self._one_pass(stepper, checkpointing="," in form)
        else:
            groups = groups_needed(self.model, self.plan.anchors, stepper.config.masks_at_once)
            _, latents = stepper.gradients(self.batch, self.plan, self.weights, self.totals, groups)
        end = self._now()
        if not form.startswith("one"):
            losses = self._losses_again(stepper, latents, groups)
        self.model.zero_grad(set_to_none=True)
        return end - start, losses

    def _losses_again(self, stepper: Stepper, latents: Latents, groups: int) -> float:
        """Seconds of the losses of a step in two passes, which takes them group by group."""
        start = self._now()
        for which in anchor_groups(latents.anchors.shape[1], groups):
            plan = self.plan.of_blocks(which)
            z_masks = latents.z_masks[:, which].clone().requires_grad_()
            part = Latents(z_masks, latents.z, plan.target, plan.anchors, plan.valid)
            with stepper.autocast():
                all_losses(self.model, self.batch, part, stepper.config, self.weights, self.totals)
        return self._now() - start

    def _one_pass(self, stepper: Stepper, checkpointing: bool) -> float:
        """Checkpointed, if at all, by layer, as transformers does it; the layers' second run needs the gate open."""
        base, (anchors, valid, _, target, _) = self.model.base, self.plan
        tokens, masks = self.batch.ids.shape[1], anchors.shape[1] * self.model.max_masks
        if checkpointing:
            base.lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            base.lm.train()
        with stepper.autocast():
            z, z_masks = one_pass(self.model, self.batch.ids, anchors)
            latents, forwarded = Latents(z_masks, z, target, anchors, valid), self._now()
            loss = all_losses(self.model, self.batch, latents, stepper.config, self.weights, self.totals)["loss"]
        losses = self._now() - forwarded
        with self.model.adapter.open(tokens, tokens + masks), grouped(base.text_config):
            loss.backward()
        base.lm.gradient_checkpointing_disable()
        base.lm.eval()
        return losses

    def _now(self) -> float:
        if self.model.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Alternating rounds after a warm-up; ratios are taken within a round."""
    steps = Steps(args, args.anchors)
    rounds: dict[str, list[tuple[float, float]]] = {form: [] for form in args.forms}
    steps.step(args.forms[-1])
    for number in range(1, args.rounds + 1):
        for form in args.forms:
            rounds[form].append(steps.step(form))
        say(f"speed: round {number} of {args.rounds}")
    tokens, found = args.tokens * args.batch, {}
    deeper = steps.depth / steps.layers
    deep = {form: [losses + deeper * (whole - losses) for whole, losses in own] for form, own in rounds.items()}
    for form, own in rounds.items():
        found[form] = {
            "seconds": summary([whole for whole, _ in own]),
            "of_them_losses": summary([losses for _, losses in own]),
            "seconds_at_full_depth": summary(deep[form]),
            "tokens_per_second": summary([tokens / whole for whole in deep[form]]),
        }
        against = FORMS[1] if "," in form else FORMS[0]  # like with like
        for name, other in (("times_one_pass", FORMS[0]), ("times_one_pass_alike", against)):
            times = [first / second for first, second in zip(deep.get(other, []), deep[form], strict=False)]
            if times:
                found[form][name] = summary(times)
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def peak(args: argparse.Namespace, form: str, anchors: int) -> int:
    """Bytes over the loaded model at the peak of one step, in a process of its own."""
    passed = ("shape", "layers", "dtype", "device", "tokens", "batch", "masks", "rank", "threads")
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


def show(run: dict[str, Any]) -> list[Table]:
    title = f"{run['shape']} ({run['layers']} layers), {run['dtype']}, {run['batch']} × {run['tokens']} tokens"
    first = Table(title=f"{title}, {run['anchors']} anchors, k = {run['masks']}")
    columns = {
        "seconds": "seconds", "at full depth": "seconds_at_full_depth", "tokens/s": "tokens_per_second",
        "× one pass": "times_one_pass", "like with like": "times_one_pass_alike",
    }  # fmt: skip
    for column in ("form", *columns, "peak MiB", "of one pass"):
        first.add_column(column, justify="left" if column == "form" else "right")
    memory, most = run.get("memory", {}), str(run["anchors"])
    for form, own in run.get("speed", {}).items():
        bytes_, whole = (memory.get(name, {}).get(most) for name in (form, FORMS[0]))
        cells = [spread(own[name]) if name in own else "" for name in columns.values()]
        first.add_row(
            form, *cells, f"{bytes_ / 2**20:.0f}" if bytes_ else "", f"{bytes_ / whole:.2f}" if bytes_ and whole else ""
        )
    second = Table(title="peak MiB over the loaded model by number of anchors")
    second.add_column("form")
    for count in next(iter(memory.values()), {}):
        second.add_column(count, justify="right")
    for form, own in memory.items():
        second.add_row(form, *(f"{value / 2**20:.0f}" for value in own.values()))
    return [first, second]


def spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['least']:.2f}–{value['most']:.2f})"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # the checkpointing's new name is newer than our oldest
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="135M")
    parser.add_argument("--layers", type=int, help="only so many of them, where memory or time forbids all [all]")
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
    parser.add_argument("--counts", type=int, nargs="+", help="anchors whose peak is measured [1/4, 1/2 and all]")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="those to measure [all]")
    parser.add_argument("--form", choices=FORMS, help="only print the peak bytes of one step of this form")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.anchors = args.anchors or args.tokens // 4
    args.layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    if args.form:
        print(own_peak(args))
        return
    named = ("shape", "layers", "dtype", "threads", "tokens", "batch", "anchors", "masks", "rank", "rounds")
    device = resolve_device(args.device)
    hardware = device_name(device)
    result = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    name = (
        f"{args.shape}, {args.layers} layers, {args.dtype}, {args.batch} x {args.tokens} tokens, {args.anchors} anchors"
    )
    run = result.setdefault(name, {}) | {option: getattr(args, option) for option in named}
    result[name] = run | {"device": device.type, "hardware": hardware, "torch": torch.__version__}
    run = result[name]

    def write() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(result, indent=1) + "\n", args.output)

    if args.part != "memory":
        run["speed"] = speed(args)
        write()
    if args.part != "speed":
        memory = run["memory"] = {form: {} for form in args.forms}
        for form in args.forms:
            for count in args.counts or (args.anchors // 4, args.anchors // 2, args.anchors):
                memory[form][str(count)] = peak(args, form, count)
                write()
                say(f"memory: {form}, {count} anchors: {memory[form][str(count)] / 2**20:.0f} MiB")
    for table in show(run):
        Console(width=max(140, Console().width)).print(table)


if __name__ == "__main__":
    try:
        main()
    except ForetellError as error:
        sys.exit(f"training.py: {error}")

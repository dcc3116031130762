"""What one step costs against its width, and what each part of it outside the base's forward costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foretell.cache import StaticCache
from foretell.decoding.draft import draft
from foretell.decoding.pick import first_largest
from foretell.decoding.verify import decide
from foretell.errors import ForetellError
from foretell.evaluation.report import Spread
from foretell.layout import Layout, linear, plain, quadratic
from foretell.model import MTPModel, step_attention

Task = Callable[[], object]
PLAIN = "plain"
SHORTLISTS = (32, 64, 128)  # tokens per mask that a cheap sampler chain chooses among


@dataclass(frozen=True)
class Timing:
    """Seconds of one task over rounds, and its ratio to the baseline's within the same round."""

    seconds: Spread
    ratio: Spread

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def strategy_layouts(masks: int) -> dict[str, Layout]:
    """The steady steps of plain decoding and of both strategies with 1 to `masks` masks, drafts all at hand."""
    layouts = {PLAIN: plain()}
    for k in range(1, masks + 1):
        layouts[f"linear {k}"] = linear(k, k)
        layouts[f"quadratic {k}"] = quadratic(k, k)
    return layouts


def alternate(tasks: Mapping[str, Task], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every task in every round: all in turn, so that a disturbance meets them all; one round warms up.

    Raises ForetellError for less than one round.
    """
    if rounds < 1:
        raise ForetellError(f"rounds must be at least 1, not {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = now(device)
            task()
            spent = now(device) - start
            if number:
                seconds[name].append(spent)
    return seconds


def timings(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Timing]:
    """Medians and spreads of what `alternate` found."""
    reference = seconds[baseline]
    return {
        name: Timing(Spread.of(values), Spread.of([own / base for own, base in zip(values, reference, strict=True)]))
        for name, values in seconds.items()
    }


def now(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StepBench:
    """Steps over a cache of random keys and values, `context` tokens long.

    In a batch every sequence has another length, as after a few steps of decoding.
    Raises ForetellError if the batch is empty or the context has no room for its different lengths.
    """

    @torch.inference_mode()
    def __init__(self, model: MTPModel, context: int, batch: int = 1) -> None:
        if not 1 <= batch <= context:
            raise ForetellError(f"batch must be 1 to the context's {context} tokens, not {batch}")
        self.model = model
        self.batch = batch
        self.device = model.base.device
        self.lengths = [context - row for row in range(batch)]
        self.cache = StaticCache(len(model.base.blocks), context + (model.max_masks + 1) ** 2, batch)
        self.cache.keep(self.lengths)
        self.forward(plain())  # allocates
        for layer in self.cache.layers:
            layer.keys.normal_()  # arithmetic on zeros may be faster than on what a text leaves there
            layer.values.normal_()

    def ids(self, tokens: int) -> Tensor:
        """(B, tokens) int64."""
        return torch.arange(self.batch * tokens, device=self.device).view(self.batch, tokens) % 97

    def latents(self, rows: int) -> Tensor:
        """(B, rows, D), random."""
        return torch.randn(self.batch, rows, self.model.base.d_model, device=self.device, dtype=self.model.base.dtype)

    def forward(self, layout: Layout) -> Tensor:
        """The model's forward over a layout, mask building included -> (B, Q, D)."""
        return self.model.step(self.ids(layout.regular), [layout] * self.batch, self.cache, self.lengths)

    def step(self, layout: Layout) -> list[list[int]]:
        """All of a step but the drafting: forward, the base's choices, verification, and their way to the host."""
        choices = self.choices(self.forward(layout)[:, : layout.regular])
        return decide(self.ids(layout.regular)[:, 1:], choices)

    def choices(self, latents: Tensor) -> Tensor:
        """(B, R, D) -> the base's choices (B, R)."""
        return first_largest(self.model.base.unembed(latents).float())

    @torch.inference_mode()
    def steps(self, layouts: Mapping[str, Layout], rounds: int, *, forward_only: bool = False) -> dict[str, Timing]:
        """Seconds of `step`, or of `forward` alone, by layout; ratios are to the layout called PLAIN."""
        run: Callable[[Layout], object] = self.forward if forward_only else self.step
        tasks: dict[str, Task] = {name: partial(run, layout) for name, layout in layouts.items()}
        return timings(alternate(tasks, self.device, rounds), PLAIN)

    @torch.inference_mode()
    def parts(self, layouts: Mapping[str, Layout], rounds: int) -> dict[str, Timing]:
        """Seconds of what stands outside the base's blocks; ratios are to a plain step, PLAIN.

        "unembed R": logits and choices of R rows; "verify R": accepted drafts and choices of R rows, brought to the
        host; "chain k, exact" or "chain k, m": drafts of k masks by the sampler, over the whole vocabulary or a
        shortlist of m; "rescore k, m": the same where the masks' logits were read along with the regular rows';
        "masks ...": positions and attention mask of a layout.
        """
        model, k = self.model, self.model.max_masks
        tasks: dict[str, Task] = {PLAIN: partial(self.step, plain())}
        for rows in (*range(1, k + 2), 2 * k + 1, 3 * k + 1, 4 * k + 1):
            tasks[f"unembed {rows}"] = partial(self.choices, self.latents(rows))
        for rows in range(1, k + 2):
            tasks[f"verify {rows}"] = partial(decide, self.ids(rows)[:, 1:], self.ids(rows))
        for masks in range(1, k + 1):
            z = self.latents(masks)
            chain = partial(draft, model, z, self.ids(2))
            tasks[f"chain {masks}, exact"] = chain
            for m in SHORTLISTS:
                tasks[f"chain {masks}, {m}"] = partial(chain, shortlist=m)
                tasks[f"rescore {masks}, {m}"] = partial(chain, shortlist=m, logits=model.base.unembed(z))
        for name, layout in layouts.items():
            tasks[f"masks {name}"] = partial(step_attention, [layout] * self.batch, self.lengths, model.base)
        return timings(alternate(tasks, self.device, rounds), PLAIN)

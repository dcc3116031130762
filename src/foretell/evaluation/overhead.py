"""Where the time and the memory of a decoding step go: the base's own forward, and everything else."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from foretell import mapped
from foretell.attended import Past
from foretell.attention import AttentionMask
from foretell.base import Base
from foretell.cache import StaticLayer
from foretell.config import DecodeConfig
from foretell.decoding import loop
from foretell.decoding.draft import Drafter, SamplerDrafter
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pick import Picker
from foretell.errors import ForetellError
from foretell.evaluation.step_cost import StepBench, alternate, now
from foretell.layout import plain, quadratic
from foretell.lean import LeanSteps
from foretell.model import MTPModel
from foretell.packed import PackedLinear
from foretell.packed_rows import RoundRows
from foretell.rows import Rows

FORWARD, UNEMBED, DRAFT = "forward", "unembed", "draft"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Bytes. `working` is what decoding took at its peak beyond the weights, the cache included."""

    base: int
    adapter: int  # all parameters of ours
    cache: int
    working: int

    @property
    def ratio(self) -> float:
        """Peak over base + adapter + cache."""
        return (self.base + self.adapter + self.working) / (self.base + self.adapter + self.cache)


@dataclass(frozen=True)
class Overhead:
    """Quadratic steps of the real loop. Milliseconds are medians over steps; the share is the median of the steps'.

    On CUDA every part waits for the device, so that nothing overlaps.
    """

    masks: int
    shortlist: int
    context: int
    steps: int
    step_ms: float
    forward_ms: float  # the base's blocks over all rows, the adapter's work in them included
    adapter_ms: float  # of it, measured apart: the same forward with the gate open, less with it closed
    unembed_ms: float  # the base's logits at the regular rows
    draft_ms: float  # the sampler chain
    rest_ms: float  # masks and positions, embedding, verification, bookkeeping
    outside_share: float  # of the step, what neither forward nor unembed took
    outside_share_strict: float  # the same, with adapter and unembed counted as outside
    memory: Memory | None  # None where it can't be measured; of a second text
    first_memory: Memory | None  # of the first, for which oneDNN makes kernels and the adapter its copies

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for name, memory in (("memory", self.memory), ("first_memory", self.first_memory)):
            if memory:
                values[name]["ratio"] = memory.ratio
        return values


class Stopwatch:
    """Seconds spent in named sections since the last `take`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spent: dict[str, float] = {}
        self._start = now(device)
        self._open: str | None = None

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Within another section nothing is counted: its time belongs to that one."""
        if self._open:
            yield
            return
        self._open, start = name, now(self.device)
        try:
            yield
        finally:
            self._open = None
            self._spent[name] = self._spent.get(name, 0.0) + now(self.device) - start

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds in all and by section since the last call."""
        end = now(self.device)
        result = end - self._start, self._spent
        self._start, self._spent = end, {}
        return result


class TimedDrafter:
    """Another drafter on the stopwatch."""

    def __init__(self, drafter: Drafter, watch: Stopwatch) -> None:
        self.drafter = drafter
        self.watch = watch

    def __call__(
        self,
        latents: Tensor,
        before: Tensor,
        sequences: Sequence[int],
        places: Sequence[int],
        logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        with self.watch.section(DRAFT):
            return self.drafter(latents, before, sequences, places, logits)


class TimedLean(LeanSteps):
    """A base's lean steps on the stopwatch."""

    def __init__(self, lean: LeanSteps, watch: Stopwatch) -> None:
        self.__dict__.update(lean.__dict__)
        self.watch = watch

    def latents(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: AttentionMask | None,
        cache: Cache,
        rows: Rows | None = None,
    ) -> Tensor:
        with self.watch.section(FORWARD):
            return super().latents(embeddings, positions, mask, cache, rows)

    def attended(self, embeddings: Tensor, past: Past, layers: Sequence[StaticLayer]) -> Tensor:
        with self.watch.section(FORWARD):
            return super().attended(embeddings, past, layers)


@contextmanager
def watched(model: MTPModel, watch: Stopwatch) -> Iterator[None]:
    """Puts the base's blocks and its unembedding on the stopwatch."""
    handles, sections, lean = [], [], model.base.lean
    decoder = [(model.base.decoder, FORWARD)] if lean is None else []  # its hooks would keep lean steps from running
    for module, name in (*decoder, (model.base.head, UNEMBED)):

        def enter(*_: Any, name: str = name) -> None:
            sections.append(watch.section(name))
            sections[-1].__enter__()

        def leave(*_: Any) -> None:
            sections.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        if lean is not None:
            model.base.lean = TimedLean(lean, watch)
        yield
    finally:
        model.base.lean = lean
        for handle in handles:
            handle.remove()


def overhead(
    model: MTPForCausalLM, *, masks: int = 4, shortlist: int = 0, context: int = 256, steps: int = 24, rounds: int = 10
) -> Overhead:
    """Profiles quadratic decoding of one random prompt of `context` tokens.

    The adapter should be untrained: hardly a draft then holds, and every token is one step.
    Raises ForetellError for settings that do not fit the model, or too few steps for one in full width.
    """
    new = steps + 2 * masks + 2
    config = model.decode_config(
        {"strategy": "quadratic", "masks": masks, "shortlist": shortlist, "max_new_tokens": new}
    )
    prompt = torch.randint(0, model.base.vocab_size, (context,), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(model.base.device)
    columns = context + new + (masks + 1) ** 2
    memories = []
    for _ in range(2):
        held = held_bytes(model.base)
        with measured_peak(model.base.device) as peak:
            for _ in loop.steps(model, [prompt], config, Picker(config)):
                pass
        memories.append(memory(model, columns, peak, held))
    taken = profiled_steps(model, prompt, config, masks)
    if not taken:
        raise ForetellError(f"no step of {steps} had its full width; profile more steps, or an untrained adapter")
    adapter = adapter_seconds(model, masks, context, rounds)
    parts = {name: [spent.get(name, 0.0) for _, spent in taken] for name in (FORWARD, UNEMBED, DRAFT)}
    totals = [total for total, _ in taken]
    inside = [forward + unembed for forward, unembed in zip(parts[FORWARD], parts[UNEMBED], strict=True)]
    rest = [total - own - made for total, own, made in zip(totals, inside, parts[DRAFT], strict=True)]
    base = [forward - adapter for forward in parts[FORWARD]]
    return Overhead(
        masks=masks,
        shortlist=shortlist,
        context=context,
        steps=len(taken),
        step_ms=milliseconds(totals),
        forward_ms=milliseconds(parts[FORWARD]),
        adapter_ms=1000 * adapter,
        unembed_ms=milliseconds(parts[UNEMBED]),
        draft_ms=milliseconds(parts[DRAFT]),
        rest_ms=milliseconds(rest),
        outside_share=statistics.median(1 - own / total for own, total in zip(inside, totals, strict=True)),
        outside_share_strict=statistics.median(1 - own / total for own, total in zip(base, totals, strict=True)),
        memory=memories[1],
        first_memory=memories[0],
    )


def milliseconds(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def profiled_steps(
    model: MTPForCausalLM, prompt: Tensor, config: DecodeConfig, masks: int
) -> list[tuple[float, dict[str, float]]]:
    """Seconds in all and by part of every step at its full width."""
    watch, picker = Stopwatch(model.base.device), Picker(config)
    drafter = TimedDrafter(SamplerDrafter(model, config, picker), watch)
    taken = []
    with watched(model, watch):
        for (step,) in loop.steps(model, [prompt], config, picker, drafter=drafter):
            spent = watch.take()
            if step.layout == quadratic(masks, masks):
                taken.append(spent)
    return taken


@torch.inference_mode()
def adapter_seconds(model: MTPModel, masks: int, context: int, rounds: int) -> float:
    """What the open gate adds to the forward of a quadratic step: one of as many tokens leaves it closed."""
    bench, layout = StepBench(model, context), quadratic(masks, masks)
    tokens = plain(layout.width)
    found = alternate(
        {"open": lambda: bench.forward(layout), "closed": lambda: bench.forward(tokens)}, bench.device, rounds
    )
    return statistics.median(o - c for o, c in zip(found["open"], found["closed"], strict=True))


def held_bytes(base: Base) -> int:
    """What its weights take in memory now; of those that are mapped, the pages that were read."""
    linears = [m for m in base.modules() if isinstance(m, PackedLinear)]
    bytes_each = {"halves": 2, "streamed": 2}  # of a number
    packed = sum(
        m.in_features * m.out_features * bytes_each.get(m.product.way, base.dtype.itemsize)
        for m in linears
        if m.product.weight is not m.kept
    )
    kept = [m.kept for m in linears if m.kept is not None]
    kept += [m.read.rounded for m in linears if isinstance(m.read, RoundRows)]
    weights = {id(weight): weight for weight in (*base.parameters(), *kept)}.values()
    size, there = mapped.resident(weights)
    return sum(weight.nbytes for weight in weights) - size + there + packed


def memory(model: MTPModel, columns: int, peak: list[int], held: int) -> Memory | None:
    """For a cache of that many columns and weights that held so many bytes before; None if no peak was measured."""
    if not peak:
        return None
    config = model.base.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = model.base.dtype.itemsize
    base = model.base.parameter_count * size
    return Memory(
        base=base,
        adapter=sum(p.numel() * p.element_size() for p in model.own_parameters().values()),
        cache=2 * config.num_hidden_layers * heads * width * columns * size,
        working=peak[0] + max(0, held - base),
    )


@contextmanager
def measured_peak(device: torch.device) -> Iterator[list[int]]:
    """The list then holds the bytes allocated at the peak beyond those before; it stays empty where none can tell.

    On a CPU they are the process's resident pages, which Linux counts.
    """
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    mapped.give_back()  # what an earlier run freed would hide what this one takes
    try:
        CLEAR.write_text("5", encoding="ascii")  # the peak starts anew from what is resident now
        before = resident("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.append(resident("VmHWM") - before)


def resident(key: str) -> int:
    """Bytes of an entry of this process's status. Raises OSError where there is none."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")

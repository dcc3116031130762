"""Seconds of a step by its width, measured once on the machine that decodes and kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretell import __version__
from foretell.cache import StaticCache
from foretell.config import DecodeConfig
from foretell.decoding.calibration import Floats
from foretell.decoding.draft import draft, reads_along, shortlist_size
from foretell.decoding.pick import Picker
from foretell.hardware import device_name
from foretell.layout import Block, Layout, linear, plain
from foretell.model import MTPModel
from foretell.rows import Rows, aligned

CONTEXT = 256  # tokens in the cache while steps are timed
REGULAR_WIDTHS = (1, 2, 3, 5, 9)
MASKED_WIDTHS = (2, 3, 4, 5, 7, 9, 12, 16, 20, 25, 33, 45, 61, 81)
ROUNDS = 7
BUDGET = 20.0  # seconds; at least two rounds are timed whatever they take
UNTIMED = 1.08  # of a step with masks: planning, learning and moving drafts about, which are not timed here
CHECKED_WIDTHS = (1, 9, 25)  # timed again before a file is believed: it may stem from a busier or quieter hour
TOLERANCE = 0.15  # of their ratios


@dataclass(frozen=True)
class Costs:
    """Seconds of a step without masks and with masks, by width Q, and of the sampler chain, by masks.

    Each is a table {width: seconds}: interpolated between its entries, beyond them extrapolated by the last slope. Of
    several sequences the width is their mean.
    """

    regular: dict[float, float]
    masked: dict[float, float]
    drafts: dict[float, float]

    def scaled(self, factor: float) -> Costs:
        """All so many times as dear."""
        return Costs(
            **{kind: {width: factor * value for width, value in table.items()} for kind, table in asdict(self).items()}
        )

    def steps(self, masks: int) -> Floats:
        """(k+1, k(k+1)+1): seconds of a step that verifies d drafts and hangs M masks."""
        drafts, hung = np.arange(masks + 1)[:, None], np.arange(masks * (masks + 1) + 1)[None, :]
        seconds = interpolated(self.masked, drafts + 1 + hung)
        seconds[:, 0] = interpolated(self.regular, drafts[:, 0] + 1)
        return seconds

    def by_rows(self, sequences: int, masks: int) -> tuple[Floats, Floats]:
        """Seconds of steps without and with masks by their rows in all, beyond one of each sequence."""
        widths = np.arange(sequences, sequences * (masks + 1) ** 2 + 1) / sequences
        return interpolated(self.regular, widths), interpolated({1: self.regular[1] * UNTIMED, **self.masked}, widths)

    def drafting(self, masks: int) -> Floats:
        """(k+1,): seconds of making n drafts."""
        return interpolated({0: 0.0, **self.drafts}, np.arange(masks + 1))


class Priced(NamedTuple):
    """What steps of a number of sequences cost, as tables for blocks of up to k masks."""

    costs: Costs
    steps: Floats  # (k+1, k(k+1)+1) seconds, by drafts and masks
    drafting: Floats  # (k+1,) seconds, by drafts
    shares: list[float]  # (n,): of a plain step, that the nth sequence adds, 1 on average

    @classmethod
    def of(cls, costs: Costs, plain: Floats, masks: int) -> Self:
        shares = np.maximum(np.diff(plain, prepend=0.0), 0.0) * len(plain) / plain[-1]
        return cls(costs, costs.steps(masks), costs.drafting(masks), shares.tolist())


def of_batch(tables: Mapping[int, Costs], sequences: int) -> Costs:
    """What so many sequences cost together, from what the numbers in `tables` do, between which it lies."""
    below = max(size for size in tables if size <= sequences)
    above = min(size for size in tables if size >= sequences)
    if below == above:
        return tables[below]
    share = (sequences - below) / (above - below)

    def between(kind: str) -> dict[float, float]:
        one, other = getattr(tables[below], kind), getattr(tables[above], kind)
        return {width: (1 - share) * one[width] + share * other[width] for width in one if width in other}

    return Costs(between("regular"), between("masked"), between("drafts"))


def plain_steps(tables: Mapping[int, Costs], sequences: int) -> Floats:
    """(n,): seconds of plain steps of 1, 2, ... n sequences."""
    sizes = sorted(tables)
    return np.interp(np.arange(1, sequences + 1), sizes, [tables[size].regular[1] for size in sizes])


def interpolated(table: dict[float, float], at: NDArray[np.int64] | Floats) -> Floats:
    """A table's values at `at`, never falling with the width.

    Where a wider step seems faster, the narrower one was disturbed while it was timed: nothing makes steps faster.
    """
    widths, known = np.array(sorted(table.items()), dtype=float).T
    seconds = np.minimum.accumulate(known[::-1])[::-1]
    values = np.interp(at, widths, seconds)
    if len(widths) > 1:
        slope = (seconds[-1] - seconds[-2]) / (widths[-1] - widths[-2])
        values += np.maximum(at - widths[-1], 0) * slope
    return values


def costs(model: MTPModel, config: DecodeConfig, batch: int = 1) -> Costs:
    """From disk if this model was measured on this machine before and that still holds, else measured now.

    Measuring takes seconds, for a model of billions of parameters on a CPU up to half a minute.

    Kept under `$XDG_CACHE_HOME/foretell/costs` (`~/.cache` where that is not set); where that can't be written, the
    next process measures again.
    """
    path = _folder() / f"{_key(model, config, batch)}.json"
    kept = _read(path)
    widest = ((config.masks or model.max_masks) + 1) ** 2
    checked = sorted({min(width, widest) for width in CHECKED_WIDTHS})
    if kept is not None and (factor := _slowed(kept, measure(model, config, batch, checked))) is not None:
        return kept.scaled(factor)
    found = measure(model, config, batch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"model": model.base.name, "batch": batch, "seconds": asdict(found)}, indent=1))
        part.replace(path)
    except OSError:
        pass
    return found


def _read(path: Path) -> Costs | None:
    """None if there is no file or it is no use."""
    try:
        tables = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return Costs(**{name: {float(w): float(s) for w, s in table.items()} for name, table in tables.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _slowed(kept: Costs, now: Costs) -> float | None:
    """If a few widths cost as much beside a plain step as they did: how many times as long they all take now."""
    if not kept.regular.get(1):
        return None
    speed = now.regular[1] / kept.regular[1]
    ratios = [now.masked[width] / kept.masked[width] for width in now.masked if kept.masked.get(width)]
    if len(ratios) < len(now.masked) or any(abs(ratio / speed - 1) >= TOLERANCE for ratio in ratios):
        return None
    return sorted([speed, *ratios])[len(ratios) // 2]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foretell" / "costs"


def _key(model: MTPModel, config: DecodeConfig, batch: int) -> str:
    device = model.base.device
    machine = device_name(device)
    facts = [
        __version__, torch.__version__, model.base.fingerprint(), model.base.packed, model.base.dtype, device.type,
        model.compiled is not None, machine, platform.machine(), torch.get_num_threads(), model.config.to_dict(), batch,
        model.skips_filler, config.masks, config.use_sampler, shortlist_size(model, config.shortlist),
        config.temperature > 0,
    ]  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


@torch.inference_mode()
def measure(model: MTPModel, config: DecodeConfig, batch: int = 1, widths: Sequence[int] | None = None) -> Costs:
    """Times steps of every width in turn, so that a disturbance meets them all; lower quartiles, of drafting medians.

    With `widths`, only those, and no drafting.
    """
    masks = config.masks or model.max_masks
    context = CONTEXT
    if model.base.max_positions is not None:  # a learned table may be short
        context = max(1, min(CONTEXT, model.base.max_positions - 2 * masks - 2))
    cache = StaticCache(len(model.base.blocks), context + (masks + 1) ** 2, batch)
    prompt = torch.arange(context, device=model.base.device).remainder(model.base.vocab_size)
    model.prefill(prompt.expand(batch, -1), cache)
    cache.keep([context] * batch)
    room = (masks + 1) ** 2
    if model.base.max_columns is not None:
        room = min(room, model.base.max_columns - context)
    regular, masked = (REGULAR_WIDTHS, (*MASKED_WIDTHS, room)) if widths is None else (widths[:1], widths[1:])
    layouts = {("regular", float(w)): [plain(w)] * batch for w in regular if w <= masks + 1}
    layouts |= {("masked", float(w)): [masked_layout(w, masks)] * batch for w in sorted(set(masked)) if 2 <= w <= room}
    if widths is None and batch > 1 and model.skips_filler:  # up to how many rows more cost nothing lies in between
        some, others = batch // 2, [plain()] * (batch - batch // 2)
        layouts |= {
            ("regular", 1 + some / batch): [plain(2)] * some + others,
            ("masked", 1 + some / batch): [linear(0, 1)] * some + others,
        }
    picker, fresh = Picker(config), itertools.count(1)
    tasks: dict[tuple[str, float], Callable[[], object]] = {
        key: partial(_step, model, config, picker, fresh, own, cache) for key, own in layouts.items()
    }
    seconds: dict[tuple[str, float], list[float]] = defaultdict(list)
    start = time.perf_counter()
    for round in range(ROUNDS + 1):
        # Of real masks, others in every round and sequence: how often a chain must be gone over depends on them, and
        # how much of the unembedding is read.
        first = torch.arange(round * batch, (round + 1) * batch, device=model.base.device)
        token = first.remainder(model.base.vocab_size)[:, None]
        drafting = _drafting(model, config, token, cache) if widths is None else {}
        for key, task in (tasks | drafting).items():
            task()  # the second of two like steps counts, as in decoding; the first meets cold caches and new hooks
            begin = _now(model)
            task()
            spent = _now(model) - begin
            if round:  # the first only warms up
                seconds[key].append(spent)
        if round >= 2 and time.perf_counter() - start > BUDGET * round / (round + 1):
            break
    tables: dict[str, dict[float, float]] = {"regular": {}, "masked": {}, "drafts": {}}
    for (name, width), values in seconds.items():
        usual = len(values) // 2 if name == "drafts" else len(values) // 4  # chains differ, not only disturbances
        tables[name][width] = sorted(values)[usual] * (UNTIMED if name == "masked" else 1.0)
    return Costs(**tables)


def masked_layout(width: int, masks: int) -> Layout:
    """Of `width` rows: as few regular ones as can carry the masks, which hang after the last ones first."""
    regular = -(-width // (masks + 1))
    left, blocks = width - regular, []
    for after in range(regular - 1, -1, -1):
        if left:
            blocks.append(Block(after, min(masks, left)))
            left -= blocks[-1].masks
    return Layout(regular, tuple(blocks))


def _step(
    model: MTPModel,
    config: DecodeConfig,
    picker: Picker,
    fresh: Iterator[int],
    own: Sequence[Layout],
    cache: StaticCache,
) -> None:
    """As the loop does one; surviving blocks whose logits were not read along are read here.

    Of each sequence one place has not been drawn for before, as if the drafts had been at the others.
    """
    masks, rows = config.masks or model.max_masks, Rows(own)
    ids = torch.zeros((rows.sequences, rows.regular), dtype=torch.long, device=model.base.device)
    latents = rows.together(model.step(ids, aligned(own, masks), cache, cache.lengths, rows))
    along = reads_along(model, config, own)
    logits = model.base.unembed(latents if along else latents[: rows.first])
    place = next(fresh)
    places = [0 if row else place for layout in own for row in range(layout.regular)]
    picker.pick(logits[: rows.first].float(), range(rows.first), places).tolist()
    if not along:
        model.base.unembed(latents[: rows.sequences * masks])


def _drafting(
    model: MTPModel, config: DecodeConfig, token: Tensor, cache: StaticCache
) -> dict[tuple[str, float], Callable[[], object]]:
    """Making 1 to k drafts behind this token (B, 1), if the step reads what it can along (see `_step`)."""
    masks, batch = config.masks or model.max_masks, len(token)
    latents = model.step(token, [linear(0, masks)] * batch, cache, cache.lengths)[:, 1:]
    logits = model.base.unembed(latents)
    before, shortlist = token.expand(-1, 2), shortlist_size(model, config.shortlist)

    def make(count: int) -> object:
        read = logits[:, :count]
        return draft(model, latents[:, :count], before, config.use_sampler, shortlist, confident=True, logits=read)

    return {("drafts", count): partial(make, count) for count in sorted({1, (masks + 1) // 2, masks})}


def _now(model: MTPModel) -> float:
    if model.base.device.type == "cuda":
        torch.cuda.synchronize(model.base.device)
    return time.perf_counter()

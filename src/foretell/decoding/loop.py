"""The step generator: one forward, one verification, one set of new drafts, until every text has ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor

from foretell.cache import StaticCache
from foretell.config import DecodeConfig
from foretell.decoding.draft import Drafter, SamplerDrafter, reads_along
from foretell.decoding.pick import Picker, first_largest
from foretell.decoding.planning import strategy_of
from foretell.decoding.stopping import Stop
from foretell.decoding.strategies import Running, Strategy
from foretell.decoding.verify import decide
from foretell.layout import Block, Layout, plain
from foretell.model import MTPModel
from foretell.rows import Rows, aligned, surviving

NO_DRAFT = -1
# Tokens of a prompt that the first step still reads itself: a forward less. Longer ones are read without a mask, which
# would have a row and a column for every token.
READ_ALONG = 256


@dataclass(frozen=True)
class Step:
    """What one step decided: `accepted` drafts, then one token of the base's own (unless the text ended before it)."""

    tokens: list[int]
    accepted: int
    layout: Layout
    sequence: int = 0  # which prompt of a batch
    verified: int = 0  # drafts; a layout of a batch may hold filler behind them
    logits: Tensor | None = field(default=None, repr=False, compare=False)  # (tokens, V) fp32, if asked for
    last: bool = False  # whether the text ends with it
    read_prompt: bool = False  # whether the same forward read the prompt

    @property
    def origins(self) -> list[str]:
        """For each token "draft" (an accepted draft) or "base"."""
        return ["draft"] * self.accepted + ["base"] * (len(self.tokens) - self.accepted)


def steps(
    model: MTPModel,
    prompts: Sequence[Tensor],
    config: DecodeConfig,
    picker: Picker,
    stop: Stop | None = None,
    strategy: Strategy | None = None,
    drafter: Drafter | None = None,
    keep_logits: bool = False,
) -> Iterator[list[Step]]:
    """Decodes prompts (n_b,) int64 side by side; each item holds one `Step` per unfinished sequence.

    A prompt's last token is the first decided token x; each step carries x, the drafts to verify and masks. Short
    prompts are read by the first step, long ones before it. A sequence accepts its own number of drafts and leaves when
    it ends; nothing past the token that `stop` ends with is yielded. Every token is what the picker picks from the
    base's own logits, whatever the drafts are. With `keep_logits` a step holds the logits of its tokens.

    `strategy` is by default the one that `config` names, `drafter` the model's own masks and sampler head.
    """
    return refilled_steps(model, enumerate(prompts), len(prompts), config, picker, stop, strategy, drafter, keep_logits)


@torch.inference_mode()
def refilled_steps(
    model: MTPModel,
    prompts: Iterable[tuple[int, Tensor]],
    batch_size: int,
    config: DecodeConfig,
    picker: Picker,
    stop: Stop | None = None,
    strategy: Strategy | None = None,
    drafter: Drafter | None = None,
    keep_logits: bool = False,
) -> Iterator[list[Step]]:
    """As `steps`, for any number of prompts (n,) int64 with the numbers that their steps bear as `sequence`.

    At most `batch_size` are decoded side by side; the next one is taken when an earlier one has ended.
    """
    waiting = Waiting(prompts)
    first = waiting.take(batch_size)
    if not first:
        return
    masks = config.masks or model.max_masks
    strategy = strategy or strategy_of(model, config, len(first))
    drafter = drafter or SamplerDrafter(model, config, picker)
    stop = stop or Stop()
    running, x = started(first, config)
    capacity = max(len(row.text) + row.remaining for row in running) + (masks + 1) ** 2
    cache = StaticCache(len(model.base.blocks), capacity, len(first))
    unread = [prompt for _, prompt in first]  # until the first step
    if max(map(len, unread)) > READ_ALONG:
        prefill(model, unread, cache)
        unread = []
    drafts = x.new_empty((len(first), 0))  # (B, most drafts), NO_DRAFT where a sequence has fewer
    try:
        while running:
            begin = time.perf_counter()
            own = strategy.layouts(running, bool(waiting))
            layouts = aligned(own, masks)
            filled = max(map(len, unread)) - 1 if unread else max(cache.lengths)
            if model.base.max_columns is not None and filled + layouts[0].width > model.base.max_columns:
                own = layouts = [plain()] * len(running)
            rows = Rows(own if model.skips_filler and not unread else layouts)
            drafts = rows.of_own(drafts[:, : rows.regular - 1], NO_DRAFT)
            ids = torch.cat([x[:, None], drafts.clamp(min=0)], dim=1)
            if unread:
                latents = read_along(model, unread, layouts, cache)
            else:
                latents = model.step(ids, layouts, cache, cache.lengths, rows)
            # What the unembedding reads is most of its cost, so few masks are read along with the regular rows.
            along = reads_along(model, config, rows.layouts)
            read = rows.together(latents)
            logits = model.base.unembed(read if along else read[: rows.first])
            choices = rows.of_regular(pick_choices(picker, logits[: rows.first], running, drafts, rows))
            decided = decide(drafts, choices)
            done, start = [], 0
            for row, layout, (count, *chosen) in zip(running, rows.layouts, decided, strict=True):
                tokens, ended = stop.cut(row.text, chosen[: min(count + 1, row.remaining)])
                row.remaining -= len(tokens)
                row.stopped, row.remaining = ended and row.remaining > 0, 0 if ended else row.remaining
                row.place += len(tokens)
                row.text += tokens
                strategy.decided(row, tokens)
                kept = logits[start : start + len(tokens)].to(torch.float32, copy=True) if keep_logits else None
                start += layout.regular
                verified = min(row.drafts, layout.regular - 1)
                count = min(count, len(tokens))
                step = Step(tokens, count, layout, row.sequence, verified, kept, not row.remaining, bool(unread))
                done.append(step)
            spent = time.perf_counter() - begin
            yield done
            begin = time.perf_counter()
            accepted = [count for count, *_ in decided]
            cache.keep([count + 1 for count in accepted])
            order = leave_finished(running, cache)
            if order:
                running = [running[row] for row in order]
                before = last_tokens(choices, ids, order, accepted)
                x = before[:, 0]
                blocks = [rows.block(row, accepted[row]) for row in order]
                for row, block in zip(running, blocks, strict=True):
                    row.drafts = 0 if block is None else min(block.stop - block.start, row.remaining - 1)
                drafting = time.perf_counter()
                scores = logits if along else None
                drafts, sure = draft_blocks(drafter, rows, latents, scores, order, blocks, before, running)
                for row in running:
                    row.drafts = min(row.drafts, drafts.shape[1])
                drafts = held(strategy.drafted(running, drafts, sure), running)
                end_of_step = time.perf_counter()
                seconds = None if unread else spent + end_of_step - begin
                strategy.took(layouts[0], seconds, end_of_step - drafting, rows.count / rows.sequences)
            else:
                running = []
            unread = []
            if joining := waiting.take(batch_size - len(running)):
                longest = max(len(prompt) for _, prompt in joining)
                fresh = StaticCache(len(model.base.blocks), longest, len(joining))
                prefill(model, [prompt for _, prompt in joining], fresh)
                cache.join(fresh)
                joined, last = started(joining, config)
                # What joins has no drafts yet.
                none = drafts.new_full((len(joined), drafts.shape[1]), NO_DRAFT)
                drafts = torch.cat([drafts, none]) if running else none
                x = torch.cat([x, last]) if running else last
                running = running + joined
    finally:
        # Also after an error or half a text: the base goes on without hooks.
        if model.adapter.gated:
            model.adapter.remove()


class Waiting:
    """Prompts that wait, one of them taken ahead: true as long as there are any."""

    def __init__(self, prompts: Iterable[tuple[int, Tensor]]) -> None:
        self._prompts = iter(prompts)
        self._ahead = list(islice(self._prompts, 1))

    def __bool__(self) -> bool:
        return bool(self._ahead)

    def take(self, count: int) -> list[tuple[int, Tensor]]:
        """Up to so many."""
        taken = list(islice(chain(self._ahead, self._prompts), count))
        if taken:
            self._ahead = list(islice(self._prompts, 1))
        return taken


def started(prompts: Sequence[tuple[int, Tensor]], config: DecodeConfig) -> tuple[list[Running], Tensor]:
    """Numbered prompts (n,) at their beginning, and the last token of each, (B,) int64."""
    running = [Running(number, config.new_tokens(len(prompt)), prompt.tolist()) for number, prompt in prompts]
    return running, torch.stack([prompt[-1] for _, prompt in prompts])


def leave_finished(running: list[Running], cache: StaticCache) -> list[int]:
    """Takes finished sequences out of the cache; returns which former row stands in each of the remaining ones."""
    order = list(range(len(running)))
    for row in reversed(range(len(running))):
        if not running[row].remaining:
            cache.leave(row)
            order[row] = order[-1]
            order.pop()
    return order


def pick_choices(picker: Picker, logits: Tensor, running: Sequence[Running], drafts: Tensor, rows: Rows) -> Tensor:
    """The base's choice (N,) after every regular token of the rows, sequence after sequence, logits (N, V)."""
    if picker.greedy and not picker.reads_text:
        return first_largest(logits.float())  # in fp32, as transformers does
    both = [(row, end) for row, layout in zip(running, rows.layouts, strict=True) for end in range(layout.regular)]
    texts = None
    if picker.reads_text:
        verified = [row.text + own for row, own in zip(running, drafts.clamp(min=0).tolist(), strict=True)]
        whole = [torch.tensor(text, device=logits.device) for text in verified]
        counts = zip(running, whole, rows.layouts, strict=True)
        texts = [text[: len(row.text) + end] for row, text, layout in counts for end in range(layout.regular)]
    return picker.pick(logits, [row.sequence for row, _ in both], [row.place + end for row, end in both], texts)


def last_tokens(choices: Tensor, ids: Tensor, order: Sequence[int], accepted: Sequence[int]) -> Tensor:
    """choices and ids (B, R) of a step, which rows go on, and what each row accepted -> the last two tokens (B', 2) of
    those, the latest first."""
    if len(order) == 1:  # two views cost less than indices
        (row,) = order
        end = accepted[row]
        return torch.stack([choices[row : row + 1, end], ids[row : row + 1, end]], dim=1)
    former, end = torch.tensor([order, [accepted[row] for row in order]], device=choices.device)  # one transfer
    return torch.stack([choices[former, end], ids[former, end]], dim=1)


def draft_blocks(
    drafter: Drafter,
    rows: Rows,
    latents: Tensor,
    logits: Tensor | None,
    order: Sequence[int],
    blocks: Sequence[slice | None],
    before: Tensor,
    running: Sequence[Running],
) -> tuple[Tensor, Tensor | None]:
    """Latents (B, Q, D) of a step, and logits (N, V) of its rows together if they were read -> drafts (B', K) of the
    sequences that go on, and confidences.

    order (B'): where these stood in the step; blocks: rows of the blocks that survived; before (B', 2): their last
    tokens. Only the sequences that have a block pay for one.
    """
    there = [index for index, block in enumerate(blocks) if block is not None]
    if not there:
        return before.new_empty((len(running), 0)), None
    own, former = [block for block in blocks if block is not None], [order[index] for index in there]
    if former != list(range(len(latents))):
        latents = latents[former]
    read = None if logits is None else rows.read(logits, former, own)
    sequences, places = [running[index].sequence for index in there], [running[index].place for index in there]
    if len(there) == len(running):
        return drafter(surviving(latents, own), before, sequences, places, read)
    drafts, confidences = drafter(surviving(latents, own), before[there], sequences, places, read)

    def spread(values: Tensor) -> Tensor:
        found = values.new_zeros((len(running), values.shape[1]))
        found[there] = values
        return found

    return spread(drafts), None if confidences is None else spread(confidences)


def held(drafts: Tensor, running: Sequence[Running]) -> Tensor:
    """drafts (B, K) -> the same, NO_DRAFT beyond those that a sequence has."""
    most = drafts.shape[1]
    if all(row.drafts == most for row in running):
        return drafts
    count = torch.tensor([row.drafts for row in running], device=drafts.device)[:, None]
    return drafts.masked_fill(torch.arange(most, device=drafts.device) >= count, NO_DRAFT)


def prefill(model: MTPModel, prompts: Sequence[Tensor], cache: StaticCache) -> None:
    """Every prompt but its last token into the cache: padded on the right, where a causal forward never looks."""
    lengths = [len(prompt) - 1 for prompt in prompts]
    if max(lengths):
        padded = torch.nn.utils.rnn.pad_sequence([prompt[:-1] for prompt in prompts], batch_first=True)
        model.prefill(padded, cache)
        cache.keep(lengths)


def read_along(model: MTPModel, prompts: Sequence[Tensor], layouts: Sequence[Layout], cache: StaticCache) -> Tensor:
    """`prefill` and the step behind it, which carries no drafts, in one forward: z (B, Q, D) as of the step alone."""
    lengths = [len(prompt) for prompt in prompts]
    longest, masks = max(lengths), layouts[0].masks
    whole = [
        Layout(longest, tuple(Block(length - 1, block.masks) for block in layout.blocks))
        for length, layout in zip(lengths, layouts, strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    latents = model.step(padded, whole, cache, cache.lengths)
    cache.keep([length - 1 for length in lengths])
    if min(lengths) == longest:
        return latents[:, longest - 1 :]
    rows = torch.tensor([[length - 1, *range(longest, longest + masks)] for length in lengths], device=latents.device)
    return latents[torch.arange(len(lengths), device=latents.device)[:, None], rows]

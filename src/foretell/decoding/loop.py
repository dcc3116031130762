"""The step generator: one forward, one verification, one set of new drafts, until every text has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from foretell.config import DecodeConfig
from foretell.decoding.cache import StaticCache
from foretell.decoding.draft import draft, largest
from foretell.decoding.pick import Picker
from foretell.decoding.strategies import aligned, next_layout
from foretell.decoding.verify import accepted_drafts
from foretell.layout import Layout, plain
from foretell.model import MTPModel

NO_DRAFT = -1


@dataclass(frozen=True)
class Step:
    """What one step decided: `accepted` drafts, then one token of the base's own (unless the text ended before it)."""

    tokens: list[int]
    accepted: int
    layout: Layout
    sequence: int = 0  # which prompt of a batch

    @property
    def origins(self) -> list[str]:
        """For each token "draft" (an accepted draft) or "base"."""
        return ["draft"] * self.accepted + ["base"] * (len(self.tokens) - self.accepted)


@dataclass
class Running:
    """One prompt on its way."""

    sequence: int  # its place in the caller's list
    remaining: int  # tokens it may still get
    text: list[int]  # prompt and tokens decided
    place: int = 0  # tokens decided
    drafts: int = 0  # drafts at hand


@torch.inference_mode()
def steps(
    model: MTPModel,
    prompts: Sequence[Tensor],
    config: DecodeConfig,
    picker: Picker,
    stop_ids: Collection[int] = (),
) -> Iterator[list[Step]]:
    """Decodes prompts (n_b,) int64 side by side; each item holds one `Step` per unfinished sequence.

    A prompt's last token is not prefilled: it is the first decided token x, and from then on each step carries x, the
    drafts to verify and masks. A sequence accepts its own number of drafts and leaves when it ends; nothing past a stop
    id is yielded. Every token is what the picker picks from the base's own logits, whatever the drafts are.
    """
    masks = config.masks or model.max_masks
    capacity = max(len(prompt) for prompt in prompts) + config.max_new_tokens + (masks + 1) ** 2
    cache = StaticCache(len(model.base.blocks), capacity, len(prompts))
    prefill(model, prompts, cache)
    running = [Running(number, config.max_new_tokens, prompt.tolist()) for number, prompt in enumerate(prompts)]
    x = torch.stack([prompt[-1] for prompt in prompts])  # (B,)
    drafts = x.new_empty((len(prompts), 0))  # (B, most drafts), NO_DRAFT where a sequence has fewer
    while running:
        layouts = aligned([next_layout(config.strategy, row.drafts, masks, row.remaining) for row in running], masks)
        if model.base.max_columns is not None and max(cache.lengths) + layouts[0].width > model.base.max_columns:
            layouts = [plain()] * len(running)
        regular = layouts[0].regular
        drafts = drafts[:, : regular - 1]
        latents = model.step(torch.cat([x[:, None], drafts.clamp(min=0)], dim=1), layouts, cache, cache.lengths)
        choices = pick_choices(picker, model.base.unembed(latents[:, :regular]), running, drafts)
        # The step's one synchronisation with the device: accepted counts and the base's choices together.
        decided = torch.cat([accepted_drafts(drafts, choices)[:, None], choices], dim=1).tolist()
        done = []
        for row, layout, (accepted, *chosen) in zip(running, layouts, decided, strict=True):
            tokens = until_stop(chosen[: min(accepted + 1, row.remaining)], stop_ids)
            ended = tokens[-1] in stop_ids or len(tokens) == row.remaining
            row.remaining = 0 if ended else row.remaining - len(tokens)
            row.place += len(tokens)
            row.text += tokens
            done.append(Step(tokens, min(accepted, len(tokens)), layout, row.sequence))
        yield done
        accepted = [count for count, *_ in decided]
        cache.keep([count + 1 for count in accepted])
        order = leave_finished(running, cache)
        if order:
            running = [running[row] for row in order]
            x = choices[order, [accepted[row] for row in order]]
            blocks = [layouts[row].block_rows(accepted[row]) for row in order]
            for row, block in zip(running, blocks, strict=True):
                row.drafts = 0 if block is None else min(block.stop - block.start, row.remaining - 1)
            choose = partial(draw_draft, picker, running) if picker.draws_drafts else largest
            make = partial(draft, model, use_sampler=config.use_sampler, shortlist=config.shortlist, choose=choose)
            drafts = draft_blocks(make, latents[order], blocks, x)
        else:
            running = []


def until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    """The tokens up to the first stop id, which is the last one given."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens


def leave_finished(running: list[Running], cache: StaticCache) -> list[int]:
    """Takes finished sequences out of the cache; returns which former row stands in each of the remaining ones."""
    order = list(range(len(running)))
    for row in reversed(range(len(running))):
        if not running[row].remaining:
            cache.leave(row)
            order[row] = order[-1]
            order.pop()
    return order


def pick_choices(picker: Picker, logits: Tensor, running: Sequence[Running], drafts: Tensor) -> Tensor:
    """The base's choice (B, R) after every regular token, logits (B, R, V)."""
    if picker.greedy and not picker.reads_text:
        return logits.argmax(-1)
    regular = logits.shape[1]
    sequences = [row.sequence for row in running for _ in range(regular)]
    places = [row.place + offset for row in running for offset in range(regular)]
    texts = None
    if picker.reads_text:
        verified = [row.text + own for row, own in zip(running, drafts.clamp(min=0).tolist(), strict=True)]
        ends = [len(row.text) + offset for row in running for offset in range(regular)]
        whole = [torch.tensor(text, device=logits.device) for text in verified for _ in range(regular)]
        texts = [text[:end] for text, end in zip(whole, ends, strict=True)]
    return picker.pick(logits.flatten(0, 1), sequences, places, texts).view(-1, regular)


def draw_draft(picker: Picker, running: Sequence[Running], scores: Tensor, mask: int) -> Tensor:
    """Drafts for the place that mask number `mask` predicts, drawn in the race in which the base will pick."""
    return picker.pick(scores, [row.sequence for row in running], [row.place + mask for row in running])


def draft_blocks(
    make: Callable[[Tensor, Tensor], Tensor], latents: Tensor, blocks: Sequence[slice | None], first: Tensor
) -> Tensor:
    """latents (B, Q, D), rows of each sequence's surviving block -> drafts (B, K), NO_DRAFT where there is none."""
    sizes = [0 if block is None else block.stop - block.start for block in blocks]
    most = max(sizes)
    if not most:
        return first.new_empty((len(blocks), 0))
    if min(sizes) == most and len(set(sizes)) == 1 and len({block.start for block in blocks if block}) == 1:
        return make(latents[:, blocks[0]], first)
    starts = torch.tensor([0 if block is None else block.start for block in blocks], device=first.device)
    held = torch.tensor(sizes, device=first.device)[:, None]
    offsets = torch.arange(most, device=first.device)
    rows = starts[:, None] + torch.minimum(offsets, (held - 1).clamp(min=0))
    chosen = latents.gather(1, rows[:, :, None].expand(-1, -1, latents.shape[-1]))
    return make(chosen, first).masked_fill(offsets >= held, NO_DRAFT)


def prefill(model: MTPModel, prompts: Sequence[Tensor], cache: StaticCache) -> None:
    """Every prompt but its last token into the cache: padded on the right, where a causal forward never looks."""
    lengths = [len(prompt) - 1 for prompt in prompts]
    if max(lengths):
        padded = torch.nn.utils.rnn.pad_sequence([prompt[:-1] for prompt in prompts], batch_first=True)
        model.prefill(padded, cache)
        cache.keep(lengths)

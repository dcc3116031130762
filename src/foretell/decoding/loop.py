"""The step generator: one forward, one verification, one set of new drafts, until the text ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foretell.decoding.cache import StaticCache
from foretell.decoding.draft import draft
from foretell.decoding.strategies import next_layout
from foretell.decoding.verify import accepted_drafts
from foretell.layout import Layout
from foretell.model import MTPModel


@dataclass(frozen=True)
class Step:
    """What one step decided: `accepted` drafts, then one token of the base's own (unless the text ended before it)."""

    tokens: list[int]
    accepted: int
    layout: Layout

    @property
    def origins(self) -> list[str]:
        """For each token "draft" (an accepted draft) or "base"."""
        return ["draft"] * self.accepted + ["base"] * (len(self.tokens) - self.accepted)


@torch.inference_mode()
def steps(
    model: MTPModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    strategy: str = "quadratic",
    masks: int | None = None,
    use_sampler: bool = True,
    shortlist: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[Step]:
    """Greedy decoding of one prompt, input_ids (1, n) int64, step by step; nothing past a stop id is yielded.

    The prompt but its last token is prefilled; from then on each step carries one decided token x, the drafts to
    verify and masks. The output is the base's own greedy continuation whatever the drafts are.
    """
    masks = masks or model.max_masks
    n = input_ids.shape[1]
    total = n + max_new_tokens
    cache = StaticCache(len(model.base.blocks), capacity=total + (masks + 1) ** 2)
    if n > 1:
        model.prefill(input_ids[:, :-1], cache)
        cache.keep(n - 1)
    x = input_ids[0, -1:]
    drafts = x[:0]
    remaining = max_new_tokens
    while remaining:
        layout = next_layout(strategy, len(drafts), masks, remaining)
        drafts = drafts[: layout.regular - 1]
        latents = model.step(torch.cat([x, drafts])[None], layout, cache, cache.length)[0]
        choices = model.base.unembed(latents[: layout.regular]).argmax(-1)
        # The step's one synchronisation with the device: the accepted count and the base's choices together.
        count, *chosen = torch.cat([accepted_drafts(drafts, choices)[None], choices]).tolist()
        tokens = chosen[: count + 1]
        cache.keep(count + 1)
        remaining -= len(tokens)
        for index, token in enumerate(tokens):
            if token in stop_ids:
                tokens, remaining = tokens[: index + 1], 0
                break
        x = choices[count : count + 1]
        rows = layout.block_rows(count) if remaining else None
        drafts = x[:0] if rows is None else draft(model, latents[rows], x[0], use_sampler, shortlist)
        yield Step(tokens, min(count, len(tokens)), layout)

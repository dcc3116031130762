"""Measuring an adapter on held-out prompts: the acceptance of decoding, without decoding (method.md section 4).

The base answers the prompts once, greedily. On that text every draft's fate is known, so the tokens per step of linear
and quadratic decoding, for every number of masks, come from one forward with a block at every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from foretell.config import TrainConfig
from foretell.model import MTPModel
from foretell.training.batches import generator, make_batch
from foretell.training.data import Example
from foretell.training.metrics import Agreement, matches
from foretell.training.step import forward
from foretell.training.walk import acceptance_rate

MOST = 64  # held-out prompts measured
PROMPT_SHARE = 4  # of a text without a question, the first quarter is the prompt
EVERYWHERE = 1 << 30  # anchors: as many as there are places


class Table(NamedTuple):
    """`accepted[i][t]` of text i (see `walk`), and the counts of every mask."""

    accepted: list[list[int]]
    agreement: Agreement


class HeldOut:
    """The held-out prompts of a training, with the base's answers."""

    def __init__(self, model: MTPModel, examples: Sequence[Example], config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.prompts = [prompt_of(example) for example in examples[:MOST]]
        self._answered: list[Example] = []

    def __len__(self) -> int:
        return len(self.prompts)

    def evaluate(self, autocast: AbstractContextManager[Any] | None = None) -> dict[str, Any]:
        """`held_out_agreement` (k values), `held_out_linear` and `held_out_quadratic`: simulated tokens per step with
        1..k masks; `held_out_simulated_acceptance` is the last of these."""
        if not self._answered or not self.model.adapter.gated:  # ungated, the answers change with the adapter
            self._answered = answered(self.model, self.prompts, self.config.evaluate_tokens, self.config.batch_size)
        with autocast or nullcontext():
            found = table(self.model, self._answered, self.config.batch_size)
        rates = {strategy: by_masks(found, strategy) for strategy in ("linear", "quadratic")}
        return {
            "held_out_agreement": found.agreement.per_mask(),
            "held_out_simulated_acceptance": rates["quadratic"][-1],
            **{f"held_out_{strategy}": values for strategy, values in rates.items()},
        }


def by_masks(found: Table, strategy: str) -> list[float]:
    """Simulated tokens per step with 1..k masks: a block's first masks never see its later ones."""
    masks = range(1, len(found.agreement.matched) + 1)
    return [round(acceptance_rate(found.accepted, strategy, count), 4) for count in masks]


def prompt_of(example: Example) -> Tensor:
    """(n,) int64: what stands before the first answer; of a plain text, its first quarter."""
    first = int(example.trained.long().argmax())
    return example.ids[: first or max(1, len(example.ids) // PROMPT_SHARE)].long()


@torch.no_grad()
def answered(model: MTPModel, prompts: Sequence[Tensor], new_tokens: int, batch_size: int) -> list[Example]:
    """Every prompt (n,) int64 with the base's own greedy continuation, of which the continuation counts as trained.

    At most `new_tokens` of it, as many as fit the base's context, up to and with its end-of-text token.
    """
    lm, limit, made = model.base.lm, model.base.max_positions, []
    own = lm.generation_config
    end = own.eos_token_id if own is not None else None
    stop = [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]
    pad = stop[0] if stop else 0
    if model.adapter.gated:
        model.adapter.remove()
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        room = new_tokens if limit is None else min(new_tokens, limit - longest)
        if room < 1:
            continue
        padding = [longest - len(prompt) for prompt in batch]
        ids = torch.stack([nn.functional.pad(p, (n, 0), value=pad) for p, n in zip(batch, padding, strict=True)])
        seen = torch.stack([(torch.arange(longest) >= n).long() for n in padding])
        greedy = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=stop or None, pad_token_id=pad)
        lm.generation_config = greedy  # whatever else the base asks for, such as a repetition penalty, is set aside
        try:
            out = lm.generate(
                ids.to(model.base.device), attention_mask=seen.to(model.base.device), max_new_tokens=room
            ).cpu()
        finally:
            lm.generation_config = own
        for prompt, row in zip(batch, out[:, longest:], strict=True):
            ends = torch.isin(row, torch.tensor(stop, dtype=torch.long)).nonzero()
            new = row[: int(ends[0]) + 1] if len(ends) else row
            trained = torch.arange(len(prompt) + len(new)) >= len(prompt)
            made.append(Example(torch.cat([prompt, new]).int(), trained))
    return made


@torch.no_grad()
def table(model: MTPModel, texts: Sequence[Example], batch_size: int) -> Table:
    """The fate of every draft at every place of the answers; a place too near the end for drafts accepts none."""
    accepted = [[0] * int(text.trained.sum()) for text in texts]
    k = model.max_masks
    counts = Agreement(torch.zeros(k, dtype=torch.long), torch.zeros(k, dtype=torch.long), torch.zeros(k), 0)
    known = [number for number, own in enumerate(accepted) if len(own) > 1]
    for start in range(0, len(known), batch_size):
        chosen = known[start : start + batch_size]
        batch = make_batch([texts[number] for number in chosen], EVERYWHERE, generator("held out"))
        batch = batch.to(model.base.device)
        latents = forward(model, batch)
        found = matches(model, latents.z_masks, latents.z, batch.anchors, latents.target)
        own = found.agreement()
        counts += Agreement(own.matched.cpu(), own.seen.cpu(), own.prefix.cpu(), own.blocks)
        rows = zip(chosen, batch.anchors.tolist(), batch.anchor_valid.tolist(), found.accepted().tolist(), strict=True)
        for number, anchors, valid, held in rows:
            first = int(texts[number].trained.long().argmax()) - 1  # the prompt's last token
            for anchor, counted, drafts in zip(anchors, valid, held, strict=True):
                if counted:
                    accepted[number][anchor - first] = drafts
    return Table(accepted, counts)

"""Decoding for comparisons: every strategy on equal terms, with the model's own drafts or with replayed ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foretell.compiled import Form
from foretell.config import DecodeConfig
from foretell.decoding import loop
from foretell.decoding.adaptive import Adaptive
from foretell.decoding.calibration import Experience
from foretell.decoding.costs import Costs
from foretell.decoding.draft import SamplerDrafter
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.pick import Picker
from foretell.decoding.planner import Planner
from foretell.evaluation.replay import ReplayDrafter

PROFILE = (0.8, 0.6, 0.45, 0.3)  # chance that the first 1, 2, ... drafts hold: runs of every length, and rejections
# A machine on which drafts pay. Given, not measured: timing the steps of every architecture takes longer than all else.
COSTS = Costs(regular={1: 1.0, 9: 1.2}, masked={2: 1.05, 25: 1.6, 81: 4.0}, drafts={8: 0.1})


@dataclass
class Decoded:
    """Texts in the order of the prompts, and what they took."""

    texts: list[list[int]]
    steps: int = 0  # of all sequences together
    accepted: int = 0  # drafts
    rejected: int = 0


def decode(
    model: MTPForCausalLM,
    prompts: Sequence[Tensor],
    strategy: str,
    new: int,
    replayed: Sequence[Sequence[int]] | None = None,
    lookup: bool = True,
) -> Decoded:
    """Prompts (1, n_b) int64 side by side, greedily. `replayed`: known continuations, whose drafts hold by PROFILE."""
    masks = model.max_masks
    config = DecodeConfig(strategy=strategy, masks=masks, max_new_tokens=new)
    picker = Picker(config)
    drafter = None
    if replayed is not None:
        own = SamplerDrafter(model, config, picker)
        drafter = ReplayDrafter(own, replayed, PROFILE, model.base.vocab_size, informative=True)
    planner = None
    if strategy == "adaptive":
        experience = Experience(masks)
        of_all = Planner(COSTS, experience)
        of_all.took = lambda *args, **more: None  # type: ignore[method-assign]  # what steps take here decides nothing
        planner = Adaptive(lambda sequences: of_all, experience, lookup)
    out = Decoded([[] for _ in prompts])
    for batch in loop.steps(model, [ids[0] for ids in prompts], config, picker, strategy=planner, drafter=drafter):
        for step in batch:
            out.texts[step.sequence] += step.tokens
            out.steps += 1
            out.accepted += step.accepted
            out.rejected += step.layout.regular - 1 - step.accepted
    return out


def count_compiled(model: MTPForCausalLM) -> Counter[Form]:
    """Counts the blocks that run compiled from here on, by the form of their step."""
    ran: Counter[Form] = Counter()

    def counted(form: Form, graph: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            ran[form] += 1
            return graph(*tensors)

        return call

    for block in model.compiled.blocks if model.compiled else []:
        block.graphs = {form: counted(form, graph) for form, graph in block.graphs.items()}
    return ran

"""The scores that tokens were chosen from, worked out afterwards from the logits that the steps kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foretell.decoding.loop import Step
from foretell.decoding.pick import Picker


def scores_and_logits(picker: Picker, prompt: Tensor, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """Of a prompt (n,) int64 and its steps with T tokens in all, decoded with `keep_logits` -> (T, V) fp32 each.

    Logits are the base's own, scores what the picker's processors and warpers make of them: what transformers calls
    so. They are one tensor if there are no processors and warpers.
    """
    logits = torch.cat([step.logits for step in steps if step.logits is not None])
    if not picker.reads_text:
        return picker.scores(logits), logits
    text = torch.cat([prompt, prompt.new_tensor([token for step in steps for token in step.tokens])])
    ends = range(len(prompt), len(text))
    return picker.scores(logits, [text[:end] for end in ends]), logits

"""The base's own `generate()` with several tokens per step: `base.generate(custom_generate=model.custom_generate)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

from foretell.config import DecodeConfig
from foretell.decoding import loop
from foretell.decoding.pick import Picker
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.decoding.generate import MTPForCausalLM


def generate(
    model: MTPForCausalLM,
    lm: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """input_ids (B, n), left-padded where attention_mask (B, n) is 0 -> (B, n + longest) int64, padded on the right.

    transformers has prepared the processors, warpers included when it samples, and the length. Draws follow torch's
    global seed. Raises ForetellError for another base and for what is neither greedy decoding nor sampling.
    """
    if lm is not model.base.lm:
        raise ForetellError(
            "custom_generate belongs to the base that this adapter was loaded with: call its generate()"
        )
    if generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
        raise ForetellError(
            "custom_generate decodes greedily or samples and returns ids: leave out beams and return_dict"
        )
    if other := [c for c in stopping_criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]:
        raise ForetellError(f"custom_generate stops at a length or an eos token, not by {type(other[0]).__name__}")
    seed = int(torch.randint(2**31, ())) if generation_config.do_sample else 0
    config: DecodeConfig = model.decode_config(
        {
            **settings,
            "max_new_tokens": generation_config.max_length - input_ids.shape[1],
            "temperature": 1.0 if generation_config.do_sample else 0.0,
            "seed": seed,
        }
    )
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [ids[kept.bool()] for ids, kept in zip(input_ids, real, strict=True)]
    eos = generation_config.eos_token_id
    stop_ids = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    # transformers tells this one to pass over the padding; our texts have none.
    processors = LogitsProcessorList(
        RepetitionPenaltyLogitsProcessor(p.penalty) if isinstance(p, RepetitionPenaltyLogitsProcessor) else p
        for p in logits_processor
    )
    new: list[list[int]] = [[] for _ in prompts]
    for steps in loop.steps(model, prompts, config, Picker(config, processors), stop_ids):
        for step in steps:
            new[step.sequence] += step.tokens
    pad = generation_config.pad_token_id
    pad = min(stop_ids, default=0) if pad is None else pad
    rows = [torch.tensor(tokens, device=input_ids.device) for tokens in new]
    return torch.cat([input_ids, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)], dim=1)

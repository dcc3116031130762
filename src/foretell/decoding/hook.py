"""The base's own `generate()` with several tokens per step: `base.generate(custom_generate=model.custom_generate)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EosTokenCriteria,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput

from foretell.config import DecodeConfig
from foretell.decoding import loop
from foretell.decoding.loop import Step
from foretell.decoding.pick import Picker
from foretell.decoding.scores import scores_and_logits
from foretell.decoding.stopping import Condition, Stop, StopStrings
from foretell.decoding.streaming import Streamer, ended, streamed
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.decoding.generate import MTPForCausalLM

WITH_MEMORY = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
BY_ROW = (PrefixConstrainedLogitsProcessor,)
BY_LENGTH = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    ExponentialDecayLengthPenalty,
    SuppressTokensAtBeginLogitsProcessor,
)
SUPPORTED_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


def generate(
    model: MTPForCausalLM,
    lm: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    attention_mask: Tensor | None,
    streamer: Streamer | None,
    settings: dict[str, Any],
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
) -> Tensor | GenerateDecoderOnlyOutput:
    """input_ids (B, n), left-padded where attention_mask (B, n) is 0 -> (B, n + longest) int64, padded on the right.

    transformers has prepared the processors, warpers included when it samples, and the length. Draws follow torch's
    global seed. With `return_dict_in_generate` the ids are the `sequences` of transformers' own output, beside the
    scores and logits that were asked for: per new token (B, V) fp32, zeros where a sequence has ended.
    `stop_strings` are found with `tokenizer`.
    Raises ForetellError for another base and for what is neither greedy decoding nor sampling.
    """
    with ended(streamer):
        if lm is not model.base.lm:
            raise ForetellError(
                "custom_generate belongs to the base that this adapter was loaded with: call its generate()"
            )
        check(generation_config, stopping_criteria)
        config: DecodeConfig = model.decode_config(
            {
                **settings,
                "max_new_tokens": stopping_criteria.max_length - input_ids.shape[1],
                "temperature": 1.0 if generation_config.do_sample else 0.0,
                "seed": int(torch.randint(2**31, ())) if generation_config.do_sample else 0,
            }
        )
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[kept.bool()] for ids, kept in zip(input_ids, real, strict=True)]
        for prompt in prompts:
            model.check_lengths(len(prompt), config)
        check_processors(logits_processor, len(prompts), padded=not bool(real.all()))
        eos = [token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()]
        conditions = [completed_string(c) for c in stopping_criteria if isinstance(c, StopStringCriteria)]
        if stop_strings:
            if tokenizer is None:
                raise ForetellError(f"the base {model.base.name} has no tokenizer to find stop_strings with")
            conditions.append(StopStrings(tokenizer, stop_strings))
        stop = Stop(eos, conditions)
        picker = Picker(config, without_padding(logits_processor))
        wants_scores, wants_logits = (
            bool(generation_config.return_dict_in_generate and wanted)
            for wanted in (generation_config.output_scores, generation_config.output_logits)
        )
        done: list[list[Step]] = [[] for _ in prompts]
        steps = loop.steps(model, prompts, config, picker, stop, keep_logits=wants_scores or wants_logits)
        for batch in streamed(streamer, input_ids, steps):
            for step in batch:
                done[step.sequence].append(step)
    pad = generation_config.pad_token_id
    pad = next(iter(eos), 0) if pad is None else pad
    new = [input_ids.new_tensor([token for step in own for token in step.tokens]) for own in done]
    sequences = torch.cat([input_ids, pad_sequence(new, batch_first=True, padding_value=pad)], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    output = GenerateDecoderOnlyOutput(sequences=sequences)
    if wants_scores or wants_logits:
        pairs = [scores_and_logits(picker, prompt, own) for prompt, own in zip(prompts, done, strict=True)]
        scores, logits = (pad_sequence(list(rows)).unbind() for rows in zip(*pairs, strict=True))
        output.scores = scores if wants_scores else None
        output.logits = logits if wants_logits else None
    return output


def check(generation_config: GenerationConfig, stopping_criteria: StoppingCriteriaList) -> None:
    """Raises ForetellError for what several tokens per step can't give."""
    if generation_config.num_beams > 1:
        raise ForetellError("custom_generate decodes greedily or samples: leave out beams")
    if generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    ):
        raise ForetellError("custom_generate gives scores and logits: leave out output_attentions, _hidden_states")
    if other := [c for c in stopping_criteria if not isinstance(c, SUPPORTED_CRITERIA)]:
        raise ForetellError(
            f"custom_generate stops at a length, an eos token or a stop string, not by {type(other[0]).__name__}"
        )


def check_processors(processors: LogitsProcessorList, batch: int, padded: bool) -> None:
    """Raises ForetellError for processors that would see other rows or lengths than in transformers' own loop.

    Ours are called for every verified draft, with one text each and without its padding.
    """
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, WITH_MEMORY) or (batch > 1 and isinstance(processor, BY_ROW)):
            raise ForetellError(
                f"custom_generate verifies several tokens of one text at once, which {name} can't follow"
            )
        if padded and isinstance(processor, BY_LENGTH):
            raise ForetellError(
                f"{name} counts the padding of a batch, which custom_generate leaves out; give prompts of one length"
            )


def completed_string(criterion: StoppingCriteria) -> Condition:
    """transformers' own criterion, which looks at ids alone, as a condition on one text."""
    return lambda text: bool(criterion(torch.tensor([text]), None))


def without_padding(processors: LogitsProcessorList) -> LogitsProcessorList:
    """transformers tells the repetition penalty how much padding each row has to pass over; our texts have none."""
    return LogitsProcessorList(
        RepetitionPenaltyLogitsProcessor(p.penalty)
        if isinstance(p, RepetitionPenaltyLogitsProcessor) and isinstance(p.prompt_ignore_length, Tensor)
        else p
        for p in processors
    )

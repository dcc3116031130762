"""One pass of one decoding method over prompts, and what its steps amount to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foretell.decoding.generate import MTPForCausalLM, repeated_ngram_share
from foretell.decoding.loop import Step
from foretell.errors import ForetellError
from foretell.evaluation.prompts import Prompt

HUGGINGFACE = "huggingface generate"
AUTOREGRESSIVE = "autoregressive"


@dataclass(frozen=True)
class Method:
    """A row of a comparison: `name` is HUGGINGFACE or a strategy; masks is 0 where none are used."""

    name: str
    masks: int = 0
    use_sampler: bool = True

    def __str__(self) -> str:
        if not self.masks:
            return "plain decoding" if self.name == AUTOREGRESSIVE else self.name
        return f"{self.name} with {self.masks} mask{'s' if self.masks > 1 else ''}"


@dataclass
class Run:
    """What one pass produced; each list has an entry per prompt. Seconds include prefill."""

    tokens: list[list[int]] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)  # tokens of every step
    drafts: list[list[int]] = field(default_factory=list)  # drafts that every step verified
    accepted: list[list[int]] = field(default_factory=list)  # and those of them that held
    seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)  # empty for HUGGINGFACE, which returns all at once


@dataclass(frozen=True)
class Counts:
    """The steps of a run. Rates are tokens per model step, over all prompts together."""

    tokens: int
    steps: int
    acceptance_rate: float
    acceptance_rate_with_prefill: float
    acceptance_rate_per_prompt: float  # mean over prompts, each weighing the same
    acceptance_histogram: list[int]  # [h]: steps that yielded h + 1 tokens
    draft_acceptance: list[
        float
    ]  # [j]: of the steps that verified more than j drafts, the share whose first j + 1 held
    repeated_4gram_share: float  # mean over prompts

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode_prompts(
    model: MTPForCausalLM, prompts: Sequence[Prompt], max_new_tokens: int, name: str = "prompts"
) -> list[Tensor]:
    """(1, n) int64 each. Raises ForetellError naming the set and the prompt that is empty or does not fit."""
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = model.encode(prompt) if isinstance(prompt, str) else model.encode(None, prompt)
            model.steps(input_ids=ids, max_new_tokens=max_new_tokens)  # checks the length; runs nothing yet
        except ForetellError as error:
            raise ForetellError(f"{name}, prompt {number}: {error}") from None
        encoded.append(ids)
    if not encoded:
        raise ForetellError(f"{name} holds no prompts")
    return encoded


def run(
    model: MTPForCausalLM,
    prompts: Sequence[Tensor],
    method: Method,
    max_new_tokens: int,
    on_prompt: Callable[[], None] = lambda: None,
) -> Run:
    """Decodes every prompt, (1, n) int64, one after another."""
    result = Run()
    for ids in prompts:
        start = time.perf_counter()
        if method.name == HUGGINGFACE:
            tokens = huggingface_generate(model, ids, max_new_tokens)
            seconds = time.perf_counter() - start
            steps, drafts, accepted = [1] * len(tokens), [0] * len(tokens), [0] * len(tokens)
        else:
            settings: dict[str, Any] = {
                "strategy": method.name,
                "masks": method.masks or None,
                "use_sampler": method.use_sampler,
            }
            done: list[Step] = []
            for step in model.steps(input_ids=ids, max_new_tokens=max_new_tokens, **settings):
                if not done:
                    result.first_token_seconds.append(time.perf_counter() - start)
                done.append(step)
            seconds = time.perf_counter() - start
            tokens = [token for step in done for token in step.tokens]
            steps = [len(step.tokens) for step in done]
            drafts, accepted = [step.layout.regular - 1 for step in done], [step.accepted for step in done]
        result.seconds += seconds
        result.tokens.append(tokens)
        result.sizes.append(steps)
        result.drafts.append(drafts)
        result.accepted.append(accepted)
        on_prompt()
    return result


def huggingface_generate(model: MTPForCausalLM, ids: Tensor, max_new_tokens: int) -> list[int]:
    """The base's own greedy `generate()`, gate closed: the new token ids, with the stop id if it was reached."""
    with _plain_greedy(model), torch.inference_mode():
        out = model.base.lm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
    return out[0, ids.shape[1] :].tolist()


@contextmanager
def _plain_greedy(model: MTPForCausalLM) -> Iterator[None]:
    """Sets aside whatever else the base's generation config asks for, such as a repetition penalty."""
    from transformers import GenerationConfig

    lm = model.base.lm
    kept = lm.generation_config
    stop = sorted(model.stop_ids())
    # Nothing is padded with one sequence, but generate() warns without a pad token.
    lm.generation_config = GenerationConfig(eos_token_id=stop or None, pad_token_id=stop[0] if stop else 0)
    try:
        yield
    finally:
        lm.generation_config = kept


def count(done: Run, masks: int) -> Counts:
    """The steps of a run of a method with `masks` masks."""
    sizes = [size for steps in done.sizes for size in steps]
    drafts = [number for steps in done.drafts for number in steps]
    accepted = [number for steps in done.accepted for number in steps]
    tokens, prompts = sum(sizes), len(done.tokens)
    histogram = Counter(sizes)
    draft_acceptance = []
    for j in range(1, masks + 1):
        held = [a >= j for a, d in zip(accepted, drafts, strict=True) if d >= j]
        draft_acceptance.append(sum(held) / len(held) if held else 0.0)
    return Counts(
        tokens=tokens,
        steps=len(sizes),
        acceptance_rate=tokens / len(sizes),
        acceptance_rate_with_prefill=tokens / (len(sizes) + prompts),
        acceptance_rate_per_prompt=sum(sum(steps) / len(steps) for steps in done.sizes) / prompts,
        acceptance_histogram=[histogram[size] for size in range(1, masks + 2)],
        draft_acceptance=draft_acceptance,
        repeated_4gram_share=sum(map(repeated_ngram_share, done.tokens)) / prompts,
    )


@dataclass(frozen=True)
class Difference:
    """Where the output first left the reference, counted from 0, and how sure the base was there."""

    prompt: int
    position: int
    expected: int | None  # token ids; None: that text had ended
    found: int | None
    logit_gap: float  # base's logit of the expected token minus that of the found one (or of its best other token)


@torch.inference_mode()
def first_difference(
    model: MTPForCausalLM, prompts: Sequence[Tensor], expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]
) -> Difference | None:
    """None if the token ids of every prompt are equal. A gap near 0 is a tie that rounding decided."""
    for index, (wanted, got) in enumerate(zip(expected, found, strict=True)):
        if list(wanted) == list(got):
            continue
        shared = min(len(wanted), len(got))
        position = next((i for i in range(shared) if wanted[i] != got[i]), shared)
        ids = torch.cat(
            [prompts[index][0], torch.tensor(list(wanted[:position]), dtype=torch.long, device=prompts[index].device)]
        )
        logits = model.base.unembed(model.base.latents(model.base.embed(ids[None])))[0, -1].float()
        first = wanted[position] if position < len(wanted) else None
        other = got[position] if position < len(got) else None
        best = logits.topk(2).indices.tolist()
        one = best[0] if first is None else first
        two = other if other is not None else next(token for token in best if token != one)
        return Difference(index, position, first, other, float(logits[one] - logits[two]))
    return None


def check_methods(
    model: MTPForCausalLM,
    strategies: Sequence[str],
    masks: Sequence[int],
    max_new_tokens: int,
    use_sampler: bool = True,
) -> list[Method]:
    """Every strategy with every number of masks. Raises ForetellError for one that the model can't do."""
    strategies = list(dict.fromkeys(s for s in strategies if s != AUTOREGRESSIVE))  # which is always measured
    methods = [Method(strategy, k, use_sampler) for strategy in strategies for k in dict.fromkeys(masks)]
    if not methods:
        raise ForetellError(
            "nothing to compare with plain decoding: give at least one strategy and one number of masks"
        )
    for method in methods:
        model.decode_config({"strategy": method.name, "masks": method.masks, "max_new_tokens": max_new_tokens})
    return methods

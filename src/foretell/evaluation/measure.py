"""One pass of one decoding method over prompts, and what its steps amount to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.generation import repeated_ngram_share
from foretell.decoding.loop import Step
from foretell.decoding.pick import Picker
from foretell.errors import ForetellError
from foretell.evaluation.baselines import Decoded, huggingface_generate
from foretell.evaluation.methods import ASSISTED, AUTOREGRESSIVE, HUGGINGFACE, Method
from foretell.evaluation.prompts import Prompt, to_context

__all__ = [
    "AUTOREGRESSIVE", "HUGGINGFACE", "Counts", "Difference", "Method", "Run",
    "count", "encode_prompts", "first_difference", "run",
]  # fmt: skip


@dataclass
class Run:
    """What one pass produced: the first four lists have an entry per prompt, the last two one per batch."""

    tokens: list[list[int]] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)  # tokens of every step
    drafts: list[list[int]] = field(default_factory=list)  # drafts that every step verified
    accepted: list[list[int]] = field(default_factory=list)  # and those of them that held
    seconds: float = 0.0  # prefill included
    first_token_seconds: list[float] = field(default_factory=list)  # until the first step had given its tokens
    steps: list[int] = field(default_factory=list)  # forwards of a whole batch, prefill not counted
    prefills: int = 0  # prompts that took a forward of their own, before the first step

    def add(self, batch: Decoded) -> None:
        self.tokens += batch.tokens
        self.sizes += batch.sizes
        self.drafts += batch.drafts
        self.accepted += batch.accepted
        self.seconds += batch.seconds
        self.first_token_seconds.append(batch.first_token_seconds)
        self.steps.append(batch.steps)
        self.prefills += batch.prefills

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / sum(map(len, self.tokens))

    @property
    def decode_seconds(self) -> float:
        """After the first token."""
        return self.seconds - sum(self.first_token_seconds)

    @property
    def decode_tokens(self) -> int:
        """Those that the first step did not give."""
        return sum(sum(sizes[1:]) for sizes in self.sizes)

    @property
    def decode_steps(self) -> int:
        """Forwards after the first of every batch."""
        return sum(self.steps) - len(self.steps)


@dataclass(frozen=True)
class Counts:
    """The steps of a run. Rates are tokens per model step of a sequence, over all prompts together."""

    tokens: int
    steps: int
    acceptance_rate: float
    acceptance_rate_with_prefill: float
    acceptance_rate_per_prompt: float  # mean over prompts, each weighing the same
    acceptance_histogram: list[int]  # [h]: steps that yielded h + 1 tokens
    draft_acceptance: list[float]  # [j]: of the steps that verified over j drafts, the share whose first j + 1 held
    repeated_4gram_share: float  # mean over prompts

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encode_prompts(
    model: MTPForCausalLM,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    name: str = "prompts",
    context: int | None = None,
) -> list[Tensor]:
    """(1, n) int64 each; with `context`, all of that length (`prompts.to_context`).

    Raises ForetellError naming the set and the prompt that is empty or does not fit.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(model.encode(prompt) if isinstance(prompt, str) else model.encode(None, prompt))
        except ForetellError as error:
            raise ForetellError(f"{name}, prompt {number}: {error}") from None
    if not encoded:
        raise ForetellError(f"{name} holds no prompts")
    if context is not None:
        encoded = to_context(encoded, context, getattr(model.tokenizer, "bos_token_id", None))
    for number, ids in enumerate(encoded, 1):
        try:
            model.steps(input_ids=ids, max_new_tokens=max_new_tokens)  # checks the length; runs nothing yet
        except ForetellError as error:
            raise ForetellError(f"{name}, prompt {number}: {error}") from None
    return encoded


def run(
    model: MTPForCausalLM,
    prompts: Sequence[Tensor],
    method: Method,
    max_new_tokens: int,
    on_batch: Callable[[], None] = lambda: None,
    *,
    batch: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    draft_model: PreTrainedModel | None = None,
    result: Run | None = None,
) -> Run:
    """Decodes prompts, (1, n) int64 each, `batch` of them side by side at a time; `draft_model` is for ASSISTED.

    Goes on with `result`, if given.
    """
    result = Run() if result is None else result
    for start in range(0, len(prompts), batch):
        ids = prompts[start : start + batch]
        if method.of_transformers:
            drafting = draft_model if method.name == ASSISTED else None
            lookup = method.lookup
            decoded = huggingface_generate(
                model, ids, max_new_tokens, temperature=temperature, seed=seed, lookup=lookup, draft_model=drafting
            )
        else:
            decoded = _decode(model, ids, method, max_new_tokens, temperature, seed)
        result.add(decoded)
        on_batch()
    return result


def _decode(
    model: MTPForCausalLM, batch: Sequence[Tensor], method: Method, max_new_tokens: int, temperature: float, seed: int
) -> Decoded:
    """With our own loop."""
    settings: dict[str, Any] = {
        "strategy": method.name,
        "masks": method.masks or None,
        "use_sampler": method.use_sampler,
        "lookup": method.from_text,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    config = model.decode_config(settings)
    sequences: list[list[Step]] = [[] for _ in batch]
    first_token, steps, prefills = 0.0, 0, 0
    start = time.perf_counter()
    for done in model._steps(batch, config, Picker(config)):
        first_token = first_token or time.perf_counter() - start
        prefills += 0 if steps else sum(not step.read_prompt for step in done)
        steps += 1
        for step in done:
            sequences[step.sequence].append(step)
    seconds = time.perf_counter() - start
    drafts = [[step.verified for step in own] for own in sequences]
    return Decoded(
        tokens=[[token for step in own for token in step.tokens] for own in sequences],
        sizes=[[len(step.tokens) for step in own] for own in sequences],
        drafts=drafts,
        # In a batch more drafts may hold than the sequence had room for.
        accepted=[
            [min(step.accepted, d) for step, d in zip(own, counts, strict=True)]
            for own, counts in zip(sequences, drafts, strict=True)
        ],
        steps=steps,
        prefills=prefills,
        seconds=seconds,
        first_token_seconds=first_token,
    )


def count(done: Run, masks: int) -> Counts:
    """The steps of a run of a method with `masks` masks, or of one that drafts without any."""
    sizes = [size for steps in done.sizes for size in steps]
    drafts = [number for steps in done.drafts for number in steps]
    accepted = [number for steps in done.accepted for number in steps]
    tokens, prompts, most = sum(sizes), len(done.tokens), max(masks, *drafts)
    histogram = Counter(sizes)
    draft_acceptance = []
    for j in range(1, most + 1):
        held = [a >= j for a, d in zip(accepted, drafts, strict=True) if d >= j]
        draft_acceptance.append(sum(held) / len(held) if held else 0.0)
    return Counts(
        tokens=tokens,
        steps=len(sizes),
        acceptance_rate=tokens / len(sizes),
        acceptance_rate_with_prefill=tokens / (len(sizes) + done.prefills),
        acceptance_rate_per_prompt=sum(sum(steps) / len(steps) for steps in done.sizes) / prompts,
        acceptance_histogram=[histogram[size] for size in range(1, most + 2)],
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

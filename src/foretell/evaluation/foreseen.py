"""Does simulated acceptance foresee decoding? Both on the same prompts, linear and quadratic (method.md section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.generation import repeated_ngram_share
from foretell.errors import ForetellError
from foretell.evaluation.measure import Method, encode_prompts, run
from foretell.evaluation.prompts import Prompt
from foretell.evaluation.report import environment
from foretell.training.held_out import answered, by_masks, table

STRATEGIES = ("linear", "quadratic")
TOLERANCE = 0.05  # relative: what simulated acceptance is held to


@dataclass(frozen=True)
class Comparison:
    """Tokens per step of one strategy with all masks, prefill not counted."""

    strategy: str
    masks: int
    simulated: float
    decoded: float
    relative_difference: float  # (simulated - decoded) / decoded


@dataclass(frozen=True)
class ForeseenReport:
    """`agreement` per mask; `simulated_linear` and `simulated_quadratic` for 1..k masks; `mean_over_places` is what a
    block accepts on average over all places, plus one: no walk, hence not what decoding reaches."""

    environment: dict[str, Any]
    max_new_tokens: int
    prompts: int
    tokens: int
    repeated_4gram_share: float
    agreement: list[float | None]
    mean_over_places: float | None
    simulated_linear: list[float]
    simulated_quadratic: list[float]
    comparisons: list[Comparison]

    @property
    def largest_difference(self) -> float:
        return max(abs(comparison.relative_difference) for comparison in self.comparisons)

    @property
    def passed(self) -> bool:
        """Whether every strategy was foreseen within TOLERANCE."""
        return self.largest_difference <= TOLERANCE

    def sentence(self) -> str:
        parts = [
            f"{c.strategy} {c.simulated:.3f} simulated, {c.decoded:.3f} decoded ({100 * c.relative_difference:+.1f} %)"
            for c in self.comparisons
        ]
        return f"tokens per step with {self.comparisons[0].masks} masks: " + "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        return {**asdict(self), "largest_difference": self.largest_difference}


@torch.inference_mode()
def foreseen(
    model: MTPForCausalLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    on_progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> ForeseenReport:
    """Simulates on the base's own greedy answers, as training measures held-out prompts, then decodes the same prompts.

    The simulation makes its answers and its table `batch_size` prompts at a time; decoding is one prompt at a time.
    Raises ForetellError for an ungated adapter, which changes the answers, and for prompts that do not fit.
    """
    if not model.adapter.gated:
        raise ForetellError(
            "an ungated adapter changes the base's answers, so there is nothing to foresee; train a gated one"
        )
    total = len(prompts) * (1 + len(STRATEGIES))
    ids = encode_prompts(model, prompts, max_new_tokens)
    on_progress(0, total, "simulation")
    texts = answered(model, [prompt[0].cpu() for prompt in ids], max_new_tokens, batch_size)
    found = table(model, texts, batch_size)
    simulated = {strategy: by_masks(found, strategy) for strategy in STRATEGIES}
    done = len(prompts)
    comparisons = []
    for strategy in STRATEGIES:
        tokens = steps = 0
        for prompt in ids:
            on_progress(done, total, strategy)
            decoded = run(model, [prompt], Method(strategy, model.max_masks), max_new_tokens)
            tokens, steps = tokens + len(decoded.tokens[0]), steps + len(decoded.sizes[0])
            done += 1
        rate = tokens / steps
        guess = simulated[strategy][-1]
        comparisons.append(Comparison(strategy, model.max_masks, guess, rate, (guess - rate) / rate))
    answers = [text.ids[text.trained].tolist() for text in texts]
    return ForeseenReport(
        environment=environment(model),
        max_new_tokens=max_new_tokens,
        prompts=len(ids),
        tokens=sum(map(len, answers)),
        repeated_4gram_share=sum(map(repeated_ngram_share, answers)) / len(answers),
        agreement=found.agreement.per_mask(),
        mean_over_places=found.agreement.simulated_acceptance(),
        simulated_linear=simulated["linear"],
        simulated_quadratic=simulated["quadratic"],
        comparisons=comparisons,
    )

"""What a generated text is and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """What was generated and what it took. `acceptance_rate` is tokens per model step, prefill not counted."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    new_tokens: int
    steps: int
    acceptance_rate: float
    acceptance_rate_with_prefill: float
    acceptance_histogram: list[int]  # [h]: steps that yielded h + 1 tokens
    repeated_4gram_share: float
    seconds: float
    tokens_per_second: float
    strategy: str
    masks: int
    model: str
    # (new_tokens, V) fp32 of the base for each token, if asked for: processed as it was chosen from, and raw.
    scores: Tensor | None = field(default=None, repr=False, compare=False)
    logits: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("scores", "logits")}


def repeated_ngram_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same text: loops flatter acceptance, so it stands beside it."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

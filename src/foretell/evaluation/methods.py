"""The rows of a comparison: our strategies and transformers' own ways to generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foretell.config import STRATEGIES as ALL_STRATEGIES
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError

HUGGINGFACE = "huggingface generate"
PROMPT_LOOKUP = "prompt lookup"
ASSISTED = "assisted"
AUTOREGRESSIVE = "autoregressive"
ADAPTIVE = "adaptive"

# Those that draft; plain decoding is measured always.
STRATEGIES = tuple(name for name in ALL_STRATEGIES if name != AUTOREGRESSIVE)
MASKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Method:
    """A row of a comparison: `name` is a strategy, or HUGGINGFACE, PROMPT_LOOKUP or ASSISTED, which transformers runs.

    `masks` is 0 where none are used; `lookup` is the most tokens that prompt lookup drafts per step. `from_text` is
    whether the adaptive strategy drafts from the text itself too.
    """

    name: str
    masks: int = 0
    use_sampler: bool = True
    lookup: int = 0
    from_text: bool = True

    @property
    def of_transformers(self) -> bool:
        return self.name in (HUGGINGFACE, PROMPT_LOOKUP, ASSISTED)

    def refusal(self, batch: int) -> str | None:
        """Why the method can't decode so many prompts side by side; None if it can."""
        return "batch 1 only" if batch > 1 and self.name in (PROMPT_LOOKUP, ASSISTED) else None

    def __str__(self) -> str:
        if self.name == AUTOREGRESSIVE:
            return "plain decoding"
        if self.lookup:
            return f"{self.name} of {self.lookup} token{'s' if self.lookup > 1 else ''}"
        if not self.masks:
            return self.name
        masks = f"{self.masks} mask{'s' if self.masks > 1 else ''}"
        if self.name == ADAPTIVE:
            return f"{self.name}{'' if self.from_text else ' without lookup'}, up to {masks}"
        return f"{self.name} with {masks}"


def methods_to_compare(
    model: MTPForCausalLM,
    *,
    strategies: Sequence[str] | None,
    masks: Sequence[int] | None,
    prompt_lookup: Sequence[int],
    assisted: bool,
    hf: bool,
    use_sampler: bool,
    max_new_tokens: int,
) -> list[Method]:
    """The rows in the order of the table: baselines first, then every strategy with every number of masks.

    The adaptive strategy has the largest number alone: to it that is no more than a limit. It comes twice, the second
    time with drafts of the masks only.
    Raises ForetellError for a method that the model can't do.
    """
    drafting = []
    for strategy in dict.fromkeys(STRATEGIES if strategies is None else strategies):
        if strategy == AUTOREGRESSIVE:
            continue
        counts = tuple(default_masks(model) if masks is None else masks)
        if strategy == ADAPTIVE:
            counts = counts and (max(counts),)
        drafting += [Method(strategy, k, use_sampler) for k in dict.fromkeys(counts)]
        if strategy == ADAPTIVE:
            drafting += [Method(strategy, k, use_sampler, from_text=False) for k in counts]
    if not drafting:
        raise ForetellError(
            "nothing to compare with plain decoding: give at least one strategy and one number of masks"
        )
    for method in drafting:
        model.decode_config({"strategy": method.name, "masks": method.masks, "max_new_tokens": max_new_tokens})
    wrong = next((number for number in prompt_lookup if number < 1), None)
    if wrong is not None:
        raise ForetellError(f"prompt_lookup must be at least 1 token, not {wrong}")
    if assisted and not hf:
        raise ForetellError("a draft model is used by transformers' generate(): leave it out, or allow hf")
    baselines = [Method(AUTOREGRESSIVE)]
    if hf:
        lookups = [Method(PROMPT_LOOKUP, lookup=number) for number in dict.fromkeys(prompt_lookup)]
        baselines = [Method(HUGGINGFACE), *lookups, *([Method(ASSISTED)] if assisted else []), *baselines]
    return [*baselines, *drafting]


def default_masks(model: MTPForCausalLM) -> tuple[int, ...]:
    """Those of MASKS that the adapter was trained with, and its own k."""
    return tuple(sorted({k for k in MASKS if k <= model.max_masks} | {model.max_masks}))

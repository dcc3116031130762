"""Is the output the base's own in this precision? Every token against its `generate()`, every difference weighed.

In half precision a wider forward rounds differently, so two nearly equal logits may change places. After such a
difference the comparison goes on from what `generate()` wrote: every token is compared, given the same text before it.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from foretell.base import Base
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.baselines import huggingface_generate
from foretell.evaluation.measure import Difference, encode_prompts, first_difference
from foretell.evaluation.prompts import Prompt
from foretell.evaluation.report import environment

NEAR_TIE_UNITS = 4  # what rounding in a whole forward moves a logit by, in units in its last place


@dataclass(frozen=True)
class Divergence:
    """A token that is not `generate()`'s. Gaps: the base's logit of `generate()`'s token minus that of ours, in a plain
    forward over the common text."""

    prompt: int  # both counted from 0
    position: int
    expected: int | None  # token ids; None: that text had ended
    found: int | None
    logit_gap: float
    unit: float  # in the last place of the two logits, in the base's precision
    logit_gap_float32: float | None  # with the base's weights widened to fp32; None if not asked for, or it is fp32
    near_tie: bool  # |logit_gap| is at most NEAR_TIE_UNITS units


@dataclass(frozen=True)
class CheckReport:
    """`tokens` were compared; `divergences` are those that differ, by prompt and position."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    prompts: int
    tokens: int
    acceptance_rate: float  # tokens per step: what no draft was accepted in would prove little
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return not self.divergences

    @property
    def passed(self) -> bool:
        """Whether every difference is a near-tie."""
        return all(divergence.near_tie for divergence in self.divergences)

    @property
    def share(self) -> float:
        """Of the tokens compared, those that differ."""
        return len(self.divergences) / self.tokens

    def first(self, prompt: int) -> Divergence | None:
        """Where the output for a prompt first leaves `generate()`'s."""
        return next((divergence for divergence in self.divergences if divergence.prompt == prompt), None)

    def sentence(self) -> str:
        what = f"{self.tokens} tokens of {self.prompts} prompt{'s' if self.prompts > 1 else ''}"
        if self.identical:
            return f"identical: all {what}"
        ties = sum(divergence.near_tie for divergence in self.divergences)
        same = sum(self.first(prompt) is None for prompt in range(self.prompts))
        return (
            f"{len(self.divergences)} of {what} differ ({100 * self.share:.2g} %), {ties} of them near-ties; "
            f"{same} of {self.prompts} outputs identical"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for json.dumps."""
        verdict = "identical" if self.identical else "near-ties only" if self.passed else "different"
        return {
            **self.environment,
            "settings": self.settings,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "acceptance_rate": self.acceptance_rate,
            "verdict": verdict,
            "identical_outputs": sum(self.first(prompt) is None for prompt in range(self.prompts)),
            "different_tokens": len(self.divergences),
            "different_share": self.share,
            "near_ties": sum(divergence.near_tie for divergence in self.divergences),
            "divergences": [asdict(divergence) for divergence in self.divergences],
        }


def check(
    model: MTPForCausalLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    strategy: str | None = None,
    masks: int | None = None,
    batch_size: int = 1,
    upcast: bool = True,
    on_progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> CheckReport:
    """Greedy output, `batch_size` prompts side by side, against the base's own `generate()`, one prompt at a time.

    `upcast` also gives the gaps in fp32, on a widened copy of the base that is made when the first difference is found.
    `on_progress` is told tokens done, tokens in all and what is being done. Raises ForetellError for bad settings.
    """
    if batch_size < 1:
        raise ForetellError(f"batch_size must be at least 1, not {batch_size}")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "strategy": strategy, "masks": masks}
    config = model.decode_config(settings)
    ids = encode_prompts(model, prompts, max_new_tokens)
    expected = []
    for done, prompt in enumerate(ids):
        on_progress(done * max_new_tokens, len(ids) * max_new_tokens, "generate()")
        expected.append(huggingface_generate(model, [prompt], max_new_tokens).tokens[0])

    total = sum(map(len, expected))
    weigh = Scales(model, upcast)
    compared = tokens = steps = 0
    divergences = []
    pending = deque((number, 0) for number in range(len(ids)))  # prompts and how many of their tokens are compared
    while pending:
        on_progress(compared, total, config.strategy)
        batch = [pending.popleft() for _ in range(min(batch_size, len(pending)))]
        new = min(max_new_tokens - start for _, start in batch)
        texts = [followed_by(ids[number], expected[number][:start]) for number, start in batch]
        outs = model.generate_batch([text[0].tolist() for text in texts], **{**settings, "max_new_tokens": new})
        for (number, start), text, out in zip(batch, texts, outs, strict=True):
            tokens, steps = tokens + out.new_tokens, steps + out.steps
            wanted = expected[number][start : start + new]
            difference = first_difference(model, [text], [wanted], [out.token_ids])
            held = len(wanted)
            if difference is not None:
                held = difference.position + 1
                common = followed_by(text, wanted[: difference.position])
                divergences.append(weigh(difference, common, number, start + difference.position))
            compared += held
            if start + held < len(expected[number]):
                pending.append((number, start + held))
    return CheckReport(
        environment=environment(model),
        settings={**settings, "strategy": config.strategy, "masks": config.masks, "batch_size": batch_size},
        prompts=len(ids),
        tokens=total,
        acceptance_rate=tokens / steps,
        divergences=sorted(divergences, key=lambda divergence: (divergence.prompt, divergence.position)),
    )


class Scales:
    """Weighs differences: how far apart are the two logits, and is that more than rounding can do?"""

    def __init__(self, model: MTPForCausalLM, upcast: bool) -> None:
        self.base = model.base
        self._upcast = upcast and model.base.dtype != torch.float32
        self._exact: Base | None = None

    def __call__(self, difference: Difference, text: Tensor, prompt: int, position: int) -> Divergence:
        """`text` (1, n) is what both outputs share, prompt included."""
        one, two = difference.expected, difference.found
        if one is None or two is None:  # the same tokens, but one text goes on: no rounding does that
            return Divergence(prompt, position, one, two, difference.logit_gap, 0.0, None, False)
        logits = next_logits(self.base, text)
        unit = last_place(max(abs(float(logits[one])), abs(float(logits[two]))), self.base.dtype)
        exact_gap = None
        if self._upcast:
            if self._exact is None:
                self._exact = Base(copy.deepcopy(self.base.unpacked()).float())
            exact = next_logits(self._exact, text)
            exact_gap = float(exact[one] - exact[two])
        near = abs(difference.logit_gap) <= NEAR_TIE_UNITS * unit
        return Divergence(prompt, position, one, two, difference.logit_gap, unit, exact_gap, near)


def followed_by(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """(1, n) and m tokens -> (1, n + m)."""
    return torch.cat([ids, torch.tensor([list(tokens)], dtype=torch.long, device=ids.device)], dim=1)


@torch.inference_mode()
def next_logits(base: Base, text: Tensor) -> Tensor:
    """text (1, n) -> the base's logits (V,) for the token after it, as fp32."""
    return base.unembed(base.latents(base.embed(text))[0, -1]).float()


def last_place(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at a value."""
    exponent = math.floor(math.log2(max(value, torch.finfo(dtype).tiny)))
    return float(torch.finfo(dtype).eps) * 2.0**exponent

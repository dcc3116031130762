"""Tokens per step and seconds of every strategy, beside plain decoding and the base's own `generate()`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.measure import (
    AUTOREGRESSIVE,
    HUGGINGFACE,
    Method,
    Run,
    check_methods,
    count,
    encode_prompts,
    first_difference,
    run,
)
from foretell.evaluation.prompts import Prompt
from foretell.evaluation.report import Report, Row, Spread, environment, order

STRATEGIES = ("linear", "quadratic")
MASKS = (1, 2, 4, 8)

# Told after every prompt: generations done, generations in all, what is being measured.
Progress = Callable[[int, int, str], None]


def bench(
    model: MTPForCausalLM,
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    strategies: Sequence[str] = STRATEGIES,
    masks: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    rounds: int = 3,
    on_progress: Progress | None = None,
    use_sampler: bool = True,
    hf: bool = True,
) -> Report:
    """Compares decoding methods on sets of prompts, in alternation.

    Every round runs every method over the prompts of a set, in an order that rotates, so that noise hits all alike;
    ratios are taken within a round. A method's first pass over one prompt is a warm-up, not counted. `masks` defaults
    to 1, 2, 4, 8 as far as the model goes, and its k. `hf=False` leaves out the base's `generate()`; the reference of
    `identical` is then plain decoding. Torch's threads stay as they are.
    Raises ForetellError for bad settings and prompts, before anything runs.
    """
    if rounds < 1:
        raise ForetellError(f"rounds must be at least 1, not {rounds}")
    if not prompts:
        raise ForetellError("give at least one set of prompts")
    masks = default_masks(model) if masks is None else masks
    methods = [Method(AUTOREGRESSIVE), *check_methods(model, strategies, masks, max_new_tokens, use_sampler)]
    if hf:
        methods.insert(0, Method(HUGGINGFACE))
    encoded = {name: encode_prompts(model, texts, max_new_tokens, name) for name, texts in prompts.items()}

    done, total = 0, sum(len(methods) * (1 + rounds * len(ids)) for ids in encoded.values())
    sets = {}
    for name, ids in encoded.items():

        def on_prompt(label: str = name) -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress(done, total, label)

        for method in methods:
            run(model, ids[:1], method, max_new_tokens, on_prompt)
        runs: dict[Method, list[Run]] = {method: [] for method in methods}
        for number in range(rounds):
            turn = number % len(methods)
            for method in methods[turn:] + methods[:turn]:
                runs[method].append(run(model, ids, method, max_new_tokens, on_prompt))
        sets[name] = order([_row(model, ids, method, runs) for method in methods])

    settings = {
        "strategies": list(strategies),
        "masks": list(masks),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "use_sampler": use_sampler,
        "prompts": {name: len(ids) for name, ids in encoded.items()},
    }
    return Report(settings, environment(model), sets)


def default_masks(model: MTPForCausalLM) -> tuple[int, ...]:
    """Those of MASKS that the adapter was trained with, and its own k."""
    return tuple(sorted({k for k in MASKS if k <= model.max_masks} | {model.max_masks}))


def _row(model: MTPForCausalLM, ids: Sequence[Tensor], method: Method, runs: Mapping[Method, list[Run]]) -> Row:
    own = runs[method]
    counts = count(own[0], method.masks)
    seconds = Spread.of([done.seconds for done in own])
    plain, huggingface = runs[Method(AUTOREGRESSIVE)], runs.get(Method(HUGGINGFACE))
    expected = (huggingface or plain)[0].tokens
    # Every round is compared: a kernel that sums in another order each time may differ in one of them only.
    differences = (first_difference(model, ids, expected, done.tokens) for done in own)
    difference = next((found for found in differences if found), None)
    first = [value for done in own for value in done.first_token_seconds]
    return Row(
        method=method,
        counts=counts,
        seconds=seconds,
        tokens_per_second=counts.tokens / seconds.median,
        ms_per_step=1000 * seconds.median / counts.steps,
        ms_to_first_token=1000 * statistics.median(first) if first else None,
        speedup_in_steps=counts.acceptance_rate / count(plain[0], 0).acceptance_rate,
        speedup=_speedup(plain, own),
        speedup_over_huggingface=_speedup(huggingface, own) if huggingface else None,
        identical=difference is None,
        difference=difference,
    )


def _speedup(baseline: Sequence[Run], own: Sequence[Run]) -> Spread:
    # Seconds per token, not seconds: where outputs differ, so may their lengths.
    return Spread.of([_seconds_per_token(b) / _seconds_per_token(o) for b, o in zip(baseline, own, strict=True)])


def _seconds_per_token(done: Run) -> float:
    return done.seconds / sum(map(len, done.tokens))

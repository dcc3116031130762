"""Tokens per step and seconds of every strategy, beside plain decoding and the base's own `generate()`."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.baselines import load_draft_model
from foretell.evaluation.measure import Run, count, encode_prompts, first_difference, run
from foretell.evaluation.methods import AUTOREGRESSIVE, HUGGINGFACE, Method, methods_to_compare
from foretell.evaluation.prompts import Prompt
from foretell.evaluation.report import Cell, Point, Report, Row, Spread, digest, environment
from foretell.evaluation.saved import check_output, finished_cells, save

# Told after every batch: batches done, batches in all, what is being measured.
Progress = Callable[[int, int, str], None]


def bench(
    model: MTPForCausalLM,
    prompts: Mapping[str, Sequence[Prompt]],
    *,
    strategies: Sequence[str] | None = None,
    masks: Sequence[int] | None = None,
    prompt_lookup: Sequence[int] = (5,),
    draft_model: str | Path | PreTrainedModel | None = None,
    batch: Sequence[int] = (1,),
    temperature: Sequence[float] = (0.0,),
    context: Sequence[int] | None = None,
    max_new_tokens: int = 128,
    rounds: int = 3,
    seed: int = 0,
    use_sampler: bool = True,
    hf: bool = True,
    output: str | Path | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Compares decoding methods on sets of prompts, in alternation, at every point of a sweep.

    The points are all combinations of the sets, `batch` (prompts decoded side by side; the last batch is filled up
    with the first prompts), `temperature` and `context` (tokens of every prompt, see `prompts.to_context`; None: as
    they are). At each, every round runs every method over all prompts, batch by batch by turns and in another order
    each time, so that noise hits all alike; ratios are taken within a round. A method's first pass over one batch is a
    warm-up, not counted.

    `strategies` are by default all that draft; `masks` 1, 2, 4, 8 as far as the model goes, and its k. Transformers'
    own ways to draft are `prompt_lookup`, by tokens drafted, and assisted generation with a `draft_model`; both take
    one prompt at a time. `hf=False` leaves out all that transformers runs; greedy texts are then compared with plain
    decoding's instead of `generate()`'s. Drawn texts always are, as transformers draws otherwise.

    With `output`, the report so far is written there after every point; `resume` goes on from that file, also for a
    wider sweep, and without it a file that exists is refused. Torch's threads stay as they are.
    Raises ForetellError for bad settings and prompts, before anything runs.
    """
    if rounds < 1:
        raise ForetellError(f"rounds must be at least 1, not {rounds}")
    if not prompts:
        raise ForetellError("give at least one set of prompts")
    check_output(output, resume)
    methods = methods_to_compare(
        model,
        strategies=strategies,
        masks=masks,
        prompt_lookup=prompt_lookup,
        assisted=draft_model is not None,
        hf=hf,
        use_sampler=use_sampler,
        max_new_tokens=max_new_tokens,
    )
    points = sweep(list(prompts), batch, temperature, context)
    model.decode_config({"seed": seed})  # checks it
    encoded = {
        (name, length): encode_prompts(model, prompts[name], max_new_tokens, name, length)
        for name, length in dict.fromkeys((point.set, point.context) for point in points)
    }
    draft = None if draft_model is None else load_draft_model(draft_model, model)
    texts = {point: filled(encoded[point.set, point.context], point.batch) for point in points}

    settings = {
        "methods": [str(method) for method in methods],
        "draft_model": None if draft is None else draft.config._name_or_path,
        "batch": list(batch),
        "temperature": list(temperature),
        "context": None if context is None else list(context),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "seed": seed,
        "use_sampler": use_sampler,
    }
    machine = environment(model)
    cells = {cell.point: cell for cell in finished_cells(output, settings, machine)} if output and resume else {}
    for point in points:
        if point in cells and cells[point].digest != digest(texts[point]):
            raise ForetellError(f"{output} can't be resumed: it has {point} with other prompts; give another output")
    missing = [point for point in points if point not in cells]
    total = sum(len(possible(methods, p)) * (1 + rounds * (len(texts[p]) // p.batch)) for p in missing)
    done = itertools.count(1)
    for point in missing:

        def on_batch(label: str = str(point)) -> None:
            number = next(done)
            if on_progress:
                on_progress(number, total, label)

        cells[point] = _measure(model, point, texts[point], methods, max_new_tokens, rounds, seed, draft, on_batch)
        if output:
            save(Report(settings, machine, _in_order(cells, points)), output)
    return Report(settings, machine, _in_order(cells, points))


def sweep(
    sets: Sequence[str], batch: Sequence[int], temperature: Sequence[float], context: Sequence[int] | None
) -> list[Point]:
    """All combinations. Raises ForetellError for an empty list or a value that makes no sense."""
    for name, values, least in (("batch", batch, 1), ("temperature", temperature, 0), ("context", context, 1)):
        if values is None:
            continue
        if not values:
            raise ForetellError(f"{name} is empty: give at least one value")
        wrong = next((value for value in values if not (value >= least and math.isfinite(value))), None)
        if wrong is not None:
            raise ForetellError(f"{name} must be at least {least}, not {wrong}")
    lengths: Sequence[int | None] = [None] if context is None else context
    combinations = itertools.product(sets, batch, map(float, temperature), lengths)
    return list(dict.fromkeys(Point(*combination) for combination in combinations))


def filled(prompts: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The prompts, and so many of the first again that all batches are full."""
    return [prompts[number % len(prompts)] for number in range(math.ceil(len(prompts) / batch) * batch)]


def possible(methods: Sequence[Method], point: Point) -> list[Method]:
    """The methods that can run there."""
    return [method for method in methods if method.refusal(point.batch) is None]


def _in_order(cells: Mapping[Point, Cell], points: Sequence[Point]) -> list[Cell]:
    """Those asked for first, then what an earlier run had measured beside them."""
    asked = [cells[point] for point in points if point in cells]
    return asked + [cell for point, cell in cells.items() if point not in points]


def _measure(
    model: MTPForCausalLM,
    point: Point,
    ids: Sequence[Tensor],
    methods: Sequence[Method],
    max_new_tokens: int,
    rounds: int,
    seed: int,
    draft_model: PreTrainedModel | None,
    on_batch: Callable[[], None],
) -> Cell:
    """Every method at one point, `rounds` times, batch by batch in alternation, after a warm-up of all."""

    def once(method: Method, start: int, result: Run) -> None:
        run(
            model,
            ids[start : start + point.batch],
            method,
            max_new_tokens,
            on_batch,
            batch=point.batch,
            temperature=point.temperature,
            seed=seed,
            draft_model=draft_model,
            result=result,
        )

    able = possible(methods, point)
    for method in able:
        once(method, 0, Run())
    runs: dict[Method, list[Run]] = {method: [Run() for _ in range(rounds)] for method in able}
    for number in range(rounds):
        for start in range(0, len(ids), point.batch):
            # Another order each time: what runs behind wide steps begins with cold caches.
            for method in random.Random(f"{point} {number} {start}").sample(able, len(able)):
                once(method, start, runs[method][number])
    rows = [_row(model, point, ids, method, runs) for method in able]
    left_out = {str(method): reason for method in methods if (reason := method.refusal(point.batch))}
    return Cell(point, len(ids), digest(ids), rows, left_out)


def _row(
    model: MTPForCausalLM, point: Point, ids: Sequence[Tensor], method: Method, runs: Mapping[Method, list[Run]]
) -> Row:
    own = runs[method]
    # What learns as it goes may take other steps in every round; the round with the median number stands for all.
    counts = count(sorted(own, key=lambda done: sum(done.steps))[len(own) // 2], method.masks)
    plain, huggingface = runs[Method(AUTOREGRESSIVE)], runs.get(Method(HUGGINGFACE))
    drawn = point.temperature > 0
    comparable = not (drawn and method.of_transformers)
    difference = None
    if comparable:
        expected = (plain if drawn or not huggingface else huggingface)[0].tokens
        # Every round is compared: a kernel that sums in another order each time may differ in one of them only.
        differences = (first_difference(model, ids, expected, done.tokens) for done in own)
        difference = next((found for found in differences if found), None)
    several = all(done.decode_steps for done in own)
    return Row(
        point=point,
        method=method,
        counts=counts,
        seconds=Spread.of([done.seconds for done in own]),
        tokens_per_second=Spread.of([1 / done.seconds_per_token for done in own]),
        decode_tokens_per_second=(
            Spread.of([done.decode_tokens / done.decode_seconds for done in own]) if several else None
        ),
        ms_to_first_token=Spread.of([1000 * seconds for done in own for seconds in done.first_token_seconds]),
        ms_per_step=Spread.of([1000 * done.decode_seconds / done.decode_steps for done in own]) if several else None,
        speedup_in_steps=counts.acceptance_rate / count(plain[0], 0).acceptance_rate,
        speedup=_speedup(plain, own),
        speedup_over_huggingface=_speedup(huggingface, own) if huggingface else None,
        identical=difference is None if comparable else None,
        difference=difference,
    )


def _speedup(baseline: Sequence[Run], own: Sequence[Run]) -> Spread:
    # Seconds per token, not seconds: where outputs differ, so may their lengths.
    return Spread.of([b.seconds_per_token / o.seconds_per_token for b, o in zip(baseline, own, strict=True)])

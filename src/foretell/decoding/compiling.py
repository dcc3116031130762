"""Compiles a model's steps, or captures them on a GPU, and compares them with eager ones before any text is decoded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

from foretell.cache import StaticCache
from foretell.captured import CapturedSteps
from foretell.compiled import CompiledSteps
from foretell.errors import ForetellError
from foretell.layout import Layout, linear, plain, quadratic
from foretell.model import MTPModel

CONTEXTS = (5, 7)  # tokens cached in the two steps from which a graph is made
CHECKED = (9, 70)  # and in those that are compared: few, and more than a vector or a short window holds


@torch.inference_mode()
def compile_steps(model: MTPModel) -> str | None:
    """From here on steps of one sequence run compiled on a CPU (see `CompiledSteps`), and all steps as CUDA graphs on
    a GPU (see `CapturedSteps`); prompts stay eager.

    On a CPU tens of seconds the first time, a few once inductor has kept the graphs on disk; on a GPU a graph is
    recorded when a kind of step recurs. The adapter's matrices are looked up once, so this comes after `for_inference`.
    Every form of step is compared with its eager one; where it differs, or anything else is in the way, the model stays
    as it was and the reason is returned, else None.
    """
    if model.compiled is not None:
        return None
    steps: CompiledSteps | CapturedSteps | None = None
    try:
        if model.base.device.type == "cuda":
            steps = captured = CapturedSteps(model.base, model.adapter)
            compare_captured(model, captured)
        else:
            steps = model.compiled = compiled = CompiledSteps(model.base, model.adapter)
            for layouts in _layouts(model):
                _compile(model, compiled, layouts)
            _compare(model, compiled, [1])
    except Exception as error:  # from the compiler or from code of any author
        if steps is not None:
            steps.remove()
        model.compiled = None
        return f"decoding goes on without compiled steps: {_reason(error)}"
    finally:
        model.adapter.remove()
    return None


def compare_captured(model: MTPModel, steps: CapturedSteps) -> None:
    """Puts them into the model. Raises ForetellError if they differ from eager steps, also of a ragged batch."""
    patience, steps.eager_first = steps.eager_first, 0
    _compare(model, steps, [1, 2])
    steps.eager_first = patience


def _compile(model: MTPModel, steps: CompiledSteps, layouts: tuple[Layout, Layout]) -> None:
    """Makes the graphs for the form of two layouts."""
    ready = [_prefilled(model, layout, [context]) for layout, context in zip(layouts, CONTEXTS, strict=True)]
    with _silent(), steps.compiling(layouts[0].regular, layouts[0].width, CONTEXTS[0]):
        for layout, (ids, cache) in zip(layouts, ready, strict=True):
            model.step(ids, [layout], cache, cache.lengths)


def _layouts(model: MTPModel) -> list[tuple[Layout, Layout]]:
    """For each form two layouts of other sizes (but for a single row)."""
    k = model.max_masks
    return [(plain(), plain()), (plain(3), plain(4)), (linear(2, k), quadratic(3, k))]


@contextmanager
def _silent() -> Iterator[None]:
    """Within this context torch's compiler logs nothing: what comes of it is said in one sentence."""
    loggers = [
        logging.getLogger(f"torch.{name}") for name in ("_inductor", "_subclasses", "fx", "_dynamo", "_functorch")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """One line for a user."""
    said = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
    if isinstance(error, ForetellError):
        return said
    inner = getattr(error, "inner_exception", error)  # inductor wraps what it meets
    if isinstance(inner, (OSError, ImportError)):  # also what a compiler that was killed has left there
        return f"inductor can't keep its graphs ({inner}); name another directory in TORCHINDUCTOR_CACHE_DIR"
    return f"its blocks can't be compiled ({type(error).__name__}: {said})"


def _compare(model: MTPModel, steps: CompiledSteps | CapturedSteps, batches: list[int]) -> None:
    """Raises ForetellError if such steps differ from eager ones, after few cached tokens and after more."""
    k = model.max_masks
    model.compiled = None
    layouts = [plain(), plain(2), linear(0, 1), linear(0, k), quadratic(2, k)]
    longest = max(CHECKED)
    if model.base.max_positions is not None:
        longest = min(longest, model.base.max_positions - layouts[-1].width)
    contexts = [context for context in CHECKED if context < longest] + [longest]
    differences = []
    for batch in batches:
        ids, cache = _prefilled(model, layouts[-1], [longest] * batch)
        for context, layout in product(contexts, layouts):
            lengths = [context - row for row in range(batch)]  # in a batch all differ
            model.compiled = None
            want = _latents(model, layout, ids, cache, lengths)
            model.compiled = steps
            got = _latents(model, layout, ids, cache, lengths)
            # Latents, and the keys and values that the next step sees: largest difference over their range.
            for one, other in zip(got, want, strict=True):
                differences.append(float((one - other).float().abs().max() / other.float().abs().max()))
    limit = 1e-4 if model.base.dtype == torch.float32 else 0.1
    if not all(difference < limit for difference in differences):  # NaN is not below it
        raise ForetellError(f"they differ from eager ones by {max(differences):.1e} of their range")


def _latents(model: MTPModel, layout: Layout, ids: Tensor, cache: StaticCache, lengths: list[int]) -> list[Tensor]:
    """z (B, Q, D) of a step behind so many tokens of a copy of the cache, and its last keys and values."""
    own = copy.deepcopy(cache)
    own.lengths[:] = lengths
    latents = model.step(ids[:, : layout.regular], [layout] * len(lengths), own, own.lengths)
    last, columns = own.layers[-1], min(lengths) + layout.width  # beyond them a longer sequence's only
    return [latents, last.keys[:, :, :columns], last.values[:, :, :columns]]


def _prefilled(model: MTPModel, layout: Layout, contexts: list[int]) -> tuple[Tensor, StaticCache]:
    """Ids (B, R) for a step, and a cache that holds so many tokens (as many of each sequence) before them."""
    batch, context = len(contexts), contexts[0]
    cache = StaticCache(len(model.base.blocks), context + 2 * layout.width, batch)
    count = context + layout.regular
    ids = torch.arange(batch * count, device=model.base.device).view(batch, count) % model.base.vocab_size
    model.prefill(ids[:, :context], cache)
    cache.keep(contexts)
    return ids[:, context:], cache

"""Compiles a model's steps and compares them with eager ones, before any text is decoded with them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

from foretell.compiled import CompiledSteps
from foretell.decoding.cache import StaticCache
from foretell.errors import ForetellError
from foretell.layout import Layout, linear, plain, quadratic
from foretell.model import MTPModel

CONTEXTS = (5, 7)  # tokens cached in the two steps from which a graph is made
CHECKED = (9, 70)  # and in those that are compared: few, and more than a vector or a short window holds


@torch.inference_mode()
def compile_steps(model: MTPModel) -> str | None:
    """From here on steps of one sequence run compiled (see `CompiledSteps`); prompts and batches stay eager.

    Tens of seconds the first time, a few once inductor has kept the graphs on disk. The adapter's matrices are looked
    up once, so this comes after `for_inference`. Every form of step is compared with its eager one; where it differs,
    or anything else is in the way, the model stays as it was and the reason is returned, else None.
    """
    if model.compiled is not None:
        return None
    steps = None
    try:
        steps = model.compiled = CompiledSteps(model.base, model.adapter)
        for layouts in _layouts(model):
            ready = [_prefilled(model, layout, context) for layout, context in zip(layouts, CONTEXTS, strict=True)]
            with _silent(), steps.compiling(layouts[0].regular, layouts[0].width, CONTEXTS[0]):
                for layout, (ids, cache) in zip(layouts, ready, strict=True):
                    model.step(ids, [layout], cache, cache.lengths)
        _compare(model, steps)
    except Exception as error:  # from the compiler or from code of any author
        if steps is not None:
            steps.remove()
        model.compiled = None
        return f"decoding goes on without compiled steps: {_reason(error)}"
    finally:
        model.adapter.remove()
    return None


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


def _compare(model: MTPModel, steps: CompiledSteps) -> None:
    """Raises ForetellError if compiled steps differ from eager ones, after few cached tokens and after more."""
    k = model.max_masks
    model.compiled = None
    layouts = [plain(), plain(2), linear(0, 1), linear(0, k), quadratic(2, k)]
    longest = max(CHECKED)
    if model.base.max_positions is not None:
        longest = min(longest, model.base.max_positions - layouts[-1].width)
    contexts = [context for context in CHECKED if context < longest] + [longest]
    ids, cache = _prefilled(model, layouts[-1], longest)
    differences = []
    for context, layout in product(contexts, layouts):
        model.compiled = None
        want = _latents(model, layout, ids, cache, context)
        model.compiled = steps
        got = _latents(model, layout, ids, cache, context)
        # Latents, and the keys and values that the next step sees: largest difference over their range.
        for one, other in zip(got, want, strict=True):
            differences.append(float((one - other).float().abs().max() / other.float().abs().max()))
    limit = 1e-4 if model.base.dtype == torch.float32 else 0.1
    if not all(difference < limit for difference in differences):  # NaN is not below it
        raise ForetellError(f"they differ from eager ones by {max(differences):.1e} of their range")


def _latents(model: MTPModel, layout: Layout, ids: Tensor, cache: StaticCache, context: int) -> list[Tensor]:
    """z (1, Q, D) of a step behind so many tokens of a copy of the cache, and its last keys and values."""
    own = copy.deepcopy(cache)
    own.lengths[0] = context
    latents = model.step(ids[:, : layout.regular], [layout], own, own.lengths)
    return [latents, own.layers[-1].keys, own.layers[-1].values]


def _prefilled(model: MTPModel, layout: Layout, context: int) -> tuple[Tensor, StaticCache]:
    """Ids (1, R) for a step, and a cache that holds so many tokens before them."""
    cache = StaticCache(len(model.base.blocks), context + 2 * layout.width)
    ids = torch.arange(context + layout.regular, device=model.base.device)[None] % model.base.vocab_size
    model.prefill(ids[:, :context], cache)
    cache.keep([context])
    return ids[:, context:], cache

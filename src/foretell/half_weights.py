"""Weights of 16 bits that are multiplied in float32: half the memory to read, and not a number changed.

Most models are published in 16 bits. What a step takes on a CPU is reading them; where they are kept in 32 bits, twice
of that, and PyTorch's own products of 16 bits go row by row on processors that have no instructions for them. FBGEMM
reads float16, widens it in registers and sums in float32. A bfloat16 number has fewer digits than a float16 but a
larger range, so weights that are too small for it are taken a power of two larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

# What the numbers of a row lose, all together, over their sum: as much as rounding to float32 may take of each.
LOST = 2.0**-24
LARGEST, EXPONENT_LIMIT = 65504.0, 16  # of float16 numbers, which are below 2^16
CHECKED_NUMBERS = 2**18  # at a time: they stay in the processor's cache
PART_NUMBERS = 2**25  # of a weight that is laid out at once, from float32: more takes longer a number, and memory

_on_their_way: dict[Future[Any], ThreadPoolExecutor] = {}


def available() -> bool:
    """Whether this build of PyTorch has FBGEMM, which is for x86 processors."""
    return "fbgemm" in torch.backends.quantized.supported_engines and hasattr(
        torch.ops.quantized, "linear_dynamic_fp16"
    )


class HalfWeight:
    """A weight (d_out, d_in) in float16, with its bias, as FBGEMM lays it out."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        """`scale`: of what is kept, a power of two (see `scale_of`)."""
        self.shape, self.dtype, self.scale = weight.shape, weight.dtype, scale
        rows = max(1, PART_NUMBERS // weight.shape[1])
        weights = weight.detach().split(rows)
        biases = [None] * len(weights) if bias is None else bias.detach().split(rows)
        self._parts: list[Any] = [_laying_out(*own, scale) for own in zip(weights, biases, strict=True)]
        self._there = False

    @property
    def parts(self) -> list[Any]:
        """FBGEMM's own objects, once they are there."""
        if not self._there:
            futures = self._parts
            self._parts, self._there = [part.result() for part in futures], True
            _end(futures)
        return self._parts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": self.parts, "_there": True}

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., d_in) float32 -> x W^T + bias (..., d_out) float32."""
        if x.ndim == 1:  # which FBGEMM does not take
            return self.multiply(x[None])[0]
        made = [torch.ops.quantized.linear_dynamic_fp16.default(x, part) for part in self.parts]
        whole = made[0] if len(made) == 1 else torch.cat(made, -1)
        return whole if self.scale == 1.0 else whole.mul_(1.0 / self.scale)

    def to_dense(self) -> Tensor:
        """(d_out, d_in), as it was given."""
        parts = [torch.ops.quantized.linear_unpack_fp16(part)[0] for part in self.parts]
        return (torch.cat(parts).float() / self.scale).to(self.dtype)

    def numel(self) -> int:
        return self.shape.numel()


def _laying_out(weight: Tensor, bias: Tensor | None, scale: float) -> Future[Any]:
    """FBGEMM's object for a weight times `scale`; its work begins once fewer are on their way than there are threads.

    One thread takes some 15 ns for a number, so several weights go on behind our back. Each has a thread of its own,
    which ends with it: a thread that has computed once keeps helpers, and with more of those than processors OpenMP's
    no longer wait awake for the next operation, which makes each of all those to come some 40 µs slower.
    """
    if len(_on_their_way) >= torch.get_num_threads():
        done, _ = wait(list(_on_their_way), return_when=FIRST_COMPLETED)
        _end(done)
    given = [None if one is None else one.float() if scale == 1.0 else one.float() * scale for one in (weight, bias)]
    pool = ThreadPoolExecutor(1, "foretell-half-weights")
    future = pool.submit(torch.ops.quantized.linear_prepack_fp16, *given)
    pool.shutdown(wait=False)
    _on_their_way[future] = pool
    return future


def _end(futures: Iterable[Future[Any]]) -> None:
    """Waits for the threads of these, which are done."""
    for future in futures:
        if pool := _on_their_way.pop(future, None):  # unless another thread has waited for it
            pool.shutdown()


def finish() -> None:
    """Returns when no weight is on its way any more and their threads have ended: then products can be timed."""
    done, _ = wait(list(_on_their_way))
    _end(done)


def scale_of(weight: Tensor) -> float | None:
    """A power of two that makes weight (d_out, d_in) a matrix of float16 numbers, 1 if it is one; None if none does."""
    largest = max(abs(float(number)) for number in weight.detach().aminmax())
    if not math.isfinite(largest):
        return None
    scales = [1.0, 2.0 ** (EXPONENT_LIMIT - math.frexp(largest)[1])] if largest else [1.0]
    possible = (scale for scale in scales if largest * scale <= LARGEST)
    return next((scale for scale in possible if _is_kept(weight.detach(), scale)), None)


def _is_kept(weight: Tensor, scale: float) -> bool:
    for rows in weight.split(max(1, CHECKED_NUMBERS // weight.shape[1])):
        given = rows.float() * scale
        lost = (given.half().float() - given).abs_().sum(1)
        if not bool((lost <= LOST * given.abs_().sum(1)).all()):
            return False
    return True

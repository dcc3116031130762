"""Weights of 16 bits that are multiplied in float32: half the memory to read, and not a number changed.

Most models are published in 16 bits. What a step takes on a CPU is reading them; where they are kept in 32 bits, twice
of that, and PyTorch's own products of 16 bits go row by row on processors that have no instructions for them. FBGEMM
reads float16, widens it in registers and sums in float32. A bfloat16 number has fewer digits than a float16 but a
larger range, so weights that are too small for it are taken a power of two larger.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# What the numbers of a row lose, all together, over their sum: as much as rounding to float32 may take of each.
LOST = 2.0**-24
LARGEST, EXPONENT_LIMIT = 65504.0, 16  # of float16 numbers, which are below 2^16
CHECKED_NUMBERS = 2**18  # at a time: they stay in the processor's cache


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
        own_bias = None if bias is None else bias.detach().float() * scale
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight.detach().float() * scale, own_bias)

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., d_in) float32 -> x W^T + bias (..., d_out) float32."""
        made = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return made if self.scale == 1.0 else made.mul_(1.0 / self.scale)

    def to_dense(self) -> Tensor:
        """(d_out, d_in), as it was given."""
        weight, _ = torch.ops.quantized.linear_unpack_fp16(self._packed)
        return (weight.float() / self.scale).to(self.dtype)

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        return 2 * self.numel()


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

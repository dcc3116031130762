"""Machines on which weights are multiplied fastest in a way that a test chooses."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import nn

from foretell import packed
from foretell.packed import Way

WAYS: tuple[Way, ...] = ("stored", "blocks", "halves")
M = TypeVar("M", bound=nn.Module)


def lying(way: Way, patch: pytest.MonkeyPatch) -> None:
    """Weights lie that way if they can, else as this machine can have any."""

    def fastest(d_out: int, d_in: int, dtype: torch.dtype) -> tuple[Way, ...]:
        possible = packed.ways(dtype)
        others = tuple(other for other in possible if other != way and other in packed.AS_TENSORS)
        return (way, *others) if way in possible else others

    patch.setattr("foretell.packed.fastest", fastest)


@torch.no_grad()
def in_16_bits(module: M) -> M:
    """The module with its numbers rounded to bfloat16, as most models are published, in the dtype that it has."""
    for parameter in module.parameters():
        parameter.copy_(parameter.bfloat16())
    return module

"""Attention of decoding steps over a static cache, by foretell's own kernel (attended.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from foretell import native
from foretell.layout import Layout
from foretell.rows import Rows
from foretell.streamed import DTYPES

MOST_ROWS = 128  # of a sequence: those of a prompt are better multiplied all at once
MULTIPLE = 16  # of which the size of a head must be one: what the widest registers hold
LARGEST = 1024


class _Step(ctypes.Structure):
    """`Step` of attended.cpp."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("sequences", "rows", "heads", "shared", "size", "stride", "capacity")),
        *((name, ctypes.c_void_p) for name in ("lengths", "counts", "order", "visible", "cosine", "sine")),
        *((name, ctypes.c_float) for name in ("scale", "epsilon")),
        ("half", ctypes.c_long),
    ]


def fits(size: int, dtype: torch.dtype) -> bool:
    """Whether it can be done here, with heads of so many numbers."""
    return native.library() is not None and size % MULTIPLE == 0 and size <= LARGEST and dtype in DTYPES


class HeadNorms(NamedTuple):
    """Weights (D_head,) of the RMS norms of queries and keys, in the dtype of both."""

    query: Tensor
    key: Tensor
    epsilon: float


class LaidOut(NamedTuple):
    """A layout's tensors as the kernel wants them."""

    positions: Tensor  # (Q,) int64, from regular token 0
    numbers: Tensor  # (M,) int64, of the masks
    visible: Tensor  # (Q * Q,) uint8
    order: Tensor  # (Q,) int64: 0, 1, ...


@lru_cache(maxsize=1024)
def laid_out(layout: Layout, bidirectional: bool) -> LaidOut:
    if bidirectional:  # strategies need not know how the masks were trained
        layout = replace(layout, bidirectional=True)
    visible = layout.visible.to(torch.uint8).flatten()
    return LaidOut(layout.position_offsets, layout.mask_numbers, visible, torch.arange(layout.width))


class Past:
    """What all layers of a step know: whose the rows together are, where they stand and what they see.

    positions (N,) int64 of the rows, numbers (N - first,) int64 of the masks among them.
    """

    def __init__(self, rows: Rows, lengths: Sequence[int], bidirectional: bool) -> None:
        """Of sequences of which so many tokens are kept, (B,)."""
        library = native.library()
        assert library is not None  # only where it `fits`
        self._library = library
        self.longest = max(lengths) + rows.width
        layouts = [laid_out(layout, bidirectional) for layout in rows.layouts]
        if len(layouts) == 1:
            self.positions, self.numbers, self._visible, self._order = layouts[0]
            self.positions = self.positions + lengths[0]
        else:
            self._order = rows.order
            positions = torch.cat([own.positions + length for own, length in zip(layouts, lengths, strict=True)])
            self.positions = torch.empty_like(positions).index_copy_(0, self._order, positions)
            self.numbers = torch.cat([own.numbers for own in layouts])
            self._visible = torch.cat([own.visible for own in layouts])
        self._facts = torch.tensor([[*lengths], [layout.width for layout in rows.layouts]])
        self._step = _Step(
            sequences=rows.sequences,
            rows=rows.count,
            lengths=self._facts[0].data_ptr(),
            counts=self._facts[1].data_ptr(),
            order=self._order.data_ptr(),
            visible=self._visible.data_ptr(),
        )

    def turn(self, cosine: Tensor, sine: Tensor, heads: int, scale: float) -> None:
        """Cosine and signed sine (1, N, D_head) of the rows' positions; heads of queries; scale of the scores."""
        self._turns = cosine.contiguous(), sine.contiguous()  # kept alive
        self._step.cosine, self._step.sine = (turn.data_ptr() for turn in self._turns)
        self._step.heads, self._step.scale, self._step.half = heads, scale, cosine.dtype == torch.bfloat16

    def attend(self, made: Tensor, shared: int, keys: Tensor, values: Tensor, norms: HeadNorms | None) -> Tensor:
        """made (1, N, .): `shared` heads of keys and of values behind those of queries, and perhaps more, which is left
        alone -> what the rows see, (1, N, heads * D_head).

        Keys and values of the rows are then in the cache's (B or more, shared, capacity, D_head), behind the tokens
        that each sequence keeps.
        """
        step, size = self._step, keys.shape[3]
        step.size, step.shared, step.capacity, step.stride = size, shared, keys.shape[2], made.stride(1)
        out = made.new_empty(1, step.rows, step.heads * size)
        of_query = of_key = None
        if norms is not None:
            of_query, of_key, step.epsilon = norms.query.data_ptr(), norms.key.data_ptr(), norms.epsilon
        given = ctypes.byref(step), made.data_ptr(), of_query, of_key, keys.data_ptr(), values.data_ptr()
        self._library.foretell_attend(*given, out.data_ptr())
        return out

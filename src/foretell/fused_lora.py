"""The low-rank terms of linears that get the same rows, as one: in decoding a call costs what it computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from itertools import product as pairs

import torch
from torch import Tensor

from foretell import packed
from foretell.packed import PackedProduct, Way

SPELLED_OUT = 2**16  # numbers of a B up to which a compiled graph is faster without a product for it
DIAGONAL = 2**20  # numbers of a matrix with B's along its diagonal, above which the zeros cost more than calls anywhere
# BLAS libraries take fewer rows than this, but several, one by one: slow where they lie far apart in memory.
FEW_ROWS = 4
# All ways of adding B's are timed for so many masks, by turns. Before each the processor reads so many bytes of other
# things: as in a step, where all weights of a block are used between two uses of a B.
TRIED_MASKS, TRIED_BYTES, TRIED_ROUNDS = (2, 3, 4, 6, 8, 16), 2**21, 5

Laying = tuple[Way, bool]  # how B's lie, and whether as one matrix, along its diagonal
Range = tuple[int, int]
Place = tuple[Range, Range]  # of a B: its columns in out, and in A·x
Window = tuple[Range, Range, int]  # size, strides and start, as `as_strided` takes them
Add = Callable[[Tensor, Tensor], None]  # to out, from A·x


@dataclass
class LaidOut:
    """B's (d_out, r) as they are multiplied."""

    places: tuple[Place, ...]
    bs: list[Tensor]  # as stored they lie transposed, so that rows are read
    way: Way

    def add(self, terms: Iterable[tuple[Tensor, Tensor]], scale: float) -> None:
        """Of every place its columns, (n, d) or (B, n / B, d), += scale · B·A·x, from the rows (n, r) of A·x for it."""
        for (term, narrow), b in zip(terms, self.bs, strict=True):
            if self.way == "blocks":
                term.add_(packed.product(narrow, b).view(term.shape), alpha=scale)
            elif term.ndim == 2:
                term.addmm_(narrow, b, alpha=scale)
            else:
                term.add_((narrow @ b).view(term.shape), alpha=scale)

    def adder(self, shape: Sequence[int], first: int, rank: int, joined: bool, scale: float) -> Add:
        """`add` to the rows from `first` on of what products make of this shape, (1, n, d), from A·x (1, n - first, r)
        or, if that is `joined`, what holds it in its last columns: out again.

        In a step a call of PyTorch costs as much as a small product, and one of Python a part of that: where everything
        lies is worked out beforehand.
        """
        _, rows, width = shape
        count, begin = rows - first, first * width
        inside: Window = (count, rank), (width, 1), begin + width - rank
        few = joined and self.way == "stored" and 1 < count < FEW_ROWS
        row, start = (width, inside[2]) if joined and not few else (rank, 0)
        lie: list[tuple[Window, Window, Tensor]] = []
        for ((left, right), (top, bottom)), b in zip(self.places, self.bs, strict=True):
            term = (count, right - left), (width, 1), begin + left
            lie.append((term, ((count, bottom - top), (row, 1), start + top), b))

        def add(out: Tensor, narrow: Tensor) -> None:
            if few:
                narrow = narrow.as_strided(*inside).contiguous()
            for term, own, b in lie:
                out.as_strided(*term).addmm_(narrow.as_strided(*own), b, alpha=scale)

        def add_products(out: Tensor, narrow: Tensor) -> None:
            for term, own, b in lie:
                out.as_strided(*term).add_(packed.product(narrow.as_strided(*own), b), alpha=scale)

        return add_products if self.way == "blocks" else add


def laid_out(places: tuple[Place, ...], bs: Sequence[Tensor], way: Way, diagonal: bool) -> LaidOut:
    """B's (d_out, r) as they lie then."""
    if diagonal:
        single = bs[0].new_zeros(whole(places))
        for (rows, columns), b in zip(places, bs, strict=True):
            single[slice(*rows), slice(*columns)] = b
        places, bs = (((0, single.shape[0]), (0, single.shape[1])),), [single]
    laid = [packed.reorder(b) if way == "blocks" else b.t().contiguous() for b in bs]
    return LaidOut(places, laid, way)


def whole(places: tuple[Place, ...]) -> tuple[int, int]:
    """Columns of out up to the last B's, and of A·x."""
    return max(rows[1] for rows, _ in places), max(columns[1] for _, columns in places)


def layings(places: tuple[Place, ...], device: torch.device, dtype: torch.dtype) -> tuple[Laying, ...]:
    """How B's may lie: in all ways of a packed weight that are tensors, as compiled code wants them."""
    if packed.why_not(device, dtype) is not None:
        return (("stored", False),)
    ways = [way for way in packed.ways(dtype) if way in packed.AS_TENSORS]
    diagonals = (False, True) if len(places) > 1 and math.prod(whole(places)) <= DIAGONAL else (False,)
    return tuple(pairs(ways, diagonals))


def fastest(places: tuple[Place, ...], bs: Sequence[Tensor]) -> LaidOut:
    """B's (d_out, r) as this machine adds them fastest: timed, once in a process for all of their shapes."""
    possible = layings(places, bs[0].device, bs[0].dtype)
    if len(possible) > 1:
        possible = _timed(possible, places, bs[0].dtype, torch.get_num_threads())
    return laid_out(places, bs, *possible[0])


@cache
@torch.inference_mode()
def _timed(
    possible: tuple[Laying, ...], places: tuple[Place, ...], dtype: torch.dtype, threads: int
) -> tuple[Laying, ...]:
    """The fastest first; `threads` only tells results apart."""
    bs = [torch.ones(rows[1] - rows[0], columns[1] - columns[0], dtype=dtype) for rows, columns in places]
    ones = {laying: laid_out(places, bs, *laying) for laying in possible}
    between = torch.ones(TRIED_BYTES // 4)
    took = dict.fromkeys(possible, 0.0)  # logarithms, so that every number of rows counts the same
    width, rank = whole(places)
    for masks in TRIED_MASKS:
        out = torch.ones(1, masks, width + rank, dtype=dtype)
        adders = {laying: laid.adder(out.shape, 0, rank, True, 1e-6) for laying, laid in ones.items()}  # 0 adds nothing
        best = dict.fromkeys(possible, math.inf)  # a disturbance only ever adds
        for _, (laying, add) in pairs(range(TRIED_ROUNDS), adders.items()):
            between.sum()
            start = time.perf_counter()
            add(out, out)
            best[laying] = min(best[laying], time.perf_counter() - start)
        for laying in possible:
            took[laying] += math.log(best[laying])
    return tuple(sorted(possible, key=took.__getitem__))


class FusedLowRank:
    """s·B·A·x of linears that are one product: A's one below the other, B's along a diagonal where that is faster.

    Small A's are joined to the product itself, which then makes A·x with what it makes anyway. What is packed, joined
    or of several linears is a copy, which does not change when the adapters do.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        matrices: Mapping[int, tuple[Tensor, Tensor]],
        scale: float,
        product: PackedProduct | None = None,
    ) -> None:
        """sizes: d_out of every linear; A (r, d_in) and B (d_out, r) of some, by their numbers; `product`: theirs, to
        join the A's to."""
        linears, ranks = (
            list(pairwise(accumulate(of, initial=0))) for of in (sizes, [len(a) for a, _ in matrices.values()])
        )
        places = tuple((linears[number], columns) for number, columns in zip(matrices, ranks, strict=True))
        downs, bs = [a.detach() for a, _ in matrices.values()], [b.detach() for _, b in matrices.values()]
        a = torch.cat(downs) if len(downs) > 1 else downs[0]
        self.scale, self.dtype, self.rank, self.spelled_out = scale, a.dtype, len(a), False
        self._separate = places, bs
        self.joined = product is not None and product.join(a, by=self)
        can_pack = not self.joined and packed.why_not(a.device, a.dtype) is None
        self.packed = can_pack and packed.pays(len(a), a.shape[1], a.dtype)
        self.a = None if self.joined else packed.reorder(a) if self.packed else a.t()
        self.laid = fastest(places, bs)
        # Of steps that recur, by the shape of what the product makes, its regular rows and all rows of the step.
        self.adders: dict[tuple[torch.Size, int, int], Add] = {}

    def in_graph(self) -> FusedLowRank:
        """The same for a graph that is compiled: products with small B's are spelled out as sums, which become part of
        the code around them, while a call of a product takes longer than the sum."""
        places, bs = self._separate
        if max(b.numel() for b in bs) > SPELLED_OUT:
            return self
        same = copy(self)
        same.laid, same.spelled_out = LaidOut(places, [b.t().contiguous() for b in bs], "stored"), True
        return same

    @property
    def tensors(self) -> list[Tensor]:
        """Its own matrices: A, unless it is joined, and the B's."""
        return self.laid.bs if self.a is None else [self.a, *self.laid.bs]

    @tensors.setter
    def tensors(self, tensors: list[Tensor]) -> None:
        if self.a is not None:
            self.a, *tensors = tensors
        self.laid.bs = tensors

    def adder(self, shape: Sequence[int], first: int) -> Add:
        """`add_to` for what its product makes of one sequence, of this shape: see `LaidOut.adder`."""
        return self.laid.adder(shape, first, self.rank, self.joined, self.scale)

    def add_to(self, out: Tensor, x: Tensor, first: int = 0) -> None:
        """out (B, n, sum of d_out) += s·B·A·x (B, n, d_in) in the rows from `first` on, in place, without autograd.

        If A is joined, out is followed by A·x: (B, n, sum of d_out + r).
        """
        out = out[:, first:]
        narrow = out[..., -self.rank :] if self.a is None else self.narrow(x[:, first:])
        if self.spelled_out:
            for ((left, right), (top, _)), b in zip(self.laid.places, self.laid.bs, strict=True):
                made = sum(narrow[..., top + i : top + i + 1] * row for i, row in enumerate(b))
                out[..., left:right].add_(made, alpha=self.scale)
            return
        narrow = narrow.reshape(-1, self.rank)  # as rows of one product, not a product for each sequence
        out = out[0] if len(out) == 1 else out
        terms = [(out[..., left:right], narrow[:, top:bottom]) for (left, right), (top, bottom) in self.laid.places]
        self.laid.add(terms, self.scale)

    def narrow(self, x: Tensor) -> Tensor:
        """A·x where A is not joined."""
        assert self.a is not None
        return packed.product(x, self.a) if self.packed else x @ self.a

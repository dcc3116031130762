"""The low-rank terms of linears that get the same rows, as one: in decoding a call costs what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import accumulate

import torch
from torch import Tensor

from foretell import packed
from foretell.packed import PackedProduct

SPELLED_OUT = 2**16  # numbers of a B up to which a compiled graph is faster without a product for it
# Numbers of B's along a diagonal, packed and as stored; above, the zeros between them cost more than calls.
DIAGONAL, STORED_DIAGONAL = 2**19, 2**17


def worth_packing(a: Tensor, bs: Sequence[Tensor]) -> bool:
    """Whether A (r, d_in) and the largest B (d_out, r) are both faster in oneDNN's blocks."""
    return packed.why_not(a.device, a.dtype) is None and all(
        packed.pays(one.shape[0], one.shape[1], a.dtype) for one in (a, max(bs, key=Tensor.numel))
    )


class FusedLowRank:
    """s·B·A·x of linears that are one product: A's one below the other, B's along a diagonal if they are small.

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
        starts, ends = [0, *accumulate(sizes)], [0, *accumulate(a.shape[0] for a, _ in matrices.values())]
        self.scale = scale
        downs = [a.detach() for a, _ in matrices.values()]
        a = torch.cat(downs) if len(downs) > 1 else downs[0]
        bs = [b.detach() for _, b in matrices.values()]
        # Where each B's rows are in out, and its columns in A·x.
        self.places = [
            (slice(*starts[number : number + 2]), slice(*ends[place : place + 2]))
            for place, number in enumerate(matrices)
        ]
        self.dtype, self.rank, self.spelled_out = a.dtype, ends[-1], False
        self._separate = self.places, bs
        self.packed = worth_packing(a, bs)
        if len(sizes) > 1 and starts[-1] * ends[-1] <= (DIAGONAL if self.packed else STORED_DIAGONAL):
            diagonal = a.new_zeros(starts[-1], ends[-1])
            for (rows, columns), b in zip(self.places, bs, strict=True):
                diagonal[rows, columns] = b
            self.places, bs = [(slice(0, starts[-1]), slice(0, ends[-1]))], [diagonal]
        self.joined = product is not None and product.join(a, by=self)
        self.a = None if self.joined else packed.reorder(a) if self.packed else a.t()
        self.bs = [packed.reorder(b) if self.packed else b.t().contiguous() for b in bs]  # (r, d_out): rows are read

    def in_graph(self) -> FusedLowRank:
        """The same for a graph that is compiled: products with small B's are spelled out as sums, which become part of
        the code around them, while a call of a product takes longer than the sum."""
        places, bs = self._separate
        if max(b.numel() for b in bs) > SPELLED_OUT:
            return self
        same = copy(self)
        same.places, same.bs, same.spelled_out = places, [b.t().contiguous() for b in bs], True
        return same

    @property
    def tensors(self) -> list[Tensor]:
        """Its own matrices: A, unless it is joined, and the B's."""
        return [*self.bs] if self.a is None else [self.a, *self.bs]

    @tensors.setter
    def tensors(self, tensors: list[Tensor]) -> None:
        if self.a is not None:
            self.a, *tensors = tensors
        self.bs = tensors

    def add_to(self, out: Tensor, x: Tensor, first: int = 0) -> None:
        """out (B, n, sum of d_out) += s·B·A·x (B, n, d_in) in the rows from `first` on, in place, without autograd.

        If A is joined, out is followed by A·x: (B, n, sum of d_out + r).
        """
        if not self.packed and len(out) == 1 and out.stride(2) == 1 and not self.spelled_out:
            return self._add_to_one(out, x, first)
        out = out[:, first:]
        if self.a is None:
            narrow = out[..., -self.rank :]
        else:
            narrow = packed.product(x[:, first:], self.a) if self.packed else x[:, first:] @ self.a
        if not self.spelled_out:
            narrow = narrow.reshape(-1, self.rank)  # as rows of one product, not a product for each sequence
        for (rows, columns), b in zip(self.places, self.bs, strict=True):
            of_part, term = narrow if len(self.bs) == 1 else narrow[..., columns], out[..., rows]
            if self.spelled_out:
                term.add_(sum(of_part[..., i : i + 1] * row for i, row in enumerate(b)), alpha=self.scale)
            else:
                made = packed.product(of_part, b) if self.packed else of_part @ b
                term.add_(made.view(term.shape), alpha=self.scale)

    def _add_to_one(self, out: Tensor, x: Tensor, first: int) -> None:
        """The same for one sequence, out (1, n, ...), in as few calls as can be: each costs what a small B does."""
        _, rows, width = out.shape
        row = out.stride(1)
        start = out.storage_offset() + first * row

        def part(columns: slice) -> Tensor:
            return out.as_strided((rows - first, columns.stop - columns.start), (row, 1), start + columns.start)

        narrow = part(slice(width - self.rank, width)) if self.a is None else x[0, first:] @ self.a
        for (columns, of_narrow), b in zip(self.places, self.bs, strict=True):
            part(columns).addmm_(narrow if len(self.bs) == 1 else narrow[:, of_narrow], b, alpha=self.scale)

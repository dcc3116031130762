"""The low-rank terms of linears that get the same rows, as one: in decoding a call costs what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from foretell import packed

WORTH_PACKING = 2**17  # numbers of A and B in fp32; below, a packed product's call costs more than it saves
DIAGONAL = 2**19  # numbers of packed B's along a diagonal; above, the zeros between them cost more than calls


def worth_packing(a: Tensor, numbers: int) -> bool:
    """Whether low-rank matrices of so many numbers are faster in oneDNN's blocks (docs/experiments.md)."""
    return packed.why_not(a.device, a.dtype) is None and (a.dtype != torch.float32 or numbers >= WORTH_PACKING)


class FusedLowRank:
    """s·B·A·x of linears that are one product: A's one below the other, packed B's along a diagonal if they are small.

    What is packed or of several linears is a copy, which does not change when the adapters do.
    """

    def __init__(self, sizes: Sequence[int], matrices: Mapping[int, tuple[Tensor, Tensor]], scale: float) -> None:
        """sizes: d_out of every linear of the product; A (r, d_in) and B (d_out, r) of some, by their numbers."""
        starts, ends = [0, *accumulate(sizes)], [0, *accumulate(a.shape[0] for a, _ in matrices.values())]
        self.scale = scale
        downs = [a.detach() for a, _ in matrices.values()]
        a = torch.cat(downs) if len(downs) > 1 else downs[0]
        # rows of out, columns of A·x, B
        self.parts = [
            (slice(*starts[number : number + 2]), slice(*ends[place : place + 2]), b.detach())
            for place, (number, (_, b)) in enumerate(matrices.items())
        ]
        self.dtype = a.dtype
        self.packed = worth_packing(a, a.numel() + sum(b.numel() for *_, b in self.parts))
        if self.packed and len(sizes) > 1 and starts[-1] * ends[-1] <= DIAGONAL:
            diagonal = a.new_zeros(starts[-1], ends[-1])
            for rows, columns, b in self.parts:
                diagonal[rows, columns] = b
            self.parts = [(slice(0, starts[-1]), slice(0, ends[-1]), diagonal)]
        self.a = packed.reorder(a) if self.packed else a.t()
        self.parts = [(rows, columns, packed.reorder(b) if self.packed else b.t()) for rows, columns, b in self.parts]

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """out (B, n, sum of d_out) += s·B·A·x (B, n, d_in), in place, without autograd."""
        if not self.packed and len(x) == 1:
            narrow = x[0] @ self.a
            # Here a call costs less than the zeros of a diagonal.
            for rows, columns, b in self.parts:
                out[0, :, rows].addmm_(narrow[:, columns], b, alpha=self.scale)
            return
        narrow = packed.product(x, self.a) if self.packed else x @ self.a
        for rows, columns, b in self.parts:
            of_part = narrow[..., columns]
            added = packed.product(of_part, b) if self.packed else of_part @ b
            out[..., rows].add_(added, alpha=self.scale)

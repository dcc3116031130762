"""Weights of 16 bits that are multiplied with a few rows as fast as they come from memory (streamed.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from foretell import native

DTYPES = torch.float32, torch.bfloat16
CHECKED = 1024  # rows at a time
# Of so many rows, which are low-rank ones: of every `width` those from `first` on; None while it is closed.
Gate = Callable[[int], tuple[int, int] | None]


def available() -> bool:
    """Whether there is a compiler for it."""
    return native.library() is not None


def fits(weight: Tensor) -> bool:
    """Whether the numbers of weight (d_out, d_in) are bfloat16 numbers."""
    if weight.dtype == torch.bfloat16:
        return True
    return all(torch.equal(rows.bfloat16().to(rows.dtype), rows) for rows in weight.detach().split(CHECKED))


class StreamedWeight:
    """A weight (d_out, d_in) of bfloat16 numbers with its bias, in tiles of columns of what it makes.

    A row gets the same bits whatever other rows there are.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        library = _library()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.tiles = _in_tiles(weight.detach(), library.foretell_lanes())
        lost = -weight.shape[0] % library.foretell_lanes()
        self.bias = None if bias is None else F.pad(bias.detach().float(), (0, lost))
        self.low_rank: list[tuple[StreamedLowRank, Gate]] = []  # of adapters, one of which is open at a time

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., d_in) float32 or bfloat16 -> x W^T + bias (..., d_out), and what low-rank rows get beyond while
        their gate is open. Raises ValueError for other rows."""
        library = _library()
        d_out, d_in = self.shape
        if x.shape[-1] != d_in or x.dtype not in DTYPES:
            raise ValueError(f"a weight ({d_out}, {d_in}) is not for rows {tuple(x.shape)} of {x.dtype}")
        rows, x = x.numel() // d_in, x.contiguous()
        out = x.new_empty((*x.shape[:-1], d_out))
        bias = None if self.bias is None else self.bias.data_ptr()
        given = x.data_ptr(), x.dtype == torch.bfloat16, rows, d_in, self.tiles.data_ptr(), bias, out.data_ptr(), d_out
        for low, gate in self.low_rank:
            if (opened := gate(rows)) is not None:
                library.foretell_product(*given, *low.pointers, low.rank, *opened, low.scale)
                return out
        library.foretell_product(*given, None, None, None, 0, 0, 1, 0.0)
        return out

    def to_dense(self) -> Tensor:
        """(d_out, d_in), as it was given."""
        d_out, d_in = self.shape
        numbers = self.tiles.transpose(1, 2).flatten(0, 1).contiguous().view(torch.bfloat16)
        return numbers[:d_out, :d_in].to(self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...,) int64 -> those rows of the weight, (..., d_in), as an embedding gives them."""
        lanes = self.tiles.shape[2]
        numbers = self.tiles[ids // lanes, :, ids % lanes].contiguous().view(torch.bfloat16)
        return numbers[..., : self.shape[1]].to(self.dtype)

    def numel(self) -> int:
        return self.shape.numel()


class StreamedLowRank:
    """A (r, d_in) and B (d_out, r) for `StreamedWeight`: what low-rank rows get beyond is scale · B·A·x.

    It is summed with the product itself, in float32, and so costs what it takes to read A and B. Their numbers are
    rounded to bfloat16: drafts hang on them, the output never does.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, spans: Sequence[tuple[int, int]] | None = None) -> None:
        """`spans`: for every row of B, from where to where it is not zero; by default everywhere."""
        library = _library()
        lanes = library.foretell_lanes()
        self.a, self.b = (_in_tiles(matrix.detach(), lanes) for matrix in (a, b))
        self.rank, self.scale = len(a), scale
        of_rows = torch.tensor(spans or [(0, self.rank)] * len(b))
        tiles = [(own[:, 0].min() // 2, (own[:, 1].max() + 1) // 2) for own in of_rows.split(lanes)]
        self._spans = torch.tensor(tiles)  # of pairs
        self.pointers = self.a.data_ptr(), self.b.data_ptr(), self._spans.data_ptr()

    @classmethod
    def of(cls, sizes: Sequence[int], matrices: Mapping[int, tuple[Tensor, Tensor]], scale: float) -> StreamedLowRank:
        """Of linears that are one product: d_out of each; A (r, d_in) and B (d_out, r) of some, by their numbers."""
        a = torch.cat([a for a, _ in matrices.values()])
        bs = [matrices[number][1] if number in matrices else a.new_zeros(size, 0) for number, size in enumerate(sizes)]
        spans, start = [], 0
        for b in bs:
            spans += [(start, start + b.shape[1])] * len(b)
            start += b.shape[1]
        return cls(a, torch.block_diag(*bs), scale, spans)


def _library() -> ctypes.CDLL:
    """Only where it is `available`."""
    library = native.library()
    assert library is not None
    return library


def _in_tiles(weight: Tensor, lanes: int) -> Tensor:
    """weight (d_out, d_in) -> (tiles, pairs of d_in, lanes) int32, each of which is two bfloat16 numbers of a row."""
    d_out, d_in = weight.shape
    padded = F.pad(weight.bfloat16(), (0, d_in % 2, 0, -d_out % lanes))
    return padded.contiguous().view(torch.int32).unflatten(0, (-1, lanes)).transpose(1, 2).contiguous()

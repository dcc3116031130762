"""Single rows of a weight that lies as it is multiplied fastest.

A tied unembedding is multiplied with latents and, as the embedding, read row by row. With this it need not be there
twice as it was. Tensors in oneDNN's blocks are opaque, but the numbers of a row lie at even distances, and so do the
rows of a block. Which distances, a small weight of the same width tells, whose numbers are numbered; then the real
one's rows are compared. FBGEMM's can't be read, but numbers that need but 16 bits are kept in as many.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.packed import PackedLinear, reorder

INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
PROBED = 256  # rows, some blocks of them
COMPARED = 1024  # rows at a time


class PackedRows:
    """ids (...,) int64 -> the rows (..., d_in) of a weight (d_out, d_in), as an embedding gives them."""

    def __init__(self, packed: Tensor, memory: Tensor, d_in: int) -> None:
        """memory (blocks, rows of a block, numbers of a row): a strided view of what `packed` holds, as integers of 32
        bits, which are two numbers each in bfloat16."""
        self._packed = packed  # whose memory it is
        self.memory, self.d_in = memory, d_in

    def __call__(self, ids: Tensor) -> Tensor:
        block = self.memory.shape[1]
        rows = self.memory[ids // block, ids % block].contiguous()  # of a single id it would be a view
        return rows.view(self._packed.dtype)[..., : self.d_in]


class RoundRows:
    """ids (...,) int64 -> the rows (..., d_in) of a weight whose numbers need but 16 bits and have more."""

    def __init__(self, rounded: Tensor, dtype: torch.dtype) -> None:
        self.rounded, self.dtype = rounded, dtype

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rounded).to(self.dtype)


class PackedEmbedding(nn.Module):
    """ids (...,) int64 -> (..., d_in): an embedding tied to a packed unembedding, without a weight of its own."""

    def __init__(self, head: PackedLinear, scale: Tensor | None) -> None:
        """`scale`: what rows are multiplied with (Gemma)."""
        super().__init__()
        self.rows, self.scale = head.rows, scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


@torch.inference_mode()
def rows_of(packed: Tensor, weight: Tensor) -> PackedRows | None:
    """Reads rows of weight (d_out, d_in) out of `packed`, which `reorder` made of it.

    None where that can't be: a layout or a build of PyTorch of another kind, or rows that are not the weight's, bit for
    bit.
    """
    (d_out, d_in), memory = weight.shape, _memory(packed, torch.int32)
    rows, columns = (_places(torch.zeros(PROBED, d_in, dtype=weight.dtype), along) for along in (0, 1))
    if d_in < 4 or memory is None or rows is None or columns is None:
        return None
    if weight.itemsize == 2:
        if bool((columns[1::2] - columns[:-1:2] != 1).any()):
            return None
        rows, columns = rows // 2, columns[::2] // 2
    block = int((rows != torch.arange(PROBED) * rows[1]).int().argmax())  # the first row that lies elsewhere
    if not block:
        return None
    size = (-(-d_out // block), block, len(columns))
    strides = (int(rows[block]), int(rows[1]), int(columns[1]))
    if sum((n - 1) * stride for n, stride in zip(size, strides, strict=True)) >= len(memory):
        return None
    found = PackedRows(packed, memory.as_strided(size, strides), d_in)
    # Of every block one row, another in each.
    blocks = torch.arange(size[0])
    ids = (blocks * block + blocks % block).clamp(max=d_out - 1)
    integers = INTEGERS[weight.dtype]
    return found if torch.equal(found(ids).view(integers), weight[ids].view(integers)) else None


def round_rows_of(weight: Tensor) -> RoundRows | None:
    """Reads rows of weight (d_out, d_in) out of a copy in 16 bits; None if it has no more, or if they need more."""
    if weight.itemsize <= 2:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        rounded = weight.to(dtype)
        parts = zip(rounded.split(COMPARED), weight.split(COMPARED), strict=True)
        if all(torch.equal(one.to(weight.dtype), other) for one, other in parts):
            return RoundRows(rounded, weight.dtype)
    return None


def _places(probe: Tensor, along: int) -> Tensor | None:
    """Where the numbers of the first column (along 0) or row (1) of a weight of zeros come to lie in its blocks."""
    integers, limits = INTEGERS[probe.dtype], torch.finfo(probe.dtype)
    least, largest = (int(torch.tensor(x, dtype=probe.dtype).view(integers)) for x in (limits.tiny, limits.max))
    line = probe.select(1 - along, 0)
    if least + len(line) > largest:
        return None  # more than there are numbers to tell them by
    line.copy_((torch.arange(len(line)) + least).to(integers).view(probe.dtype))
    packed = reorder(probe)
    memory = _memory(packed, integers)
    if memory is None:
        return None
    places = memory.nonzero()[:, 0]
    return places[memory[places].argsort()] if len(places) == len(line) else None


def _memory(packed: Tensor, integers: torch.dtype) -> Tensor | None:
    """The bytes of an opaque tensor as integers (n,), of which only the tensor's owner keeps them there."""
    try:
        start, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    except (AttributeError, RuntimeError):  # a build that does not tell
        return None
    return torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=integers)

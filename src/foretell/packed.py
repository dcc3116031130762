"""Linears whose weights lie in memory as this machine multiplies them fastest, for decoding on a CPU.

A step of decoding multiplies each weight with a handful of rows. PyTorch hands such products to its BLAS, which reads a
weight as it was stored; oneDNN, once it has laid the weight out in blocks of its own, is up to five times as fast on
one processor and three times as slow on another; and most weights need but 16 bits (`half_weights`), which is another
factor of two; a kernel of our own reads those once for all rows of a step (`streamed`, docs/experiments.md). So all are
timed. The numbers are the same and so is the product, but for the order
in which it is summed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from foretell import half_weights, streamed
from foretell.errors import ForetellError
from foretell.half_weights import HalfWeight, scale_of
from foretell.streamed import StreamedWeight

Laid = Tensor | HalfWeight | StreamedWeight
Way = Literal["stored", "blocks", "halves", "streamed"]
AS_TENSORS: tuple[Way, ...] = ("stored", "blocks")
PACKED_DTYPES = (torch.float32, torch.bfloat16)
# A product of a few rows takes 25 to 35 microseconds in the midst of a step, however small it is. Other rows below a
# weight cost every step what it takes to read them; below a large weight they cost more than their share.
JOINED_BYTES, JOINS_NUMBERS = 2**17, 2**21
# All ways of making a product are timed with so many rows, by turns, over several weights of so many bytes in all.
TRIED_ROWS, TRIED_BYTES, TRIED_WEIGHTS, TRIED_ROUNDS = (1, 5, 17), 2**24, 16, 5


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why linears can't be packed there, or None."""
    if device.type != "cpu":
        return f"that is for models on a CPU, and this one is on {device}"
    if dtype not in PACKED_DTYPES:
        return f"that is for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    # The operators that torch.compile itself uses for frozen weights; a build without oneDNN has none.
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this build of PyTorch has no oneDNN"
    return None


def reorder(weight: Tensor) -> Tensor:
    """A copy of weight (d_out, d_in) in oneDNN's blocks, for `product`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out) for W as `reorder` made it."""
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


def ways(dtype: torch.dtype) -> tuple[Way, ...]:
    """How weights of that dtype may lie here; in the first all can.

    In bfloat16 PyTorch's own products are oneDNN's, on a weight laid out anew for each, so that blocks are the faster.
    A processor without instructions for them has no blocks either, and multiplies row by row.
    """
    halves: tuple[Way, ...] = ("halves",) if half_weights.available() else ()
    streams: tuple[Way, ...] = ("streamed",) if streamed.available() else ()
    if dtype == torch.float32:
        return "stored", "blocks", *halves, *streams
    return ("blocks", *streams) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ("stored", *halves, *streams)


def fastest(d_out: int, d_in: int, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways in which a weight (d_out, d_in) may lie, the fastest first.

    They are timed with as many threads as now, once in a process for each shape: some hundredths of a second.
    """
    possible = ways(dtype)
    return _timed(possible, d_out, d_in, dtype, torch.get_num_threads()) if len(possible) > 1 else possible


def pays(d_out: int, d_in: int, dtype: torch.dtype) -> bool:
    """Whether a weight (d_out, d_in) is multiplied faster in oneDNN's blocks than as stored."""
    return next(way for way in fastest(d_out, d_in, dtype) if way in AS_TENSORS) == "blocks"


def laid_out(weights: Sequence[Tensor], bias: Tensor | None, way: Way, kept: bool = False) -> Laid | None:
    """Weights (d_out, d_in) one below the other as they lie then, None if they can't.

    What is no tensor has the bias in it. In memory of their own, unless a single one is `kept` as it is stored.
    """
    whole = torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0].detach()
    if way == "halves":
        scale = scale_of(whole)
        return None if scale is None else HalfWeight(whole, bias, scale)
    if way == "streamed":
        return StreamedWeight(whole, bias) if streamed.fits(whole) else None
    if way == "blocks":
        return reorder(whole)
    return whole if kept or len(weights) > 1 else whole.clone()


def multiply(x: Tensor, weight: Laid, bias: Tensor | None, way: Way) -> Tensor:
    """x (..., d_in) -> x W^T + bias (..., d_out) for W as `laid_out` made it; of a `HalfWeight` in float32."""
    if isinstance(weight, HalfWeight):
        return weight.multiply(x.float())
    if isinstance(weight, StreamedWeight):
        return weight.multiply(x)
    return (product if way == "blocks" else F.linear)(x, weight, bias)  # tracing, blocks don't show


@cache
@torch.inference_mode()
def _timed(possible: tuple[Way, ...], d_out: int, d_in: int, dtype: torch.dtype, threads: int) -> tuple[Way, ...]:
    """Timed, the fastest first; `threads` only tells results apart."""
    row = d_in * dtype.itemsize  # bytes
    d_out = max(1, min(d_out, TRIED_BYTES // row))  # a part tells of a large one
    count = min(TRIED_WEIGHTS, max(1, TRIED_BYTES // (d_out * row)))  # small ones should not all lie in the cache
    stored = [torch.ones(d_out, d_in, dtype=dtype) for _ in range(count)]
    weights = {way: [laid for one in stored if (laid := laid_out([one], None, way)) is not None] for way in possible}
    half_weights.finish()
    took = dict.fromkeys(possible, 0.0)  # logarithms, so that every number of rows counts the same
    for rows in TRIED_ROWS:
        x = torch.ones(1, rows, d_in, dtype=dtype)
        best = dict.fromkeys(possible, math.inf)  # a disturbance only ever adds
        for _ in range(TRIED_ROUNDS):
            for way in possible:
                start = time.perf_counter()
                for weight in weights[way]:
                    multiply(x, weight, None, way).to(dtype)
                best[way] = min(best[way], time.perf_counter() - start)
        for way in possible:
            took[way] += math.log(best[way])
    return tuple(sorted(possible, key=took.__getitem__))


class PackedProduct:
    """x (..., d_in) -> x W^T + bias for one or several linears that get the same x, as one product.

    A small product takes hardly longer than its call, so that the three of an attention cost what one does.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: bool = False) -> None:
        """`kept`: the one weight stays in memory in any case, and needs no copy if it is multiplied as stored."""
        self.sizes = [len(weight) for weight in weights]
        self.dtype = weights[0].dtype
        there = [bias.detach() for bias in biases if bias is not None]
        self.bias = torch.cat(there) if there else None
        self.way, self.weight = next(
            (way, laid)
            for way in fastest(sum(self.sizes), weights[0].shape[1], self.dtype)
            if (laid := laid_out(weights, self.bias, way, kept)) is not None
        )
        self.joined = 0  # rows below the weights that are not theirs
        self.added: list[Callable[[Tensor, Tensor], None]] = []  # each, given x and what is made of it, adds to that
        self._joined_by: ReferenceType[object] | None = None
        self._made: tuple[Tensor, dict[int, Tensor]] | None = None  # an x and what linears have yet to take of it

    @property
    def arithmetic(self) -> torch.dtype:
        """Of what is made, and of what is `added` to it."""
        return torch.float32 if self.way == "halves" else self.dtype

    def to_tensors(self) -> None:
        """The weights lie in a tensor from here on, as compiled code wants them. What was joined to them is gone."""
        if self.way not in AS_TENSORS:
            weights, biases = self.weights, self.biases
            self.bias = None if biases is None else torch.cat(biases)
            self.joined, self._joined_by = 0, None
            self.way = "blocks" if pays(sum(self.sizes), weights[0].shape[1], self.dtype) else "stored"
            self.weight = cast(Tensor, laid_out(weights, self.bias, self.way))

    @property
    def tensors(self) -> list[Tensor]:
        """The weight as it is multiplied and, if there is one, the bias.

        Raises ForetellError where it is no tensor.
        """
        if not isinstance(self.weight, Tensor):
            raise ForetellError(f"its weights are {self.way}, which is no tensor")
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @tensors.setter
    def tensors(self, tensors: list[Tensor]) -> None:
        self.weight, *bias = tensors
        if bias:
            (self.bias,) = bias

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """(d_out, d_in) of every linear, taken out of how they lie anew at each call."""
        return self.weight.to_dense()[: sum(self.sizes)].split(self.sizes)

    @property
    def biases(self) -> tuple[Tensor, ...] | None:
        """(d_out,) of every linear, if they have one."""
        return None if self.bias is None else self.bias[: sum(self.sizes)].split(self.sizes)

    def join(self, rows: Tensor, by: object) -> bool:
        """Puts rows (n, d_in) below the weights, so that what `added` gets holds x rows^T in its last n columns.

        True if they are there, as long as `by` lives; False, and nothing changes, where a product of their own costs
        less or another's rows are there.
        """
        if isinstance(self.weight, StreamedWeight):
            return False  # a product of a few rows more costs hardly a call
        small = rows.numel() * rows.element_size() <= JOINED_BYTES and self.weight.numel() <= JOINS_NUMBERS
        if not small or rows.dtype != self.arithmetic or (self._joined_by is not None and self._joined_by()):
            return False
        count, bias = sum(self.sizes), self.bias
        if bias is not None:
            bias = torch.cat([bias[:count], bias.new_zeros(len(rows))])
        laid = laid_out([self.weight.to_dense()[:count], rows.to(self.dtype)], bias, self.way)
        if laid is None:  # the rows' numbers need more than 16 bits
            return False
        self.weight, self.bias = laid, bias
        self.joined, self._joined_by = len(rows), ref(by)
        return True

    def part(self, x: Tensor, index: int) -> Tensor:
        """What linear number `index` makes of x; the product is made when the first of them asks."""
        if len(self.sizes) == 1:
            made = self.make(x)
            return made[..., : self.sizes[0]] if self.joined else made
        kept = self._made  # in one piece: another thread's x may take its place at any time
        if kept is None or kept[0] is not x or index not in kept[1]:
            parts = self.make(x).split(self.parts, -1)
            kept = self._made = x, dict(enumerate(parts[:-1]))
        part = kept[1].pop(index)
        if not kept[1]:
            self._made = None  # all have theirs
        return part

    @property
    def parts(self) -> list[int]:
        """Columns of what `make` gives: of every linear, then of the rows joined to them."""
        return [*self.sizes, self.joined]

    def make(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> what all linears make of it side by side, and x times the rows joined to them."""
        made = multiply(x, self.weight, self.bias, self.way)
        if self.added:
            x = x.to(made.dtype)
            for add in self.added:
                add(x, made)
        return made.to(self.dtype)


class PackedLinear(nn.Module):
    """x (..., d_in) -> x W^T + bias (..., d_out), forward only; instead of an nn.Linear or GPT-2's Conv1D.

    It is linear number `index` of a product. With `keep` the weight stays beside its packed copy: for an embedding tied
    to it, and to read single rows of, unless `read` can read them out of the copy.
    """

    def __init__(self, product: PackedProduct, index: int, in_features: int, keep: Tensor | None = None) -> None:
        super().__init__()
        # Plain attributes: state dicts and `.to()` know no packed tensors.
        self.product, self.index, self.kept = product, index, keep
        self.read: Callable[[Tensor], Tensor] | None = None
        self.in_features, self.out_features = in_features, product.sizes[index]

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...,) int64 -> those rows of the weight, (..., d_in)."""
        return F.embedding(ids, self.weight) if self.read is None else self.read(ids)

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), unpacked anew at each call unless it was kept."""
        if self.kept is not None:
            return self.kept
        return self.product.weights[self.index]

    @property
    def bias(self) -> Tensor | None:
        """(d_out,), if there is one."""
        return None if self.product.biases is None else self.product.biases[self.index]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ForetellError("a base with packed linears can't be trained through; load it with packed=False")
        return self.product.part(x, self.index)


def pack(module: nn.Module, run: Callable[[], object], kept: nn.Module | None = None) -> None:
    """Replaces every linear inside of `module`, group by group, so that hardly a weight is there twice.

    Linears of one parent that get the very same tensor while `run` runs become one product. `kept` is the linear whose
    weight is kept. Quantised linears stay as they are.
    """
    for parent, names in together(module, run):
        linears = [getattr(parent, name) for name in names]
        weights = [linear.weight.t() if isinstance(linear, Conv1D) else linear.weight for linear in linears]
        made = PackedProduct(weights, [linear.bias for linear in linears], kept in linears)
        for index, (name, linear, weight) in enumerate(zip(names, linears, weights, strict=True)):
            setattr(parent, name, PackedLinear(made, index, weight.shape[1], weight if linear is kept else None))


def together(module: nn.Module, run: Callable[[], object]) -> list[tuple[nn.Module, list[str]]]:
    """Every linear inside of `module`, as parent and names, those in one list that can be one product."""
    inputs: dict[nn.Module, list[Tensor]] = {}  # kept, so that no other tensor takes one's place in memory

    def note(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(linear, []).append(args[0])

    groups: dict[tuple[nn.Module, object], list[str]] = {}
    of = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Conv1D) or type(child) is nn.Linear
    ]
    hooks = [child.register_forward_pre_hook(note) for _, _, child in of]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for parent, name, child in of:
        given = inputs.get(child, [])
        same = (id(given[0]), child.bias is None) if len(given) == 1 else name
        groups.setdefault((parent, same), []).append(name)
    return [(parent, names) for (parent, _), names in groups.items()]

"""One block of a base as a graph, compiled by inductor to C++ that serves every block of its kind.

What differs from block to block or from step to step goes in as tensors: the weights, the adapter's matrices, keys and
values, and the numbers of rows, columns and regular rows, each as the length of a tensor, since a number that Python
counts would be compiled in. One call from Python then does a block's work, where eager mode makes a hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from foretell.errors import ForetellError
from foretell.fused_lora import FusedLowRank
from foretell.gated_lora import Added, Handle, Term
from foretell.packed import PackedLinear, PackedProduct, product

OPTIONS = {
    "cpp_wrapper": True,  # what calls the kernels and products is C++ as well: half of what there is to gain
    # Kernels between products take a microsecond or two: less than to wake a thread, or to check their sizes.
    "cpp.threads": 1,
    "size_asserts": False,
    "alignment_asserts": False,
}
SCALARS = (int, float, bool, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Call:
    """How a base called a block in one step: its arguments, without the cache's tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of((*self.args, *self.kwargs.values()))

    @property
    def constants(self) -> Any:
        """All that is no tensor, in its place."""
        return _replaced((self.args, self.kwargs), repeat(None), None)


@dataclass(frozen=True)
class Parts:
    """A block with what acts inside of it, as lists of tensors in a fixed order."""

    block: nn.Module
    terms: list[Term]  # of the adapter

    @cached_property
    def own(self) -> dict[str, Tensor]:
        return {**dict(self.block.named_parameters()), **dict(self.block.named_buffers())}

    @cached_property
    def packed(self) -> list[PackedProduct]:
        linears = (module for module in self.block.modules() if isinstance(module, PackedLinear))
        return list(dict.fromkeys(linear.product for linear in linears))

    @cached_property
    def low(self) -> list[FusedLowRank]:
        """The low-rank terms. Raises ForetellError for an adapter in training."""
        fused = [term.fused.in_graph() for term in self.terms if isinstance(term.fused, FusedLowRank)]
        if len(fused) < len(self.terms):
            raise ForetellError("its adapter is being trained")
        return fused

    def weights(self, masks: bool) -> list[Tensor]:
        """What the graph takes first; the adapter's matrices only where there are masks."""
        return [*self.own.values(), *(tensor for own in self.holders(masks) for tensor in own.tensors)]

    def holders(self, masks: bool) -> list[PackedProduct | FusedLowRank]:
        """What holds tensors beside the block itself."""
        return [*self.packed, *(self.low if masks else [])]

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for blocks that one graph can serve: the same modules, shapes and settings."""
        modules = [
            (
                name,
                type(module),
                [(k, v) for k, v in vars(module).items() if isinstance(v, SCALARS) and k != "layer_idx"],
            )
            for name, module in self.block.named_modules()
        ]
        sites: dict[object, object] = {module: name for name, module in self.block.named_modules()}
        sites |= {product: number for number, product in enumerate(self.packed)}
        low = [
            (sites[term.site], fused.scale, fused.laid.places, fused.joined, fused.spelled_out)
            for term, fused in zip(self.terms, self.low, strict=True)
        ]
        shapes = [(tuple(t.shape), t.dtype, t.is_mkldnn or t.stride()) for t in self.weights(masks=True)]
        return repr(modules), repr(low), repr(shapes)


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Every tensor among the values, and in tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_of(value)
        elif isinstance(value, dict):
            found += tensors_of(value.values())
    return found


def _replaced(value: Any, tensors: Iterator[Any], columns: Any) -> Any:
    """The value with other tensors, in the order of `tensors_of`, and `columns` for the cache."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(_replaced(item, tensors, columns) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, tensors, columns) for key, item in value.items()}
    return columns if isinstance(value, Cache) else value


@dataclass(frozen=True)
class _Columns:
    """Stands for the cache in a graph: one layer, written where a tensor says."""

    keys: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.rows, key_states)
        self.values.index_copy_(2, self.rows, value_states)
        count = self.columns.shape[0]
        return self.keys[:, :, :count], self.values[:, :, :count]


@dataclass(frozen=True)
class Traced:
    """A block's graph before it is compiled."""

    graph: Any  # a GraphModule
    inputs: list[Any]
    mode: Any  # in which the inputs are fake tensors
    gives: Any  # what the block gives, with other tensors in the place of its own

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for graphs that do the same, whatever the modules they stem from are called and set to.

        So layers with a sliding window share the graph of those without: their masks are made outside of them.
        """
        sizes = [
            ([size if isinstance(size, int) else None for size in (*given.shape, *strides_of(given))], given.dtype)
            for given in self.inputs
        ]
        constants = [getattr(self.graph, str(node.target)) for node in self.graph.graph.nodes if node.op == "get_attr"]
        values = [value.tolist() if value.numel() == 1 else id(value) for value in constants]
        return self.graph.code, repr(sizes), repr(self.gives), repr(values)

    def compiled(self) -> Callable[..., Any]:
        """What `trace_block` says. Raises whatever the compiler raises, ForetellError if it counted on a size."""
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile as inductor

        with torch.inference_mode(False), torch.no_grad(), tracing(TracingContext(self.mode)):
            run = inductor(self.graph, self.inputs, options=OPTIONS)
        if any(value.is_number for value in self.mode.shape_env.replacements.values()):
            raise ForetellError("its blocks work out a number from a size that changes from step to step")
        gives = self.gives
        if isinstance(gives, Tensor):
            return lambda *tensors: run(*tensors)[0]
        return lambda *tensors: _replaced(gives, iter(run(*tensors)), None)


def trace_block(
    parts: Parts, calls: Sequence[Call], past: Sequence[Tensor], columns: int, regular: int | None
) -> Traced:
    """A graph of (weights, the call's tensors, keys, values, rows, columns, gate if there are masks) -> what it gives.

    past: any keys and values (1, H, capacity, D_head); rows (Q,) int64: columns of the new rows; columns (S,): its
    length is how many the step sees; gate (R + 1,): its length is one more than the regular rows. `calls` are two of
    different numbers of rows (unless that is to be 1) and columns: sizes in which they agree are compiled in, others
    left open.
    `columns` and `regular` (None: no masks) are the first one's.
    Raises ForetellError if other things differ between them; else whatever tracing raises.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    from torch.fx.graph import CodeGen

    first, second = calls
    if first.constants != second.constants or len(first.tensors) != len(second.tensors):
        raise ForetellError("its blocks are called with numbers that change from step to step")
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(like: Tensor, *open_dimensions: int) -> Tensor:
        shape = tuple(like.shape)
        if like.is_mkldnn or open_dimensions:
            example = torch.empty(shape, dtype=like.dtype)
        else:
            example = torch.empty_strided(shape, like.stride(), dtype=like.dtype)
        sizes = [DimDynamic.DYNAMIC if d in open_dimensions else DimDynamic.STATIC for d in range(like.ndim)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(example, symbolic_context=context)

    masks = regular is not None
    with torch.inference_mode(False), torch.no_grad():
        weights = [fake(weight) for weight in parts.weights(masks)]
        given = []
        for one, other in zip(first.tensors, second.tensors, strict=True):
            given.append(fake(one.contiguous(), *(d for d in range(one.ndim) if one.shape[d] != other.shape[d])))
        rows = first.tensors[0].shape[1]
        width = [fake(torch.empty(rows, dtype=torch.long), *([0] if rows > 1 else []))]
        seen, gate = fake(torch.empty(columns), 0), fake(torch.empty((regular or 0) + 1), 0)
        written = [fake(states, 2) for states in past]
        inputs: list[Any] = [*weights, *given, *written, *width, seen, *([gate] if masks else [])]
        gives: list[Any] = []
        with mode, _compiling():
            graph = make_fx(_of_tensors(parts, first, masks, gives), {torch.ops.aten.cat.default: _joined})(*inputs)
    for node in graph.graph.nodes:
        if node.target is torch.ops.mkldnn._linear_pointwise.default:
            node.target, node.args = packed_product(), node.args[:3]
    graph.graph.set_codegen(CodeGen())  # a flat call; taking nested arguments apart would cost at every step
    graph.recompile()
    return Traced(graph, inputs, mode, gives[0])


@contextmanager
def _compiling() -> Iterator[None]:
    """Within this context torch says that it compiles: transformers' experts then take operators that can be traced."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True  # as torch.export sets it
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def strides_of(tensor: Tensor) -> tuple[Any, ...]:
    return () if tensor.is_mkldnn else tensor.stride()


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """aten.cat: what is left of one tensor and empty ones lies in order, while inductor's own copy keeps its strides.

    Phi-3 has this: rotated columns and the others, of which there are none.
    """
    full = [tensor for tensor in tensors if tensor.shape[dim : dim + 1 or None] != (0,)]
    if len(full) == 1 < len(tensors) and full[0].dtype == tensors[0].dtype:
        return full[0].clone(memory_format=torch.contiguous_format)
    return NotImplemented


def _of_tensors(parts: Parts, call: Call, masks: bool, gives: list[Any]) -> Callable[..., list[Tensor]]:
    """The block as a function of tensors alone, in `trace_block`'s order; what it gives is put into `gives`."""
    sizes = [len(parts.own), sum(len(one.tensors) for one in parts.holders(masks)), len(call.tensors)]

    def latents(*tensors: Tensor) -> list[Tensor]:
        left = iter(tensors)
        own, held, given = ([next(left) for _ in range(size)] for size in sizes)
        keys, values, rows, columns, *gate = left
        stand_in = _Columns(keys, values, rows, columns)
        args, kwargs = _replaced((call.args, call.kwargs), iter(given), stand_in)
        with ExitStack() as stack:
            stack.enter_context(_holding(parts.holders(masks), held))
            for term, fused in zip(parts.terms, parts.low, strict=True) if masks else ():
                handle = _put_on(term.site, _adding(fused, gate[0].shape[0] - 1))
                stack.callback(handle.remove)
            weights = dict(zip(parts.own, own, strict=True))
            out = torch.func.functional_call(parts.block, weights, args, kwargs)
        gives.append(_replaced(out, repeat(torch.empty(0)), None))
        return tensors_of([out])

    return latents


def _adding(fused: FusedLowRank, regular: int) -> Callable[[Tensor, Tensor], None]:
    """What adapts the rows from `regular` on, of one sequence."""

    def add(x: Tensor, made: Tensor) -> None:
        fused.add_to(made.view(1, -1, made.shape[-1]), x.reshape(1, -1, x.shape[-1]), regular)

    return add


def _put_on(site: nn.Module | PackedProduct, add: Callable[[Tensor, Tensor], None]) -> Handle:
    if isinstance(site, PackedProduct):
        return Added(site, add)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        add(args[0], output[0] if isinstance(output, tuple) else output)

    return site.register_forward_hook(hook)


@contextmanager
def _holding(holders: Sequence[PackedProduct | FusedLowRank], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Within this context they hold other tensors."""
    before = [one.tensors for one in holders]
    left = iter(tensors)
    try:
        for one, own in zip(holders, before, strict=True):
            one.tensors = [next(left) for _ in own]
        yield
    finally:
        for one, own in zip(holders, before, strict=True):
            one.tensors = own


@cache
def packed_product() -> Any:
    """oneDNN's product as an operator of ours: inductor takes its own only with weights that are part of the graph."""
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.mkldnn_ir import LinearUnary

    def shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    library = torch.library.Library("foretell", "DEF")
    library.define("packed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("packed_product", product, "CPU")
    torch.library.register_fake("foretell::packed_product", shape, lib=library)
    operator = torch.ops.foretell.packed_product.default

    @register_lowering(operator, type_promotion_kind=None)
    def lower(x: Any, weight: Any, bias: Any) -> Any:
        return TensorBox.create(LinearUnary.create(x, weight, bias, "none", [], ""))

    _libraries.append(library)  # an operator lives as long as its library
    return operator


_libraries: list[torch.library.Library] = []

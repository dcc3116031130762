"""Steps of one sequence with the base's blocks compiled: the same numbers with little of Python between the products.

A base's blocks stay what they are, under their names, except in a step that runs compiled (see `CompiledBlock`).
Three graphs for each kind of block serve every layout: one regular row, several, and regular rows with masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from foretell.attention import AttentionMask
from foretell.base import Base
from foretell.block_graph import Call, Parts, tensors_of, trace_block
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA
from foretell.packed import AS_TENSORS, PackedLinear, ways


class Form(NamedTuple):
    """What a graph is made for: a size of 1 is compiled in, and so is whether the adapter acts."""

    several: bool  # rows
    masks: bool


def form_of(regular: int, width: int) -> Form:
    """The form of a step of `width` rows, of which `regular` are regular."""
    return Form(width > 1, regular < width)


@dataclass
class Running:
    """A step that runs compiled."""

    form: Form
    layers: Any  # of the cache
    tail: list[Tensor]  # the graph's last inputs: rows, columns, gate


@dataclass
class CompiledNow:
    """A form that is being compiled, with the graphs made so far by kind of block."""

    form: Form
    regular: int  # rows of the first step
    columns: int
    graphs: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    traced: dict[Any, Callable[..., Any]] = field(default_factory=dict)  # and by what their tracing gave


def why_not(base: Base, adapter: GatedLoRA) -> str | None:
    """Why a base's blocks can't be compiled, or None."""
    if base.device.type != "cpu":
        return f"that was made for models on a CPU, and this one is on {base.device}"
    if base.quantised != "none":
        return "its linears are quantised"
    if base.dtype == torch.bfloat16 and "blocks" not in ways(base.dtype):
        return "this processor has no instructions for bfloat16; load it in float32 to compile it"
    if not adapter.gated:
        return "its adapter is not gated"
    if any(hasattr(type(block), "compiled_by") for block in base.blocks):
        return "another model has compiled this base already; load a base for each of them"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler; install g++ or clang++"
    return None


class CompiledSteps:
    """The base's blocks can run compiled until `remove`: `compiling` makes their graphs, `running` uses them.

    The base must stay as it is from then on: not moved, cast or trained. Weights that lie in 16 bits become tensors.
    Raises ForetellError where that can't be done.
    """

    def __init__(self, base: Base, adapter: GatedLoRA) -> None:
        if reason := why_not(base, adapter):
            raise ForetellError(reason)
        self.run: Running | None = None
        self.compiled_now: CompiledNow | None = None
        self.base, self.adapter = base, adapter
        linears = (module for module in base.blocks.modules() if isinstance(module, PackedLinear))
        if no_tensors := [linear.product for linear in linears if linear.product.way not in AS_TENSORS]:
            adapter.forget_terms()  # made for them
            for product in no_tensors:
                product.to_tensors()
        self.blocks = [
            CompiledBlock(number, self, Parts(block, adapter.of_block(number)))
            for number, block in enumerate(base.blocks)
        ]

    def remove(self) -> None:
        """The blocks are the base's own again."""
        for block in self.blocks:
            block.remove()

    def can_run(self, cache: Any, lengths: Sequence[int], regular: int, width: int) -> bool:
        """Whether a step behind so many tokens can: of one sequence, after its prefill, with room in the cache."""
        layer = cache.layers[0]
        if len(lengths) > 1 or not layer.is_initialized or layer.keys.shape[0] != 1:
            return False
        # Not up to its very end: the graphs were made for keys that are a part of what the cache holds.
        return lengths[0] + width < layer.keys.shape[2] and form_of(regular, width) in self.blocks[0].graphs

    def latents(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: AttentionMask | None,
        cache: Any,
        lengths: Sequence[int],
        regular: int,
    ) -> Tensor:
        """As `Base.latents` for a step behind the first `lengths[0]` cached tokens: (1, Q, E) -> z (1, Q, D).

        The mask must be there, also where everything is seen.
        """
        (length,), width = lengths, embeddings.shape[1]
        form = form_of(regular, width)
        tail = [torch.arange(length, length + width), torch.empty(length + width)]
        if form.masks:
            tail.append(torch.empty(regular + 1))
        self.run = Running(form, cache.layers, tail)
        try:
            with self.base.by_modules():
                return self.base.latents(embeddings, positions, mask, cache)
        finally:
            self.run = None

    @contextmanager
    def compiling(self, regular: int, width: int, length: int) -> Iterator[None]:
        """Two eager steps in here, the first of these sizes, make the blocks' graphs for steps of its form.

        The second differs in rows (if there are several) and in columns.
        Raises ForetellError for a base whose blocks can't be compiled so, and whatever the compiler raises.
        """
        form = form_of(regular, width)
        self.compiled_now = CompiledNow(form, regular, length + width)
        try:
            with self.base.by_modules():
                yield
            if not all(form in block.graphs for block in self.blocks):
                raise ForetellError("its decoder does not call its blocks once each in every step")
        finally:
            self.compiled_now = None
            for block in self.blocks:
                block.calls.clear()


class CompiledBlock:
    """What a block of the base does in a step: its own forward, or the graph of a step that runs compiled.

    Until `remove` the block's class is one of the same name that asks here first. Names, state dict, hooks and what a
    decoder looks up in its blocks stay what they are; torch's `fully_shard` goes about it in the same way.
    """

    def __init__(self, number: int, steps: CompiledSteps, parts: Parts) -> None:
        self.number, self.steps, self.parts = number, steps, parts
        self.kind = parts.kind
        self.weights = {masks: parts.weights(masks) for masks in (False, True)}
        self.graphs: dict[Form, Callable[..., Any]] = {}
        self.calls: list[Call] = []
        self.own = type(parts.block)
        parts.block.__class__ = _asking(self)

    def remove(self) -> None:
        """The block is the base's own again."""
        self.parts.block.__class__ = self.own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the block's."""
        run = self.steps.run
        if run is None:
            if self.steps.compiled_now is not None:
                self._record(Call(args, kwargs), self.steps.compiled_now)
            return self.own.forward(self.parts.block, *args, **kwargs)
        layer = run.layers[self.number]
        given = [tensor.contiguous() for tensor in tensors_of((*args, *kwargs.values()))]
        weights = self.weights[run.form.masks]
        return self.graphs[run.form](*weights, *given, layer.keys, layer.values, *run.tail)

    def _record(self, call: Call, now: CompiledNow) -> None:
        self.calls.append(call)
        if len(self.calls) < 2:
            return
        # Here, in the midst of a step, attention is what it will be in the steps to come.
        self.steps.adapter.remove()  # the graph has hooks of its own
        cache = next(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Cache))
        shapes = [[tuple(tensor.shape) for tensor in own.tensors] for own in self.calls]
        key = (self.kind, repr(call.constants), repr(shapes))
        if key not in now.graphs:
            self.steps.compiled_now = None  # the block is only traced
            layer, regular = cache.layers[self.number], now.regular if now.form.masks else None
            traced = trace_block(self.parts, self.calls, (layer.keys, layer.values), now.columns, regular)
            if traced.key not in now.traced:
                now.traced[traced.key] = traced.compiled()
            now.graphs[key] = now.traced[traced.key]
            self.steps.compiled_now = now
        self.graphs[now.form] = now.graphs[key]


def _asking(compiled: CompiledBlock) -> type[nn.Module]:
    """The class of a block that may run compiled; a copy of such a block has its own class again."""
    own = compiled.own

    class Asking(own):  # type: ignore[valid-type, misc]
        compiled_by = compiled

        @wraps(own.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return compiled.forward(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            make, (_, *args), *state = super().__reduce_ex__(protocol)
            return make, (own, *args), *state

    Asking.__name__, Asking.__qualname__, Asking.__module__ = own.__name__, own.__qualname__, own.__module__
    return Asking

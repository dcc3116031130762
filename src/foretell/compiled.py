"""Steps of one sequence with the base's blocks compiled: the same numbers with little of Python between the products.

A base's blocks are replaced by `CompiledBlock`s, which are the blocks themselves, except in a step that runs compiled.
Three graphs for each kind of block serve every layout: one regular row, several, and regular rows with masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from foretell.base import Base
from foretell.block_graph import Call, Parts, compile_block, tensors_of
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA


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


def why_not(base: Base, adapter: GatedLoRA) -> str | None:
    """Why a base's blocks can't be compiled, or None."""
    if base.device.type != "cpu":
        return f"that was made for models on a CPU, and this one is on {base.device}"
    if base.quantised != "none":
        return "its linears are quantised"
    if not adapter.gated:
        return "its adapter is not gated"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler; install g++ or clang++"
    return None


class CompiledSteps:
    """Replaces the base's blocks; `compiling` makes their graphs, `running` uses them, `remove` puts the blocks back.

    The base must stay as it is from then on: not moved, cast or trained.
    Raises ForetellError where that can't be done.
    """

    def __init__(self, base: Base, adapter: GatedLoRA) -> None:
        if reason := why_not(base, adapter):
            raise ForetellError(reason)
        self.base = base
        self.run: Running | None = None
        self.compiled_now: CompiledNow | None = None
        self.adapter = adapter
        base.keep_fingerprint()  # which goes by the blocks' names
        self.blocks = [
            CompiledBlock(number, self, Parts(block, adapter.of_block(number)))
            for number, block in enumerate(base.blocks)
        ]
        modules = base.blocks
        for number, block in enumerate(self.blocks):
            modules[number] = block

    def remove(self) -> None:
        """Puts the base's own blocks back."""
        modules = self.base.blocks
        for number, block in enumerate(self.blocks):
            modules[number] = block.block

    def can_run(self, cache: Any, length: int, regular: int, width: int) -> bool:
        """Whether a step behind `length` tokens of one sequence can: after its prefill, with room in the cache."""
        layer = cache.layers[0]
        if not layer.is_initialized or layer.keys.shape[0] != 1:
            return False
        return length + width <= layer.keys.shape[2] and form_of(regular, width) in self.blocks[0].graphs

    @contextmanager
    def running(self, cache: Any, length: int, regular: int, width: int) -> Iterator[None]:
        """Within this context a step of so many rows behind the first `length` cached tokens runs compiled."""
        form = form_of(regular, width)
        tail = [torch.arange(length, length + width), torch.empty(length + width)]
        if form.masks:
            tail.append(torch.empty(regular + 1))
        self.run = Running(form, cache.layers, tail)
        try:
            yield
        finally:
            self.run = None

    @contextmanager
    def compiling(self, regular: int, width: int, length: int) -> Iterator[None]:
        """Two eager steps in here, the first of these sizes, make the blocks' graphs for steps of its form.

        The second differs in rows (if there are several) and in columns.
        Raises ForetellError for a base whose blocks can't be compiled so, and whatever the compiler raises.
        """
        self.compiled_now = CompiledNow(form_of(regular, width), regular, length + width)
        try:
            yield
        finally:
            self.compiled_now = None
            for block in self.blocks:
                block.calls.clear()


class CompiledBlock(nn.Module):
    """A block of the base: itself, but for steps that run compiled."""

    def __init__(self, number: int, steps: CompiledSteps, parts: Parts) -> None:
        super().__init__()
        self.block, self.number, self.steps, self.parts = parts.block, number, steps, parts
        self.weights = {masks: parts.weights(masks) for masks in (False, True)}
        self.graphs: dict[Form, Callable[..., Any]] = {}
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what a decoder asks of its blocks
            return getattr(super().__getattr__("block"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.parts.block, memo)  # a copy of the base has nothing compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.steps.run
        if run is None:
            if self.steps.compiled_now is not None:
                self._record(Call(args, kwargs), self.steps.compiled_now)
            return self.block(*args, **kwargs)
        layer = run.layers[self.number]
        given = [tensor.contiguous() for tensor in tensors_of((*args, *kwargs.values()))]
        weights = self.weights[run.form.masks]
        (latents,) = self.graphs[run.form](*weights, *given, layer.keys, layer.values, *run.tail)
        return latents

    def _record(self, call: Call, now: CompiledNow) -> None:
        self.calls.append(call)
        if len(self.calls) < 2:
            return
        # Here, in the midst of a step, attention is what it will be in the steps to come.
        self.steps.adapter.remove()  # the graph has hooks of its own
        cache = next(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Cache))
        shapes = [[tuple(tensor.shape) for tensor in own.tensors] for own in self.calls]
        key = (self.parts.kind, repr(call.constants), repr(shapes))
        if key not in now.graphs:
            keys = cache.layers[self.number].keys
            now.graphs[key] = compile_block(
                self.parts, self.calls, keys, now.columns, now.regular if now.form.masks else None
            )
        self.graphs[now.form] = now.graphs[key]

"""Low-rank adapters that touch mask rows only (method.md section 2).

Each adapted module of the base gets a forward hook that adds s·B·A·x to the rows of the gate's slice; once nothing is
trained any more, packed linears that are one product get one such term for all of them. The base's module tree, state
dict and code stay as they are, and a forward without masks meets no hook, or one that returns at once.
Regular rows never pass through extra arithmetic, so they are bit-identical to the base's: the gate is a selection, not
a multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.errors import ForetellError
from foretell.fused_lora import FusedLowRank
from foretell.layout import RECURRING
from foretell.mapped import give_back
from foretell.packed import PackedLinear, PackedProduct
from foretell.streamed import Gate, StreamedLowRank, StreamedWeight

KINDS = 64  # of steps that are remembered
PATIENCE = 3  # forwards without masks before the hooks are taken off: putting them on and off costs as much as that


class LowRank(nn.Module):
    """x (..., d_in) -> s·B·A·x (..., d_out); A starts Kaiming-uniform and B zero, so training starts at the base."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)) * self.scale, self.b.to(x.dtype))  # scaled where it is narrow

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """out (B, n, d_out) += s·B·A·x (B, n, d_in), in place: fewer kernel launches than `forward`, for inference."""
        a, b = self.a.t().to(x.dtype), self.b.t().to(x.dtype)
        out.add_((x.flatten(0, 1) @ a @ b).view(out.shape), alpha=self.scale)


class Handle(Protocol):
    """Of a hook that was put on."""

    def remove(self) -> None:
        """Takes it off."""
        ...


class Added:
    """What is added to a packed product until `remove`."""

    def __init__(self, product: PackedProduct, add: Callable[[Tensor, Tensor], None]) -> None:
        self.product, self.add = product, add
        product.added.append(add)

    def remove(self) -> None:
        self.product.added.remove(self.add)


class Inside:
    """Low-rank terms that a streamed weight adds itself, until `remove`."""

    def __init__(self, weight: StreamedWeight, low_rank: StreamedLowRank, gate: Gate) -> None:
        self.weight, self.own = weight, (low_rank, gate)
        weight.low_rank.append(self.own)

    def remove(self) -> None:
        self.weight.low_rank.remove(self.own)


class Term(NamedTuple):
    """What acts on a module, or on all adapted linears of a packed product."""

    name: str  # of the first module, in the base's blocks
    site: nn.Module | PackedProduct
    adapter: LowRank  # of the first module
    fused: FusedLowRank | StreamedLowRank | None = None  # once nothing is trained any more


class Target(NamedTuple):
    """A module to adapt: rows of d_in go in, rows of d_out come out."""

    module: nn.Module
    d_in: int
    d_out: int


class GatedLoRA(nn.Module):
    """Adapters on modules of a base.

    `gated=False` is standard LoRA: every row of every forward is adapted, so the base's answers change (a baseline).

    Raises ForetellError if there is no module to adapt.
    """

    def __init__(self, targets: dict[str, Target], rank: int, alpha: float, gated: bool = True) -> None:
        super().__init__()
        if not targets:
            raise ForetellError("no linear layer was found inside the base's blocks, so there is nothing to adapt")
        self.gated = gated
        self.scale = alpha / rank
        # Names hold dots, which ModuleDict refuses; the state dict maps back and forth.
        self.adapters = nn.ModuleDict()
        self._terms: list[Term] = []
        self._handles: list[Handle] = []
        self._regular: int | None = None  # rows before the gate's slice; None: the gate is closed
        self._width = 0
        self._idle = 0  # forwards without masks in a row
        self._targets = [module for module, _, _ in targets.values()]  # a list: the base's modules stay the base's
        for name, (_, d_in, d_out) in targets.items():
            self.adapters[name.replace(".", "/")] = LowRank(d_in, d_out, rank, self.scale)
        if not gated:
            self.attach()

    def _hook(self, adapter: LowRank, fused: FusedLowRank | None) -> Callable[..., Any]:
        def add_low_rank(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            regular = self._regular
            if self.gated and regular is None:
                return None
            x = args[0]
            # Decoding as `_adapt` does it, in as little Python as can be: every linear of every step.
            whole = x.ndim == 3 and x.shape[1] == self._width and isinstance(output, Tensor)
            if fused is not None and regular and whole and x.dtype == fused.dtype and not torch.is_grad_enabled():
                fused.add_to(output, x, regular)
                return None
            if isinstance(output, tuple):  # a mixture may return its router's scores too
                return self._adapt(adapter, args[0], output[0]), *output[1:]
            return self._adapt(adapter, args[0], output)

        return add_low_rank

    def _adapt(self, adapter: LowRank, x: Tensor, output: Tensor) -> Tensor:
        regular = self._regular
        if not self.gated or regular == 0:
            return output + adapter(x).view_as(output)
        rows, out = self._by_step(x), self._by_step(output)
        if torch.is_grad_enabled():
            return torch.cat([out[:, :regular], out[:, regular:] + adapter(rows[:, regular:])], dim=1).view_as(output)
        adapter.add_to(out[:, regular:], rows[:, regular:])
        return output

    def _by_step(self, rows: Tensor) -> Tensor:
        """(B, width, d) as it is; some bases (OPT) flatten batch and rows: (B·width, d) -> (B, width, d), a view.

        Raises ForetellError for anything else: slicing it would hit regular tokens.
        """
        width = self._width
        if rows.ndim == 3 and rows.shape[1] == width:
            return rows
        if rows.ndim == 2 and rows.shape[0] % width == 0:
            return rows.view(-1, width, rows.shape[-1])
        raise ForetellError(f"an adapted layer got {tuple(rows.shape)}, not a whole number of {width}-row steps")

    @contextmanager
    def open(self, regular: int, width: int) -> Iterator[None]:
        """Within this context the adapter acts on rows `regular`..`width` of every forward of `width` rows.

        The hooks stay until PATIENCE forwards without masks or `remove`: a module with a hook, even an idle one, is
        called the slow way, which a small base feels at every token.
        """
        if regular < width:
            self.attach()
            self._regular, self._width, self._idle = regular, width, 0
        elif self.gated:
            self._idle += 1
            if self._idle >= PATIENCE:
                self.remove()
        try:
            yield
        finally:
            self._regular = None

    def attach(self) -> None:
        """Puts the hooks on the base, if they are not there."""
        if self._handles:
            return
        for _, site, adapter, fused in self.terms:
            if isinstance(fused, StreamedLowRank):
                weight = cast(PackedProduct, site).weight
                self._handles.append(Inside(cast(StreamedWeight, weight), fused, self._gate))
            elif isinstance(site, PackedProduct) and fused is not None:
                self._handles.append(Added(site, self._adding(fused)))
            elif isinstance(site, nn.Module):
                self._handles.append(site.register_forward_hook(self._hook(adapter, fused)))

    @property
    def terms(self) -> list[Term]:
        """One for each module to adapt, or packed product of such modules; their copies are made once."""
        if not self._terms:
            self._terms = list(self._make_terms())
            give_back()  # what the products were without the rows joined to them
        return self._terms

    def _make_terms(self) -> Iterator[Term]:
        together: dict[PackedProduct, list[tuple[int, str, LowRank]]] = {}
        for module, (name, low_rank) in zip(self._targets, self.adapters.items(), strict=True):
            adapter = cast(LowRank, low_rank)
            if not self.gated or adapter.a.requires_grad:
                yield Term(name, module, adapter)
            elif isinstance(module, PackedLinear) and module.product.dtype == adapter.a.dtype:
                together.setdefault(module.product, []).append((module.index, name, adapter))
            else:
                fused = FusedLowRank([len(adapter.b)], {0: (adapter.a, adapter.b)}, self.scale)
                yield Term(name, module, adapter, fused)
        for product, own in together.items():
            dtype = product.arithmetic
            matrices = {index: (adapter.a.to(dtype), adapter.b.to(dtype)) for index, _, adapter in own}
            _, name, adapter = own[0]
            if isinstance(product.weight, StreamedWeight):
                yield Term(name, product, adapter, StreamedLowRank.of(product.sizes, matrices, self.scale))
            else:
                yield Term(name, product, adapter, FusedLowRank(product.sizes, matrices, self.scale, product))

    def _gate(self, rows: int) -> tuple[int, int] | None:
        """For so many rows: see `streamed.Gate`. Raises ForetellError unless they are those of whole steps."""
        regular = self._regular
        if regular is None:
            return None
        if rows % self._width:
            raise ForetellError(f"an adapted layer got {rows} rows, not a whole number of {self._width}-row steps")
        return regular, self._width

    def _adding(self, fused: FusedLowRank) -> Callable[[Tensor, Tensor], None]:
        adders = fused.adders

        def add_low_rank(x: Tensor, output: Tensor) -> None:
            regular = self._regular
            if regular is None:
                return
            key = output.shape, regular, self._width
            add = adders.get(key)
            if add is not None:
                add(output, output if fused.joined else fused.narrow(x[:, regular:]))
                return
            fused.add_to(self._by_step(output), x if fused.joined else self._by_step(x), regular)
            if output.shape[:-1] == (1, self._width) and regular <= RECURRING:
                if len(adders) == KINDS:
                    adders.clear()
                adders[key] = fused.adder(output.shape, regular)

        return add_low_rank

    def of_block(self, number: int) -> list[Term]:
        """What acts inside of one of the base's blocks."""
        return [term for term in self.terms if term.name.startswith(f"{number}/")]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moved or cast: the hooks hold copies of what the parameters were.
        attached = bool(self._handles)
        self.forget_terms()
        super()._apply(fn, recurse)
        if attached:
            self.attach()
        return self

    def forget_terms(self) -> None:
        """What acts on the base is made anew when it is needed, as after a change of the base's products."""
        self.remove()
        self._terms.clear()

    def remove(self) -> None:
        """Takes the hooks off the base; the next forward with masks brings them back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear-like module: nn.Linear and its quantised forms, or GPT-2's Conv1D."""
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int):
        return d_in, d_out
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and weight is not None:
        return int(weight.shape[0]), int(weight.shape[1])
    raise ForetellError(f"{type(module).__name__} is not a linear layer that foretell knows how to adapt")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear-like: it has sizes of its own and a weight, and no children."""
    if any(True for _ in module.children()):
        return False
    has_sizes = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "weight")
    return has_sizes or type(module).__name__ == "Conv1D"


# Modules by the names that transformers gives them. What experts get are rows sorted by expert, of which a slice is not
# the mask rows; kv_b_proj (DeepSeek) runs over the whole cached prefix at every step; routers only choose.
NOT_ADAPTED = {"experts", "router", "gate", "shared_expert_gate", "kv_b_proj"}


def adapted_linears(blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The linear-like modules of the base's blocks by name ('3.mlp.up_proj') that see one row per token of a step."""
    found = {}
    for name, module in blocks.named_modules():
        if is_linear(module) and NOT_ADAPTED.isdisjoint(name.split(".")):
            found[name] = module
    return found


def mixtures(blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The mixtures of experts by name ('3.mlp'): whatever holds experts and is not itself inside of one."""
    return {
        name: module
        for name, module in blocks.named_modules()
        if "experts" in dict(module.named_children()) and NOT_ADAPTED.isdisjoint(name.split("."))
    }


def adapted_modules(blocks: nn.ModuleList, d_hidden: int) -> dict[str, Target]:
    """Everything to adapt: the linears, and each mixture of experts as a whole, from its input to its output.

    The experts' weights are packed and their rows sorted, so one adapter serves them all: d_hidden -> d_hidden.
    """
    targets = {name: Target(module, *linear_shape(module)) for name, module in adapted_linears(blocks).items()}
    return targets | {name: Target(module, d_hidden, d_hidden) for name, module in mixtures(blocks).items()}

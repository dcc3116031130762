"""Low-rank adapters that touch mask rows only (method.md section 2).

Each adapted module of the base gets a forward hook that adds s·B·A·x to the rows of the gate's slice. The base's module
tree, state dict and code stay as they are, and with the gate closed the hook returns at once: regular rows never
pass through extra arithmetic, so they are bit-identical to the base's. The gate is a selection, not a multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from foretell.errors import ForetellError


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
        """out (n, d_out) += s·B·A·x (n, d_in), in place: half the kernel launches of `forward`, for inference."""
        out.addmm_(x @ self.a.t(), self.b.t(), alpha=self.scale)


class GatedLoRA(nn.Module):
    """Adapters on the linear-like modules of a base.

    `gated=False` is standard LoRA: every row of every forward is adapted, so the base's answers change (a baseline).

    Raises ForetellError if the base has no linear-like module of known size to adapt.
    """

    def __init__(self, targets: dict[str, nn.Module], rank: int, alpha: float, gated: bool = True) -> None:
        super().__init__()
        if not targets:
            raise ForetellError("no linear layer was found inside the base's blocks, so there is nothing to adapt")
        self.gated = gated
        # Names hold dots, which ModuleDict refuses; the state dict maps back and forth.
        self.adapters = nn.ModuleDict()
        self._handles: list[RemovableHandle] = []
        self._regular: int | None = None  # rows before the gate's slice; None: the gate is closed
        self._width = 0
        for name, module in targets.items():
            adapter = LowRank(*linear_shape(module), rank, alpha / rank)
            self.adapters[name.replace(".", "/")] = adapter
            self._handles.append(module.register_forward_hook(self._hook(adapter)))

    def _hook(self, adapter: LowRank) -> Any:
        def add_low_rank(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.gated:
                return output + adapter(args[0])
            if self._regular is None:
                return None
            return self._adapt_rows(adapter, args[0], output)

        return add_low_rank

    def _adapt_rows(self, adapter: LowRank, x: Tensor, output: Tensor) -> Tensor:
        regular, width = self._regular, self._width
        if regular == 0:
            return output + adapter(x)
        if x.ndim != 3:
            # Some bases (OPT) flatten batch and rows before a linear; slicing those would hit regular tokens.
            if x.ndim != 2 or x.shape[0] % width:
                raise ForetellError(f"an adapted layer got {tuple(x.shape)}, not a whole number of {width}-row steps")
            adapted = self._adapt_rows(
                adapter, x.view(-1, width, x.shape[-1]), output.view(-1, width, output.shape[-1])
            )
            return adapted.view(output.shape)
        if x.shape[1] != width:
            raise ForetellError(f"an adapted layer got {x.shape[1]} rows in a step of {width}")
        if torch.is_grad_enabled():
            return torch.cat([output[:, :regular], output[:, regular:] + adapter(x[:, regular:])], dim=1)
        for sequence in range(x.shape[0]):
            adapter.add_to(output[sequence, regular:], x[sequence, regular:])
        return output

    @contextmanager
    def open(self, regular: int, width: int) -> Iterator[None]:
        """Within this context the adapter acts on rows `regular`..`width` of every forward of `width` rows."""
        self._regular, self._width = (regular, width) if regular < width else (None, 0)
        try:
            yield
        finally:
            self._regular = None

    def remove(self) -> None:
        """Takes the hooks off the base again."""
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


def adapted_linears(blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The linear-like modules of the base's blocks by name ('3.mlp.up_proj'); routers of mixtures are left out."""
    found = {}
    for name, module in blocks.named_modules():
        if is_linear(module) and not any(part in ("router", "gate") for part in name.split(".")):
            found[name] = module
    return found

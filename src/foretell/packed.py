"""Linears whose weights lie in memory in the order in which oneDNN multiplies fastest, for decoding on a CPU.

A step of decoding multiplies each weight with a handful of rows. PyTorch hands such products to its BLAS, which reads a
weight as it was stored; oneDNN, once it has laid the weight out in blocks of its own, is up to five times as fast
(docs/experiments.md). The numbers are the same and so is the product, but for the order in which it is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretell.errors import ForetellError

PACKED_DTYPES = (torch.float32, torch.bfloat16)


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
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedLinear(nn.Module):
    """x (..., d_in) -> x W^T + bias (..., d_out), forward only; instead of an nn.Linear or GPT-2's Conv1D.

    With `keep` the weight stays beside its packed copy: for an embedding tied to it, and to read single rows of.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, keep: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # A plain attribute: state dicts and `.to()` know no packed tensors.
        self.packed = reorder(weight)
        self.bias, self.kept = bias, keep

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), unpacked anew at each call unless it was kept."""
        return self.packed.to_dense() if self.kept is None else self.kept

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ForetellError("a base with packed linears can't be trained through; load it with packed=False")
        return product(x, self.packed, self.bias)


def pack(module: nn.Module, kept: nn.Module | None = None) -> None:
    """Replaces every linear inside of `module`, one by one, so that no more than one weight is there twice.

    `kept` is the linear whose weight is kept. Quantised linears stay as they are.
    """
    for name, child in module.named_children():
        if isinstance(child, Conv1D) or type(child) is nn.Linear:
            weight = child.weight.t() if isinstance(child, Conv1D) else child.weight
            setattr(module, name, PackedLinear(weight, child.bias, keep=weight if child is kept else None))
        else:
            pack(child, kept)

"""Steps of the commonest decoder with little Python between its products: the same numbers in half the calls.

Llama, Mistral, Qwen and their many relatives are one stack: RMS norm, attention with rotary positions, RMS norm, gated
MLP. Called module by module, transformers' code for it takes as long as the products of a small model. Here a step over
a cache is written out: queries and keys are turned together, what is the same in every layer is worked out once.
Whether a base is of that make is not read off its name but tried, on steps of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from foretell.attended import HeadNorms, Past, fits
from foretell.attention import AttentionMask, attention_mask
from foretell.cache import StaticLayer
from foretell.packed import PackedLinear, PackedProduct
from foretell.rows import Rows

TRIED = (4, 3)  # tokens cached and rows of the step that a base is tried on
FAR = 4096  # position of other rows, or the last that there are: what goes by position may begin late


def make_of(base: Any) -> LeanSteps | None:
    """Lean steps for a base with packed linears, if its decoder is of the make that they are written for.

    Tried on steps near and far, with and without a mask: whatever its code does and ours does not changes a bit.
    """
    try:
        steps = LeanSteps(base.decoder)
        return steps if _agrees(base, steps) else None
    except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):  # code of any author; it is not that
        return None


@torch.inference_mode()
def _agrees(base: Any, steps: LeanSteps) -> bool:
    context, rows = TRIED
    ids = torch.arange(context + rows, device=base.device)[None] % base.vocab_size
    embeddings = base.embed(ids)
    far = min(FAR, base.max_positions or FAR) - rows
    for first, count in ((context, rows), (context, 1), (far, rows)):
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            base.latents(embeddings[:, :context], cache=cache)
        new = torch.arange(first, first + count, device=base.device)
        columns = torch.cat([torch.arange(context, device=base.device), new])[None]
        seen = columns[:, None] <= new[:, None]
        mask = attention_mask(seen, new[None], columns, base.text_config, base.dtype)
        step = embeddings[:, -count:], new[None], mask
        with base.by_modules():
            expected = base.latents(*step, caches[0])
        if not torch.equal(expected, steps.latents(*step, caches[1])):
            return False
    return True


class LeanSteps:
    """`Base.latents` for steps over a cache, of a decoder with packed linears.

    Raises AttributeError, TypeError or ValueError for a decoder that is built of other parts.
    """

    def __init__(self, decoder: Any) -> None:
        config = decoder.config
        self.rotary = decoder.rotary_emb
        self.norm = normed(decoder.norm)
        self.blocks = [LeanBlock(number, block) for number, block in enumerate(decoder.layers)]
        types = getattr(config, "layer_types", None)
        self.types = list(types) if types else [None] * len(self.blocks)
        if len(self.types) != len(self.blocks) or len({block.head_size for block in self.blocks}) != 1:
            raise ValueError("layers of several kinds")
        self._alike = len({(block.heads, block.shared, block.scaling) for block in self.blocks}) == 1
        self._dtype = decoder.norm.weight.dtype
        # A hook of anyone's wants its module to be called.
        self._hooks = [
            hooks for module in decoder.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @property
    def attends(self) -> bool:
        """Whether steps over a static cache can have the attention of `attended`."""
        block = self.blocks[0]
        return self._alike and fits(block.head_size, self._dtype)

    def can_run(self, rows: int, mask: AttentionMask | None) -> bool:
        """Whether they can do a step of so many rows: with a mask, or a single row, while nobody hooks in."""
        return (mask is not None or rows == 1) and not torch.is_grad_enabled() and not any(self._hooks)

    def latents(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: AttentionMask | None,
        cache: Cache,
        rows: Rows | None = None,
    ) -> Tensor:
        """(B, Q, E) at positions (B or 1, Q) -> z (B, Q, D); masks additive (B or 1, 1, Q, S), None for a single row
        that sees everything. With `rows` those that belong to sequences go through the linears together."""
        cos, sin = (turn[:, :, None] for turn in self._turns(embeddings, positions))
        masks: dict[int, Tensor] = {}
        x = embeddings if rows is None else rows.together(embeddings)[None]
        for block, kind in zip(self.blocks, self.types, strict=True):
            own = mask[str(kind)] if isinstance(mask, dict) else mask
            if own is not None:
                if id(own) not in masks:
                    masks[id(own)] = block.stacked(own)
                own = masks[id(own)]
            x = block.latents(x, cos, sin, own, cache, rows)
        z = self.norm(x)
        return z if rows is None else rows.apart(z[0])

    def _turns(self, embeddings: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B or 1, Q, D_head) of positions (B or 1, Q), the sine with the sign of the half that changes
        places."""
        cos, sin = self.rotary(embeddings, position_ids=positions)
        half = self.blocks[0].head_size // 2
        if cos.shape[-1] != 2 * half:
            raise ValueError("only a part of each head is turned")
        return cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)

    def attended(self, embeddings: Tensor, past: Past, layers: Sequence[StaticLayer]) -> Tensor:
        """(1, N, E) of rows together -> z (1, N, D), where `attends`; their keys and values are then in the layers."""
        first = self.blocks[0]
        past.turn(*self._turns(embeddings, past.positions[None]), first.heads, first.scaling)
        x = embeddings
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block.attended(x, past, layer)
        return self.norm(x)


class LeanBlock:
    """One layer, over the packed products of its modules, to which the adapter adds as ever."""

    def __init__(self, number: int, block: Any) -> None:
        self.number = number
        attention, mlp = block.self_attn, block.mlp
        expected = {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
        heads = {"q_proj", "k_proj", "v_proj", "o_proj"}
        of_attention = {name for name, _ in attention.named_children()} - {"q_norm", "k_norm", "rotary_fn"}
        if {name for name, _ in block.named_children()} != expected or of_attention != heads:
            raise ValueError("a layer of other parts")
        self.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = joined(attention.o_proj), joined(mlp.down_proj)
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn.forward
        self.before, self.between = normed(block.input_layernorm), normed(block.post_attention_layernorm)
        self.head_norms, self.weights_of_norms = None, None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm, attention.k_norm
            self.head_norms = normed(norms[0]), normed(norms[1])
            of_query, of_key = (norm.weight.detach() for norm in norms)
            self.weights_of_norms = HeadNorms(of_query, of_key, norms[0].variance_epsilon)
        self.head_size, self.scaling = int(attention.head_dim), attention.scaling
        self.heads, self.shared = (size // self.head_size for size in self.qkv.sizes[:2])
        self.groups = self.heads // self.shared

    def latents(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache, together: Rows | None
    ) -> Tensor:
        """x (B, Q, D), cos and signed sin (B or 1, Q, 1, D_head), mask as `stacked` makes it -> (B, Q, D); or all rows
        `together`, (1, N, D) -> (1, N, D)."""
        turned = self.heads + self.shared
        made = self.qkv.make(self.before(x))[..., : (turned + self.shared) * self.head_size]
        if together is not None:
            made = together.apart(made[0])
        batch, rows, _ = made.shape
        qkv = made.view(batch, rows, -1, self.head_size)
        qk = qkv[:, :, :turned]
        if self.head_norms is not None:
            of_query, of_key = self.head_norms
            qk = torch.cat((of_query(qk[:, :, : self.heads]), of_key(qk[:, :, self.heads :])), 2)
        qk = (qk * cos + qk.roll(self.head_size // 2, -1) * sin).transpose(1, 2)
        keys, values = cache.update(qk[:, self.heads :], qkv[:, :, turned:].transpose(1, 2), self.number)
        # The heads of a group one below the other, as rows of one head (see `grouped_attention`).
        query = qk[:, : self.heads].reshape(batch, self.shared, self.groups * rows, self.head_size)
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scaling)
        seen = seen.view(batch, self.heads, rows, self.head_size).transpose(1, 2)
        seen = seen.flatten(2) if together is None else together.together(seen).flatten(1)[None]
        return self.behind(x, seen)

    def attended(self, x: Tensor, past: Past, layer: StaticLayer) -> Tensor:
        """x (1, N, D) -> (1, N, D)."""
        made = self.qkv.make(self.before(x))
        keys, values = layer.room(past.longest, self.shared, self.head_size, made)
        return self.behind(x, past.attend(made, self.shared, keys, values, self.weights_of_norms))

    def behind(self, x: Tensor, seen: Tensor) -> Tensor:
        """What the attention of a layer saw, (..., heads * D_head), added to its x (..., D), and the MLP."""
        x = x + self.out.part(seen, 0)
        gate, up = self.gate_up.make(self.between(x)).split(self.gate_up.parts, -1)[:2]
        return x + self.down.part(self.activation(gate) * up, 0)

    def stacked(self, mask: Tensor) -> Tensor:
        """(B, 1, Q, S) -> (B, 1, groups * Q, S), for the heads of a group one below the other."""
        if self.groups == 1:
            return mask
        if mask.shape[2] == 1:
            return mask.expand(-1, -1, self.groups, -1)
        return mask.expand(-1, self.groups, -1, -1).reshape(len(mask), 1, -1, mask.shape[3])


def joined(*linears: Any) -> PackedProduct:
    """The product that these linears, and no others, are in this order. Raises ValueError if there is none."""
    products = {linear.product for linear in linears if isinstance(linear, PackedLinear)}
    if len(products) != 1:
        raise ValueError("its linears are not one product")
    (product,) = products
    if [linear.index for linear in linears] != list(range(len(product.sizes))):
        raise ValueError("its linears are in another order")
    return product


def normed(norm: Any) -> Callable[[Tensor], Tensor]:
    """What an RMS norm does, in fewer kernels if it has the usual form; whether it has shows when the base is tried."""
    weight, epsilon = norm.weight, norm.variance_epsilon

    def exact(x: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, epsilon)

    def rounded(x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), weight.shape, None, epsilon).to(x.dtype) * weight

    return exact if weight.dtype == torch.float32 else rounded

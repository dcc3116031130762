"""The two passes of training: real tokens without autograd, then only the masks with it (method.md section 1).

The base is frozen and the gate is off at regular tokens, so no gradient ever reaches one: their keys, values and
latents are computed once and kept. The ungated baseline changes regular tokens too and needs one pass over everything.
Letters: B batch, N tokens, A anchors (positions with a mask block), K masks per block, M = A * K, D hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from foretell.attention import AttentionMask, attention_mask
from foretell.errors import ForetellError
from foretell.model import MTPModel

BLOCKS_TOGETHER = 16
MASKS_AT_ONCE = 1024  # where there are as many: fewer leave a GPU idle
MASKS_AT_ONCE_ON_CPU = 256  # whose products are as fast as those of 1024, with a quarter of the activations


class FrozenLayer(CacheLayerMixin):
    """Kept keys and values of one layer: `update` returns them with the new ones behind and writes nothing.

    In-place writes, as in a decoding cache, would break the second backward.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, copies: int = 1) -> None:
        """keys and values (B, H, N, D/H); forwards bring B * copies rows, `copies` of them for each sequence."""
        super().__init__()
        self.keys, self.values, self.copies = keys, values, copies
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is born full."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, kept: Tensor, new: Tensor) -> Tensor:
        shared = kept[:, None].expand(-1, self.copies, -1, -1, -1)
        return torch.cat([shared, new.unflatten(0, (-1, self.copies))], dim=-2).flatten(0, 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[-2])

    def get_max_length(self) -> int:
        return -1


class Regular(NamedTuple):
    """What the first pass leaves: keys and values of every layer, and z (B, N, D)."""

    layers: list[tuple[Tensor, Tensor]]
    z: Tensor


@torch.no_grad()
def regular_pass(model: MTPModel, ids: Tensor, starts: Tensor | None = None) -> Regular:
    """ids (B, N), padded on the right: the base's own forward with the gate closed; starts (B, N) if packed."""
    cache, positions, mask = DynamicCache(), None, None
    if starts is not None:
        positions = regular_positions(ids.shape[0], ids.shape[1], starts, ids.device)
        visible = within_documents(starts)
        mask = attention_mask(visible, positions, positions, model.base.text_config, model.base.dtype)
    z = model.base.latents(model.base.embed(ids), positions, mask, cache)
    return Regular([(layer.keys, layer.values) for layer in cache.layers], z)


def mask_pass(
    model: MTPModel,
    anchors: Tensor,
    regular: Regular,
    together: int | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """Mask rows only, with autograd: anchors (B, A) -> z (B, A, K, D); starts (B, N) if packed.

    Bidirectional masks see the first lengths[b] masks of their block b, lengths (B, A) int64, by default all.
    Blocks never see each other, so they are spread over batch rows with `together` of them in each: the attention of M
    masks over N + M columns is mostly masked away when M is large. Rows go through the base in groups with about the
    same anchors, which need no keys beyond their last; so memory and time grow with A, not with its square.
    Raises ForetellError if not even one block fits.
    """
    (batch, total), k, tokens = anchors.shape, model.max_masks, regular.z.shape[1]
    if (count := groups_needed(model, anchors)) > 1:
        parts = []
        for which in anchor_groups(total, count):
            own = None if lengths is None else lengths[:, which]
            parts.append(mask_pass(model, anchors[:, which], regular, together, own, starts))
        return torch.cat(parts, dim=1)
    copies = -(-total // (together or blocks_together(model, tokens)))
    blocks = -(-total // copies)
    spread, ends = (
        None if rows is None else torch.cat([rows, rows[:, : copies * blocks - total]], dim=1).view(batch, -1, blocks)
        for rows in (anchors, lengths)
    )
    assert spread is not None
    z = _group_pass(model, spread, regular, ends, starts, tokens)
    return z.reshape(batch, copies * blocks, k, -1)[:, :total]


def _group_pass(
    model: MTPModel, anchors: Tensor, regular: Regular, lengths: Tensor | None, starts: Tensor | None, tokens: int
) -> Tensor:
    """anchors and lengths (B, C, b) -> z (B, C, b * K, D): C rows of b blocks for every sequence."""
    (batch, copies, blocks), k = anchors.shape, model.max_masks
    seen = int(anchors.max()) + 1  # no mask of these sees more of the sequence
    anchors, lengths = anchors.flatten(0, 1), None if lengths is None else lengths.flatten(0, 1)
    if starts is not None:
        starts = starts.repeat_interleave(copies, dim=0)
    positions, ends = mask_positions(anchors, k, tokens, starts), block_ends(model, anchors, tokens, lengths)
    mask = mask_rows(model, anchors, positions, seen, ends, None if starts is None else starts[:, :seen])
    cache = Cache(
        layers=[FrozenLayer(keys[:, :, :seen], values[:, :, :seen], copies) for keys, values in regular.layers]
    )
    with model.adapter.open(0, blocks * k):
        z = model.base.latents(mask_embeddings(model, batch * copies, blocks), positions, mask, cache)
    return z.view(batch, copies, blocks * k, -1)


def groups_needed(model: MTPModel, anchors: Tensor, masks_at_once: int | None = None) -> int:
    """In how many groups the blocks of anchors (B, A) go through the base, one after the other."""
    at_once = masks_at_once or (MASKS_AT_ONCE_ON_CPU if model.base.device.type == "cpu" else MASKS_AT_ONCE)
    batch, total = anchors.shape
    return -(-total // max(1, at_once // (batch * model.max_masks)))


def anchor_groups(total: int, count: int) -> list[slice]:
    """`count` runs of neighbours among `total` anchors, about equal; some are empty if there are fewer anchors."""
    return [slice(total * i // count, total * (i + 1) // count) for i in range(count)]


def blocks_together(model: MTPModel, tokens: int) -> int:
    """How many blocks share a batch row: a number that was fast, or what fits a table of past columns (GPT-Neo's)."""
    limit = model.base.max_positions
    tables = (buffer for buffer in model.base.lm.buffers() if buffer.dtype == torch.bool and buffer.dim() >= 2)
    if limit is None or not any(table.shape[-2:] == (limit, limit) for table in tables):
        return BLOCKS_TOGETHER
    fit = (limit - tokens) // model.max_masks
    if fit < 1:
        raise ForetellError(
            f"{tokens} tokens and a block of masks exceed this base; give --seq-len {limit - model.max_masks}"
        )
    return min(fit, BLOCKS_TOGETHER)


def one_pass(
    model: MTPModel, ids: Tensor, anchors: Tensor, lengths: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Everything in one forward with autograd: ids (B, N), anchors (B, A) -> z (B, N, D) and (B, A, K, D).

    lengths (B, A) as in `mask_pass`; starts (B, N) if packed.
    """
    (batch, tokens), blocks, k = ids.shape, anchors.shape[1], model.max_masks
    regular = regular_positions(batch, tokens, starts, ids.device)
    positions = torch.cat([regular, mask_positions(anchors, k, tokens, starts)], dim=1)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril().expand(batch, -1, -1)
    seen = causal if starts is None else within_documents(starts)
    seen = torch.cat([seen, seen.new_zeros(batch, tokens, blocks * k)], dim=2)
    ends = block_ends(model, anchors, tokens, lengths)
    visible = torch.cat([seen, visibility(anchors, k, tokens, ends, starts)], dim=1)
    mask = attention_mask(visible, positions, positions, model.base.text_config, model.base.dtype)
    embeddings = torch.cat([model.base.embed(ids), mask_embeddings(model, batch, blocks)], dim=1)
    with model.adapter.open(tokens, tokens + blocks * k):
        z = model.base.latents(embeddings, positions, mask)
    return z[:, :tokens], z[:, tokens:].reshape(batch, blocks, k, -1)


def mask_embeddings(model: MTPModel, batch: int, blocks: int) -> Tensor:
    """(B, M, E): the K mask vectors, once per block."""
    return model.mask_vectors.to(model.base.dtype).repeat(blocks, 1).expand(batch, -1, -1)


def regular_positions(batch: int, tokens: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """(B, N) position ids of the regular tokens: those of every document of a pack begin at 0."""
    columns = torch.arange(tokens, device=device).expand(batch, -1)
    return columns if starts is None else columns - starts


def within_documents(starts: Tensor) -> Tensor:
    """starts (B, N) -> (B, N, N) bool: a token sees those up to itself of its own document."""
    causal = torch.ones(starts.shape[1], starts.shape[1], dtype=torch.bool, device=starts.device).tril()
    return causal & (starts[:, :, None] == starts[:, None, :])


def mask_positions(anchors: Tensor, k: int, tokens: int, starts: Tensor | None = None) -> Tensor:
    """(B, M) position ids: mask j after anchor i sits at i + j, counted from its document's start.

    Masks past the end have no label and are held at the last position, which a table of learned positions still has.
    """
    offsets = torch.arange(1, k + 1, device=anchors.device)
    own = anchors if starts is None else anchors - starts.gather(1, anchors)
    return (own[:, :, None] + offsets).clamp(max=tokens - 1).flatten(1)


def block_ends(model: MTPModel, anchors: Tensor, tokens: int, lengths: Tensor | None) -> Tensor | None:
    """(B, A): how many masks of a block see each other; None if attention is causal, each seeing those up to itself.

    Masks past the last column are left out, as in decoding: they are not where they ought to be.
    """
    if not model.bidirectional:
        return None
    inside = (tokens - 1 - anchors).clamp(1, model.max_masks)
    return inside if lengths is None else torch.minimum(inside, lengths)


def visibility(
    anchors: Tensor, k: int, tokens: int, ends: Tensor | None = None, starts: Tensor | None = None
) -> Tensor:
    """(B, M, N + M) bool: m_j after anchor i sees regular tokens up to i of its document and m_1..m_j of its own block.

    With ends (B, A) all masks up to m_ends, or to itself, as if the block held no more of them.
    """
    batch, blocks = anchors.shape
    columns = torch.arange(tokens, device=anchors.device)
    prefix = columns <= anchors[:, :, None]
    if starts is not None:
        prefix &= columns >= starts.gather(1, anchors)[:, :, None]
    within = torch.ones(k, k, dtype=torch.bool, device=anchors.device).tril()
    own = torch.block_diag(*[within] * blocks).bool()
    if ends is not None:
        number = torch.arange(k, device=anchors.device).repeat(blocks)
        same = torch.block_diag(*[torch.ones_like(within)] * blocks).bool()
        own = own | (same & (number < ends.repeat_interleave(k, dim=1)[:, None, :]))
    return torch.cat([prefix.repeat_interleave(k, dim=1), own.expand(batch, -1, -1)], dim=2)


def mask_rows(
    model: MTPModel,
    anchors: Tensor,
    positions: Tensor,
    kept: int,
    ends: Tensor | None = None,
    starts: Tensor | None = None,
) -> AttentionMask:
    """The additive mask of the second pass over `kept` regular tokens, per layer type where the base wants it."""
    regular = regular_positions(anchors.shape[0], kept, starts, anchors.device)
    visible = visibility(anchors, model.max_masks, kept, ends, starts)
    keys = torch.cat([regular, positions], dim=1)
    return attention_mask(visible, positions, keys, model.base.text_config, model.base.dtype)

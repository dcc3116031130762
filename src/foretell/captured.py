"""Steps on a GPU as CUDA graphs: what a decoder launches kernel by kernel is recorded once and replayed as a whole.

A graph reads and writes fixed addresses, so whatever changes from step to step goes into tensors that stay: embeddings,
positions, the mask, and the columns that the new rows are written to. Keys and values lie in buffers of the graphs'
own, which the cache of the text at hand takes over. A layout's inner form is in its mask, so one graph serves all steps
of as many sequences, regular rows, rows and (up to COLUMNS) columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from foretell.attention import AttentionMask
from foretell.base import Base
from foretell.errors import ForetellError
from foretell.gated_lora import GatedLoRA

COLUMNS = 256  # a graph sees a multiple of so many; those that hold nothing are masked
EAGER_FIRST = 3  # steps of a kind before it is recorded: recording takes as long as a few eager steps
MOST_GRAPHS = 512  # kinds of steps; each holds some megabytes of the GPU's memory

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


class Kind(NamedTuple):
    """What a graph is made for."""

    batch: int
    regular: int
    width: int
    columns: int


def why_not(base: Base, adapter: GatedLoRA) -> str | None:
    """Why a base's steps can't be captured, or None."""
    if base.device.type != "cuda":
        return f"that is for models on a GPU, and this one is on {base.device}"
    if base.max_columns is not None:
        return "its attention has a table of columns"
    return None if adapter.gated else "its adapter is not gated"


class CudaGraphs:
    """Records what `run` launches -> (replay, what it gave). All share a pool of memory, as one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are chosen and workspaces made outside of the graph
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                out = run()
        return graph.replay, out


class BufferLayer(CacheLayerMixin):
    """Keys and values (B, H, S, D_head) of one layer in a graph: new rows go where a tensor says."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        """columns (B, Q) int64: of the new rows."""
        super().__init__()
        self.keys, self.values, self.columns = keys, values, columns
        self.rows = torch.arange(len(columns), device=columns.device)[:, None]
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.columns] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.columns] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0

    def get_seq_length(self) -> int:
        return int(self.keys.shape[2] - self.columns.shape[1])

    def get_max_length(self) -> int:
        return -1


@dataclass
class Captured:
    """A recorded step and the tensors that it reads."""

    embeddings: Tensor  # (B, Q, E)
    positions: Tensor  # (B, Q) int64
    columns: Tensor  # (B, Q) int64
    masks: dict[str | None, Tensor]  # (B, 1, Q, S) additive, by type of layer
    replay: Callable[[], object]
    out: Tensor  # z (B, Q, D)


class CapturedSteps:
    """Records and replays steps of a base over one cache at a time; a second text at the same time runs eager.

    The base and the adapter must stay as they are from then on: not moved, cast or trained. `record` makes a graph of a
    function without arguments.
    Raises ForetellError where that can't be done.
    """

    def __init__(self, base: Base, adapter: GatedLoRA, record: Record | None = None) -> None:
        if record is None and (reason := why_not(base, adapter)):
            raise ForetellError(reason)
        self.base, self.adapter = base, adapter
        self.record: Record = record or CudaGraphs(base.device)
        self.eager_first = EAGER_FIRST
        self.graphs: dict[Kind, Captured] = {}
        self.seen: Counter[Kind] = Counter()
        self.buffers: list[tuple[Tensor, Tensor]] = []  # (B, H, S, D_head) each, a pair per layer
        self._owner: ReferenceType[Any] | None = None

    def remove(self) -> None:
        """Frees graphs and buffers."""
        self.graphs.clear()
        self.buffers.clear()

    def can_run(self, cache: Any, lengths: Sequence[int], regular: int, width: int) -> bool:
        """Whether this step runs from a graph, one that is recorded now if need be; counts steps of its kind."""
        kind = kind_of(lengths, regular, width)
        layer = cache.layers[0]
        other = self._owner() if self._owner is not None else None
        if not layer.is_initialized or layer.keys is None or other not in (None, cache):
            return False
        self.seen[kind] += 1
        known = kind in self.graphs and self._fits(cache, kind)
        return known or (self.seen[kind] > self.eager_first and len(self.graphs) < MOST_GRAPHS)

    def latents(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: AttentionMask | None,
        cache: Any,
        lengths: Sequence[int],
        regular: int,
    ) -> Tensor:
        """As `Base.latents` for a step behind so many cached tokens of each sequence: (B, Q, E) -> z (B, Q, D).

        The mask must be there, also where everything is seen.
        """
        assert mask is not None
        kind = kind_of(lengths, regular, embeddings.shape[1])
        self._take_over(cache, kind, max(lengths))
        if kind not in self.graphs:
            self.graphs[kind] = self._recorded(kind, embeddings, positions, mask, lengths)
        step = self.graphs[kind]
        fill(step, embeddings, positions, mask, lengths)
        step.replay()
        return step.out.clone()  # the next graph may use its memory

    def _recorded(
        self, kind: Kind, embeddings: Tensor, positions: Tensor, mask: AttentionMask, lengths: Sequence[int]
    ) -> Captured:
        with torch.inference_mode(False), torch.no_grad():
            wide = {id(one): widened(one, kind) for one in by_type(mask).values()}
            masks = {name: wide[id(one)] for name, one in by_type(mask).items()}
            step = Captured(
                embeddings.clone(),
                positions.clone(),
                torch.zeros(positions.shape, dtype=torch.long, device=positions.device),
                masks,
                lambda: None,
                embeddings,
            )
            layers = [
                BufferLayer(
                    keys[: kind.batch, :, : kind.columns], values[: kind.batch, :, : kind.columns], step.columns
                )
                for keys, values in self.buffers
            ]
        fill(step, embeddings, positions, mask, lengths)
        sees: Any = masks.get(None, masks)  # as the base was given them

        def run() -> Tensor:
            with self.adapter.open(kind.regular, kind.width):
                return self.base.latents(step.embeddings, step.positions, sees, Cache(layers=layers))

        step.replay, step.out = self.record(run)
        return step

    def _fits(self, cache: Any, kind: Kind) -> bool:
        """Whether a cache's text finds room in the buffers."""
        if not self.buffers:
            return False
        like, keys = cache.layers[0].keys, self.buffers[0][0]
        return len(keys) >= len(like) and keys.shape[2] >= max(kind.columns, like.shape[2])

    def _take_over(self, cache: Any, kind: Kind, kept: int) -> None:
        """From here on the cache's keys and values lie in our buffers, with the `kept` columns that it holds."""
        if not self._fits(cache, kind):
            self._make_buffers(cache, kind)
        if cache.layers[0].keys.data_ptr() != self.buffers[0][0].data_ptr():
            for layer, own in zip(cache.layers, self.buffers, strict=True):
                keys, values = (buffer[: len(layer.keys)] for buffer in own)
                keys[:, :, :kept].copy_(layer.keys[:, :, :kept])
                values[:, :, :kept].copy_(layer.values[:, :, :kept])
                layer.keys, layer.values, layer.capacity = keys, values, keys.shape[2]
        self._owner = ref(cache)

    def _make_buffers(self, cache: Any, kind: Kind) -> None:
        """For this cache and smaller ones; graphs of smaller buffers go."""
        self.remove()
        with torch.inference_mode(False):
            for layer in cache.layers:
                most = whole_columns(max(kind.columns, layer.keys.shape[2]))
                # Zeros: NaN in unwritten columns would leak through masked attention as 0 * NaN.
                keys, values = (
                    states.new_zeros((*states.shape[:2], most, states.shape[3]))
                    for states in (layer.keys, layer.values)
                )
                self.buffers.append((keys, values))


def whole_columns(columns: int) -> int:
    """The next multiple of COLUMNS."""
    return -(-columns // COLUMNS) * COLUMNS


def kind_of(lengths: Sequence[int], regular: int, width: int) -> Kind:
    return Kind(len(lengths), regular, width, whole_columns(max(lengths) + width))


def by_type(mask: AttentionMask) -> dict[str | None, Tensor]:
    """Masks by type of layer, None for every layer."""
    return dict(mask.items()) if isinstance(mask, dict) else {None: mask}


def widened(mask: Tensor, kind: Kind) -> Tensor:
    """mask (B or 1, 1, Q, S') in memory of its own as (B, 1, Q, S): nothing is seen beyond S'."""
    padded = F.pad(mask, (0, kind.columns - mask.shape[-1]), value=torch.finfo(mask.dtype).min)
    return padded.expand(kind.batch, -1, -1, -1).clone(memory_format=torch.contiguous_format)


def fill(step: Captured, embeddings: Tensor, positions: Tensor, mask: AttentionMask, lengths: Sequence[int]) -> None:
    """Puts a step's own numbers where its graph reads them."""
    step.embeddings.copy_(embeddings)
    step.positions.copy_(positions)
    width, device = positions.shape[1], positions.device
    step.columns.copy_(torch.tensor(lengths, device=device)[:, None] + torch.arange(width, device=device))
    given = by_type(mask)
    for name, target in {id(own): (name, own) for name, own in step.masks.items()}.values():  # types may share one
        seen = given[name].shape[-1]
        target[..., :seen].copy_(given[name])
        target[..., seen:].fill_(torch.finfo(target.dtype).min)

"""The base's own `generate()`, as transformers runs it: plain, with prompt lookup, or assisted by a draft model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from foretell.base import load_base
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError


@dataclass(frozen=True)
class Decoded:
    """What decoding a batch gave: each list has an entry per sequence, and in it one per step."""

    tokens: list[list[int]]
    sizes: list[list[int]]  # tokens of every step
    drafts: list[list[int]]  # drafts that every step verified
    accepted: list[list[int]]  # and those of them that held
    steps: int  # of the whole batch: as many as its longest sequence took
    prefills: int  # sequences whose prompt took a forward of its own; transformers' first step reads the prompt too
    seconds: float  # with prefill
    first_token_seconds: float  # until the first step had given its tokens


def huggingface_generate(
    model: MTPForCausalLM,
    batch: Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    lookup: int = 0,
    draft_model: PreTrainedModel | None = None,
) -> Decoded:
    """Prompts (1, n_b) int64 side by side, padded on the left, on the base as transformers loads it: not packed.

    Nothing else that its generation config wishes is obeyed.

    `lookup` and `draft_model` have transformers draft; then the batch must be a single prompt.
    """
    longest = max(ids.shape[1] for ids in batch)
    stop = model.stop_ids()
    ids = torch.cat([nn.functional.pad(ids, (longest - ids.shape[1], 0), value=_pad(stop)) for ids in batch])
    seen = [nn.functional.pad(torch.ones_like(ids), (longest - ids.shape[1], 0)) for ids in batch]
    drafting: dict[str, Any] = {"prompt_lookup_num_tokens": lookup} if lookup else {}
    if draft_model is not None:
        drafting["assistant_model"] = draft_model
    lm, stopwatch = model.base.unpacked(), _Stopwatch()
    devices = [model.base.device] if model.base.device.type == "cuda" else []
    with (
        _own_settings(lm, stop, temperature),
        torch.random.fork_rng(devices),
        _widths(lm) as widths,
        torch.inference_mode(),
    ):
        torch.manual_seed(seed)
        start = time.perf_counter()
        out = lm.generate(
            input_ids=ids,
            attention_mask=torch.cat(seen),
            max_new_tokens=max_new_tokens,
            streamer=stopwatch,
            **drafting,
        )
        new = out[:, longest:].tolist()
        seconds = time.perf_counter() - start
    tokens = [row[: 1 + next((i for i, token in enumerate(row) if token in stop), len(row))] for row in new]
    if drafting:
        sizes = [stopwatch.sizes]
        # The first forward carries the prompt too, each later one the token just decided and the drafts.
        drafts = [[width - (longest if step == 0 else 1) for step, width in enumerate(widths)]]
    else:
        sizes = [[1] * len(row) for row in tokens]
        drafts = [[0] * len(row) for row in tokens]
    return Decoded(
        tokens=tokens,
        sizes=sizes,
        drafts=drafts,
        accepted=[[size - 1 for size in row] for row in sizes],
        steps=len(stopwatch.sizes),
        prefills=0,
        seconds=seconds,
        first_token_seconds=stopwatch.times[0] - start,
    )


def load_draft_model(source: str | Path | PreTrainedModel, model: MTPForCausalLM) -> PreTrainedModel:
    """The model that drafts for transformers' assisted generation, in the base's precision and on its device.

    Raises ForetellError if it is not there or has another vocabulary than the base.
    """
    if isinstance(source, PreTrainedModel):
        draft = source
    else:
        draft = load_base(str(source), dtype=model.base.dtype, device=model.base.device).lm
    own, wanted = (lm.config.get_text_config().vocab_size for lm in (draft, model.base.lm))
    if own != wanted:
        raise ForetellError(
            f"the draft model has a vocabulary of {own} tokens and the base one of {wanted}: "
            "give a draft model with the base's tokenizer"
        )
    return draft


class _Stopwatch(BaseStreamer):
    """When each step gave its tokens, and how many."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sizes: list[int] = []
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.sizes.append(value.numel())
        self._prompt_seen = True

    def end(self) -> None:
        pass


@contextmanager
def _widths(lm: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens in every forward of the base: what transformers drafted shows nowhere else."""
    widths: list[int] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        widths.append((named["input_ids"] if "input_ids" in named else arguments[0]).shape[1])

    handle = lm.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


@contextmanager
def _own_settings(lm: PreTrainedModel, stop: set[int], temperature: float) -> Iterator[None]:
    """Sets aside whatever else the base's generation config asks for, such as a repetition penalty."""
    kept = lm.generation_config
    # top_k and top_p are said because transformers' defaults cut the distribution.
    drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    lm.generation_config = GenerationConfig(
        eos_token_id=sorted(stop) or None, pad_token_id=_pad(stop), num_beams=1, **(drawing or {"do_sample": False})
    )
    try:
        yield
    finally:
        lm.generation_config = kept


def _pad(stop: set[int]) -> int:
    return min(stop, default=0)

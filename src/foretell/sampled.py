"""Sweeps of the sampler head over the masks of a block, by foretell's own kernel (sampled.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from foretell import native
from foretell.base import Base
from foretell.packed import PackedLinear
from foretell.sampler import BigramHead, CombinedHead, Sampler, SamplerHead
from foretell.streamed import DTYPES, StreamedWeight

MULTIPLE = 16  # of which the size of latents must be one: what the widest registers hold


class _Sweep(ctypes.Structure):
    """`Sweep` of sampled.cpp."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("width", "vocabulary", "tokens")),
        *((name, ctypes.c_void_p) for name in ("first", "second", "unembedding")),
        *((name, ctypes.c_void_p) for name in ("first_bias", "second_bias", "unembedding_bias")),
        *((name, ctypes.c_void_p) for name in ("first_gain", "first_shift", "second_gain", "second_shift")),
        *((name, ctypes.c_float) for name in ("first_epsilon", "second_epsilon")),
        *((name, ctypes.c_long) for name in ("residual", "bigram", "half", "latents")),
        *((name, ctypes.c_void_p) for name in ("latent", "prepared")),
    ]


class SampledHead:
    """A sampler head with its base's unembedding, laid out for sweeps of one call each.

    Its weights are rounded to bfloat16, and so may be what they are multiplied with: drafts hang on them, the output
    never does.
    """

    def __init__(self, sampler: Sampler, base: Base) -> None:
        """Only where `of` gives one."""
        library, terms = native.library(), sampler.remembered
        assert library is not None and terms is not None
        self.library, self.embed, self.terms = library, base.embed, terms
        self.width, self._kept = base.d_model, list[object]()
        facts: dict[str, Any] = {"width": base.d_model, "tokens": sampler.tokens, "half": base.dtype == torch.bfloat16}
        facts["bigram"] = isinstance(sampler, BigramHead | CombinedHead)
        facts["residual"] = not isinstance(sampler, SamplerHead) or sampler.residual
        if isinstance(sampler, SamplerHead):
            for name, layer, norm in (
                ("first", sampler.first, sampler.first_norm),
                ("second", sampler.second, sampler.second_norm),
            ):
                facts |= self._weight(name, StreamedWeight(*layer.last_part))
                gain, shift = norm.weight.detach().float(), norm.bias.detach().float()
                self._kept += [gain, shift]
                facts |= {f"{name}_gain": gain.data_ptr(), f"{name}_shift": shift.data_ptr()}
                facts[f"{name}_epsilon"] = norm.eps
        head = base.head.product.weight if isinstance(base.head, PackedLinear) else None
        self.vocabulary = 0
        if isinstance(head, StreamedWeight) and not base.bends_logits:
            self.vocabulary = base.vocab_size
            facts |= {"vocabulary": base.vocab_size, **self._weight("unembedding", head)}
        self.facts = facts

    @classmethod
    def of(cls, sampler: Sampler, base: Base) -> Self | None:
        """None where it can't be done."""
        fits = native.library() is not None and base.d_model % MULTIPLE == 0 and base.dtype in DTYPES
        return cls(sampler, base) if fits and sampler.remembered is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies have other weights: they have to be laid out anew."""
        return type(None), ()

    def _weight(self, name: str, weight: StreamedWeight) -> dict[str, int | None]:
        self._kept.append(weight)
        bias = None if weight.bias is None else weight.bias.data_ptr()
        return {name: weight.tiles.data_ptr(), f"{name}_bias": bias}

    @property
    def unembeds(self) -> bool:
        """Whether it gives scores, not only what is to be unembedded."""
        return self.vocabulary > 0

    def block(self, latents: Tensor, unembed: bool) -> SampledBlock:
        """Latents (N, D) of masks, in the base's dtype; whether scores will be asked for."""
        return SampledBlock(self, latents, unembed)


class SampledBlock:
    """Latents (N, D), drafts for which are made again and again behind other tokens.

    `before` (n, T) below are the tokens before each draft, the latest first; numbers (n,) which of the N drafts to
    make, None for all of them, as the first time.
    """

    def __init__(self, head: SampledHead, latents: Tensor, unembed: bool) -> None:
        self._head, self._latents = head, latents.contiguous()
        self._prepared = torch.empty(latents.shape, dtype=torch.float32)
        self._sweep = _Sweep(**head.facts)
        self._sweep.latents, self._sweep.latent = len(latents), self._latents.data_ptr()
        self._sweep.prepared = self._prepared.data_ptr()
        if not unembed:
            self._sweep.unembedding = None

    def sampled(self, before: Sequence[Sequence[int]], numbers: Sequence[int] | None) -> Tensor:
        """-> (n, D), to be unembedded."""
        return self._run(before, numbers)[0].to(self._latents.dtype)

    def scores(self, before: Sequence[Sequence[int]], numbers: Sequence[int] | None) -> Tensor:
        """-> (n, V) float32, of a head that `unembeds`."""
        return self._run(before, numbers, torch.empty(len(before), self._head.vocabulary))[1]

    def likeliest(
        self, before: Sequence[Sequence[int]], numbers: Sequence[int] | None
    ) -> tuple[list[int], list[float]]:
        """-> the tokens (n,) of the largest scores and their probabilities, of a head that `unembeds`."""
        index, sure = (ctypes.c_int64 * len(before))(), (ctypes.c_float * len(before))()
        self._run(before, numbers, torch.empty(len(before), self._head.vocabulary), index, sure)
        return list(index), list(sure)

    def _run(
        self,
        before: Sequence[Sequence[int]],
        numbers: Sequence[int] | None,
        scores: Tensor | None = None,
        index: Any = None,
        sure: Any = None,
    ) -> tuple[Tensor, Any]:
        count = len(before)
        places, terms = self._head.terms.placed(before, self._head.embed)
        sampled = torch.empty(count, self._head.width)
        self._head.library.foretell_sweep(
            ctypes.byref(self._sweep),
            count,
            None if numbers is None else (ctypes.c_int64 * count)(*numbers),
            (ctypes.c_int64 * len(places))(*places),
            terms.data_ptr(),
            sampled.data_ptr(),
            None if scores is None else scores.data_ptr(),
            index,
            sure,
        )
        return sampled, scores

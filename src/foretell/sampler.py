"""The sampler head: which token fits a mask's latent, given the tokens just before it (method.md section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.config import MTPConfig
from foretell.packed import PackedProduct
from foretell.token_terms import TokenTerms


class SplitLinear(nn.Linear):
    """A linear whose input comes in parts, (..., d_in) each: W_0 x_0 + W_1 x_1 + ... + bias, part by part."""

    def __init__(self, d_ins: list[int], d_out: int, bias: bool = True) -> None:
        super().__init__(sum(d_ins), d_out, bias)
        self.d_ins = d_ins
        self._laid_out: list[PackedProduct] = []

    def part(self, x: Tensor, index: int = 0) -> Tensor:
        """W_index x; the last part brings the bias."""
        if self._laid_out:
            return self._laid_out[index].part(x, 0)
        return F.linear(x, *self._parts()[index])

    def lay_out(self) -> None:
        """From here on copies are multiplied, which lie as this machine multiplies them fastest; until it is moved."""
        self._laid_out = [PackedProduct([weight], [bias]) for weight, bias in self._parts()]

    @property
    def last_part(self) -> tuple[Tensor, Tensor | None]:
        """Its weight (d_out, d_in) and the bias."""
        return self._parts()[-1]

    def _parts(self) -> list[tuple[Tensor, Tensor | None]]:
        weights = self.weight.split(self.d_ins, 1)
        return [*((weight, None) for weight in weights[:-1]), (weights[-1], self.bias)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._laid_out = []
        return super()._apply(fn, recurse)


class Sampler(nn.Module):
    """A map of embeddings (..., T, E) and a mask's latent z (..., D) to the latent to be unembedded.

    The embeddings are of the T = `tokens` tokens before the one to draft, the latest first. It comes in parts, because
    decoding knows all latents of a block at once but the tokens only one by one, and meets the same ones again:
    `prepare` reads the latents, `terms` the tokens, `finish` what those two made.
    """

    tokens: int
    remembered: TokenTerms | None = None  # once laid out

    def prepare(self, latent: Tensor) -> Tensor:
        """latent (..., D) -> (..., P): what needs no token."""
        raise NotImplementedError

    def terms(self, embedding: Tensor) -> Tensor:
        """embedding (..., T, E) -> (..., Q): a sum of what each token adds by itself; one of zeros adds nothing."""
        raise NotImplementedError

    def finish(self, prepared: Tensor, terms: Tensor, latent: Tensor) -> Tensor:
        """`prepared` (..., P), `terms` (..., Q), latent (..., D) -> (..., D), to be unembedded by the base."""
        raise NotImplementedError

    def forward(self, embedding: Tensor, latent: Tensor) -> Tensor:
        return self.finish(self.prepare(latent), self.terms(embedding), latent)

    def lay_out(self) -> None:
        """See `SplitLinear.lay_out`; what tokens add is remembered from here on, too."""
        for module in self.modules():
            if isinstance(module, SplitLinear):
                module.lay_out()
        self.remembered = TokenTerms(self.terms)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.remembered = None
        return super()._apply(fn, recurse)


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm` of x: called as a module it takes twice the time for a few rows."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class SamplerHead(Sampler):
    """MLP([E_y; E_y'; z]), the paper's with T = 1, two blocks of Linear -> SiLU -> LayerNorm with widths 2D -> D -> D.

    `residual=True` gives z + MLP(...) with the last norm's gain at zero, so that training starts at the base's own
    choice.
    """

    def __init__(self, d_model: int, d_embedding: int, tokens: int, residual: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.residual = residual
        self.first = SplitLinear([tokens * d_embedding, d_model], d_model)
        self.first_norm = nn.LayerNorm(d_model)
        self.second = SplitLinear([d_model], d_model)
        self.second_norm = nn.LayerNorm(d_model)
        if residual:
            nn.init.zeros_(self.second_norm.weight)

    def prepare(self, latent: Tensor) -> Tensor:
        return self.first.part(latent.reshape(-1, latent.shape[-1]), 1).view(latent.shape)

    def terms(self, embedding: Tensor) -> Tensor:
        return self.first.part(embedding.flatten(-2))

    def finish(self, prepared: Tensor, terms: Tensor, latent: Tensor) -> Tensor:
        hidden = normed(F.silu(prepared + terms), self.first_norm)
        out = normed(F.silu(self.second.part(hidden)), self.second_norm)
        return latent + out if self.residual else out


class Bigram(nn.Module):
    """rms(z) · B A [E_y; E_y'], each E over its rms: to the logits W z a low-rank table of which token follows which.

    **Ours.** A (r, T·E) and B (D, r); B starts at zero, so that training starts at the base's own choice. In units of
    the latent's own size it learns equally fast in every base: latents of size 6 drown what an unscaled head adds.
    """

    def __init__(self, d_model: int, d_embedding: int, tokens: int, rank: int) -> None:
        super().__init__()
        self.a = SplitLinear([tokens * d_embedding], rank, bias=False)
        self.b = SplitLinear([rank], d_model, bias=False)
        nn.init.zeros_(self.b.weight)

    @staticmethod
    def scale(latent: Tensor) -> Tensor:
        """latent (..., D) -> its rms (..., 1), from which nothing is to be learnt."""
        return torch.linalg.vector_norm(latent.detach(), dim=-1, keepdim=True) / latent.shape[-1] ** 0.5

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding (..., T, E) -> (..., D), in units of the latent's size."""
        return self.b.part(self.a.part(F.rms_norm(embedding, embedding.shape[-1:]).flatten(-2)))


class BigramHead(Sampler):
    """z + bigram: r (D + T·E) numbers instead of some (2 + T) D²."""

    def __init__(self, d_model: int, d_embedding: int, tokens: int, rank: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.bigram = Bigram(d_model, d_embedding, tokens, rank)

    def prepare(self, latent: Tensor) -> Tensor:
        return Bigram.scale(latent)

    def terms(self, embedding: Tensor) -> Tensor:
        return self.bigram(embedding)

    def finish(self, prepared: Tensor, terms: Tensor, latent: Tensor) -> Tensor:
        return latent + prepared * terms


class CombinedHead(SamplerHead):
    """z + MLP([E_y; E_y'; z]) + bigram: the table learns at once, the MLP slowly what depends on the latent."""

    def __init__(self, d_model: int, d_embedding: int, tokens: int, rank: int) -> None:
        super().__init__(d_model, d_embedding, tokens, residual=True)
        self.bigram = Bigram(d_model, d_embedding, tokens, rank)

    def prepare(self, latent: Tensor) -> Tensor:
        return torch.cat([super().prepare(latent), Bigram.scale(latent)], dim=-1)

    def terms(self, embedding: Tensor) -> Tensor:
        return torch.cat([super().terms(embedding), self.bigram(embedding)], dim=-1)

    def finish(self, prepared: Tensor, terms: Tensor, latent: Tensor) -> Tensor:
        of_mlp, of_table = terms.split([terms.shape[-1] - latent.shape[-1], latent.shape[-1]], -1)
        return torch.addcmul(super().finish(prepared[..., :-1], of_mlp, latent), prepared[..., -1:], of_table)


def make_sampler(config: MTPConfig, d_model: int, d_embedding: int) -> Sampler | None:
    """The head that `config` names, None for none; its start is drawn from torch's global generator."""
    if config.sampler == "none":
        return None
    if config.sampler in ("bigram", "combined"):
        head = BigramHead if config.sampler == "bigram" else CombinedHead
        return head(d_model, d_embedding, config.sampler_tokens, config.sampler_rank)
    return SamplerHead(d_model, d_embedding, config.sampler_tokens, residual=config.sampler == "residual")

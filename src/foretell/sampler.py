"""The sampler head: which token fits a mask's latent, given the tokens just before it (method.md section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretell.config import MTPConfig


class Sampler(nn.Module):
    """A map of embeddings (..., T, E) and a mask's latent z (..., D) to the latent to be unembedded.

    The embeddings are of the T = `tokens` tokens before the one to draft, the latest first. It comes in two parts,
    because decoding knows all latents of a block at once but the tokens only one by one:
    `prepare` reads the latents, `finish` the tokens.
    """

    tokens: int

    def prepare(self, latent: Tensor) -> Tensor:
        """latent (..., D) -> (..., P): what needs no token."""
        raise NotImplementedError

    def finish(self, prepared: Tensor, embedding: Tensor, latent: Tensor) -> Tensor:
        """`prepared` (..., P), embedding (..., T, E), latent (..., D) -> (..., D), to be unembedded by the base."""
        raise NotImplementedError

    def forward(self, embedding: Tensor, latent: Tensor) -> Tensor:
        return self.finish(self.prepare(latent), embedding, latent)


class SamplerHead(Sampler):
    """MLP([E_y; E_y'; z]), the paper's with T = 1, two blocks of Linear -> SiLU -> LayerNorm with widths 2D -> D -> D.

    `residual=True` gives z + MLP(...) with the last norm's gain at zero, so that training starts at the base's own
    choice.
    """

    def __init__(self, d_model: int, d_embedding: int, tokens: int, residual: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.residual = residual
        self.read = tokens * d_embedding  # columns of the first layer
        self.first = nn.Linear(self.read + d_model, d_model)
        self.first_norm = nn.LayerNorm(d_model)
        self.second = nn.Linear(d_model, d_model)
        self.second_norm = nn.LayerNorm(d_model)
        if residual:
            nn.init.zeros_(self.second_norm.weight)

    def prepare(self, latent: Tensor) -> Tensor:
        rows = F.linear(latent.reshape(-1, latent.shape[-1]), self.first.weight[:, self.read :], self.first.bias)
        return rows.view(latent.shape)

    def finish(self, prepared: Tensor, embedding: Tensor, latent: Tensor) -> Tensor:
        hidden = prepared + F.linear(embedding.flatten(-2), self.first.weight[:, : self.read])
        hidden = self.first_norm(F.silu(hidden))
        out = self.second_norm(F.silu(self.second(hidden)))
        return latent + out if self.residual else out


class Bigram(nn.Module):
    """rms(z) · B A [E_y; E_y'], each E over its rms: to the logits W z a low-rank table of which token follows which.

    **Ours.** A (r, T·E) and B (D, r); B starts at zero, so that training starts at the base's own choice. In units of
    the latent's own size it learns equally fast in every base: latents of size 6 drown what an unscaled head adds.
    """

    def __init__(self, d_model: int, d_embedding: int, tokens: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Linear(tokens * d_embedding, rank, bias=False)
        self.b = nn.Linear(rank, d_model, bias=False)
        nn.init.zeros_(self.b.weight)

    @staticmethod
    def scale(latent: Tensor) -> Tensor:
        """latent (..., D) -> its rms (..., 1), from which nothing is to be learnt."""
        return torch.linalg.vector_norm(latent.detach(), dim=-1, keepdim=True) / latent.shape[-1] ** 0.5

    def forward(self, embedding: Tensor, scale: Tensor) -> Tensor:
        return scale * self.b(self.a(F.rms_norm(embedding, embedding.shape[-1:]).flatten(-2)))


class BigramHead(Sampler):
    """z + bigram: r (D + T·E) numbers instead of some (2 + T) D²."""

    def __init__(self, d_model: int, d_embedding: int, tokens: int, rank: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.bigram = Bigram(d_model, d_embedding, tokens, rank)

    def prepare(self, latent: Tensor) -> Tensor:
        return Bigram.scale(latent)

    def finish(self, prepared: Tensor, embedding: Tensor, latent: Tensor) -> Tensor:
        return latent + self.bigram(embedding, prepared)


class CombinedHead(SamplerHead):
    """z + MLP([E_y; E_y'; z]) + bigram: the table learns at once, the MLP slowly what depends on the latent."""

    def __init__(self, d_model: int, d_embedding: int, tokens: int, rank: int) -> None:
        super().__init__(d_model, d_embedding, tokens, residual=True)
        self.bigram = Bigram(d_model, d_embedding, tokens, rank)

    def prepare(self, latent: Tensor) -> Tensor:
        return torch.cat([super().prepare(latent), Bigram.scale(latent)], dim=-1)

    def finish(self, prepared: Tensor, embedding: Tensor, latent: Tensor) -> Tensor:
        out = super().finish(prepared[..., :-1], embedding, latent)
        return out + self.bigram(embedding, prepared[..., -1:])


def make_sampler(config: MTPConfig, d_model: int, d_embedding: int) -> Sampler | None:
    """The head that `config` names, None for none; its start is drawn from torch's global generator."""
    if config.sampler == "none":
        return None
    if config.sampler in ("bigram", "combined"):
        head = BigramHead if config.sampler == "bigram" else CombinedHead
        return head(d_model, d_embedding, config.sampler_tokens, config.sampler_rank)
    return SamplerHead(d_model, d_embedding, config.sampler_tokens, residual=config.sampler == "residual")

"""A tiny model whose drafts hold: base and adapter have learned one phrase by heart."""

from __future__ import annotations

import torch
from torch import nn

from foretell.base import Base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.training.two_pass import mask_pass, regular_pass

from .models import VOCAB, tiny_lm


def fitted(name: str) -> tuple[MTPForCausalLM, torch.Tensor]:
    """A base that has learned to repeat a phrase, and an adapter that has learned the same text."""
    phrase = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))[:11]
    text = phrase.repeat(8)[None]
    lm = tiny_lm(name, spread=None).requires_grad_(True)
    optimiser = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    for _ in range(120):
        loss = nn.functional.cross_entropy(lm(text).logits[0, :-1], text[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model = MTPForCausalLM(Base(lm), MTPConfig(masks=4, rank=8, alpha=16.0))
    assert model.sampler is not None
    anchors = torch.arange(4, 70, 3)[None]
    labels = text[0][anchors[0][:, None] + torch.arange(2, 6)]  # m_j after x_i predicts x_{i+j+1}
    previous = text[0][anchors[0][:, None, None] + torch.arange(1, 5)[:, None] - torch.arange(2)]
    optimiser = torch.optim.AdamW(model.own_parameters().values(), lr=1e-2)
    for _ in range(60):
        latents = mask_pass(model, anchors, regular_pass(model, text))[0]
        sampled = model.sample(previous, latents)
        loss = sum(
            nn.functional.cross_entropy(model.base.unembed(z).flatten(0, 1), labels.flatten())
            for z in (latents, sampled)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.for_inference()
    return model, text[:, :23]

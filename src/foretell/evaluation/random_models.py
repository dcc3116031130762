"""Models of well-known shapes with random weights: what a step costs depends on the shape, not on what was learnt."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from foretell.base import Base, load_base, resolve_device
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM, resolve_dtype
from foretell.errors import ForetellError
from foretell.packed import why_not
from foretell.sampler import CombinedHead

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # for tests and dry runs
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
    "135M": {  # SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1B": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
GAIN = 0.5  # of every linear: what the blocks add stays below the embedding, so no activation grows with depth
PATTERN = 16_777_213  # random numbers that fill all weights; prime, so that rows don't fall in step with it


def random_model(
    shape: str,
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device | None = None,
    masks: int = 8,
    rank: int = 128,
    packed: bool | None = None,
    seed: int = 0,
    directory: Path | None = None,
) -> MTPForCausalLM:
    """A Llama of the named shape with an untrained adapter, ready to decode, without a download. It has no stop ids.

    The adapter's matrices are random and none is zero, so that its work is real. `packed` as in `foretell.load`.
    With `directory` the base is saved there and loaded from there, as users' bases are.
    Raises ForetellError for an unknown shape, dtype or device.
    """
    make = partial(random_llama, shape, resolve_dtype(dtype), resolve_device(device), seed)
    if directory is None:
        base = Base(make())
    else:
        make().save_pretrained(directory)
        base = load_base(str(directory), dtype=resolve_dtype(dtype), device=resolve_device(device))
        base.lm.config._name_or_path = f"random-{shape}"
    if packed or (packed is None and why_not(base.device, base.dtype) is None):
        base.pack(make)
    torch.manual_seed(seed)
    model = MTPForCausalLM(base, MTPConfig(masks=masks, rank=rank, alpha=2.0 * rank, sampler="combined"), check=False)
    for name, parameter in model.adapter.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.01)
    if isinstance(model.sampler, CombinedHead):
        nn.init.constant_(model.sampler.second_norm.weight, 0.1)
        nn.init.normal_(model.sampler.bigram.b.weight, std=0.01)
    model.for_inference()
    model.source = f"{shape} (random weights)"
    return model


@torch.no_grad()
def random_llama(shape: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> LlamaForCausalLM:
    """The base alone. Its greedy text is dull but clear-cut, so that rounding seldom changes it."""
    if shape not in SHAPES:
        raise ForetellError(f"there is no shape {shape!r}; known: {', '.join(SHAPES)}")
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    config.dtype = dtype
    with torch.device("meta"):  # the library's own start draws every weight, which takes minutes for billions
        lm = LlamaForCausalLM(config).to(dtype)
    lm.to_empty(device=device)
    lm.tie_weights()
    lm.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its frequencies were lost with meta
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.randn(PATTERN, generator=generator).to(device, dtype)
    start = 0
    for module in lm.modules():
        if isinstance(module, LlamaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            start = fill(module.weight, pattern, start)
        elif isinstance(module, nn.Linear) and module is not lm.lm_head:
            start = fill(module.weight, pattern, start)
            module.weight.mul_(GAIN / module.in_features**0.5)
    if not config.tie_word_embeddings:
        # Token t's likeliest successor is t + 1: each row of the head is the embedding of the token before.
        lm.lm_head.weight.copy_(lm.model.embed_tokens.weight.roll(1, 0))
    for parameter in lm.parameters():
        parameter.copy_(parameter.bfloat16())  # as models are published, whatever they are loaded in
    lm.config._name_or_path = f"random-{shape}"
    return lm.eval()


def fill(weight: Tensor, pattern: Tensor, start: int) -> int:
    """Copies pattern (P,) over a weight, over and over from `start` on; returns where the next weight starts.

    No two rows are then alike, and it goes at the speed of copying.
    """
    flat = weight.view(-1)
    while len(flat):
        chunk = pattern[start : start + len(flat)]
        flat[: len(chunk)].copy_(chunk)
        flat = flat[len(chunk) :]
        start = (start + len(chunk)) % len(pattern)
    return start

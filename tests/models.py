"""Tiny random models of many architectures, for tests; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PreTrainedModel

from foretell.base import Base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {**COMMON, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 16}  # as foretell's own attention wants it
# Windows of 16 are shorter than the contexts of the tests, so that a wrong window shows.
LAYERED = {
    **GQA,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

CONFIGS = {
    "llama": hf.LlamaConfig(**GQA),
    "qwen2": hf.Qwen2Config(**WIDE),
    "mistral": hf.MistralConfig(**WIDE, sliding_window=16),
    "gpt_neox": hf.GPTNeoXConfig(**COMMON),
    "gemma2": hf.Gemma2Config(**GQA, sliding_window=16, head_dim=8, tie_word_embeddings=False),
    "gemma3": hf.Gemma3TextConfig(**LAYERED, head_dim=8, tie_word_embeddings=False),
    "phi3": hf.Phi3Config(**GQA),
    "gpt2": hf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
    "gpt_neo": hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global"], 3]],
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "opt": hf.OPTConfig(
        **{**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 16},
    ),
    "granite": hf.GraniteConfig(**GQA, logits_scaling=3.0, embedding_multiplier=2.0),
    "cohere": hf.CohereConfig(**GQA, logit_scale=0.5),
    "cohere2": hf.Cohere2Config(**LAYERED),
    "qwen3": hf.Qwen3Config(**GQA, head_dim=8),
    "olmo2": hf.Olmo2Config(**GQA),
    "olmo3": hf.Olmo3Config(**LAYERED),
    "starcoder2": hf.Starcoder2Config(**GQA, sliding_window=16),
    "falcon": hf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        alibi=False,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "stablelm": hf.StableLmConfig(**GQA),
    "smollm3": hf.SmolLM3Config(**WIDE),
    "phi": hf.PhiConfig(**GQA),
    "mixtral": hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": hf.Qwen3MoeConfig(
        **GQA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1]
    ),
    "gpt_oss": hf.GptOssConfig(
        **LAYERED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_theta": 10000.0}
    ),
    "llama4": hf.Llama4TextConfig(
        **GQA,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=16,
    ),
    "deepseek_v3": hf.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3")
EAGER = ("gemma2", "gpt_neo", "gpt_oss")  # they have no sdpa that is theirs


MONOTONOUS = ("mistral", "gpt_neox", "gpt2", "gpt_neo", "opt", "starcoder2", "falcon")  # unless weights are larger


def tiny_lm(name: str = "llama", seed: int = 0, spread: float | None = 0.2) -> PreTrainedModel:
    """A random model in fp32; weights N(0, spread²) give varied greedy text, None keeps the library's start."""
    torch.manual_seed(seed)
    attention = "eager" if name in EAGER else "sdpa"
    lm = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()
    if spread is not None:
        spread *= 2 if name in MONOTONOUS else 1
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=spread)
    return lm


def tiny_model(name: str = "llama", masks: int = 4, random_adapter: bool = True, **settings: Any) -> MTPForCausalLM:
    """`tiny_lm` with an adapter; a random one proposes nonsense, so nearly every draft is rejected."""
    model = MTPForCausalLM(Base(tiny_lm(name)), MTPConfig(masks=masks, rank=4, alpha=8.0, **settings))
    if random_adapter:
        torch.manual_seed(1)
        for parameter in model.own_parameters().values():
            torch.nn.init.normal_(parameter, std=0.2)
    model.for_inference()
    return model


def reference(lm: PreTrainedModel, ids: torch.Tensor, new: int) -> list[int]:
    """Greedy tokens of the base's own generate()."""
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def random_prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))

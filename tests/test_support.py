"""Which bases are refused at load, each with the reason, and how mixtures of experts are adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig

from foretell.base import Base
from foretell.cache import StaticCache
from foretell.config import MTPConfig
from foretell.errors import ForetellError
from foretell.gated_lora import adapted_linears, mixtures
from foretell.layout import quadratic
from foretell.model import MTPModel

from .models import GQA, MIXTURES, VOCAB, random_prompt, tiny_model

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
ROPE = {"rope_theta": 10000.0}
RECURRENT = "state(, which)? can't skip rejected tokens"
REFUSED = {
    "mamba": (hf.MambaConfig(**SMALL, state_size=4), RECURRENT),
    "mamba2": (
        hf.Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
        RECURRENT,
    ),
    "rwkv": (hf.RwkvConfig(**SMALL, attention_hidden_size=32, context_length=64), RECURRENT),
    "recurrent_gemma": (
        hf.RecurrentGemmaConfig(
            **{**SMALL, "num_hidden_layers": 3},
            intermediate_size=64,
            num_attention_heads=4,
            lru_width=32,
            attention_window_size=16,
        ),
        RECURRENT,
    ),
    "jamba": (
        hf.JambaConfig(
            **GQA, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4
        ),
        "layers of type linear_attention",
    ),
    "lfm2": (hf.Lfm2Config(**GQA, layer_types=["conv", "full_attention", "conv"]), "layers of type conv"),
    "bloom": (hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    "mpt": (hf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), "ALiBi"),
    "falcon with alibi": (hf.FalconConfig(**SMALL, num_attention_heads=4, alibi=True), "ALiBi"),
    "gpt_neo with local layers": (
        hf.GPTNeoConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
        ),
        "local attention goes by column",
    ),
    "dynamic rope": (
        hf.LlamaConfig(**GQA, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
        r"rotary frequencies \(dynamic\) depend on the longest position",
    ),
    "longrope": (
        hf.Phi3Config(
            **GQA,
            rope_parameters={
                **ROPE,
                "rope_type": "longrope",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
            },
        ),
        r"rotary frequencies \(longrope\)",
    ),
    "llama4 with attention temperature": (
        hf.Llama4TextConfig(
            **GQA, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=16, floor_scale=64
        ),
        "attention temperature goes by row",
    ),
    "xlnet": (
        hf.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64),
        "takes no position_ids and no cache",
    ),
    "roberta": (hf.RobertaConfig(**{**GQA, "is_decoder": True}), "fails on a step with masks"),
}


def lm_of(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_in_one_sentence(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(ForetellError, match=reason) as caught:
        MTPModel(Base(lm_of(config)), MTPConfig(masks=2, rank=2))
    sentence = str(caught.value)
    assert sentence.count("\n") == 0 and "is not supported: " in sentence


def test_what_the_rules_miss_the_self_test_finds() -> None:
    """A base whose positions go by row: the rules know nothing of it."""
    lm = lm_of(hf.LlamaConfig(**GQA))

    def by_row(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        rows = kwargs["position_ids"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(rows)[None]}

    lm.model.rotary_emb.register_forward_pre_hook(by_row, with_kwargs=True)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ForetellError, match="changed its own logits"):
        MTPModel(Base(lm), MTPConfig(masks=2, rank=2))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_adapted_as_a_whole(name: str) -> None:
    model = tiny_model(name)
    whole = mixtures(model.base.blocks)
    assert whole and all(linear.count(".experts") == 0 for linear in adapted_linears(model.base.blocks))
    assert {block.replace(".", "/") for block in whole} <= set(model.adapter.adapters)

    def rows() -> torch.Tensor:
        cache = StaticCache(len(model.base.blocks), 64)
        model.prefill(random_prompt(20), cache)
        cache.keep([20])
        return model.step(random_prompt(3, seed=1), [quadratic(2, 3)], cache, cache.lengths)[0]

    with torch.no_grad():
        first = rows()
        for block in whole:
            model.adapter.adapters[block.replace(".", "/")].b.normal_()
        model.adapter.float()  # moved or cast, it is read again
        second = rows()
    # transformers' default kernel sorts rows by expert, so what the masks hold moves the last bits of other rows.
    torch.testing.assert_close(first[:3], second[:3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first[3:], second[3:], atol=1e-2)

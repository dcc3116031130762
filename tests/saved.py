"""A tiny model on disk, with a tokenizer of single characters, for tests of the command line."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foretell.base import load_base
from foretell.config import MTPConfig
from foretell.decoding.generate import MTPForCausalLM

from .models import VOCAB, tiny_lm, tiny_model


def character_tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens: printable ASCII, line end and an end of text."""
    characters = [chr(code) for code in range(32, 127)] + ["\n", "<eos>"]
    assert len(characters) == VOCAB
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<eos>")


def save_base(directory: Path, name: str = "llama", seed: int = 0) -> Path:
    lm = tiny_lm(name, seed=seed)
    lm.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def save_model(root: Path, masks: int = 4) -> Path:
    """root/base and root/adapter; returns the latter. Its weights are those of `tiny_model`."""
    model = MTPForCausalLM(load_base(str(save_base(root / "base"))), MTPConfig(masks=masks, rank=4, alpha=8.0))
    for own, other in zip(
        model.own_parameters().values(), tiny_model(masks=masks).own_parameters().values(), strict=True
    ):
        own.data.copy_(other)
    return model.save_pretrained(root / "adapter")

"""Bases with linear layers of 8 or 4 bits, by bitsandbytes through transformers."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from foretell.errors import ForetellError


def load_arguments(kind: str, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs for a base of `kind` int8 or int4 on `device`; {} for none.

    Raises ForetellError if bitsandbytes is not installed.
    """
    if kind == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise ForetellError(
            'a quantised base needs bitsandbytes: run `pip install "foretell[quantised]"`, or leave out quantise'
        )
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of its casts in every layer of every forward
    if kind == "int8":
        # With outliers taken apart, which columns those are depends on all rows: masks would change regular tokens.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def one_arithmetic(lm: nn.Module) -> None:
    """Keeps 4-bit layers on a CPU from repacking their weights when no gradient is wanted.

    The repacked ones are multiplied in another way, for some widths only, so the two passes of training would disagree.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

"""`foretell.distill(...)`: a base answers prompts, faster with an adapter, into a file that `foretell train` takes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from foretell.base import CONFIG_FILE, load_base, resolve_device
from foretell.checkpoint import load_tokenizer
from foretell.config import DecodeConfig, DistillConfig, MTPConfig
from foretell.decoding.generate import MTPForCausalLM, resolve_dtype
from foretell.distillation.answering import Distillation, Progress, Work
from foretell.distillation.journal import DISTILLED, Journal, check_output, check_settings, part_of
from foretell.distillation.prompts import read_prompts
from foretell.errors import ForetellError
from foretell.packed import why_not


def distill(
    prompts: str | Path,
    output: str | Path,
    *,
    model: MTPForCausalLM | str | Path | None = None,
    base: str | None = None,
    resume: bool = False,
    dtype: str = "float32",
    device: str | None = None,
    packed: bool | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> Distillation:
    """The base's own answers to `prompts` in the file `output`, a JSON line each, in the order of the prompts.

    `model` is a trained model as `foretell.load` takes it, `base` where its base lies; `base` alone answers without an
    adapter, token by token (or is a directory with one); neither is the embedded model. `settings` are the fields of
    `DistillConfig` and `DecodeConfig`. Prompts come as `read_prompts` reads them. A base with a chat template gives
    records with `messages`, another one `prompt` and `completion`; `distilled` says where each comes from, and why it
    ended: "eos", "stop" or "length".

    Answers depend on the prompts and on the settings of the text alone: not on batches, adapter or strategy (but for
    ties that rounding decides). Each is kept in `output`.part as soon as it ends; `resume` goes on after a kill, and
    gives the file that an unbroken run gives. Prompts that are empty, too long or refused by the template are named.

    Raises ForetellError for bad settings, prompts or model, if there is something in the way at `output`, and if what
    is there was made with other settings.
    """
    own = {f.name for f in dataclasses.fields(DistillConfig)}
    config = DistillConfig.from_dict({k: v for k, v in settings.items() if k in own and v is not None})
    decoding = {k: v for k, v in settings.items() if k not in own and v is not None}
    check_output(output, resume)
    if config.samples > 1 and not DecodeConfig.from_dict(decoding).temperature:
        raise ForetellError("several samples of greedy decoding are all the same; give a temperature above 0")
    questions = read_prompts(prompts, config.limit)
    if not isinstance(model, MTPForCausalLM):
        model, decoding = load_model(model, base, dtype, device, packed, trust_remote_code, decoding)
    work = Work(model, questions, config, model.decode_config(decoding))
    if resume and Path(output).exists() and not part_of(output).exists():
        return finished(Path(output), work)
    return work.run(Journal(output, work.settings, resume), on_progress)


def load_model(
    model: str | Path | None,
    base: str | None,
    dtype: str,
    device: str | None,
    packed: bool | None,
    trust_remote_code: bool,
    decoding: dict[str, Any],
) -> tuple[MTPForCausalLM, dict[str, Any]]:
    """The model that answers, and the decoding settings that suit it: a base alone has no masks to draft with."""
    if model is None and base is not None and (Path(base) / CONFIG_FILE).is_file():
        model, base = base, None
    if model is not None or base is None:
        trained = MTPForCausalLM.from_pretrained(
            model, base=base, dtype=dtype, device=device, packed=packed, trust_remote_code=trust_remote_code
        )
        if trained.config.adapter == "standard":
            raise ForetellError(f"the adapter in {model} is not gated: the answers would not be the base's own")
        return trained, decoding
    if decoding.get("strategy", "autoregressive") != "autoregressive" or "masks" in decoding:
        raise ForetellError(
            f"{base} is a base without an adapter: give a trained --model, or leave out strategy, masks"
        )
    load = partial(
        load_base, base, dtype=resolve_dtype(dtype), device=resolve_device(device), trust_remote_code=trust_remote_code
    )
    loaded = load()
    if packed or (packed is None and why_not(loaded.device, loaded.dtype) is None):
        loaded.pack(lambda: load().lm)
    # Its mask is never used. What training would refuse is refused before it has answered for hours.
    alone = MTPForCausalLM(loaded, MTPConfig(masks=1, rank=1, sampler="none"), load_tokenizer(base, trust_remote_code))
    alone.source = base
    alone.for_inference()
    return alone, decoding | {"strategy": "autoregressive"}


def finished(output: Path, work: Work) -> Distillation:
    """What an earlier run left. Raises ForetellError if it was made with other settings or is something else."""
    answers = cut = 0
    try:
        with open(output, encoding="utf-8") as file:
            for line in file:
                origin = json.loads(line)[DISTILLED]
                if not answers:
                    check_settings(output, origin["settings"], work.settings)
                answers, cut = answers + 1, cut + (origin["finish_reason"] == "length")
    except (OSError, ValueError, KeyError, TypeError):
        raise ForetellError(f"{output} was not made by `foretell distill`; give another --output") from None
    return Distillation(str(output), work.model.base.name, len(work.prompts), answers, answers, cut, 0)

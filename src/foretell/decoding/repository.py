"""What a checkpoint's `custom_generate/generate.py` calls, so that its adapter can be used from plain transformers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from foretell import checkpoint
from foretell.base import Base
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.streaming import EndedOnce, ended
from foretell.errors import ForetellError

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
ATTRIBUTE = "_foretell_adapters"


class Attached(dict[tuple[str, str | None], MTPForCausalLM]):
    """The adapters of one base by source and revision.

    Kept on the base itself: they hold it, so a table of ours would keep it alive for ever. A copy of the base starts
    without any.
    """

    def __reduce__(self) -> tuple[type[Attached], tuple[()]]:
        return Attached, ()


def generate_with_adapter(lm: PreTrainedModel, **arguments: Any) -> Tensor | GenerateDecoderOnlyOutput:
    """`lm.generate(**arguments)` in several tokens per step, with the adapter that the running call names.

    `strategy` and `masks` may be among the arguments. The first call loads the adapter; else `lm` stays as it is.
    Raises ForetellError if the adapter was trained for another base.
    """
    streamer = arguments.pop("streamer", None)
    if streamer is not None:
        streamer = EndedOnce(streamer)
    with ended(streamer):  # also if the adapter can't be loaded, or transformers refuses the arguments
        download = {name: arguments.pop(name) for name in DOWNLOAD_OPTIONS if name in arguments}
        model = attached(lm, named_by_the_call() or str(lm.config._name_or_path), download)
        # transformers hands neither a streamer nor a tokenizer on to a callable.
        decode = partial(model.custom_generate, streamer=streamer, tokenizer=arguments.pop("tokenizer", None))
        with without_stop_strings(lm, arguments) as strings:
            # From its class: a base loaded from the adapter's own repository has a `generate` of its own, this one.
            return type(lm).generate(lm, custom_generate=partial(decode, stop_strings=strings), **arguments)


@contextmanager
def without_stop_strings(lm: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[str | list[str] | None]:
    """Takes the stop strings from the arguments, or from the configuration that holds them, where they are put back.

    Those in a configuration transformers would look for with the tokenizer that it withholds, and refuse.
    """
    strings = arguments.pop("stop_strings", None)
    given = arguments.get("generation_config")
    holding = [config for config in (given, lm.generation_config) if config is not None and config.stop_strings]
    kept = [config.stop_strings for config in holding]
    try:
        for config in holding:
            config.stop_strings = None
        yield strings if strings is not None or not kept else kept[0]
    finally:
        for config, own in zip(holding, kept, strict=True):
            config.stop_strings = own


def attached(lm: PreTrainedModel, source: str, download: dict[str, Any]) -> MTPForCausalLM:
    """The adapter of a directory or Hub repository around `lm`, loaded once per model object.

    Raises ForetellError if it is missing, damaged, of another base, or not gated.
    """
    key = (str(Path(source).resolve()) if Path(source).is_dir() else source, download.get("revision"))
    adapters = lm.__dict__.setdefault(ATTRIBUTE, Attached())
    if key not in adapters:
        directory = checkpoint.local_directory(source, **download)
        if checkpoint.read_description(directory)["config"].get("adapter") == "standard":
            raise ForetellError(f"the adapter in {source} is not gated: it would change the base's other answers too")
        with unchanged(lm):
            adapters[key] = MTPForCausalLM.from_pretrained(directory, base=Base(lm))
    model = adapters[key]
    model.own_modules_to(device=model.base.device, dtype=model.base.dtype)  # the base may have moved since
    return model


@contextmanager
def unchanged(lm: PreTrainedModel) -> Iterator[None]:
    """Gives `lm` back as trainable as it was: a base of ours is frozen, but this one is its owner's."""
    training = [module for module in lm.modules() if module.training]
    trainable = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def named_by_the_call() -> str | None:
    """The directory or repository that the running `generate()` got as custom_generate.

    transformers does not pass it on and runs a copy of the repository's file, so the call itself is all that knows
    where the adapter lies. None where a base was loaded from the repository and calls it of its own accord.
    """
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["custom_generate"]

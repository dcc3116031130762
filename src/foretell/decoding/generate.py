"""The user's API: `foretell.load(...)` gives a model, `model.generate(...)` its text with an account of the steps."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from foretell import checkpoint
from foretell.base import Base, resolve_device
from foretell.config import DTYPES, QUANTISED, DecodeConfig
from foretell.decoding import hook, loop
from foretell.decoding.compiling import compile_steps
from foretell.decoding.generation import Generation, repeated_ngram_share
from foretell.decoding.loop import Step
from foretell.decoding.pick import Picker
from foretell.decoding.planning import strategy_of
from foretell.decoding.scores import scores_and_logits
from foretell.decoding.stopping import Stop, StopStrings
from foretell.decoding.streaming import Streamer, ended, streamed
from foretell.decoding.text import TextStream
from foretell.errors import ForetellError
from foretell.model import MTPModel

EMBEDDED = Path(__file__).parents[1] / "assets" / "embedded" / "adapter"


class MTPForCausalLM(MTPModel):
    """An `MTPModel` that generates."""

    source: str = ""  # where it was loaded from, as the user named it

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        base: str | Base | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        packed: bool | None = None,
        compiled: bool = False,
        quantise: str = "none",
        check: bool = True,
    ) -> Self:
        """A trained model from a directory or Hub name; None is the small model that ships with foretell.

        `packed` lays out the base's weights as a CPU multiplies them fastest (see `Base.pack`), None where that can be
        done. Such a base is for decoding alone: it can neither be trained nor saved. `quantise` int8 or int4 loads the
        base's linears in so many bits (see `checkpoint.load`). `compiled` compiles the base's blocks for steps of one
        sequence on a CPU, and records steps as CUDA graphs on a GPU (see `compile_steps`); where that can't be done it
        warns and decodes as it does without.

        Raises ForetellError for a missing or damaged checkpoint, another base than it was trained on, or an
        unsupported architecture.
        """
        model = checkpoint.load(
            cls,
            EMBEDDED if source is None else source,
            base=base,
            dtype=resolve_dtype(dtype),
            device=resolve_device(device),
            trust_remote_code=trust_remote_code,
            packed=packed,
            quantise=resolve_quantise(quantise),
            check=check,
        )
        model.source = "embedded" if source is None else str(source)
        model.for_inference()
        if compiled and (reason := compile_steps(model)):
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
        return model

    def save_pretrained(self, directory: str | Path) -> Path:
        """Writes adapter, configuration and model card; see `foretell.checkpoint.save`."""
        return checkpoint.save(self, directory)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads the checkpoint to the Hub repository `repository`; returns its address."""
        return checkpoint.push_to_hub(self, repository, private=private)

    def generate(
        self,
        prompt: str | None = None,
        *,
        input_ids: Tensor | Sequence[int] | None = None,
        chat: bool = False,
        logits_processor: LogitsProcessorList | None = None,
        streamer: Streamer | None = None,
        return_scores: bool = False,
        **settings: Any,
    ) -> Generation:
        """The base's continuation of a prompt, several tokens per step: greedy, or drawn when `temperature` is given.

        Give a text, or input_ids ((n,) or (1, n)). `chat` puts the text through the base's chat template. Settings are
        the fields of `DecodeConfig`: max_new_tokens, stop, strategy, masks, temperature, ... `logits_processor` are
        further processors of transformers' kind, applied to the base's logits as its own `generate()` does. `streamer`
        is one of transformers' and is ended even if an error comes. With `return_scores` the result has scores, logits.
        Raises ForetellError for bad settings and for a prompt that does not fit the base's context.
        """
        with ended(streamer):
            ids = self.encode(prompt, input_ids, chat)
            config = self.decode_config(settings)
            return self._generate([ids], config, logits_processor, return_scores, streamer)[0]

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        chat: bool = False,
        logits_processor: LogitsProcessorList | None = None,
        return_scores: bool = False,
        **settings: Any,
    ) -> list[Generation]:
        """Several prompts side by side, texts or token ids of any lengths, each as `generate` would continue it alone.

        Every sequence accepts its own number of drafts and leaves when it ends. `seconds` of each is the whole batch's.
        """
        if not prompts:
            raise ForetellError("the batch is empty; give at least one prompt")
        ids = [self.encode(p, chat=chat) if isinstance(p, str) else self.encode(None, p) for p in prompts]
        return self._generate(ids, self.decode_config(settings), logits_processor, return_scores)

    def custom_generate(
        self,
        lm: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: Streamer | None = None,
        strategy: str | None = None,
        masks: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """For the base's own `generate(**inputs, custom_generate=model.custom_generate)`; batches too, padded left.

        transformers calls this with what it has prepared; `strategy`, `masks` and `stop_strings` may be given to
        `generate()`. It keeps the streamer and the tokenizer to itself: stop strings are found with the base's own
        tokenizer, and a streamer is bound, `custom_generate=functools.partial(model.custom_generate, streamer=s)`.
        """
        settings = {"strategy": strategy, "masks": masks}
        strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
        return hook.generate(
            self,
            lm,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs.get("attention_mask"),
            streamer,
            settings,
            strings,
            self.tokenizer if tokenizer is None else tokenizer,
        )

    def _generate(
        self,
        ids: Sequence[Tensor],
        config: DecodeConfig,
        processors: LogitsProcessorList | None,
        return_scores: bool,
        streamer: Streamer | None = None,
    ) -> list[Generation]:
        picker = Picker(config, processors)
        done: list[list[Step]] = [[] for _ in ids]
        batches = streamed(streamer, ids[0], self._steps(ids, config, picker, return_scores))
        start = time.perf_counter()
        for batch in batches:
            for step in batch:
                done[step.sequence].append(step)
        seconds = time.perf_counter() - start
        generations = [self.account(own, i.shape[1], seconds, config) for own, i in zip(done, ids, strict=True)]
        if not return_scores:
            return generations
        pairs = [scores_and_logits(picker, i[0], own) for own, i in zip(done, ids, strict=True)]
        return [replace(g, scores=pair[0], logits=pair[1]) for g, pair in zip(generations, pairs, strict=True)]

    def steps(
        self,
        prompt: str | None = None,
        *,
        input_ids: Tensor | Sequence[int] | None = None,
        chat: bool = False,
        logits_processor: LogitsProcessorList | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """As `generate`, but yields every step as it is done: its tokens and their origin (base or draft)."""
        # Checked here, not at the first next(): a bad prompt should raise where it was given.
        ids = self.encode(prompt, input_ids, chat)
        config = self.decode_config(settings)
        batch = self._steps([ids], config, Picker(config, logits_processor))
        return (step for (step,) in batch)

    def stream(
        self,
        prompt: str | None = None,
        *,
        input_ids: Tensor | Sequence[int] | None = None,
        chat: bool = False,
        logits_processor: LogitsProcessorList | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """As `generate`, but yields the text piece by piece as it is decided; together they are the whole text."""
        if self.tokenizer is None:
            raise ForetellError(f"the base {self.base.name} has no tokenizer to stream text with; use steps()")
        ids = self.encode(prompt, input_ids, chat)
        steps = self.steps(input_ids=ids, logits_processor=logits_processor, **settings)
        return TextStream(self.tokenizer, ids[0].tolist()).pieces(token for step in steps for token in step.tokens)

    def _steps(
        self, ids: Sequence[Tensor], config: DecodeConfig, picker: Picker, keep_logits: bool = False
    ) -> Iterator[list[Step]]:
        for prompt_tokens in {sequence.shape[1] for sequence in ids}:
            self.check_lengths(prompt_tokens, config)
        prompts = [sequence[0] for sequence in ids]
        strategy = strategy_of(self, config, len(prompts))  # here, as it may have to time some steps first
        return loop.steps(self, prompts, config, picker, self._stop(config), strategy, keep_logits=keep_logits)

    def check_lengths(self, prompt_tokens: int, config: DecodeConfig) -> None:
        """Raises ForetellError for a prompt that leaves no room, or with its new tokens exceeds the base's context."""
        new, limit = config.new_tokens(prompt_tokens), self.base.max_positions
        if new < 1:
            raise ForetellError(
                f"the prompt leaves no room: it has {prompt_tokens} tokens and max_length is {config.max_length}; "
                "shorten the prompt or raise max_length"
            )
        if limit is not None and prompt_tokens + new > limit:
            setting = "max_new_tokens" if config.max_length is None else "max_length"
            raise ForetellError(
                f"the prompt is too long: {prompt_tokens} tokens and {new} new ones exceed the base's context of "
                f"{limit}; shorten the prompt or lower {setting}"
            )

    def _stop(self, config: DecodeConfig) -> Stop:
        ids = self.stop_ids() if config.eos_token_id is None else config.eos_token_id
        if config.stop and self.tokenizer is None:
            raise ForetellError(f"the base {self.base.name} has no tokenizer to find stop texts with; leave out stop")
        strings = [StopStrings(self.tokenizer, config.stop)] if config.stop else []
        return Stop(() if config.ignore_eos else ids, strings)

    def decode_config(self, settings: dict[str, Any]) -> DecodeConfig:
        """Settings, checked; masks defaults to the k of training."""
        config = DecodeConfig.from_dict(
            {"masks": self.max_masks, **{k: v for k, v in settings.items() if v is not None}}
        )
        if config.masks is not None and config.masks > self.max_masks:
            raise ForetellError(
                f"masks must be at most {self.max_masks}, which this adapter was trained with, not {config.masks}"
            )
        if strange := [token for token in config.eos_token_id or () if not 0 <= token < self.base.vocab_size]:
            raise ForetellError(
                f"eos_token_id must be token ids of the base, 0 to {self.base.vocab_size - 1}, not {strange[0]}"
            )
        return config

    def encode(self, prompt: str | None, input_ids: Tensor | Sequence[int] | None = None, chat: bool = False) -> Tensor:
        """(1, n) int64 on the base's device. Raises ForetellError if empty, no text, not the base's, both, neither."""
        if (prompt is None) == (input_ids is None):
            raise ForetellError("give either a prompt or input_ids")
        if prompt is not None and not isinstance(prompt, str):
            raise ForetellError(f"the prompt must be a text, not {type(prompt).__name__}; generate_batch takes several")
        if input_ids is not None:
            ids = torch.as_tensor(input_ids, dtype=torch.long)
            ids = ids[None] if ids.ndim == 1 else ids
            if ids.ndim != 2 or ids.shape[0] != 1:
                raise ForetellError(f"input_ids must be one sequence, (n,) or (1, n), not {tuple(ids.shape)}")
        elif self.tokenizer is None:
            raise ForetellError(f"the base {self.base.name} has no tokenizer; give input_ids")
        elif chat:
            if not self.tokenizer.chat_template:
                raise ForetellError(f"the base {self.base.name} has no chat template; leave out chat")
            messages = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        else:
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].long()
        if ids.shape[1] == 0:
            raise ForetellError("the prompt is empty; give at least one token")
        strange = ids[(ids < 0) | (ids >= self.base.vocab_size)].tolist()
        if strange:
            raise ForetellError(
                f"the base has token ids 0 to {self.base.vocab_size - 1} and the prompt {strange[0]}; "
                "give ids of the base's own tokenizer"
            )
        return ids.to(self.base.device)

    def stop_ids(self) -> set[int]:
        """The base's end-of-text ids, as its `generate()` uses them."""
        eos = self.base.lm.generation_config.eos_token_id if self.base.lm.generation_config else None
        if eos is None:
            return set()
        return set(eos) if isinstance(eos, (list, tuple)) else {int(eos)}

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        return "" if self.tokenizer is None else self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def account(self, done: Sequence[Step], prompt_tokens: int, seconds: float, config: DecodeConfig) -> Generation:
        """The `Generation` of a finished list of steps."""
        tokens = [token for step in done for token in step.tokens]
        masks = 0 if config.strategy == "autoregressive" else config.masks or self.max_masks
        sizes = Counter(len(step.tokens) for step in done)
        return Generation(
            text=self.decode(tokens),
            token_ids=tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=len(tokens),
            steps=len(done),
            acceptance_rate=len(tokens) / len(done),
            acceptance_rate_with_prefill=len(tokens) / (len(done) + (not done[0].read_prompt)),
            acceptance_histogram=[sizes[size] for size in range(1, masks + 2)],
            repeated_4gram_share=repeated_ngram_share(tokens),
            seconds=seconds,
            tokens_per_second=len(tokens) / seconds,
            strategy=config.strategy,
            masks=masks,
            model=self.source or self.base.name,
        )


def load(source: str | Path | None = None, **kwargs: Any) -> MTPForCausalLM:
    """A model ready to generate; see `MTPForCausalLM.from_pretrained`. Without a source: the embedded model."""
    return MTPForCausalLM.from_pretrained(source, **kwargs)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Raises ForetellError for a name that is not one of DTYPES."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ForetellError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    return getattr(torch, dtype)


def resolve_quantise(quantise: str) -> str:
    """Raises ForetellError for a name that is not one of QUANTISED."""
    if quantise not in QUANTISED:
        raise ForetellError(f"quantise must be one of {', '.join(QUANTISED)}, not {quantise!r}")
    return quantise

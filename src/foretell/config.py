"""Settings as validated dataclasses. Each field carries its help text; the command line is made from these fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Self

from foretell.errors import ForetellError

DTYPES = ("float32", "bfloat16", "float16")
QUANTISED = ("none", "int8", "int4")
OBJECTIVES = ("labels", "kl", "tv")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with help text and the bounds that `Config.__post_init__` checks."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all settings: checked on construction, strict about unknown keys."""

    title: ClassVar[str] = "Options"  # of the options' group in the command line's help

    def __post_init__(self) -> None:
        hints = self._hints()
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            _check_type(f.name, value, hints[f.name])
            if value is None:
                continue
            choices, low, high = (f.metadata.get(key) for key in ("choices", "minimum", "maximum"))
            for item in value if isinstance(value, tuple) else (value,):
                if choices and item not in choices:
                    raise ForetellError(f"{f.name} must be one of {', '.join(choices)}, not {item!r}")
            if low is not None and value < low:
                raise ForetellError(f"{f.name} must be at least {low}, not {value}")
            if high is not None and value > high:
                raise ForetellError(f"{f.name} must be at most {high}, not {value}")

    @classmethod
    @cache
    def _hints(cls) -> dict[str, Any]:
        """The types of the fields: to work them out anew took half as long as a step of a small model."""
        return typing.get_type_hints(cls)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ForetellError naming the first unknown key, and the known ones."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ForetellError(f"unknown setting {key!r} for {cls.__name__}; known: {', '.join(sorted(known))}")
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise ForetellError(f"{cls.__name__} needs {', '.join(missing)}")
        hints = cls._hints()
        return cls(**{key: _as_meant(value, hints[key]) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _as_meant(value: Any, hint: Any) -> Any:
    """Numbers that YAML reads as str (2e-4) or int where a float is meant, and lists, or one item, where a tuple is."""
    options = _options(hint)
    if float in options and isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if any(typing.get_origin(kind) is tuple for kind in options) and value is not None:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return value


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not any(_is_a(value, kind) for kind in _options(hint)):
        raise ForetellError(f"{name} must be {' or '.join(map(_in_words, _options(hint)))}, not {value!r}")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(kind)[0]) for item in value)
    if isinstance(value, bool):  # Python counts it among the integers
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _in_words(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    return "nothing" if kind is type(None) else kind.__name__


@dataclass(frozen=True, kw_only=True)
class MTPConfig(Config):
    """What is added to a base: masks, adapter and sampler head (method.md sections 1 to 3)."""

    title: ClassVar[str] = "Masks, adapter and sampler head"

    masks: int = option(8, "number of mask tokens k: tokens predicted ahead", minimum=1, maximum=64)
    masks_init: str = option("random", "start of the mask vectors", choices=("random", "mean"))
    masks_trainable: bool = option(True, "train the mask vectors (the paper draws them and leaves them)")
    adapter: str = option(
        "gated", "gated changes mask rows only; standard is ordinary LoRA, a baseline that changes the base's answers",
        choices=("gated", "standard"),
    )  # fmt: skip
    rank: int = option(128, "rank of the LoRA matrices", minimum=1)
    alpha: float = option(256.0, "LoRA scale: the low-rank term is multiplied by alpha / rank", minimum=0.0)
    sampler: str = option(
        "combined",
        "sampler head: combined (z + MLP + low-rank map of the tokens before), residual (z + MLP), bigram (z + map), "
        "mlp as in the paper, or none",
        choices=("combined", "residual", "bigram", "mlp", "none"),
    )
    sampler_tokens: int = option(
        2, "tokens before the one to draft that the sampler head reads (1 in the paper)", minimum=1, maximum=2
    )
    sampler_rank: int = option(64, "rank of the low-rank map of the bigram and combined sampler heads", minimum=1)
    mask_attention: str = option(
        "causal",
        "which masks of its block a mask sees: causal, up to itself; bidirectional, all, trained with blocks of random "
        "lengths because decoding shortens blocks too",
        choices=("causal", "bidirectional"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How an adapter is trained (method.md section 4)."""

    title: ClassVar[str] = "Training"

    steps: int = option(2000, "optimiser steps", minimum=1)
    batch_size: int = option(8, "sequences per process at once", minimum=1)
    accumulation: int = option(1, "batches per process whose gradients are added up to one step", minimum=1)
    seq_len: int = option(512, "tokens per sequence; longer texts are split, longer conversations truncated", minimum=8)
    packing: bool = option(False, "several short records share a sequence, without attention between them")
    anchors: int = option(64, "mask blocks per sequence; anchor_choice says where", minimum=1)
    lr: float = option(1e-3, "peak learning rate of AdamW", minimum=0.0)
    warmup: int = option(100, "steps of linear warm-up, at most a fifth of all", minimum=0)
    schedule: str = option("cosine", "learning rate after warm-up", choices=("cosine", "flat"))
    weight_decay: float = option(0.0, "decoupled weight decay", minimum=0.0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped", minimum=0.0)
    base_weight: float = option(1.0, "weight of the cross-entropy of the base's own logits at masks", minimum=0.0)
    sampler_weight: float = option(1.0, "weight of the sampler head's cross-entropy", minimum=0.0)
    lcm_weight: float = option(1.0, "weight of the latent consistency loss", minimum=0.0)
    lcm_normalised: bool = option(
        True,
        "divide the latent consistency loss by the variance of the base's latents: one weight then suits every base",
    )
    base_objective: str = option(
        "labels",
        "what the base's logits at masks learn: labels (cross-entropy to the text), kl or tv (Kullback-Leibler "
        "divergence or total variation to the base's own next-token distribution)",
        choices=OBJECTIVES,
    )
    sampler_objective: str = option("labels", "the same for the sampler head's logits", choices=OBJECTIVES)
    offset_weights: str = option(
        "uniform",
        "weight of a mask's losses by its place in the block: uniform, decay (see offset_decay), or acceptance (the "
        "running estimate of the chance that all drafts before it hold)",
        choices=("uniform", "decay", "acceptance"),
    )
    offset_decay: float = option(
        0.8, "with decay: each mask's weight over that of the one before", minimum=0.01, maximum=1.0
    )
    anchor_choice: str = option(
        "random",
        "which positions get a mask block: random; every (a run of neighbours, all positions if anchors are enough); "
        "uncertain or certain (of twice as many random ones, the half where the base knows less, or more, what m1 is "
        "to say)",
        choices=("random", "every", "uncertain", "certain"),
    )
    masks_warmup: int = option(
        0, "steps over which the masks trained per block grow from 1 to k; 0: all at once", minimum=0
    )
    seed: int = option(0, "seed of initialisation, data order and anchors", minimum=0)
    dtype: str = option("float32", "precision of the base's weights and of autocast", choices=DTYPES)
    masks_at_once: int | None = option(
        None,
        "masks that go forward and backward together; fewer: less memory, more time [256 on a CPU, 1024 elsewhere]",
        minimum=1,
    )
    attention: str = option(
        "sdpa",
        "how masks attend: sdpa, or flex, FlexAttention with block masks, which skips keys that none sees (on a GPU)",
        choices=("sdpa", "flex"),
    )
    shard_base: bool = option(
        False, "with several processes, each keeps a share of the base's blocks: for a base too large for one GPU"
    )
    quantise: str = option("none", "load the base's linear layers in 8 or 4 bits (bitsandbytes)", choices=QUANTISED)
    checkpoint_every: int = option(200, "steps between checkpoints", minimum=1)
    log_every: int = option(10, "steps between lines of the metrics file", minimum=1)
    evaluate_every: int = option(200, "steps between measurements on held-out text", minimum=1)
    held_out: str | None = option(None, "data to measure on, in any form that data takes [a share of the data]")
    evaluate_tokens: int = option(
        64, "tokens of the base's own answer to each held-out prompt that acceptance is measured on", minimum=4
    )
    keep_best: bool = option(True, "the adapter saved is that of the best held-out acceptance, not of the last step")
    tracker: tuple[str, ...] = option(
        (),
        "also log the metrics to tensorboard or wandb; may be given several times",
        choices=("tensorboard", "wandb"),
    )


NEW_TOKENS = 128  # unless a length is given
STRATEGIES = ("autoregressive", "linear", "quadratic", "adaptive")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(Config):
    """How text is decoded (method.md section 5)."""

    title: ClassVar[str] = "Decoding"

    max_new_tokens: int | None = option(
        None, f"generate at most this many tokens [{NEW_TOKENS}, unless max_length is given]", minimum=1
    )
    max_length: int | None = option(
        None, "prompt and new tokens together, at most; with max_new_tokens the smaller of the two holds", minimum=1
    )
    stop: tuple[str, ...] = option(
        (), "end with the token that completes this text, which is kept; may be given several times"
    )
    eos_token_id: tuple[int, ...] | None = option(
        None, "end at this token id [the base's own end of text]; may be given several times"
    )
    ignore_eos: bool = option(False, "go on past the end of text")
    strategy: str = option(
        "adaptive", "which layout a step uses; adaptive picks it by cost and confidence", choices=STRATEGIES
    )
    masks: int | None = option(None, "masks per block, 1 up to the k the adapter was trained with [that k]", minimum=1)
    lookup: bool = option(
        True, "adaptive: also draft what followed the last tokens where they stood in the text before"
    )
    use_sampler: bool = option(True, "draft with the sampler head; off: drafts are the base's argmax at each mask")
    temperature: float = option(0.0, "0 is greedy; above, tokens are drawn from the base's distribution", minimum=0.0)
    top_k: int = option(0, "draw among the k likeliest tokens; 0: all", minimum=0)
    top_p: float = option(
        1.0, "draw among the likeliest tokens that together have this probability", minimum=0.0, maximum=1.0
    )
    min_p: float = option(
        0.0, "draw among tokens at least this likely, relative to the likeliest", minimum=0.0, maximum=1.0
    )
    repetition_penalty: float = option(1.0, "divides the scores of tokens that occurred before; 1: none", minimum=0.0)
    seed: int = option(0, "seed of the draws: the same text for the same seed, whatever the strategy", minimum=0)
    drafts: str = option(
        "best", "when drawing: draft the likeliest token, or draw drafts too", choices=("best", "drawn")
    )
    shortlist: int | None = option(
        None,
        "tokens per mask that the sampler head chooses among, those the base likes best; 0: the whole vocabulary "
        "[64 where the unembedding has 4 million numbers and more, else 0]",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise ForetellError("stop must hold no empty text, which would end every output at once; leave it out")

    def new_tokens(self, prompt_tokens: int) -> int:
        """How many tokens a prompt of that length may get at most; not above 0 if it is at max_length already."""
        if self.max_length is None:
            return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens
        room = self.max_length - prompt_tokens
        return room if self.max_new_tokens is None else min(room, self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Config):
    """How a base answers prompts to be trained on (method.md section 4: the model's own responses)."""

    title: ClassVar[str] = "Distillation"

    batch_size: int = option(8, "prompts decoded side by side; the answers do not depend on it", minimum=1)
    limit: int | None = option(None, "take this many prompts, the first ones [all]", minimum=1)
    samples: int = option(1, "answers per prompt, each drawn with a seed of its own", minimum=1)
    chat: bool | None = option(None, "put prompts through the base's chat template [if it has one]")
    only_finished: bool = option(False, "leave out answers that were cut off by the length")

"""Prompts through the decoding loop, into the journal: which are still to be answered, and what becomes of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from foretell.config import NEW_TOKENS, DecodeConfig, DistillConfig
from foretell.decoding.generate import MTPForCausalLM
from foretell.decoding.loop import refilled_steps
from foretell.decoding.pick import Picker
from foretell.decoding.stopping import Stop
from foretell.distillation.journal import DISTILLED, Journal, Record
from foretell.distillation.prompts import Prompt
from foretell.errors import ForetellError

WINDOW = 32  # batches' worth of prompts that are sorted by length, so that those side by side are alike
WITHOUT_EFFECT = ("strategy", "masks", "use_sampler", "drafts", "shortlist")  # on the answers: decoding is lossless


@dataclass(frozen=True)
class Progress:
    """How far it is: answers there and wanted; tokens, steps of single sequences and seconds of this run."""

    done: int
    total: int
    tokens: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Distillation:
    """What came of it. Tokens, steps, seconds and rates are of this run, what was there before not counted."""

    output: str
    base: str
    prompts: int
    answers: int  # in the output
    resumed: int  # of them, there before this run
    cut: int  # answers that the length cut off
    left_out: int  # of those, not in the output (only_finished)
    skipped: list[dict[str, str]] = field(default_factory=list)  # prompts without an answer: where, and why
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Tokens per step."""
        return self.tokens / self.steps if self.steps else 0.0

    def to_dict(self) -> dict[str, Any]:
        rates = {"tokens_per_second": self.tokens_per_second, "acceptance_rate": self.acceptance_rate}
        return dataclasses.asdict(self) | rates


class Work:
    """The answers wanted of one model: number p * samples + s is answer s to prompt p."""

    def __init__(
        self, model: MTPForCausalLM, prompts: Sequence[Prompt], config: DistillConfig, decoding: DecodeConfig
    ) -> None:
        if model.tokenizer is None:
            raise ForetellError(f"the base {model.base.name} has no tokenizer beside it; put its tokenizer files there")
        template = bool(getattr(model.tokenizer, "chat_template", None))
        if config.chat and not template:
            raise ForetellError(f"the base {model.base.name} has no chat template; leave out chat")
        self.model, self.prompts, self.config, self.decoding = model, prompts, config, decoding
        self.chat = template if config.chat is None else config.chat
        self.stop: Stop = model._stop(decoding)
        self.skipped: dict[int, str] = {}  # prompt -> why it has no answer
        self.settings = self._settings()

    @property
    def total(self) -> int:
        """Answers wanted."""
        return (len(self.prompts) - len(self.skipped)) * self.config.samples

    def _settings(self) -> Record:
        """All that the answers depend on."""
        text = {k: v for k, v in self.decoding.to_dict().items() if k not in WITHOUT_EFFECT and v not in (None, ())}
        if self.decoding.max_length is None:
            text.setdefault("max_new_tokens", NEW_TOKENS)
        prompts = hashlib.sha256("".join(prompt.sha256 for prompt in self.prompts).encode()).hexdigest()
        settings = {
            "base_fingerprint": self.model.base.fingerprint(),
            "prompts_sha256": prompts,
            "dtype": str(self.model.base.dtype).removeprefix("torch."),
            "chat": self.chat,
            "samples": self.config.samples,
            **text,
        }
        return json.loads(json.dumps(settings))  # tuples become lists, as they will be read again

    def run(self, journal: Journal, on_progress: Callable[[Progress], None] | None) -> Distillation:
        """Answers what the journal lacks and finishes it."""
        resumed, tokens, steps, texts = len(journal.done), 0, 0, dict[int, list[int]]()
        asked: dict[int, list[int]] = {}  # number -> ids of the prompt, while it is being answered

        def queue() -> Iterator[tuple[int, Tensor]]:
            for number, ids in self.queue(journal):
                asked[number], texts[number] = ids.tolist(), []
                yield number, ids

        picker = Picker(self.decoding, seed_of=self.seed_of)
        start = time.perf_counter()
        batches = refilled_steps(self.model, queue(), self.config.batch_size, self.decoding, picker, self.stop)
        with closing(batches):  # type: ignore[type-var]
            for batch in batches:
                for step in batch:
                    texts[step.sequence] += step.tokens
                    tokens, steps = tokens + len(step.tokens), steps + 1
                    if step.last:
                        number = step.sequence
                        journal.add(self.record(number, asked.pop(number), texts.pop(number)))
                if on_progress:
                    on_progress(Progress(len(journal.done), self.total, tokens, steps, time.perf_counter() - start))
        seconds = time.perf_counter() - start
        skipped = [{"prompt": self.prompts[p].where, "reason": why} for p, why in sorted(self.skipped.items())]
        if not journal.done:
            journal.discard()
            raise ForetellError(
                f"none of the {len(skipped)} prompts can be answered; "
                f"the first, {skipped[0]['prompt']}: {skipped[0]['reason']}"
            )
        cut = left_out = 0

        def wanted(record: Record) -> bool:
            nonlocal cut, left_out
            if record[DISTILLED]["finish_reason"] != "length":
                return True
            cut += 1
            left_out += self.config.only_finished
            return not self.config.only_finished

        answers = len(journal.done)
        journal.finish(wanted)
        return Distillation(
            str(journal.output), self.model.base.name, len(self.prompts), answers - left_out, resumed, cut, left_out,
            skipped, tokens, steps, seconds,
        )  # fmt: skip

    def queue(self, journal: Journal) -> Iterator[tuple[int, Tensor]]:
        """Numbers and prompts (n,) int64 still to be answered: windows in order, longest first within each."""
        samples = self.config.samples
        wanted = [number for number in range(len(self.prompts) * samples) if number not in journal.done]
        window = WINDOW * self.config.batch_size
        for start in range(0, len(wanted), window):
            encoded: dict[int, Tensor | None] = {}
            for prompt in dict.fromkeys(number // samples for number in wanted[start : start + window]):
                encoded[prompt] = self.encode(prompt)
            ready = ((number, encoded[number // samples]) for number in wanted[start : start + window])
            answerable = [(number, ids) for number, ids in ready if ids is not None]
            yield from sorted(answerable, key=lambda pair: -len(pair[1]))

    def encode(self, number: int) -> Tensor | None:
        """A prompt's ids (n,) int64, or None if it can't be answered; `skipped` then says why."""
        prompt = self.prompts[number]
        try:
            ids = self._encode(prompt)
            self.model.check_lengths(ids.shape[1], self.decoding)
            return ids[0]
        except ForetellError as error:
            self.skipped[number] = str(error)
        except UnicodeEncodeError:
            self.skipped[number] = "the prompt is not valid Unicode text"
        return None

    def _encode(self, prompt: Prompt) -> Tensor:
        if prompt.empty:
            raise ForetellError("the prompt is empty")
        json.dumps(prompt.messages, ensure_ascii=False).encode()  # half of a surrogate pair could not be written
        if not self.chat:
            if prompt.text is None:
                raise ForetellError("a conversation needs a base with a chat template")
            return self.model.encode(prompt.text)
        try:
            encoded = self.model.tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # the template is a program of the model's author and raises what it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ForetellError(f"the base's chat template refuses it ({reason})") from error
        return self.model.encode(None, [int(token) for token in encoded["input_ids"]])

    def seed_of(self, number: int) -> int:
        """The seed that gives `generate` the same answer. Not seed + number: runs of other seeds would repeat it."""
        digest = hashlib.blake2b(f"{self.decoding.seed}/{number}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) >> 1

    def record(self, number: int, ids: list[int], tokens: list[int]) -> Record:
        """The line of the output; `ids` are the prompt's."""
        prompt = self.prompts[number // self.config.samples]
        answer = self.model.decode(tokens)
        content: Record = {"prompt": prompt.text, "completion": answer}
        if self.chat:
            content = {"messages": [*prompt.messages, {"role": "assistant", "content": answer}]}
        origin: Record = {
            "number": number,
            "prompt": prompt.where,
            "prompt_sha256": prompt.sha256,
            "sample": number % self.config.samples,
            "finish_reason": self.finish_reason(ids, tokens),
            "tokens": len(tokens),
            "base": self.model.base.name,
            "settings": self.settings,
        }
        if self.decoding.temperature:
            origin["seed"] = self.seed_of(number)
        return content | {DISTILLED: origin}

    def finish_reason(self, ids: list[int], tokens: list[int]) -> str:
        if tokens[-1] in self.stop.ids:
            return "eos"
        return "stop" if any(condition([*ids, *tokens]) for condition in self.stop.conditions) else "length"

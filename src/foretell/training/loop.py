"""The training loop: a frozen base in, an adapter for several tokens per step out (method.md section 4)."""

from __future__ import annotations

import json
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from foretell import checkpoint
from foretell.base import load_base
from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.model import MTPModel
from foretell.training.batches import Batch, Batches, generator, make_batch, split
from foretell.training.data import Corpus, Report, load_corpus
from foretell.training.losses import ntp_loss
from foretell.training.metrics import agreement
from foretell.training.packing import packed
from foretell.training.state import DIRECTORY, find_state, restore, save_state, settings
from foretell.training.step import Latents, Stepper, forward, learning_rate
from foretell.training.store import SKIPPED_FILE

METRICS_FILE = "metrics.jsonl"
MEASURED_SEQUENCES = 2  # of a training batch, for the agreement shown while training
EVALUATION_ANCHORS = 32

OnStep = Callable[[dict[str, Any]], None]


def train(
    base: str,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    mtp: MTPConfig | None = None,
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_step: OnStep | None = None,
) -> MTPModel:
    """Trains an adapter for `base` on `data` and leaves it in `output`, ready for `foretell.load`.

    `data` is a file, a directory, a Hub data set or several of them as "source[:weight]" (`load_corpus`); records that
    can't be used are named in `output/skipped.jsonl`.
    `output/metrics.jsonl` gets a line every `log_every` steps; `output/checkpoint` lets `resume=True` go on to the same
    bits. `on_step` is called with {"step", "steps", "reading"} while long data are read, before the first step with
    {"step", "steps", "data"}, after every step with the first two, and on logged steps with all metrics.
    `init` is a trained model of the same settings whose weights to start from.
    Ctrl-C and SIGTERM finish the step, save a checkpoint and raise KeyboardInterrupt.

    Raises ForetellError for unusable data, base or settings, and if `output` holds a training and `resume` is off.
    """
    mtp, config, output = mtp or MTPConfig(), config or TrainConfig(), Path(output)
    state = check_output(output, resume)
    place = PartialState(cpu=device == "cpu")
    loaded = load_base(
        base, dtype=getattr(torch, config.dtype), device=device or place.device, trust_remote_code=trust_remote_code
    )
    if loaded.max_positions is not None and config.seq_len > loaded.max_positions:
        raise ForetellError(
            f"the base has {loaded.max_positions} positions; give --seq-len {loaded.max_positions} or less"
        )
    torch.manual_seed(config.seed)  # what comes next draws our initial weights
    model = MTPModel(loaded, mtp, checkpoint.load_tokenizer(base, trust_remote_code))
    if init is not None and not resume:
        checkpoint.load_weights(model, checkpoint.local_directory(init) / checkpoint.WEIGHTS_FILE)

    def reading(report: Report) -> None:
        if on_step is not None:
            on_step({"step": 0, "steps": config.steps, "reading": report.records})

    with place.local_main_process_first():  # the others find the tokens there
        corpus = load_corpus(data, model.tokenizer, config.seq_len, reading)
    return Training(model, corpus, output, config, place, on_step).run(state)


def check_output(output: Path, resume: bool) -> dict[str, Any] | None:
    """The state to go on from, None for a new training. Raises ForetellError rather than overwrite anything."""
    state = find_state(output) if output.is_dir() else None
    if resume:
        if state is None:
            raise ForetellError(f"{output} holds no checkpoint to go on from; leave out --resume to start anew")
        return state
    if state is not None:
        raise ForetellError(
            f"{output} holds a training at step {state['step']}; go on with --resume, or give another --output"
        )
    taken = [name for name in (checkpoint.CONFIG_FILE, checkpoint.CARD_FILE, DIRECTORY) if (output / name).exists()]
    if taken or (output.exists() and not output.is_dir()):
        raise ForetellError(f"{output} already holds {taken[0] if taken else 'a file'}; give another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ForetellError(f"{output} can't be made ({error.strerror}); give another --output") from error
    return None


class Training:
    """One run: the model, its optimiser and its place in the data."""

    def __init__(
        self,
        model: MTPModel,
        corpus: Corpus,
        output: Path,
        config: TrainConfig,
        place: PartialState,
        on_step: OnStep | None = None,
    ) -> None:
        self.model, self.corpus, self.output, self.config, self.place = model, corpus, output, config, place
        self.on_step = on_step or (lambda line: None)
        self.stepper = Stepper(model, config, place.num_processes)
        examples, self.held_out = split(corpus.examples, config.seed)
        if config.packing:
            examples = packed(examples, config.seq_len)
        self.batches = Batches(examples, config.batch_size, config.anchors, config.seed)
        self.fixed = settings(model, config, corpus.fingerprint, place.num_processes)
        self.step, self.seconds = 0, 0.0
        self.metrics: dict[str, Any] = {}  # the latest of each
        self.stop = False

    def run(self, state: dict[str, Any] | None) -> MTPModel:
        """All steps from `state` on, from the beginning if None."""
        if state is not None:
            self.step = restore(self.output, state, self.model, self.stepper.optimizer, self.fixed)
            self.seconds, self.metrics = float(state["seconds"]), dict(state["metrics"])
        self._drop_metrics_after(self.step)
        if self.place.is_main_process:
            self.corpus.write_skipped(self.output / SKIPPED_FILE)
        self.on_step({"step": self.step, "steps": self.config.steps, "data": str(self.corpus.report)})
        interval = Interval()
        with self._stop_on_signals():
            while self.step < self.config.steps:
                start = time.perf_counter()
                number = self.step * self.place.num_processes + self.place.process_index
                batch = self.batches.batch(number).to(self.model.base.device)
                losses, latents = self.stepper.step(batch, self.step)
                interval.add(losses, batch, time.perf_counter() - start)
                self.step += 1
                self._report(interval, batch, latents)
                self.seconds += time.perf_counter() - start
                self._checkpoint()
        self._checkpoint(last=True)
        return self.model

    def _report(self, interval: Interval, batch: Batch, latents: Latents) -> None:
        """Measures and writes when it is time to, and calls `on_step` always."""
        line: dict[str, Any] = {}
        if self._every(self.config.log_every):
            line |= interval.close(self.place.num_processes) | self._measure(batch, latents)
            line |= {"lr": learning_rate(self.step - 1, self.config), "elapsed": round(self.seconds, 2)}
        if self.held_out and self._every(self.config.evaluate_every):
            line |= self.evaluate()
        self.metrics |= line
        if line and self.place.is_main_process:
            with (self.output / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **line}) + "\n")
        try:
            self.on_step({"step": self.step, "steps": self.config.steps, **line})
        except KeyboardInterrupt:
            self.stop = True

    def _every(self, steps: int) -> bool:
        return self.step % steps == 0 or self.step == self.config.steps

    @torch.no_grad()
    def _measure(self, batch: Batch, latents: Latents) -> dict[str, Any]:
        """On a few sequences of the batch just trained on: they are still unseen apart from that one step."""
        few = slice(0, MEASURED_SEQUENCES)
        target = type(latents.target)(*(tensor[few] for tensor in latents.target))
        with self.stepper.autocast():
            found = agreement(self.model, latents.z_masks[few], latents.z[few], batch.anchors[few], target)
            ntp = ntp_loss(self.model, latents.z, batch.ids, batch.anchors, batch.anchor_valid)
        return {
            "ntp_loss": round(float(ntp), 4),
            "agreement": found.per_mask(),
            "simulated_acceptance": found.simulated_acceptance(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Agreement and simulated acceptance on the held-out examples, always at the same anchors."""
        found = None
        for start in range(0, len(self.held_out), self.config.batch_size):
            examples = self.held_out[start : start + self.config.batch_size]
            anchors = min(self.config.anchors, EVALUATION_ANCHORS)
            batch = make_batch(examples, anchors, generator(self.config.seed, "evaluation", start))
            batch = batch.to(self.model.base.device)
            with self.stepper.autocast():
                latents = forward(self.model, batch)
                counts = agreement(self.model, latents.z_masks, latents.z, batch.anchors, latents.target)
            found = counts if found is None else found + counts
        assert found is not None
        return {
            "held_out_agreement": found.per_mask(),
            "held_out_simulated_acceptance": found.simulated_acceptance(),
        }

    def _checkpoint(self, last: bool = False) -> None:
        """Saves when it is time to. Raises KeyboardInterrupt after saving if the training was asked to stop."""
        stop = self.stop
        if self.place.num_processes > 1:  # all processes must leave at the same step
            stop = bool(reduce(torch.tensor(float(stop), device=self.place.device), reduction="sum"))
        if (last or stop or self.step % self.config.checkpoint_every == 0) and self.place.is_main_process:
            self.model.provenance = self._provenance()
            save_state(
                self.output, self.model, self.stepper.optimizer, self.step, self.fixed, self.seconds, self.metrics
            )
            checkpoint.save(self.model, self.output)
        if stop and not last:
            raise KeyboardInterrupt

    def _provenance(self) -> dict[str, Any]:
        device = self.model.base.device
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {
            "data": str(self.corpus),
            "data_sources": self.corpus.describe(),
            "data_report": str(self.corpus.report),
            "data_fingerprint": self.corpus.fingerprint,
            "training": self.config.to_dict(),
            "trained_steps": self.step,
            "seconds": round(self.seconds, 1),
            **{name: value for name, value in self.metrics.items() if name not in ("lr", "elapsed")},
            "hardware": f"{self.place.num_processes} x {device.type} ({hardware})",
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _drop_metrics_after(self, step: int) -> None:
        path = self.output / METRICS_FILE
        if not self.place.is_main_process or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line cut in two by a kill
        checkpoint.write_text("".join(kept), path)

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step first; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Interval:
    """Losses and speed since the last logged step."""

    def __init__(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    def add(self, losses: dict[str, Tensor], batch: Batch, seconds: float) -> None:
        for name, value in losses.items():
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._steps += 1
        self._tokens += int(batch.real.sum())
        self._seconds += seconds

    def close(self, processes: int) -> dict[str, Any]:
        """Mean losses and regular tokens per second; starts over."""
        means = {name: round(float(value) / self._steps, 4) for name, value in self._losses.items()}
        means = {name if name == "loss" else f"{name}_loss": value for name, value in means.items()}
        speed = round(self._tokens * processes / max(1e-9, self._seconds), 1)
        self.__init__()  # type: ignore[misc]
        return {**means, "tokens_per_second": speed}

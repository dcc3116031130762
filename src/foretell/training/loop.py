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
from accelerate.tracking import GeneralTracker
from accelerate.utils import parse_flag_from_env, reduce

from foretell import checkpoint
from foretell.base import load_base, resolve_device
from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError
from foretell.hardware import device_name
from foretell.model import MTPModel
from foretell.training.batches import Batch, Batches, split
from foretell.training.best import Best
from foretell.training.curves import METRICS_FILE, draw, milestones, picture_path, read_run
from foretell.training.data import Corpus, Report, load_corpus
from foretell.training.held_out import MOST, HeldOut
from foretell.training.interval import Interval
from foretell.training.losses import ntp_loss
from foretell.training.metrics import agreement
from foretell.training.packing import packed
from foretell.training.sharding import shard_base
from foretell.training.sources import parse_sources
from foretell.training.state import DIRECTORY, find_state, restore, save_state, settings
from foretell.training.step import Latents, Stepper, latent_variance, learning_rate
from foretell.training.store import SKIPPED_FILE
from foretell.training.tracking import check_installed, scalars, trackers

DRAWN_FROM = 10  # measurements: a table says fewer as well, and drawing takes a second
SCALE_SEQUENCES = 8  # of the first step, for the scale of the base's latents
MEASURED_SEQUENCES = 2  # of a training batch, for the agreement shown while training

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
    {"step", "steps", "data"}, after every step with the first two, and on logged steps with all metrics. With
    `keep_best` the model returned and saved is that of the best step on held-out text; its provenance says which, as
    `kept_step`.
    `init` is a trained model of the same settings whose weights to start from.
    Ctrl-C and SIGTERM finish the step, save a checkpoint and raise KeyboardInterrupt.

    Raises ForetellError for unusable data, base or settings, and if `output` holds a training and `resume` is off.
    """
    mtp, config, output = mtp or MTPConfig(), config or TrainConfig(), Path(output)
    check_installed(config.tracker)
    for given in (data, config.held_out):
        for source in parse_sources(given) if given is not None else ():
            source.files()  # a wrong name shows before a large base has been loaded
    place = PartialState(cpu=device == "cpu")
    where = resolve_device(device) if device else place.device
    with place.main_process_first():  # it may have to finish what a kill cut in two
        state = check_output(output, resume)
    sharded = config.shard_base or parse_flag_from_env("ACCELERATE_USE_FSDP")
    loaded = load_base(
        base, dtype=getattr(torch, config.dtype), device="cpu" if sharded else where,
        trust_remote_code=trust_remote_code, quantise=config.quantise,
    )  # fmt: skip
    if loaded.max_positions is not None and config.seq_len > loaded.max_positions:
        raise ForetellError(
            f"the base has {loaded.max_positions} positions; give --seq-len {loaded.max_positions} or less"
        )
    torch.manual_seed(config.seed)  # what comes next draws our initial weights
    model = MTPModel(loaded, mtp, checkpoint.load_tokenizer(base, trust_remote_code))
    if init is not None and not resume:
        checkpoint.load_weights(model, checkpoint.local_directory(init) / checkpoint.WEIGHTS_FILE)
    if sharded:
        shard_base(model, place)

    def reading(report: Report) -> None:
        if on_step is not None and place.is_main_process:
            on_step({"step": 0, "steps": config.steps, "reading": report.records})

    with place.local_main_process_first():  # the others find the tokens there
        corpus = load_corpus(data, model.tokenizer, config.seq_len, reading, config.packing)
        held_out = load_corpus(config.held_out, model.tokenizer, config.seq_len) if config.held_out else None
    return Training(model, corpus, output, config, place, on_step, held_out).run(state)


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
        held_out: Corpus | None = None,
    ) -> None:
        self.model, self.corpus, self.output, self.config, self.place = model, corpus, output, config, place
        self.on_step = on_step if on_step and place.is_main_process else lambda line: None
        examples, rest = (corpus.examples, held_out.examples) if held_out else split(corpus.examples, config.seed)
        self.held_out = HeldOut(model, rest[:MOST], config)
        if config.packing:
            examples = packed(examples, config.seq_len)
        sequences = config.batch_size * config.accumulation * place.num_processes
        self.batches = Batches(examples, sequences, config.anchors, config.seed, config.anchor_choice)
        scale = latent_variance(model, self.batches.micro_batches(0, 1)[:SCALE_SEQUENCES])
        self.stepper = Stepper(model, config, place.num_processes, scale)
        self.fixed = settings(model, config, corpus.fingerprint, sequences)
        self.fixed["held_out"] = held_out.fingerprint if held_out else None
        self.best, self.improved = Best(output, config.keep_best), False
        self.trackers: list[GeneralTracker] = []
        self.step, self.seconds = 0, 0.0
        self.metrics: dict[str, Any] = {}  # the latest of each
        self.interval = Interval()
        self.stop = False

    def run(self, state: dict[str, Any] | None) -> MTPModel:
        """All steps from `state` on, from the beginning if None."""
        if state is not None:
            self.step = restore(self.output, state, self.model, self.stepper.optimizer, self.fixed)
            self.seconds, self.metrics = float(state["seconds"]), dict(state["metrics"])
            if "held" in state:
                self.stepper.held.load(state["held"])
            self.interval = Interval(state.get("interval"))
        self._drop_metrics_after(self.step)
        if self.place.is_main_process:
            self.corpus.write_skipped(self.output / SKIPPED_FILE)
        self.on_step({"step": self.step, "steps": self.config.steps, "data": str(self.corpus.report)})
        hyperparameters = {"base": self.model.base.name, "data": str(self.corpus), **self._settings()}
        resumed_from = None if state is None else self.step
        tracking = trackers(self.config.tracker, self.output, hyperparameters, resumed_from)
        with tracking as self.trackers, self._stop_on_signals():
            while self.step < self.config.steps:
                start = time.perf_counter()
                own = self.batches.micro_batches(
                    self.step, self.config.batch_size, self.place.process_index, self.place.num_processes
                )
                own = [batch.to(self.model.base.device) for batch in own]
                losses, latents = self.stepper.step(own, self.step)
                self.interval.add(losses, own, time.perf_counter() - start)
                self.step += 1
                self._report(own[-1], latents)
                self.seconds += time.perf_counter() - start
                self._checkpoint()
        self._checkpoint(last=True)
        return self.model

    def _report(self, batch: Batch, latents: Latents) -> None:
        """Measures and writes when it is time to, and calls `on_step` always."""
        line: dict[str, Any] = {}
        if self._every(self.config.log_every):
            line |= self.interval.close(self.place.num_processes) | self._measure(batch, latents)
            line |= {"lr": learning_rate(self.step - 1, self.config), "elapsed": round(self.seconds, 2)}
        if self.held_out and self._every(self.config.evaluate_every):
            line |= self.evaluate()
        self.metrics |= {name: value for name, value in line.items() if value is not None}
        self.improved = self.best.beaten_by(line)
        if line and self.place.is_main_process:
            with (self.output / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **line}) + "\n")
            for tracker in self.trackers:
                tracker.log(scalars(line), step=self.step)
        try:
            self.on_step({"step": self.step, "steps": self.config.steps, **line})
        except KeyboardInterrupt:
            self.stop = True

    def _every(self, steps: int) -> bool:
        return self.step % steps == 0 or self.step == self.config.steps

    @torch.no_grad()
    def _measure(self, batch: Batch, latents: Latents) -> dict[str, Any]:
        """On the sequences of the batch just trained on with most labels: unseen apart from that one step."""
        few = latents.target.valid.sum((1, 2)).argsort(descending=True, stable=True)[:MEASURED_SEQUENCES]
        target = type(latents.target)(*(tensor[few] for tensor in latents.target))
        with self.stepper.autocast():
            found = agreement(self.model, latents.z_masks[few], latents.z[few], latents.anchors[few], target)
            ntp = ntp_loss(self.model, latents.z, batch.ids, latents.anchors, latents.anchor_valid)
        return {
            "ntp_loss": round(float(ntp), 4),
            "agreement": found.per_mask(),
            "simulated_acceptance": found.simulated_acceptance(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Agreement and simulated acceptance on the held-out prompts (`HeldOut.evaluate`)."""
        return self.held_out.evaluate(self.stepper.autocast())

    def _checkpoint(self, last: bool = False) -> None:
        """Saves when it is time to. Raises KeyboardInterrupt after saving if the training was asked to stop."""
        stop = self.stop
        if self.place.num_processes > 1:  # all processes must leave at the same step
            stop = bool(reduce(torch.tensor(float(stop), device=self.place.device), reduction="sum"))
        due = last or stop or self.improved or self.step % self.config.checkpoint_every == 0
        if due and self.place.is_main_process:
            if self.improved:  # before the state: after a kill in between, this step is measured again
                self.best.keep(self.model, self._facts() | self._measured(), self.step)
                self.improved = False
            save_state(
                self.output, self.model, self.stepper.optimizer, self.step, self.fixed, self.seconds, self.metrics,
                self.stepper.held.state(), self.interval.state(),
            )  # fmt: skip
            self._save(last)
        if stop and not last:
            raise KeyboardInterrupt

    def _save(self, last: bool) -> None:
        """The adapter for people: the best one is there already, and in the end gets its last words."""
        facts = self._facts()
        run = read_run(self.output)
        if last and len(run.lines) >= DRAWN_FROM:
            draw([run], picture_path(self.output))
        if self.best.provenance is None:
            self.model.provenance = facts | self._measured()
        elif last:
            self.best.bring_back(self.model, facts)
        if last or self.best.provenance is None:
            checkpoint.save(self.model, self.output)

    def _settings(self) -> dict[str, Any]:
        return {**self.model.config.to_dict(), **self.config.to_dict()}

    def _measured(self) -> dict[str, Any]:
        return {name: value for name, value in self.metrics.items() if name not in ("lr", "elapsed")}

    def _facts(self) -> dict[str, Any]:
        """What is known of the training so far, apart from what was measured."""
        held_out = self.config.held_out
        device = self.model.base.device
        hardware = device_name(device)
        return {
            "data": str(self.corpus),
            "data_sources": self.corpus.describe(),
            "data_report": str(self.corpus.report),
            "data_fingerprint": self.corpus.fingerprint,
            "training": {**self.config.to_dict(), "held_out": held_out and Path(held_out).name},
            "trained_steps": self.step,
            "seconds": round(self.seconds, 1),
            "held_out_prompts": len(self.held_out),
            "curve": milestones(read_run(self.output)),
            "hardware": f"{self.place.num_processes} x {device.type} ({hardware}, {torch.get_num_threads()} threads)",
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _drop_metrics_after(self, step: int) -> None:
        path = self.output / METRICS_FILE
        if not self.place.is_main_process:
            return
        path.touch()
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

"""What metrics.jsonl gets goes to experiment trackers too: TensorBoard and Weights & Biases, through accelerate."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from foretell.checkpoint import write_text
from foretell.errors import ForetellError

PROJECT, DIRECTORY, WANDB_ID = "foretell", "tracking", "wandb_id"


def check_installed(names: Sequence[str]) -> None:
    """Raises ForetellError with the command that installs the first tracker that is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ForetellError(
                f'{name} is not installed; run `pip install "foretell[{name}]"`, or leave out --tracker'
            )


@contextmanager
def trackers(
    names: Sequence[str], output: Path, settings: Mapping[str, Any], resumed_from: int | None
) -> Iterator[list[GeneralTracker]]:
    """The trackers called so, started with `settings` as hyperparameters and finished in the end, also after an error.

    After `resumed_from` steps the record goes on: TensorBoard hides what it had of later steps, wandb opens the same
    run again. `output/tracking` holds TensorBoard's files and wandb's run id. Only the main process writes.
    Raises ForetellError if one can't be started.
    """
    started: list[GeneralTracker] = []
    try:
        for name in dict.fromkeys(names):
            try:
                tracker = _made(name, output, resumed_from)
                if hasattr(tracker, "start"):  # not among the trackers of older accelerates, which start when made
                    with _nobody_to_ask():
                        tracker.start()
            except Exception as error:  # each tracker has errors of its own: not logged in, no network, ...
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                offline = ", set WANDB_MODE=offline" if name == "wandb" else ""
                raise ForetellError(
                    f"{name} can't be started ({reason.rstrip('.')}); put it right{offline}, or leave out --tracker"
                ) from error
            started.append(tracker)
            if resumed_from is None or name == "wandb":  # TensorBoard would count a second set as another run
                tracker.store_init_configuration(flat(settings))
        yield started
    finally:
        for tracker in started:
            tracker.finish()


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """A stdin that is no terminal: wandb asks for a missing key there, and waits for ever below our progress bar."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = before


def _made(name: str, output: Path, resumed_from: int | None) -> GeneralTracker:
    cls = LOGGER_TYPE_TO_CLASS[name]
    directory = output / DIRECTORY
    if name == "tensorboard":
        purge = {} if resumed_from is None else {"purge_step": resumed_from + 1}
        return cls(name, logging_dir=str(directory), **purge)
    return cls(PROJECT, id=_wandb_id(directory / WANDB_ID), name=output.name, resume="allow", dir=str(directory))


def _wandb_id(path: Path) -> str:
    """The id of this training's run, the same every time it goes on."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(uuid.uuid4().hex[:12] + "\n", path)
        return path.read_text(encoding="utf-8").strip()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics as numbers with a name each: value j of a list, counted from 1, is `name/j`."""
    found: dict[str, float] = {}
    for name, value in line.items():
        values = {f"{name}/{j}": item for j, item in enumerate(value, 1)} if isinstance(value, list) else {name: value}
        found |= {key: item for key, item in values.items() if isinstance(item, (int, float))}
    return found


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters in the types that every tracker takes; lists and None as text."""
    return {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in settings.items()}

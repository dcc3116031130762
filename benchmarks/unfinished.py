"""What a long benchmark has measured so far, kept beside its result until that is whole, so that it can be stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from foretell.checkpoint import write_text
from foretell.decoding.generate import MTPForCausalLM
from foretell.errors import ForetellError
from foretell.evaluation.report import environment
from foretell.evaluation.saved import FREE_ENVIRONMENT

INTERRUPTED = 130  # exit code


class Unfinished:
    """A file RESULT.PART.unfinished, written whole after every measurement; a run of the same settings goes on with it.

    settings: what must be alike for that, beside model, machine and versions. `fresh`: start anew anyway.
    Raises ForetellError if the file can't be written.
    """

    def __init__(
        self, result: Path, part: str, model: MTPForCausalLM, settings: Mapping[str, Any], fresh: bool = False
    ) -> None:
        self.path = result.with_suffix(f".{part}.unfinished")
        machine = {key: value for key, value in environment(model).items() if key not in FREE_ENVIRONMENT}
        self.settings = json.loads(json.dumps({**settings, **machine}))
        self.measured: dict[str, Any] = {}
        self.seconds = 0.0  # of all runs together
        if fresh or not self.path.exists():
            return
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
            settings_before, measured, seconds = before["settings"], dict(before["measured"]), float(before["seconds"])
        except (ValueError, KeyError, TypeError):
            say(f"{self.path} is damaged: {part} starts anew")
            return
        for key in (*self.settings, *settings_before):
            if self.settings.get(key) != settings_before.get(key):
                was, now = settings_before.get(key), self.settings.get(key)
                say(f"{self.path} was measured with {key} {was}, not {now}: {part} starts anew")
                return
        self.measured, self.seconds = measured, seconds
        say(f"{part}: goes on after {len(measured)} measurements of {self.path} (--fresh starts anew)")

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under this name, or else what `measure` returns, as JSON gives it back; kept at once."""
        if name not in self.measured:
            start = time.perf_counter()
            self.measured[name] = json.loads(json.dumps(measure()))
            self.seconds += time.perf_counter() - start
            kept = {"settings": self.settings, "seconds": self.seconds, "measured": self.measured}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(kept, ensure_ascii=False) + "\n", self.path)
        return self.measured[name]

    def finish(self) -> None:
        """Once the result is written."""
        self.path.unlink(missing_ok=True)


def joined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report of `bench` from those of its sets."""
    return {**reports[0], "cells": [cell for report in reports for cell in report["cells"]]}


def stoppable(main: Callable[[], None]) -> None:
    """A benchmark's `main`; an error becomes one sentence, and an interruption says that nothing is lost."""
    try:
        main()
    except ForetellError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        sys.exit(INTERRUPTED)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

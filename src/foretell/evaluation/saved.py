"""A report on disk, written after every cell of a sweep, so that a later run takes it up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foretell.checkpoint import write_text
from foretell.errors import ForetellError
from foretell.evaluation.report import Cell, Report

# What may differ between runs of one report: the points of the sweep, and what seconds don't depend on.
FREE_SETTINGS = ("batch", "temperature", "context")
FREE_ENVIRONMENT = ("date", "python")


def save(report: Report, path: str | Path) -> None:
    """Atomic: an interruption leaves the previous file. Raises ForetellError if it can't be written."""
    write_text(json.dumps(report.to_dict(), ensure_ascii=False, indent=2) + "\n", Path(path))


def load(path: str | Path) -> Report:
    """The report in a file. Raises ForetellError if it can't be read or is something else."""
    try:
        return Report.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ForetellError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ForetellError(f"{path} is not a report of this version's `foretell bench`; give another file") from None


def check_output(path: str | Path | None, resume: bool) -> None:
    """Raises ForetellError rather than overwrite a report, and if there is nothing to resume from."""
    if path is None and resume:
        raise ForetellError("resume goes on from the file that output names; give output too")
    if path is not None and Path(path).exists() and not resume:
        raise ForetellError(f"{path} exists already; go on from it with --resume, or give another --output")


def finished_cells(path: str | Path, settings: dict[str, Any], environment: dict[str, Any]) -> list[Cell]:
    """The cells of the report in a file; none if it does not exist yet.

    Raises ForetellError if they were measured in another way or on another machine: they would not compare.
    """
    if not Path(path).exists():
        return []
    report = load(path)
    for before, now, free in (
        (report.settings, settings, FREE_SETTINGS),
        (report.environment, environment, FREE_ENVIRONMENT),
    ):
        for key in (*now, *before):
            if key not in free and before.get(key) != now.get(key):
                raise ForetellError(
                    f"{path} can't be resumed: it was measured with {key} {before.get(key)}, not {now.get(key)}; "
                    "give another output file"
                )
    return report.cells

"""`foretell plot`: the curves of trainings. In Python: `foretell.training.curves.draw([read_run(directory)], path)`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretell.commands.common import JsonOption, check_writable, to_json
from foretell.errors import ForetellError


def command(
    runs: Annotated[list[Path], typer.Argument(help="output directories of `foretell train`", metavar="RUN_DIR...")],
    output: Annotated[
        Path | None,
        typer.Option(help="picture, .png, .svg or .pdf \\[training.png in the directory]", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Draw a training: losses, agreement per mask and simulated acceptance over the steps; several runs side by side.

    A training that still runs can be drawn too.
    """
    from foretell.pictures import check_plot_path
    from foretell.training.curves import draw, picture_path, read_run

    if output is None and len(runs) > 1:
        raise ForetellError("several runs need --output, the name of their common picture")
    path = output or picture_path(runs[0])
    check_plot_path(path)
    read = [read_run(directory) for directory in runs]
    check_writable(path)
    draw(read, path)
    if json:
        print(to_json({"picture": str(path), "runs": [run.to_dict() for run in read]}, indent=2))
        return
    for run in read:
        typer.echo(f"{run.name}: {sentence(run.held_out(), run.lines[-1])}")
    typer.echo(f"drawn to {path}")


def sentence(held_out: dict[str, Any] | None, last: dict[str, Any]) -> str:
    """The figure that counts."""
    text = f"{last['step']} steps"
    if held_out is not None:
        rate = held_out["held_out_simulated_acceptance"]
        text += f", best adapter of step {held_out['step']}" if held_out["step"] != last["step"] else ""
        text += f", simulated acceptance {rate:.2f} tokens per step on held-out prompts"
    return text

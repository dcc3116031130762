"""`foretell demo`: several tokens per step, seen live and measured. In Python: `model.steps(...)` and `bench(...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretell.commands.common import BaseOption, CompiledOption, DeviceOption, ModelOption, check_writable, load_model


def command(
    model: ModelOption = None,
    base: BaseOption = None,
    prompts: Annotated[
        int, typer.Option(min=1, max=50, help="prompts shown: school problems and Python functions by turns")
    ] = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="generate at most this many tokens per prompt")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of the measurement at the end")] = 1,
    svg: Annotated[Path | None, typer.Option(help="write what is shown to this file too, as a picture")] = None,
    device: DeviceOption = None,
    compiled: CompiledOption = False,
) -> None:
    """Watch a small language model say several tokens per step, and see what that gains in seconds. Offline."""
    from foretell.commands.show import Show

    check_writable(svg)
    show = Show(load_model(model, base, "float32", device, compiled=compiled), prompts, max_new_tokens)
    show.introduce()
    show.generate()
    show.measure(rounds)
    show.point_onwards()
    if svg:
        show.save_svg(svg)

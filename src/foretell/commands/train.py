"""`foretell train`: an adapter for a frozen base, from text or conversations."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from foretell.commands.common import DataOption, MoreData, quiet_loading
from foretell.commands.options import dataclass_options, load_yaml
from foretell.config import MTPConfig, TrainConfig
from foretell.errors import ForetellError

INTERRUPTED = 130
MAIN_SPEAKS = 10.0  # seconds that another process waits with its error
PLACES = ("base", "data", "output")


@dataclass_options(MTPConfig, TrainConfig)
def command(
    base: Annotated[str | None, typer.Option(help="base model: a directory or a Hub name", show_default=False)] = None,
    more: MoreData = None,
    data: DataOption = None,
    output: Annotated[str | None, typer.Option(help="where the trained adapter goes", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of any of these settings; options win over it", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the training in --output")] = False,
    init: Annotated[
        str | None, typer.Option(help="trained model of the same settings to start from", show_default="anew")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the GPU if any")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the base")
    ] = False,
    **values: Any,
) -> None:
    """Train an adapter, so that a base says several tokens per step. The base itself stays as it is."""
    given = {"base": base, "data": [*(data or ()), *(more or ())] or None, "output": output}
    places, mtp, settings = merge_settings(config, {k: v for k, v in given.items() if v is not None} | values)

    from accelerate import PartialState
    from rich.console import Console

    from foretell.training.display import Display
    from foretell.training.loop import train

    main = PartialState(cpu=device == "cpu").is_main_process  # of several, one speaks
    console = Console(stderr=True, quiet=not main)
    try:
        with quiet_loading(), Display(settings.steps, console) as display:
            model = train(
                **places, mtp=mtp, config=settings, resume=resume, init=init, device=device,
                trust_remote_code=trust_remote_code, on_step=display,
            )  # fmt: skip
    except ForetellError:
        if not main:  # the main one says the same, whereupon the launcher ends the others
            time.sleep(MAIN_SPEAKS)
        raise
    except KeyboardInterrupt:
        if (Path(places["output"]) / "checkpoint").is_dir():
            console.print("stopped and saved; give the same command with --resume to go on", markup=False)
        else:
            console.print("stopped before the first step; nothing was saved", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    if main:
        report(places["output"], model.provenance, as_json)
    several = PartialState().num_processes > 1
    PartialState().destroy_process_group()
    if several:
        # A group that a sharded base still refers to keeps its threads, which now and then abort a process that ends
        # beside them, with all of it done and saved.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def merge_settings(path: Path | None, given: dict[str, Any]) -> tuple[dict[str, Any], MTPConfig, TrainConfig]:
    """Defaults < YAML < what was given on the command line. `data` may be one source or a list of them.

    Raises ForetellError for an unknown key, and if base, data or output is given nowhere.
    """
    values = {**(load_yaml(path) if path else {}), **given}
    fields = {cls: {field.name for field in dataclasses.fields(cls)} for cls in (MTPConfig, TrainConfig)}
    known = fields[MTPConfig] | fields[TrainConfig] | set(PLACES)
    for key in values:
        if key not in known:
            raise ForetellError(f"{path}: unknown setting {key!r}; known are {', '.join(sorted(known))}")
    for name in PLACES:
        value = values.get(name)
        several = name == "data" and isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not value or not (several or isinstance(value, str)):
            raise ForetellError(f"training needs --{name} (or {name}: in the --config file)")
    mtp = MTPConfig.from_dict({k: v for k, v in values.items() if k in fields[MTPConfig]})
    settings = TrainConfig.from_dict({k: v for k, v in values.items() if k in fields[TrainConfig]})
    return {name: values[name] for name in PLACES}, mtp, settings


def report(output: str, provenance: dict[str, Any], as_json: bool) -> None:
    """Where the model is, what it should reach, and what to do next."""
    acceptance = provenance.get("held_out_simulated_acceptance", provenance.get("simulated_acceptance"))
    if as_json:
        typer.echo(json.dumps({"output": output, **provenance}, indent=2, default=str))
        return
    place = shlex.quote(output)
    typer.echo(f"The adapter is in {output}.")
    if "kept_step" in provenance:
        kept, trained = provenance["kept_step"], provenance["trained_steps"]
        typer.echo(f"It is that of step {kept} of {trained}, the best on held-out prompts.")
    if acceptance is not None:
        where = "held-out prompts" if "held_out_simulated_acceptance" in provenance else "training text"
        typer.echo(f"Simulated acceptance: {acceptance:.2f} tokens per step on {where}.")
    typer.echo("Next:")
    typer.echo(f'  foretell generate --model {place} --prompt "Once upon a time"')
    typer.echo(f"  foretell bench --model {place}")

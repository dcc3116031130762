"""The `foretell` command: its sub-commands, and one sentence instead of a traceback for every expected failure."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from foretell import __version__
from foretell.errors import ForetellError

# In the order of the help. Each is foretell.commands.<name>, light to import, with a function `command`, or a typer
# application `group` where it has sub-commands of its own.
COMMANDS = ("demo", "generate", "distill", "data", "train", "plot", "bench", "check")

USAGE, INTERRUPTED = 2, 130


def build_app() -> typer.Typer:
    """The typer application, with the sub-commands that are installed."""
    app = typer.Typer(name="foretell", add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_root)
    for name in COMMANDS:
        module = f"foretell.commands.{name}"
        if importlib.util.find_spec(module):
            found = importlib.import_module(module)
            if hasattr(found, "group"):
                app.add_typer(found.group, name=name)
            else:
                app.command(name)(found.command)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` by default) and returns the exit code: 0, 2 for what the user can put right,
    130 for an interrupt. Anything else is our fault and keeps its traceback."""
    try:
        code = _run(argv)
        sys.stdout.flush()  # a closed pipe shows here, not at interpreter exit
        return code
    except ForetellError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader (`| head`) has had enough. Later writes, and Python's own flush at exit, go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"the disk is full{place}: free some space, then run the same command again")


def _run(argv: Sequence[str] | None) -> int:
    command = typer.main.get_command(build_app())
    try:
        code = command.main(None if argv is None else list(argv), prog_name="foretell", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "foretell"
        return _fail(f"{error.format_message().rstrip('.')} (see {path} --help)")
    except typer.Abort:
        return _interrupted()
    if code == INTERRUPTED:  # what typer makes of Ctrl-C
        return _interrupted()
    return code if type(code) is int else 0


def _fail(message: str) -> int:
    print(f"foretell: {message}", file=sys.stderr)
    return USAGE


def _interrupted() -> int:
    print("foretell: interrupted", file=sys.stderr)
    return INTERRUPTED


def _version(wanted: bool) -> None:
    if wanted:
        print(f"foretell {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Several tokens per step from any Hugging Face causal language model, with the same output."""
    if context.invoked_subcommand is None:
        print(context.get_help())

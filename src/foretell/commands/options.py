"""Command-line options made from the config dataclasses, so that every setting has one name, one help text and one
default in Python, in YAML and on the command line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from foretell.errors import ForetellError

# The parameters made for one `**values`, by name.
Parameters = dict[str, inspect.Parameter]


def dataclass_options(
    *classes: type, exclude: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for a typer command: its `**values` become one option per field of `classes` not in `exclude`.

    `values` then holds only what was given on the command line, so that it can be laid over a YAML file:
    `TrainConfig.from_dict({**load_yaml(path), **values})`. The defaults stay with the dataclass and are only shown.
    Raises TypeError where a command has no `**values` or two options would share a name.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(own) == len(signature.parameters):
            raise TypeError(f"{command.__name__} needs **values to receive the options made from dataclasses")
        made: Parameters = {}
        for cls in classes:
            for name, parameter in _parameters(cls, exclude).items():
                if name in made or name in signature.parameters:
                    raise TypeError(f"{command.__name__} would have two options named {name}; exclude one")
                made[name] = parameter

        @functools.wraps(command)
        def run(**arguments: Any) -> Any:
            given = {}
            for name in made:
                value = arguments.pop(name, None)
                if value is None or value == []:
                    continue
                given[name] = tuple(value) if isinstance(value, list) else value
            return command(**arguments, **given)

        # Typer reads these two, not the code.
        parameters = [*own, *made.values()]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one. Raises ForetellError naming the file and the fault."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForetellError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ForetellError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ForetellError(f"{path}{where}: not valid YAML: {problem or str(error).splitlines()[0]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ForetellError(f"{path}: expected settings as 'name: value', one per line")
    return values


def _parameters(cls: type, exclude: Collection[str]) -> Parameters:
    hints = typing.get_type_hints(cls)
    return {
        field.name: inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_cli_type(field, hints[field.name]) | None, _option(field, cls, hints[field.name])],
        )
        for field in dataclasses.fields(cls)
        if field.name not in exclude
    }


def _cli_type(field: dataclasses.Field[Any], hint: Any) -> Any:
    hint = _without_none(hint)
    choices = field.metadata.get("choices")
    if typing.get_origin(hint) is tuple:
        return list[typing.get_args(hint)[0]]  # type: ignore[misc]  # choices: the dataclass checks, typer can't here
    return Literal[tuple(choices)] if choices else hint


def _option(field: dataclasses.Field[Any], cls: type, hint: Any) -> Any:
    flag = field.name.replace("_", "-")
    if _without_none(hint) is bool:
        names = f"--{flag}/--no-{flag}"
    else:
        names = f"--{flag}"
    text = field.metadata.get("help", "")
    default = _default_text(field)
    if default:
        text = f"{text} [default: {default}]"
    return typer.Option(
        names,
        help=text.replace("[", r"\["),  # typer would take brackets for rich markup and drop them
        show_default=False,
        min=field.metadata.get("minimum"),
        max=field.metadata.get("maximum"),
        rich_help_panel=getattr(cls, "title", cls.__name__),
    )


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING or default is None or default == "":
        return ""
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, (tuple, list)):
        return " ".join(map(str, default))
    return str(default)

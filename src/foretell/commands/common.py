"""What the commands share: the options that name a model, lists on the command line, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foretell.config import DTYPES, QUANTISED
from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.decoding.generate import MTPForCausalLM

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="directory or Hub name of a trained model; without it the small one that ships with foretell"
    ),
]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="where the base lies, if not where the model says: directory or Hub name")
]
DtypeOption = Annotated[Literal[DTYPES], typer.Option("--dtype", help="precision")]  # type: ignore[valid-type]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]".replace("[", r"\["))
]
PackedOption = Annotated[
    bool | None,
    typer.Option(
        "--packed/--no-packed",
        help="lay out the base's weights for a CPU: faster steps \\[where it can be done]",
    ),
]
CompiledOption = Annotated[
    bool,
    typer.Option(
        "--compiled/--no-compiled",
        help="on a CPU compile the base's blocks for steps of one sequence: faster, but half a minute the first time; "
        "on a GPU record steps as CUDA graphs",
    ),
]
QuantiseOption = Annotated[
    Literal[QUANTISED],  # type: ignore[valid-type]
    typer.Option("--quantise", help="load the base's linear layers in 8 or 4 bits (bitsandbytes)"),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the base")]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="training text: .jsonl, .json, .parquet, .txt, a directory or a Hub data set; several are a mixture, with "
        "weights as in --data a.jsonl:2 b:1",
        show_default=False,
    ),
]
MoreData = Annotated[list[str] | None, typer.Argument(metavar="MORE_DATA", help="more of --data", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def load_model(
    model: str | None,
    base: str | None,
    dtype: str,
    device: str | None,
    trust_remote_code: bool = False,
    packed: bool | None = None,
    quantise: str = "none",
    compiled: bool = False,
) -> MTPForCausalLM:
    """`foretell.load`, with a sign of life on a terminal's stderr and without transformers' progress bars."""
    from rich.console import Console

    import foretell
    from foretell import native
    from foretell.decoding.compiling import compile_steps

    doing = "loading and compiling" if compiled else "loading"
    with quiet_loading(), Console(stderr=True).status(f"{doing} {model or 'the embedded model'}"):
        loaded = foretell.load(
            model, base=base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, packed=packed,
            quantise=quantise,
        )  # fmt: skip
        reason = compile_steps(loaded) if compiled else None
    if reason:
        print(reason, file=sys.stderr)
    if loaded.base.packed and sys.platform == "linux" and (missing := native.why_not()):
        print(f"steps could be faster: weights are not streamed, as {missing}", file=sys.stderr)
    return loaded


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' progress bars and warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield


def words(text: str) -> list[str]:
    """ "linear, quadratic" -> ["linear", "quadratic"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, option: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4]. Raises ForetellError naming the option."""
    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise ForetellError(f"{option} takes whole numbers separated by commas, like 1,2,4, not {text!r}") from None


def check_writable(path: Path | None) -> None:
    """Raises ForetellError at once, not after minutes of work, if a file can't be written there."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        reason = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise ForetellError(f"{path} can't be written: {reason}")


def to_json(values: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(values, ensure_ascii=False, indent=indent)

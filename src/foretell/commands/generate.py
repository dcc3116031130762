"""`foretell generate`: text from a prompt, several tokens per step. In Python: `foretell.load(...).generate(...)`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from foretell.commands.common import (
    BaseOption,
    CompiledOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PackedOption,
    QuantiseOption,
    TrustOption,
    load_model,
    to_json,
)
from foretell.commands.options import dataclass_options
from foretell.config import DecodeConfig
from foretell.errors import ForetellError


@dataclass_options(DecodeConfig)
def command(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="the text to continue; - reads standard input")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="a file with the text to continue")] = None,
    model: ModelOption = None,
    base: BaseOption = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="put the prompt through the base's chat template")
    ] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="show tokens as they are decided \\[on a terminal: yes]")
    ] = None,
    json: JsonOption = False,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    packed: PackedOption = None,
    compiled: CompiledOption = False,
    quantise: QuantiseOption = "none",
    trust_remote_code: TrustOption = False,
    **values: Any,
) -> None:
    """Continue a prompt, several tokens per step, with the output that the base would have given anyway.

    The text goes to standard output, everything else to standard error.
    """
    text = read_prompt(prompt, prompt_file)
    loaded = load_model(model, base, dtype, device, trust_remote_code, packed, quantise, compiled)
    if json:
        print(to_json(loaded.generate(text, chat=chat, **values).to_dict()))
        return
    from foretell.commands.render import LiveText, generate_live, stdout_console, summary

    console = stdout_console()
    if console.is_terminal if stream is None else stream:
        ids = loaded.encode(text, chat=chat)
        live = LiveText(console, loaded, ids)
        if console.is_terminal:
            live.prompt(text)
        generation = generate_live(console, loaded, ids, live, values)
    else:
        generation = loaded.generate(text, chat=chat, **values)
        print(generation.text)
    print(summary(generation), file=sys.stderr)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt's text; one line end at the end of a file or of standard input is not part of it."""
    if (prompt is None) == (prompt_file is None):
        raise ForetellError("give either --prompt TEXT (- for standard input) or --prompt-file FILE")
    try:
        if prompt is not None and prompt != "-":
            prompt.encode()  # bytes that are not UTF-8 come as lone surrogates
            return prompt
        text = sys.stdin.read() if prompt_file is None else prompt_file.read_text(encoding="utf-8")
        text.encode()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        place = prompt_file or ("standard input" if prompt == "-" else "--prompt")
        raise ForetellError(f"{place} cannot be read: {reason}") from None
    return text.removesuffix("\n").removesuffix("\r")

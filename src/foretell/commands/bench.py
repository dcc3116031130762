"""`foretell bench`: tokens per step and seconds. In Python: `foretell.evaluation.bench.bench(...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretell.commands.common import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    TrustOption,
    check_writable,
    load_model,
    numbers,
    to_json,
    words,
)


def command(
    model: ModelOption = None,
    base: BaseOption = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="problems, code, or a file: .jsonl with prompt, question or messages in each line, or .txt with "
            "a prompt per line; may be repeated \\[problems and code]"
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="prompts taken of each set")] = 10,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="put prompts through the base's chat template")
    ] = False,
    strategies: Annotated[str, typer.Option(help="strategies, separated by commas")] = "linear,quadratic",
    masks: Annotated[
        str | None,
        typer.Option(help="masks per block, separated by commas \\[1,2,4,8 as far as the model goes, and its k]"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="generate at most this many tokens per prompt")] = 128,
    rounds: Annotated[int, typer.Option(help="rounds in alternation; the median counts")] = 3,
    sampler: Annotated[bool, typer.Option("--sampler/--no-sampler", help="draft with the sampler head")] = True,
    hf: Annotated[bool, typer.Option("--hf/--no-hf", help="compare with Hugging Face generate() too")] = True,
    json: JsonOption = False,
    output: Annotated[Path | None, typer.Option(help="write the report to this file, as JSON")] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare decoding in several tokens per step with plain decoding and Hugging Face generate(), in seconds."""
    from foretell.evaluation.bench import bench
    from foretell.evaluation.prompts import NAMES, load_prompts, prompts_path, set_name

    check_writable(output)
    wanted_masks = None if masks is None else numbers(masks, "--masks")
    sources = prompts or list(NAMES)
    for source in sources:
        prompts_path(source)  # a misspelt name shows before the model is loaded
    loaded = load_model(model, base, dtype, device, trust_remote_code)
    sets = {set_name(s): load_prompts(s, tokenizer=loaded.tokenizer, chat=chat, limit=limit) for s in sources}

    from foretell.commands.render import machine, progress_bar, report_renderables, stdout_console

    with progress_bar() as on_progress:
        report = bench(
            loaded,
            sets,
            strategies=words(strategies),
            masks=wanted_masks,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            on_progress=on_progress,
            use_sampler=sampler,
            hf=hf,
        )
    text = to_json(report.to_dict(), indent=2)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if json:
        print(text)
        return
    console = stdout_console()
    for part in report_renderables(report, console.width):
        console.print(part)
    console.print(machine(report), style="dim")

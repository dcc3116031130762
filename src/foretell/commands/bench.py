"""`foretell bench`: tokens per step and seconds. In Python: `foretell.evaluation.bench.bench(...)`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
    check_writable,
    load_model,
    numbers,
    to_json,
    words,
)
from foretell.errors import ForetellError

SWEEP, TRANSFORMERS, FILES = "Sweep: all combinations are measured", "What transformers can do", "Files"


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
    max_new_tokens: Annotated[int, typer.Option(help="generate at most this many tokens per prompt")] = 128,
    rounds: Annotated[int, typer.Option(help="rounds in alternation; the median counts")] = 3,
    seed: Annotated[int, typer.Option(help="seed of the draws where the temperature is above 0")] = 0,
    use_sampler: Annotated[
        bool, typer.Option("--use-sampler/--no-use-sampler", help="draft with the sampler head")
    ] = True,
    strategies: Annotated[
        str | None, typer.Option(help="strategies, separated by commas \\[all that draft]", rich_help_panel=SWEEP)
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            help="masks per block, separated by commas \\[1,2,4,8 as far as the model goes, and its k]",
            rich_help_panel=SWEEP,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="prompts decoded side by side, like 1,2,4", rich_help_panel=SWEEP)] = "1",
    temperature: Annotated[str, typer.Option(help="like 0,1; 0 is greedy", rich_help_panel=SWEEP)] = "0",
    context: Annotated[
        str | None,
        typer.Option(
            help="tokens of every prompt, like 64,512: long ones are cut from the left, short ones get earlier prompts "
            "of the set in front \\[prompts as they are]",
            rich_help_panel=SWEEP,
        ),
    ] = None,
    hf: Annotated[
        bool, typer.Option("--hf/--no-hf", help="compare with transformers' generate()", rich_help_panel=TRANSFORMERS)
    ] = True,
    prompt_lookup: Annotated[
        str,
        typer.Option(
            help="compare with its prompt lookup, drafting so many tokens, like 3,5,10; '' leaves it out",
            rich_help_panel=TRANSFORMERS,
        ),
    ] = "5",
    draft_model: Annotated[
        str | None,
        typer.Option(
            help="compare with its assisted generation by this smaller model: directory or Hub name",
            rich_help_panel=TRANSFORMERS,
        ),
    ] = None,
    json: JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option(help="write the report to this file, as JSON, after every point", rich_help_panel=FILES),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="measure only what --output lacks", rich_help_panel=FILES)
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="draw the report into this .png, .svg or .pdf", rich_help_panel=FILES)
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = None,
    packed: PackedOption = None,
    compiled: CompiledOption = False,
    quantise: QuantiseOption = "none",
    trust_remote_code: TrustOption = False,
) -> None:
    """Compare decoding in several tokens per step with plain decoding and with what transformers does, in seconds."""
    from foretell.evaluation import plot as picture
    from foretell.evaluation.bench import bench
    from foretell.evaluation.prompts import NAMES, load_prompts, prompts_path, set_name
    from foretell.evaluation.saved import check_output

    check_output(output, resume)
    check_writable(output)
    check_writable(plot)
    if plot:
        picture.check_plot_path(plot)
    settings = {
        "strategies": None if strategies is None else words(strategies),
        "masks": None if masks is None else numbers(masks, "--masks"),
        "batch": numbers(batch, "--batch"),
        "temperature": decimals(temperature, "--temperature"),
        "context": None if context is None else numbers(context, "--context"),
        "prompt_lookup": numbers(prompt_lookup, "--prompt-lookup"),
    }
    sources = prompts or list(NAMES)
    for source in sources:
        prompts_path(source)  # a misspelt name shows before the model is loaded
    loaded = load_model(model, base, dtype, device, trust_remote_code, packed, quantise, compiled)
    names = {set_name(s): s for s in sources}
    if len(names) < len(sources):
        raise ForetellError("two of the prompt sets have the same name; rename one of the files")
    sets = {n: load_prompts(s, tokenizer=loaded.tokenizer, chat=chat, limit=limit) for n, s in names.items()}

    from foretell.commands.render import progress_bar, stdout_console
    from foretell.commands.tables import machine, report_renderables

    try:
        with progress_bar() as on_progress:
            report = bench(
                loaded,
                sets,
                **settings,  # type: ignore[arg-type]
                draft_model=draft_model,
                max_new_tokens=max_new_tokens,
                rounds=rounds,
                seed=seed,
                use_sampler=use_sampler,
                hf=hf,
                output=output,
                resume=resume,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        if output and output.exists():
            print(f"foretell: what was finished is in {output}; --resume goes on from there", file=sys.stderr)
        raise
    if plot:
        picture.plot(report, plot)
    if json:
        print(to_json(report.to_dict(), indent=2))
        return
    console = stdout_console()
    for part in report_renderables(report, console.width):
        console.print(part)
    console.print(machine(report), style="dim")


def decimals(text: str, option: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]. Raises ForetellError naming the option."""
    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise ForetellError(f"{option} takes numbers separated by commas, like 0,1, not {text!r}") from None

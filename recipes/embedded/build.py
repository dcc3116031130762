"""Build the embedded base model: data, tokenizer, pre-training, evaluation, export. Resumable: run it again.

    python recipes/embedded/build.py

Every stage leaves a marker in `<folder>/done/` when it is through, and is skipped while the marker is there; an
interrupted pre-training goes on from its last checkpoint.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import data
import evaluate
import export
import pretrain
import problems


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    folder: Path
    minutes: float
    problem_tokens: int
    compiled: bool

    @property
    def tokens(self) -> Path:
        """The tokenizer and the token arrays."""
        return self.folder / "data"

    @property
    def base(self) -> Path:
        """The finished base model."""
        return self.folder / "base"


def data_stage(settings: Settings) -> None:
    """Check the generator, then write the tokenizer and the token arrays."""
    problems.check(20_000)
    data.prepare(settings.tokens, settings.problem_tokens)


def pretrain_stage(settings: Settings) -> None:
    """Train the base within its wall-clock budget."""
    pretrain.train(settings.folder, settings.minutes, pretrain.BATCH, settings.compiled, resume=True)


def export_stage(settings: Settings) -> None:
    """Write the base in bfloat16, the held-out prompts and the adapter's training text."""
    export.export_base(settings.folder / "checkpoint", settings.tokens / "tokenizer", settings.base)
    export.export_prompts(settings.folder / "prompts")
    export.export_adapter_data(settings.tokens / "tokenizer", settings.folder / "adapter_data")


def evaluate_stage(settings: Settings) -> None:
    """Measure the exported base."""
    report = evaluate.evaluate(settings.base, settings.tokens)
    (settings.folder / "evaluation.json").write_text(json.dumps(report, indent=1))
    print({name: value for name, value in report.items() if name != "samples"})


STAGES: tuple[tuple[str, Callable[[Settings], None]], ...] = (
    ("data", data_stage),
    ("pretrain", pretrain_stage),
    ("export", export_stage),
    ("evaluate", evaluate_stage),
    # The adapter's training (`foretell train` on `base` with `adapter_data`) comes here.
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(".build/embedded"))
    parser.add_argument("--minutes", type=float, default=pretrain.MINUTES, help="wall-clock budget of the pre-training")
    parser.add_argument("--problem-tokens", type=int, default=data.PROBLEM_TOKENS)
    parser.add_argument(
        "--no-compile", action="store_true", help="train without torch.compile (no C++ compiler needed)"
    )
    parser.add_argument(
        "--again", choices=[name for name, _ in STAGES], action="append", default=[], help="redo a stage"
    )
    args = parser.parse_args()
    settings = Settings(args.folder, args.minutes, args.problem_tokens, not args.no_compile)
    done = args.folder / "done"
    done.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES:
        if (done / name).exists() and name not in args.again:
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: starting", flush=True)
        stage(settings)
        (done / name).touch()


if __name__ == "__main__":
    main()

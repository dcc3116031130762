"""What `foretell demo` shows, scene by scene; kept as it goes so that it can be saved as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from foretell.commands.render import (
    HUES,
    LiveText,
    bar_of,
    generate_live,
    progress_bar,
    stdout_console,
    summary,
)
from foretell.commands.tables import machine, report_renderables
from foretell.evaluation.bench import bench
from foretell.evaluation.prompts import load_prompts

if TYPE_CHECKING:
    from foretell.decoding.generate import MTPForCausalLM

KINDS = {"problems": "school problem", "code": "Python function"}
PICTURE_WIDTH = 100  # columns


class Show:
    """Scenes in order: `introduce`, `generate`, `measure`, `point_onwards`; then `save_svg` if wanted."""

    def __init__(self, model: MTPForCausalLM, prompts: int, max_new_tokens: int) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens
        self.masks = model.max_masks
        self.console = stdout_console()
        problems, functions = (prompts + 1) // 2, prompts // 2
        self.sets = {"problems": load_prompts("problems", limit=problems)}
        if functions:
            self.sets["code"] = load_prompts("code", limit=functions)
        self._scenes: list[RenderableType] = []

    def say(self, scene: RenderableType, style: str = "") -> None:
        self.console.print(scene, style=style)
        self._scenes.append(Text(scene, style) if isinstance(scene, str) else scene)

    def introduce(self) -> None:
        millions = self.model.base.parameter_count / 1e6
        size = f"{millions:.1f}" if millions < 10 else f"{millions:.0f}"
        self.say(
            f"You are watching a language model of {size} million parameters write several tokens per step. At each "
            "step it drafts the tokens to come; the next step keeps those that the model itself would have chosen, so "
            "that the text is the same as token by token."
        )
        self.say("")
        legend = Text("How to read it: one colour is one step; ")
        legend.append("drafts", f"underline {HUES[0]}").append(" that held are underlined, the model's ")
        legend.append("own token", f"bold {HUES[0]}").append(" ends the step; then the ")
        legend.append("next step", f"underline {HUES[1]}").append(" begins.")
        bar = bar_of(self.console)
        plain = Text(f"How to read it: {bar} ends a step; everything between two bars was decided at once.")
        self.console.print(plain if bar else legend)
        self._scenes.append(legend)

    def generate(self) -> None:
        """Every prompt, live."""
        for name, prompts in self.sets.items():
            for number, prompt in enumerate(prompts, 1):
                self.say("")
                self.say(f"-- unseen {KINDS[name]} {number} of {len(prompts)}", style="bold")
                ids = self.model.encode(str(prompt))
                live = LiveText(self.console, self.model, ids, bars=True)
                live.prompt(str(prompt))
                settings = {"max_new_tokens": self.max_new_tokens}
                generation = generate_live(self.console, self.model, ids, live, settings)
                self._scenes.append(live.text)
                self.say(f"   {summary(generation)}", style="dim")

    def measure(self, rounds: int) -> None:
        """The same prompts, timed against the two baselines."""
        self.say("")
        self.say("The same prompts again, by each method in turn, in seconds:")
        self.say("")
        few = sorted({max(1, self.masks // 2), self.masks})
        with progress_bar() as on_progress:
            report = bench(
                self.model,
                self.sets,
                masks=few,
                prompt_lookup=(),
                max_new_tokens=self.max_new_tokens,
                rounds=rounds,
                on_progress=on_progress,
            )
        for part in report_renderables(report, min(self.console.width, PICTURE_WIDTH)):
            self.say(part)
        self.say(machine(report), style="dim")

    def point_onwards(self) -> None:
        self.say("")
        self.say("Where to go next", style="bold")
        for what, line in (
            ("a prompt of your own", 'foretell generate --prompt "def area(radius):"'),
            ("every strategy, measured", "foretell bench"),
            ("a model of your own", "foretell train --help"),
        ):
            self.say(f"  {what + ':':<26}{line}")

    def save_svg(self, path: Path) -> None:
        """All scenes so far. Raises OSError if the file can't be written."""
        recorder = Console(
            file=io.StringIO(),
            record=True,
            width=PICTURE_WIDTH,
            force_terminal=True,
            color_system="truecolor",
            highlight=False,
        )
        for scene in self._scenes:
            recorder.print(scene)
        recorder.save_svg(str(path), title="foretell demo")

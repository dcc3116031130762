"""Trackers get what the metrics file gets."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from foretell.config import TrainConfig
from foretell.errors import ForetellError
from foretell.training import tracking

from .following import follow, lines, power_cut_at, save_places


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_places(tmp_path_factory.mktemp("tracked"))


class Notebook(GeneralTracker):
    """A tracker as accelerate wants them, in place of wandb: no network."""

    name, requires_logging_directory = "wandb", False
    runs: list[Notebook] = []  # noqa: RUF012

    def __init__(self, project: str, **settings: Any) -> None:
        super().__init__()
        self.project, self.settings, self.finished = project, settings, False
        self.configuration: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.runs.append(self)

    def start(self) -> None:
        if self.settings.get("name") == "asking":
            raise ValueError("waits for a key" if sys.stdin.isatty() else "No API key configured.")
        if self.settings.get("name") == "refused":
            raise ConnectionError("not logged in\nmore")

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Notebook]:
    """The runs that a stand-in for wandb was given."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    monkeypatch.setattr(tracking, "find_spec", lambda name: sys)
    monkeypatch.setattr(Notebook, "runs", [])
    return Notebook.runs


def test_a_tracker_gets_the_metrics_and_the_settings(places: Path, tmp_path: Path, notebooks: list[Notebook]) -> None:
    follow(places, tmp_path / "out", {"tracker": ("wandb", "wandb")})
    (run,) = notebooks
    assert run.finished and run.project == "foretell" and run.settings["name"] == "out"
    assert [step for step, _ in run.logged] == [2, 4, 6]
    for (step, logged), line in zip(run.logged, lines(tmp_path / "out"), strict=True):
        assert line.pop("step") == step and logged == tracking.scalars(line)
    assert run.logged[-1][1]["held_out_agreement/2"] == lines(tmp_path / "out")[-1]["held_out_agreement"][1]
    assert run.configuration["masks"] == 2 and run.configuration["lr"] == 1e-2
    assert run.configuration["data"] == "d.jsonl" and run.configuration["held_out"] == "None"


def test_a_resumed_training_goes_on_in_the_same_run(places: Path, tmp_path: Path, notebooks: list[Notebook]) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        follow(places, tmp_path / "out", {"tracker": ("wandb",)}, on_step=power_cut_at(5))
    assert notebooks[0].finished, "also after an error"
    follow(places, tmp_path / "out", {"tracker": ("wandb",)}, resume=True)
    first, second = notebooks
    assert first.settings["id"] == second.settings["id"] and second.settings["resume"] == "allow"
    assert [step for step, _ in second.logged][-1] == 6
    assert {step for step, _ in first.logged + second.logged} == {2, 4, 6}
    follow(places, tmp_path / "another", {"tracker": ("wandb",)})
    assert notebooks[2].settings["id"] != first.settings["id"]


def test_what_cannot_be_tracked_is_said_in_a_sentence(
    places: Path, tmp_path: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ForetellError, match=r"wandb can't be started \(not logged in\)"):
        follow(places, tmp_path / "refused", {"tracker": ("wandb",)})
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(
        ForetellError, match=r'tensorboard is not installed; run `pip install "foretell\[tensorboard\]"`'
    ):
        follow(places, tmp_path / "out", {"tracker": ("tensorboard",)})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ForetellError, match="tracker must be one of tensorboard, wandb, not 'paper'"):
        TrainConfig(tracker=("tensorboard", "paper"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_tracker_has_no_terminal_to_ask_for_a_key(
    places: Path, tmp_path: Path, notebooks: list[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", terminal := Terminal())
    with pytest.raises(ForetellError, match=r"\(No API key configured\); put it right, set WANDB_MODE=offline, or"):
        follow(places, tmp_path / "asking", {"tracker": ("wandb",)})
    assert sys.stdin is terminal and not terminal.closed


def test_tensorboard(places: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="power cut"):
        follow(places, tmp_path / "out", {"tracker": ("tensorboard",)}, on_step=power_cut_at(5))
    follow(places, tmp_path / "out", {"tracker": ("tensorboard",)}, resume=True)
    record = EventAccumulator(str(tmp_path / "out" / "tracking" / "tensorboard"))
    record.Reload()
    for name in ("loss", "held_out_simulated_acceptance"):
        expected = [(line["step"], line[name]) for line in lines(tmp_path / "out")]
        found = [(event.step, event.value) for event in record.Scalars(name)]
        assert [step for step, _ in found] == [2, 4, 6]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    assert len(list((tmp_path / "out" / "tracking" / "tensorboard").glob("*/hparams.yml"))) == 1

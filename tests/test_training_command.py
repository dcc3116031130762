"""`foretell train`: where settings come from, what is shown, and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import SafetensorError

from foretell import checkpoint
from foretell.cli import main
from foretell.commands.train import merge_settings
from foretell.errors import ForetellError
from foretell.training.display import BAR, Display, bar

from .saved import save_base

PLACES = {"base": "b", "data": "d", "output": "o"}
LINE = {
    "step": 10, "steps": 20, "loss": 3.5, "base_loss": 2.0, "sampler_loss": 1.0, "lcm_loss": 0.5, "ntp_loss": 1.25,
    "agreement": [0.5, 0.25], "simulated_acceptance": 1.6, "tokens_per_second": 1234.5, "lr": 0.001,
}  # fmt: skip


def test_options_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("base: from-yaml\nmasks: 3\nlr: 2e-4\nsteps: 7\ndata: d\n")
    places, mtp, config = merge_settings(path, {"output": "o", "steps": 9, "rank": 2})
    assert places == {"base": "from-yaml", "data": "d", "output": "o"}
    assert (mtp.masks, mtp.rank, config.lr, config.steps, config.seed) == (3, 2, 2e-4, 9, 0)


def test_an_unknown_or_missing_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("step: 7\n")
    with pytest.raises(ForetellError, match=r"c\.yaml: unknown setting 'step'; known are .*steps"):
        merge_settings(path, dict(PLACES))
    with pytest.raises(ForetellError, match="training needs --data"):
        merge_settings(None, {"base": "b", "output": "o"})
    with pytest.raises(ForetellError, match="masks must be at least 1"):
        merge_settings(None, {**PLACES, "masks": 0})


def test_bars() -> None:
    assert bar(1.0) == "█" * BAR and bar(0.0).strip() == "" and bar(0.5).strip() == "█" * (BAR // 2)
    assert len({bar(value / 20) for value in range(21)}) == 21 and {len(bar(v / 20)) for v in range(21)} == {BAR}


def test_a_terminal_gets_a_panel_and_a_file_gets_lines() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
        with Display(20, console) as display:
            display({"step": 0, "steps": 20, "data": "5 records"})
            display({"step": 9, "steps": 20})
            display(LINE)
        shown = out.getvalue()
        assert "5 records" in shown and "1.60" in shown and "1,23" in shown
        assert ("mask 2" in shown and "25%" in shown and "10/20" in shown) == terminal
        assert ("step 10/20" in shown and "agreement 0.50 0.25" in shown and "step 9" not in shown) == (not terminal)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    base = save_base(tmp_path / "base")
    (tmp_path / "d.txt").write_text("\n<|endoftext|>\n".join(f"document number {n}" for n in range(24)))
    settings = {"masks": 2, "rank": 2, "steps": 4, "batch_size": 2, "seq_len": 32, "anchors": 2, "log_every": 2}
    options = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    places = {"base": base, "data": tmp_path / "d.txt", "output": tmp_path / "out"}
    return ["train", "--device", "cpu", *options, *(word for n, v in places.items() for word in (f"--{n}", str(v)))]


def test_it_says_where_the_adapter_is_and_what_comes_next(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert f"The adapter is in {tmp_path / 'out'}" in shown.out and "tokens per step" in shown.out
    assert "24 records, 24 sequences" in shown.err and "step 4/4" in shown.err
    following = [line.split() for line in shown.out.splitlines() if line.startswith("  foretell ")]
    assert [words[1] for words in following] == ["generate", "bench"]
    assert main(["generate", "--model", str(tmp_path / "out"), "-p", "document", "--max-new-tokens", "4"]) == 0

    assert main(arguments) == 2, "a finished training is not overwritten"
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_steps"] == 4


def test_ctrl_c_saves_and_says_how_to_go_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(display: Display, line: dict[str, Any]) -> None:
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "__call__", press)
        assert main(arguments) == 130
    assert "give the same command with --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_steps"] == 4


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint meets a full disk; once there is room, training goes on as if nothing had happened."""
    real, written = checkpoint.save_file, 0

    def fills_up(tensors: dict[str, Any], path: str) -> None:
        nonlocal written
        real(tensors, path)
        written += Path(path).stat().st_size
        if written > room:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    every_step = [*arguments, "--checkpoint-every", "1"]
    room = 10**9
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fills_up)
        assert main(every_step) == 0
        room = written // 2
        written = 0
        whole = (tmp_path / "out").rename(tmp_path / "whole")
        assert main(every_step) == 2
    assert "free some space" in capsys.readouterr().err.splitlines()[-1]
    step = json.loads((tmp_path / "out" / "checkpoint" / "state.json").read_text())["step"]
    assert 1 <= step < 4
    assert main([*every_step, "--resume"]) == 0
    name = checkpoint.WEIGHTS_FILE
    assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_the_first_sign_of_bad_input_is_one_sentence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of transformers' own output, and no wait for a base that is not needed to see the fault."""
    data = str(tmp_path / "d.txt")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / checkpoint.CONFIG_FILE).write_text("{}")
    for more, named in (
        (["--device", "nowhere"], "there is no device 'nowhere'"),
        (["--data", f"{data}:half"], "must be a number"),
        (["--base", "./absent", "--data", "absent.txt"], "absent.txt does not exist"),
        (["--base", "./absent", "--held-out", "absent.txt"], "absent.txt does not exist"),
        (["--base", str(tmp_path / "adapter")], "is a trained adapter, not a base"),
    ):
        assert main([*arguments, *more]) == 2, more
        err = capsys.readouterr().err
        assert err.startswith("foretell: ") and named in err and err.count("\n") == 1, err


def test_nothing_but_ours_is_printed_while_loading_and_nothing_is_wrapped(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    monkeypatch.setenv("COLUMNS", "30")
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n{"text": "a document"}\n')
    assert main([*arguments, str(tmp_path / "bad.jsonl")]) == 0
    err = capsys.readouterr().err
    assert "Loading weights" not in err
    assert any("bad.jsonl, line 1: found txt; a record must" in line for line in err.splitlines()), err


def test_the_acceptance_stands_at_the_left_of_the_panel() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    display = Display(20, console)
    display.latest = dict(LINE)
    console.print(display.render())
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "\n1.60 tokens per step, simulated on training text" in file.getvalue()

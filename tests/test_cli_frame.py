"""The command line's frame: options made from dataclasses, and expected failures as one sentence with an exit code."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer

from foretell import cli
from foretell.commands.options import dataclass_options, load_yaml
from foretell.config import Config, MTPConfig, TrainConfig, option
from foretell.errors import ForetellError


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    title: ClassVar[str] = "Sample settings"
    rank_count: int = option(4, "how many [of them]", minimum=1, maximum=9)
    rate: float = option(1e-3, "a rate", minimum=0.0)
    gated: bool = option(True, "gate it")
    kind: str = option("plain", "which kind", choices=("plain", "fancy"))
    limit: int | None = option(None, "a limit [none]")
    names: tuple[str, ...] = option(("a", "b"), "some names")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Gives cli.main one command, `probe`, with Sample's options; returns the dict that its calls fill."""
    calls: dict[str, Any] = {}

    @dataclass_options(Sample)
    def probe(place: str, **values: Any) -> None:
        calls.update(place=place, **values)

    _install(monkeypatch, probe)
    return calls


def _install(monkeypatch: pytest.MonkeyPatch, command: Any) -> None:
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(cli._root)
    app.command("probe")(command)
    monkeypatch.setattr(cli, "build_app", lambda: app)


def _raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def probe() -> None:
        raise error

    _install(monkeypatch, probe)


def test_only_given_options_reach_the_command(received: dict[str, Any]) -> None:
    assert cli.main(["probe", "here"]) == 0
    assert received == {"place": "here"}


def test_every_type_of_field(received: dict[str, Any]) -> None:
    line = "probe here --rank-count 3 --rate 2e-4 --no-gated --kind fancy --limit 7 --names x --names y"
    assert cli.main(line.split()) == 0
    assert received.pop("place") == "here"
    assert received == {
        "rank_count": 3, "rate": 2e-4, "gated": False, "kind": "fancy", "limit": 7, "names": ("x", "y")
    }  # fmt: skip
    assert Sample(**received).names == ("x", "y")


def test_given_value_equal_to_the_default_or_falsy_is_still_given(received: dict[str, Any]) -> None:
    assert cli.main(["probe", "here", "--gated", "--rate", "0", "--rank-count", "4"]) == 0
    assert received == {"place": "here", "gated": True, "rate": 0.0, "rank_count": 4}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("probe here --nope 1", "--nope"),
        ("probe here --rank-count 0", "--rank-count"),
        ("probe here --rank-count 10", "--rank-count"),
        ("probe here --rank-count many", "--rank-count"),
        ("probe here --kind odd", "plain"),
        ("probe", "place"),
        ("absent", "absent"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: str, named: str, received: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and received == {}
    assert err.startswith("foretell: ") and err.count("\n") == 1
    assert named in err and "--help)" in err


def test_help_shows_flags_help_texts_bounds_and_defaults(
    received: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", False)  # which FORCE_COLOR and CI services turn on
    assert cli.main(["probe", "--help"]) == 0
    out = capsys.readouterr().out
    for text in ("--rank-count", "how many [of them] [default: 4]", "--no-gated", "[default: yes]", "plain|fancy",
                 "a limit [none]", "[default: a b]", "[default: 0.001]", "1<=x<=9", "Sample settings"):  # fmt: skip
        assert text in out, text


def test_our_own_configs_become_options() -> None:
    @dataclass_options(MTPConfig, TrainConfig, exclude=("seed",))
    def probe(**values: Any) -> None: ...

    names = set(inspect.signature(probe).parameters)
    assert names == {f.name for cls in (MTPConfig, TrainConfig) for f in fields(cls)} - {"seed"}


def test_options_that_collide_are_refused() -> None:
    with pytest.raises(TypeError, match="two options named rank_count"):

        @dataclass_options(Sample, Sample)
        def twice(**values: Any) -> None: ...

    with pytest.raises(TypeError, match="two options named kind"):

        @dataclass_options(Sample)
        def own(kind: str, **values: Any) -> None: ...

    with pytest.raises(TypeError, match="values"):

        @dataclass_options(Sample)
        def closed(place: str) -> None: ...


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ForetellError("no such adapter; train one first"), 2, "foretell: no such adapter; train one first\n"),
        (KeyboardInterrupt(), 130, "foretell: interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 2,
         "foretell: the disk is full (a.bin): free some space, then run the same command again\n"),
    ],
)  # fmt: skip
def test_expected_failures_are_one_line(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _raising(monkeypatch, error)
    assert cli.main(["probe"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "denied"), ZeroDivisionError("ours")])
def test_other_errors_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    _raising(monkeypatch, error)
    with pytest.raises(type(error)):
        cli.main(["probe"])


def test_every_command_has_a_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert "Usage: foretell" in overview
    for info in cli.build_app().registered_commands:
        assert info.name is not None and info.name in overview
        assert cli.main([info.name, "--help"]) == 0
        assert f"foretell {info.name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from foretell.cli import main; assert main(['--help']) == 0; "
        "sys.exit(','.join({'torch', 'transformers', 'datasets', 'matplotlib', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") or done.stderr == "\n", f"imported at help: {done.stderr}"


def test_module_runs_and_prints_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "foretell", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("foretell 0.")


@pytest.mark.parametrize("argument", ["--help", "--version"])  # longer and shorter than the buffer of stdout
def test_closed_pipe_is_quiet(argument: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "foretell", argument]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_yaml_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("steps: 5\nlr: 2e-4\n")
    assert TrainConfig.from_dict(load_yaml(path)) == TrainConfig(steps=5, lr=2e-4)
    path.write_text("# nothing yet\n")
    assert load_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"a: [1, 2\nb: 3\n", "line 2: not valid YAML"),
        (b"- 1\n- 2\n", "name: value"),
        (b"just words\n", "name: value"),
        (b"1: one\n", "name: value"),
        (b"a: !!python/object:os.system {}\n", "not valid YAML"),
        (b"\xff\xfe\x00bad", "UTF-8"),
        (b"a: \x00\n", "not valid YAML"),
    ],
)
def test_bad_yaml_names_file_and_fault(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ForetellError) as caught:
        load_yaml(path)
    message = str(caught.value)
    assert str(path) in message and fault in message and "\n" not in message


def test_missing_yaml_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ForetellError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ForetellError, match="cannot be read"):
        load_yaml(tmp_path)

"""The command line: help, exit codes, and mistakes in one line each."""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedamole import cli, stages
from fedamole.cli import main
from fedamole.cli import schema as schema_command
from fedamole.cli import server as server_command
from fedamole.config import load_config
from fedamole.config_files import read_yaml


@pytest.fixture(autouse=True)
def as_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the variables that steer the command line; it replaces the handler of SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("FEDAMOLE_LOG", "RANK", "WORLD_SIZE", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    yield
    signal.signal(signal.SIGTERM, handler)


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Names, help lines and parsers of all subcommands, inner ones too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for key, inner in action.choices.items():
                yield f"{name}{key}", lines.get(key, ""), inner
                yield from commands(inner, f"{name}{key} ")


COMMANDS = {name: (line, parser) for name, line, parser in commands(cli._parser())}
ASSIGN = ["assign", "--settings", "{}", "--pool", "pool.h5", "--out-assignment", "out.h5"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, parser = COMMANDS[name]
    assert len(line.split()) >= 3
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"])
    assert ended.value.code == 0
    assert parser.prog in capsys.readouterr().out


def test_the_commands_for_people_exist() -> None:
    assert set(cli.FOR_PEOPLE) <= set(COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["pool"], ["show"], ["show", "--what", "x"]])
def test_a_wrong_command_line_ends_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fedamole")


def test_a_command_that_succeeds_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"]


def test_a_mistake_ends_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pool", "show", str(tmp_path / "none.h5")]) == 2
    expected = f"fedamole: {tmp_path / 'none.h5'}: cannot be read (No such file or directory)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], "--settings: "),
        (lambda text: "[]", "--settings: [] is not allowed; "),
        (
            lambda text: json.dumps({**json.loads(text), "sed": 7}),
            "--settings: sed: is not a setting (value 7); did you mean seed? allowed: ",
        ),
    ],
    ids=["broken", "list", "unknown"],
)
def test_unknown_settings_are_one_line(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    config = load_config(read_yaml(configs / "smoke.yaml"), configs)
    stage = stages.scenario_stage(config, next(iter(config.scenario_seeds())))
    settings = change(stages.canonical_json(stage))
    assert main(["partition", "--settings", settings, "--out", str(tmp_path / "out.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fedamole: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_one_rank_speaks_for_all(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main(ASSIGN) == 2
    assert ("fedamole: --settings: " in capsys.readouterr().err) == (rank != "1")


def raising(error: BaseException) -> Any:
    """A command that fails with an error."""

    def command(_: argparse.Namespace) -> None:
        raise error

    return command


def test_an_interrupted_command_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server_command, "run_assign", raising(KeyboardInterrupt()))
    assert main(ASSIGN) == 130
    assert capsys.readouterr().err == "fedamole: interrupted\n"


@pytest.mark.parametrize("error", [KeyError("a defect"), BrokenPipeError("of another process")])
def test_a_defect_of_a_job_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_command, "run_assign", raising(error))
    with pytest.raises(type(error)):
        main(ASSIGN)


def test_a_defect_of_a_command_for_people_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(schema_command, "run_schema", raising(KeyError("a defect")))
    with pytest.raises(KeyError):
        main(["schema"])


@pytest.mark.parametrize("name", ["schema", "show"])
def test_a_reader_that_leaves_is_no_error(name: str, configs: Path, tmp_path: Path) -> None:
    """The output of `show` fits into the buffer, so that writing it fails at the very end."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "main.md").write_text("a table")
    smoke = read_yaml(configs / "smoke.yaml") | {"results": str(tmp_path)}
    (tmp_path / "study.yaml").write_text(json.dumps(smoke))
    command = [sys.executable, "-m", "fedamole", name]
    command += ["--configfile", str(tmp_path / "study.yaml")] if name == "show" else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""


def show(
    configs: Path, folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any
) -> tuple[int, str, str]:
    """Call `show` for the smoke study with other settings: exit code, and what it prints."""
    smoke = read_yaml(configs / "smoke.yaml") | {"results": str(folder), **changes}
    (folder / "study.yaml").write_text(json.dumps(smoke))
    code = main(["show", "--configfile", str(folder / "study.yaml")])
    return code, *capsys.readouterr()


def test_a_study_without_the_main_table_shows_its_first(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: Any = {"study": "mine", "tables": {"show": ["spread", "main"], "figures": []}}
    code, _, error = show(configs, tmp_path, capsys, **changes)
    table = tmp_path / "mine/tables/spread.md"
    assert (code, error.count("\n")) == (2, 1) and f"{table}: does not exist yet" in error
    table.parent.mkdir(parents=True)
    table.write_text("a table")
    code, text, _ = show(configs, tmp_path, capsys, **changes)
    assert code == 0 and text.startswith("\na table\n")
    # Neither the figures nor the table of clients are among what it shows.
    assert "figures" not in text and "clients.md" not in text


def test_a_study_of_figures_alone_says_where_they_are(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: Any = {"tables": {"show": [], "figures": ["bars"]}}
    assert show(configs, tmp_path, capsys, **changes)[0] == 2
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/bars.svg").write_text("a picture")
    code, text, _ = show(configs, tmp_path, capsys, **changes)
    assert (code, text) == (0, f"figures  {tmp_path / 'figures'} (svg, pdf, png, csv)\n")


def test_show_says_what_is_wrong_with_a_config(
    configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = show(configs, tmp_path, capsys, methods=["fedmole"])
    assert code == 2 and "did you mean fedamole?" in error and error.count("\n") == 1


@pytest.mark.parametrize("level", ["foo", "notset", "7"])
def test_an_unknown_log_level_is_one_line(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDAMOLE_LOG", level)
    assert main(["schema"]) == 2
    expected = f"fedamole: FEDAMOLE_LOG '{level}' is unknown; allowed: DEBUG, INFO, WARNING, "
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{expected}ERROR, CRITICAL\n")


@pytest.mark.parametrize("level", ["", "debug", "ERROR"])
def test_log_levels_may_be_written_small(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDAMOLE_LOG", level)
    assert main(["schema"]) == 0
    assert capsys.readouterr().err == ""

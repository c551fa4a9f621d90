"""What a person reads who asks for help, at 80 columns; what a script reads."""

import json
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from powersteer.apps import cli
from powersteer.apps.cli.help import PANELS
from powersteer.core.errors import PowersteerError

ROOT = typer.main.get_command(cli.app)


def commands(command=ROOT, path=()):
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


PATHS = [path for path, _ in commands()]


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_fits_80_columns_and_cuts_no_name(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cli.app, [*path, "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    assert not re.search(r"\S(…|\.\.\.)$", result.output.replace("]...", ""), re.M)  # no sentence is cut
    assert not re.search(r"--[\w-]*…", result.output) and "<" not in result.output.replace("<=", "")
    command = dict(commands())[path]
    for param in command.params:
        for name in param.opts if param.param_type_name == "option" else [param.metavar]:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", result.output), name
        assert isinstance(command, TyperGroup) or param.help, f"{param.name} says nothing of itself"


def test_every_command_has_its_place():
    placed = [name for names in PANELS.values() for name in names]
    assert set(ROOT.commands) <= set(placed) and len(set(placed)) == len(placed)
    listed = CliRunner().invoke(cli.app, ["--help"]).output
    names = [name for name in placed if name in ROOT.commands]
    assert [listed.index(f"\n  {name} ") for name in names] == sorted(listed.index(f"\n  {name} ") for name in names)


def test_brackets_of_a_message_are_no_markup(monkeypatch, capsys):
    def fail():
        raise PowersteerError("the plots need matplotlib: pip install 'powersteer[plots]'; not [left, top] [/x]")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: the plots need matplotlib: pip install 'powersteer[plots]'; not [left, top] [/x]\n"


def test_extractors_are_listed_for_scripts():
    listed = json.loads(CliRunner().invoke(cli.app, ["prepare", "--list", "--json"]).output)
    assert {"task": "segmentation", "extractor": "labels"} in [
        {key: one[key] for key in ("task", "extractor")} for one in listed
    ]


def test_the_shell_completes_commands():
    environment = os.environ | {"COMP_WORDS": "powersteer pre", "COMP_CWORD": "1"}
    environment["_POWERSTEER_COMPLETE"] = "complete_bash"
    code = "import sys; sys.argv = ['powersteer']; from powersteer.apps.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["prepare", "pretrain"]

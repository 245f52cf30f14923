"""The command ``mdt``: short names of the scripts."""

import sys

import pytest
from support import REPO

from masked_diffusion.commands import COMMANDS, main


@pytest.fixture(autouse=True)
def _arguments_and_path_are_this_process_s(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mdt"])
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_mdt_alone_lists_the_commands(capsys):
    assert main([]) == main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(said.count(f"\n  {name} ") == 2 for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_script_that_is_there(name):
    assert (REPO / COMMANDS[name].program).is_file()


def test_an_unknown_command_is_refused_in_a_sentence(capsys):
    assert main(["paint"]) == 2
    assert capsys.readouterr().err.startswith("mdt: error: paint: unknown command; choose one of train, sample,")


def test_a_command_runs_its_script_with_the_flags_that_follow(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check-data", "--image_size", "large"])
    assert ended.value.code == 2
    assert "check_data.py: error: argument --image_size: invalid int value: 'large'" in capsys.readouterr().err

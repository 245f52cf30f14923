"""A command that was refused is refused again, at once, when torchrun starts it again; one that was unlucky is not."""

import os

import pytest

from masked_diffusion.dist_util import Place, Ranks
from masked_diffusion.processes import refusals
from masked_diffusion.processes.refusals import NotNowError
from masked_diffusion.runs.run_folder import held, writing_to
from masked_diffusion.script_util import run_script

SAID = "--lr 0: must be positive"


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """Run a script as an attempt of a torchrun that starts it again twice. Returns its status."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")

    def run(number, prepare):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        return run_script(prepare)

    return run


def refusing(error):
    def prepare(stack):
        raise error

    return prepare


def allowing(stack):
    return lambda: 0


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error", [ValueError(SAID), FileNotFoundError(SAID), caused(ValueError(SAID), PermissionError("not yours"))]
)
def test_restarts_of_a_refused_command_say_the_same_and_prepare_nothing(attempt, capsys, tmp_path, error):
    assert attempt(0, refusing(error)) == 2
    assert [attempt(number, allowing) for number in (1, 2)] == [2, 2]
    assert capsys.readouterr().err.count(f"error: {SAID}\n") == 3
    assert list(tmp_path.iterdir()) == []  # the last attempt has cleared it away


@pytest.mark.parametrize(
    "error",
    [
        NotNowError("another process is training there"),
        OSError(5, "Input/output error"),
        caused(ValueError("--data_dir x: cannot list x/y (Stale file handle)"), OSError(116, "Stale file handle")),
    ],
)
def test_what_may_have_passed_is_tried_again(attempt, error):
    assert attempt(0, refusing(error)) == 2
    assert attempt(1, allowing) == 0


def test_another_launcher_is_not_refused(attempt, monkeypatch):
    assert attempt(0, refusing(ValueError(SAID))) == 2
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert attempt(1, allowing) == 0


def test_nothing_is_left_where_no_restart_follows(attempt, tmp_path, monkeypatch):
    assert attempt(2, refusing(ValueError(SAID))) == 2
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert attempt(0, refusing(ValueError(SAID))) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_written_costs_no_more_than_another_look(attempt, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert attempt(0, refusing(ValueError(SAID))) == 2
    assert attempt(1, refusing(ValueError(SAID))) == 2
    assert capsys.readouterr().err.count(SAID) == 2


def test_a_folder_in_use_and_a_full_disk_do_not_outlast_a_restart_and_one_that_may_not_be_written_does(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("masked_diffusion.runs.run_folder.LOCK_SECONDS", 0.0)
    monkeypatch.setattr("masked_diffusion.runs.run_folder.lock", lambda file: False)

    def error_of(enter):
        with pytest.raises(ValueError) as raised, enter:
            raise AssertionError
        return raised.value

    def writing(error):
        with pytest.raises(ValueError) as raised, writing_to(tmp_path):
            raise error
        return raised.value

    assert not refusals.outlasts_a_restart(error_of(held(tmp_path, "training")))
    assert not refusals.outlasts_a_restart(writing(OSError(28, "No space left on device")))
    assert refusals.outlasts_a_restart(writing(PermissionError(13, "Permission denied")))


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_met_an_error_leaves_it_to_its_restarts(monkeypatch, rank):
    """A cause does not travel with an error, so that the other ranks cannot judge it."""

    def broadcast(box, **_):
        box[:] = [None, ValueError(SAID)]

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    ranks = Ranks(Place(rank, 2, rank), "cpu")
    with pytest.raises(ValueError, match=SAID) as raised:
        ranks.from_main(lambda: None)
    assert refusals.outlasts_a_restart(raised.value) is (rank == 0)

"""An output folder belongs to one training and one sampling at a time."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from support import TINY_DIGITS, call, environment, few_steps, weights

from masked_diffusion.runs import run_folder
from masked_diffusion.runs.run_folder import held, own_folder

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
HOLD = """
import os, sys, time
from pathlib import Path
from masked_diffusion.runs.run_folder import held
with held(Path(sys.argv[1]), sys.argv[2]):
    child = os.fork()  # as loader processes are made; it outlives its parent
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def unnamed(monkeypatch, tmp_path):
    """An empty working folder, no OPENAI_LOGDIR, and a clock that stands still."""
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.setattr("time.strftime", lambda form, *moment: "mdt-now")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_starts_of_the_same_second_have_folders_of_their_own(unnamed):
    with contextlib.ExitStack() as stack:
        folders = [own_folder(stack) for _ in range(3)]
        assert [folder.name for folder in folders] == ["mdt-now", "mdt-now_2", "mdt-now_3"]
        assert own_folder(stack, leave_no_trace=True).name == "mdt-now_4"
        (folders[0] / "config.json").touch()
        (folders[1] / ".training.lock").touch()
    assert list(unnamed.iterdir()) == [folders[0]]  # the others were not used


def test_a_second_training_of_the_same_second_does_not_go_on_from_the_first(unnamed, monkeypatch):
    for seed in ("1", "2"):
        assert call(monkeypatch, TRAIN, "", *TINY_DIGITS, "--seed", seed, "--max_steps", "2") == 0
    [first, second] = [weights(unnamed / name, 2) for name in ("mdt-now", "mdt-now_2")]
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_a_refused_training_leaves_no_folder(unnamed, monkeypatch):
    assert call(monkeypatch, TRAIN, "", *TINY_DIGITS, "--init_from", "no_such_file.pt") == 2
    assert list(unnamed.iterdir()) == []


@contextlib.contextmanager
def holding(folder, work):
    """Another process, with a child, that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), work], env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.0)


def test_another_process_is_refused_while_the_first_one_is_there(tmp_path, impatient):
    with holding(tmp_path, "training") as process:
        said = f"process {process.pid} of .* is training there"
        with pytest.raises(ValueError, match=said), held(tmp_path, "training"):
            pass
        with held(tmp_path, "sampling"):  # which may go on beside a training
            pass


def test_a_killed_process_is_waited_for_and_its_loader_processes_are_not(tmp_path):
    with holding(tmp_path, "training") as process:
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {process.pid}"])
        with held(tmp_path, "training"):
            assert killer.wait(5) == 0 and str(os.getpid()) in (tmp_path / ".training.lock").read_text()


def test_a_second_training_and_a_second_sampling_change_nothing(monkeypatch, tmp_path, capsys, impatient):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS) == 0
    sample = ["--model_path", tmp_path / "ema_0.9999_000002.pt", "--num_samples", "2", *few_steps(2)]

    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for path, arguments, work in [
        (TRAIN, [*TINY_DIGITS, "--overwrite", "True"], "training"),
        (SAMPLE, sample, "sampling"),
    ]:
        with holding(tmp_path, work) as process:
            before = contents()
            assert call(monkeypatch, path, tmp_path, *arguments) == 2
            assert contents() == before
        said = capsys.readouterr().err
        assert f"process {process.pid}" in said and f"is {work} there" in said and "OPENAI_LOGDIR" in said
    assert call(monkeypatch, SAMPLE, tmp_path, *sample) == 0


def test_a_dry_run_looks_at_a_folder_in_use(monkeypatch, tmp_path, impatient):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS) == 0
    with holding(tmp_path, "training"):
        assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, "--max_steps", "3", "--dry_run", "True") == 0


def test_samples_that_are_complete_are_named_although_nothing_may_be_written(monkeypatch, tmp_path, capsys, impatient):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS) == 0
    sample = ["--model_path", tmp_path / "ema_0.9999_000002.pt", "--num_samples", "2", *few_steps(2)]
    assert call(monkeypatch, SAMPLE, tmp_path, *sample) == 0
    with holding(tmp_path, "sampling"):
        assert call(monkeypatch, SAMPLE, tmp_path, *sample) == 0
    assert "already complete" in capsys.readouterr().err


def test_out_names_the_output_folder_and_wins_over_the_environment(monkeypatch, tmp_path):
    named, other = tmp_path / "named", tmp_path / "other"
    assert call(monkeypatch, TRAIN, other, *TINY_DIGITS, "--out", named, sinks="log") == 0
    assert (named / "checkpoint000002.json").is_file() and not other.exists()
    assert f"warning: OPENAI_LOGDIR {other} is ignored: --out {named} is given" in (named / "log.txt").read_text()
    flags = ["--model_path", named / "model000002.pt", "--num_samples", "1", *few_steps(2)]
    assert call(monkeypatch, SAMPLE, tmp_path / "set", *flags, "--device", "cpu", "--out", tmp_path / "set") == 0
    assert (tmp_path / "set" / "samples_1x8x8x3.npz").is_file()

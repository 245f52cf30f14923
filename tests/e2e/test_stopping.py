"""Runs that are stopped or killed go on, and end where an undisturbed run ends. Real processes, real signals."""

import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from support import (
    REPO,
    TIMEOUT,
    TINY_DIGITS,
    assert_same_weights,
    begin,
    call,
    command,
    environment,
    free_port,
    has_logged,
    kill_run,
    pid_of_rank,
    rows,
    run,
    run_command,
    weights,
)

from masked_diffusion.processes.preemption import STOPPED
from masked_diffusion.runs.checkpoint import newest_complete_step

pytestmark = pytest.mark.e2e

TRAIN = "scripts/image_train.py"
STEPS = 40
FLAGS = [*TINY_DIGITS, "--max_steps", STEPS, "--save_interval", 10, "--lr", "1e-3", "--ema_rate", "0.9",
         "--schedule_sampler", "loss-second-moment", "--diffusion_steps", "50"]  # fmt: skip
KINDS = ("model", "ema_0.9_")


def start(folder, *flags, processes=None, launcher_flags=()):
    arguments = command(TRAIN, *FLAGS, *flags, processes=processes)
    arguments[3:3] = launcher_flags
    return begin(arguments, environment(folder))


def wait_for_step(process, folder, step):
    """Until the run has logged a step, or is over."""
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and not has_logged(folder, step):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module", params=[None, 2], ids=["one process", "two processes"])
def undisturbed(request, module_folder):
    folder = module_folder("undisturbed")
    run(TRAIN, folder, *FLAGS, processes=request.param)
    return folder, request.param


def assert_ends_as(folder, undisturbed):
    for kind in KINDS:
        assert_same_weights(weights(undisturbed, STEPS, kind), weights(folder, STEPS, kind))
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(undisturbed)]


# The launcher decides what it passes on to several processes; SIGTERM is what schedulers send.
@pytest.mark.parametrize(
    "undisturbed, number",
    [(None, signal.SIGTERM), (None, signal.SIGINT), (None, signal.SIGUSR1), (2, signal.SIGTERM)],
    indirect=["undisturbed"],
    ids=str,
)
def test_a_signal_lets_the_run_save_and_the_same_command_goes_on(undisturbed, tmp_path, number):
    reference, processes = undisturbed
    process = start(tmp_path, processes=processes)
    wait_for_step(process, tmp_path, 12)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == STOPPED if processes is None else process.returncode != 0, out
    [step] = [
        int(line.split("after step ")[1].split(";")[0]) for line in out.splitlines() if "stopped by a signal" in line
    ]
    assert 12 <= step < STEPS and (tmp_path / f"checkpoint{step:06d}.json").exists()
    run(TRAIN, tmp_path, *FLAGS, processes=processes)
    assert_ends_as(tmp_path, reference)


@pytest.mark.parametrize("undisturbed, launched", [(None, False), (2, True)], indirect=["undisturbed"], ids=str)
def test_loader_processes_do_not_die_of_a_signal_to_the_whole_group(undisturbed, tmp_path, launched):
    """torchrun and many schedulers send it so. Without its loaders a training could not finish its step."""
    reference, processes = undisturbed
    process = start(tmp_path, "--num_workers", 2, processes=processes)
    wait_for_step(process, tmp_path, 12)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == STOPPED if not launched else process.returncode != 0, out
    assert "stopped by a signal after step" in out and "DataLoader worker" not in out, out
    step = int(rows(tmp_path)[-1]["step"])
    assert (tmp_path / f"checkpoint{step:06d}.json").exists()


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
def test_torchrun_passes_on_the_signal_of_a_slurm_preemption_where_it_is_told_to(undisturbed, tmp_path):
    from torch.distributed.run import get_args_parser

    if not any("--signals-to-handle" in action.option_strings for action in get_args_parser()._actions):
        pytest.skip("this torchrun has no --signals-to-handle")
    process = start(tmp_path, processes=2, launcher_flags=["--signals-to-handle=SIGTERM,SIGUSR1"])
    wait_for_step(process, tmp_path, 12)
    os.kill(process.pid, signal.SIGUSR1)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0 and "stopped by a signal after step" in out, out
    step = int(rows(tmp_path)[-1]["step"])
    assert 12 <= step < STEPS and (tmp_path / f"checkpoint{step:06d}.json").exists()


def test_a_run_goes_on_with_its_global_batch_on_another_number_of_processes(undisturbed, tmp_path):
    reference, processes = undisturbed
    other = {None: 2, 2: None}[processes]
    run(TRAIN, tmp_path, *FLAGS, "--max_steps", 20, processes=processes)
    done = run(TRAIN, tmp_path, *FLAGS, processes=other)
    assert f"the global batch stays {4 * (processes or 1)}" in done.stdout
    assert [row["samples"] for row in rows(tmp_path)] == [row["samples"] for row in rows(reference)]
    for kind in KINDS:
        assert_same_weights(weights(reference, STEPS, kind), weights(tmp_path, STEPS, kind), atol=0.1 * 1e-3)


def test_a_run_killed_again_and_again_ends_bit_for_bit_where_an_undisturbed_one_ends(undisturbed, tmp_path):
    reference, processes = undisturbed
    chance = random.Random(processes)
    kills, first_step = 0, 5
    while kills < 4:
        process = start(tmp_path, "--num_workers", kills % 2, processes=processes)
        wait_for_step(process, tmp_path, first_step + 7 * kills)
        time.sleep(chance.uniform(0, 0.1))
        kill_run(process, tmp_path)
        kills += 1
    run(TRAIN, tmp_path, *FLAGS, processes=processes)
    assert_ends_as(tmp_path, reference)


DEATH = """
import os, signal, sys, time
from pathlib import Path
from masked_diffusion.image_datasets import DigitsDataset

load, loaded = DigitsDataset.load, 0

def failing(self, index, rng=None):
    global loaded
    loaded += rng is not None  # not the check of the first batch
    if loaded > {images} and os.environ["{rank_variable}"] == "1":
        Path({note!r}).write_text(str(time.time()))
        {death}
    return load(self, index, rng)

DigitsDataset.load = failing
sys.path.insert(0, {scripts!r})
import image_train
sys.exit(image_train.main())
"""
EXCEPTION = "raise RuntimeError('a dead disk')"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def dying_program(folder, rank_variable, death, images=0):
    """A training whose rank 1 dies after so many images, and a file that says when."""
    program, note = folder / "dies.py", folder / "died"
    program.write_text(
        DEATH.format(
            rank_variable=rank_variable, death=death, images=images, note=str(note), scripts=str(REPO / "scripts")
        )
    )
    return program, note


@pytest.mark.parametrize("death", [EXCEPTION, KILL], ids=["exception", "SIGKILL"])
def test_a_rank_that_dies_in_training_under_torchrun_takes_the_job_down_within_a_minute(tmp_path, death):
    """The documented time. The last checkpoint stays whole, and the same command goes on from it."""
    program, note = dying_program(tmp_path, "RANK", death, images=4 * 7)
    flags = [*TINY_DIGITS, "--save_interval", 2, "--max_steps", 1000]
    done = run_command(command(program, *flags, processes=2), environment(tmp_path))
    assert time.time() - float(note.read_text()) < 60
    assert done.returncode != 0 and ("a dead disk" if death == EXCEPTION else "SIGKILL") in done.stderr
    reports = []
    newest = newest_complete_step(tmp_path, reports.append)
    # An exception lets rank 0 save the last step that all made; SIGKILL leaves what was already written.
    assert newest == rows(tmp_path)[-1]["step"] > 4 if death == EXCEPTION else newest in (2, 4)
    assert not reports
    run(TRAIN, tmp_path, *TINY_DIGITS, "--max_steps", 10, processes=2)
    assert (tmp_path / "checkpoint000010.json").exists() and rows(tmp_path)[-1]["samples"] == 10 * 8


def test_a_rank_that_dies_under_mpiexec_takes_the_job_down(tmp_path):
    """mpi4py's goodbye is collective: without an abort, the dead rank would wait for the living and they for it."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("mpiexec is not installed")
    program, _ = dying_program(tmp_path, "PMI_RANK", EXCEPTION)
    flags = [str(flag) for flag in TINY_DIGITS]
    done = run_command([mpiexec, "-n", "2", sys.executable, str(program), *flags], environment(tmp_path), timeout=60)
    assert done.returncode != 0 and "a dead disk" in done.stderr


def lose_a_rank(processes, folder):
    """Kill rank 1 after some steps, and wait for the launchers. Returns what they said."""
    wait_for_step(processes[0], folder, 12)
    os.kill(pid_of_rank(1, folder), signal.SIGKILL)
    return [process.communicate(timeout=TIMEOUT)[0] for process in processes]


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
def test_ranks_whose_torchrun_is_killed_save_and_end_by_themselves(undisturbed, tmp_path):
    """Otherwise they would write into the folder in which the same command already runs again."""
    process = start(tmp_path, processes=2)
    wait_for_step(process, tmp_path, 12)
    ranks = [pid_of_rank(number, tmp_path) for number in range(2)]
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    step = int(rows(tmp_path)[-1]["step"])
    assert 12 <= step < STEPS and (tmp_path / f"checkpoint{step:06d}.json").exists()
    run(TRAIN, tmp_path, *FLAGS, processes=2)
    assert_ends_as(tmp_path, undisturbed[0])


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
def test_after_a_rank_is_killed_torchrun_goes_on_by_itself_from_the_last_checkpoint(undisturbed, tmp_path):
    process = start(tmp_path, processes=2, launcher_flags=["--max-restarts=1"])
    [out] = lose_a_rank([process], tmp_path)
    assert process.returncode == 0 and "resuming from the checkpoint of step 10" in out, out
    assert_ends_as(tmp_path, undisturbed[0])


def test_torchrun_starts_a_refused_command_again_and_it_is_refused_with_the_same_line_at_once(monkeypatch, tmp_path):
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS) == 0
    lock = tmp_path / ".training.lock"
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path != lock}
    process = start(tmp_path, "--resume_checkpoint", "", processes=1, launcher_flags=["--max-restarts=1"])
    out, _ = process.communicate(timeout=TIMEOUT)
    said = [line for line in out.splitlines() if line.startswith("image_train.py: error: ")]
    assert process.returncode != 0 and len(said) == 2 and said[0] == said[1] and "has checkpoints" in said[0], out
    assert contents == {path: path.read_bytes() for path in tmp_path.rglob("*") if path != lock}
    last = re.findall(r"\(pid: (\d+)\)", out)[-1]
    assert f"process {last} " not in lock.read_text()  # the last attempt did not come as far as to the folder


@pytest.mark.parametrize("undisturbed", [2], indirect=True)
def test_after_a_rank_is_killed_the_published_scripts_go_on_by_themselves_on_both_nodes(undisturbed, tmp_path):
    given = dict(zip(map(str, FLAGS[::2]), FLAGS[1::2], strict=True))
    settings = {
        "NUM_NODE": 2, "GPU_PRE_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    for name, flag in (("DATA_PATH", "data_dir"), ("MODEL", "model"), ("IMAGE_SIZE", "image_size"),
                       ("MASK_RATIO", "mask_ratio"), ("BATCH_SIZE", "batch_size"),
                       ("DIFFUSION_STEPS", "diffusion_steps")):  # fmt: skip
        settings[name] = given[f"--{flag}"]
    nodes = [
        begin(["bash", str(REPO / script), *map(str, FLAGS)], environment(tmp_path, RANK=rank, **settings))
        for rank, script in enumerate(["run_ddp_master.sh", "run_ddp_worker.sh"])
    ]
    outputs = lose_a_rank(nodes, tmp_path)
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "resuming from the checkpoint of step 10" in outputs[0]
    assert_ends_as(tmp_path, undisturbed[0])

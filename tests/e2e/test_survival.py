"""Disks that fill up, files that rot, processes that die while they write, samplings that are cut off.

What is done stays done, and the same command ends where an undisturbed run ends.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

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
    few_steps,
    has_logged,
    kill_run,
    pid_of_rank,
    rows,
    run,
    weights,
)

pytestmark = pytest.mark.e2e

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"
STEPS = 12
FLAGS = [*TINY_DIGITS, "--max_steps", STEPS, "--save_interval", 4, "--lr", "1e-3", "--ema_rate", "0.9",
         "--diffusion_steps", "50"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(module_folder):
    folder = module_folder("undisturbed")
    run(TRAIN, folder, *FLAGS)
    return folder


def assert_ends_as(folder, undisturbed):
    for kind in ("model", "ema_0.9_"):
        assert_same_weights(weights(undisturbed, STEPS, kind), weights(folder, STEPS, kind))


# -- while a checkpoint is written -------------------------------------------------------------------------------------

SLOW_DISK = f"""
import sys, time
from masked_diffusion.runs import checkpoint

class Slowly(dict):
    def items(self):
        for item in super().items():
            time.sleep(0.4)
            yield item
        time.sleep(0.4)

class SlowWriter(checkpoint.CheckpointWriter):
    def _write(self, step, parts, config):
        super()._write(step, Slowly(parts), config)

checkpoint.CheckpointWriter = SlowWriter
sys.path.insert(0, {str(REPO / "scripts")!r})
import image_train
sys.exit(image_train.main())
"""


@pytest.mark.parametrize("written", ["model000008.pt", "opt000008.pt", "state000008.pt"])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(undisturbed, tmp_path, written):
    program = tmp_path / "slow_disk.py"
    program.write_text(SLOW_DISK)
    folder = tmp_path / "run"
    process = begin([sys.executable, str(program), *map(str, FLAGS)], environment(folder))
    deadline = time.monotonic() + TIMEOUT
    while not (folder / written).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill_run(process, folder)
    assert (folder / "checkpoint000004.json").exists() and not (folder / "checkpoint000008.json").exists()
    done = run(TRAIN, folder, *FLAGS)
    assert "resuming from the checkpoint of step 4" in done.stdout
    assert_ends_as(folder, undisturbed)
    assert [row["step"] for row in rows(folder)] == list(range(1, STEPS + 1))


# -- files that rot ----------------------------------------------------------------------------------------------------


def tear(content):
    return content[: len(content) // 2]


def zero(content):
    return bytes(len(content))


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage, name",
    [(tear, "model"), (zero, "opt"), (flip_a_bit, "ema_0.9_"), (tear, "checkpoint"), (zero, "checkpoint")],
)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    undisturbed, tmp_path, monkeypatch, capsys, damage, name
):
    assert call(monkeypatch, TRAIN, tmp_path, *FLAGS, "--max_steps", 8) == 0
    [path] = tmp_path.glob(f"{name}000008.*")
    path.write_bytes(damage(path.read_bytes()))
    assert call(monkeypatch, TRAIN, tmp_path, *FLAGS, sinks="stdout,csv") == 0
    out = capsys.readouterr().out
    assert "the checkpoint of step 8" in out and "is damaged" in out and "resuming from the checkpoint of step 4" in out
    assert path.with_name(path.name + ".corrupt").exists()
    assert_ends_as(tmp_path, undisturbed)


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """Mount a small file system. Call it with mount options; a second call changes them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    is_mounted = False

    def mount(options):
        nonlocal is_mounted
        options = f"remount,{options}" if is_mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        is_mounted = True
        return folder

    try:
        yield mount
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_but_nothing_that_was_saved(undisturbed, mounted):
    disk = mounted("size=40m")  # one checkpoint has 26 MB
    done = run(TRAIN, disk, *FLAGS, check=False)
    assert done.returncode not in (0, 2) and "No space left" in done.stderr
    assert "could not save the checkpoint of step 8" in done.stdout
    assert [path.name for path in disk.glob("checkpoint*.json")] == ["checkpoint000004.json"]
    assert not list(disk.glob(".*.tmp")) and not list(disk.glob("*000008.pt"))
    mounted("size=200m")
    done = run(TRAIN, disk, *FLAGS)
    assert "resuming from the checkpoint of step 4" in done.stdout
    assert_ends_as(disk, undisturbed)


def test_a_folder_that_cannot_be_written_is_refused_before_the_start(undisturbed, mounted):
    disk = mounted("size=1m,ro")
    model = undisturbed / f"ema_0.9_{STEPS:06d}.pt"
    for path, flags in (
        (TRAIN, FLAGS),
        (SAMPLE, ["--model_path", model, "--num_samples", 1, *few_steps(2)]),
    ):
        done = run(path, disk, *flags, check=False)
        assert done.returncode == 2 and "cannot write there (Read-only file system)" in done.stderr
        assert "Traceback" not in done.stderr


# -- sampling ----------------------------------------------------------------------------------------------------------


def sampling(undisturbed, num_samples=60):
    model = undisturbed / f"ema_0.9_{STEPS:06d}.pt"
    return ["--model_path", model, "--num_sampling_steps", 50, "--num_samples", num_samples, "--batch_size", 2,
            "--cfg_cond", "True", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed_samples(undisturbed, module_folder):
    folder = module_folder("samples")
    run(SAMPLE, folder, *sampling(undisturbed))
    return (folder / "samples_60x8x8x3.npz").read_bytes()


def start_sampling(folder, flags, processes):
    return begin(command(SAMPLE, *flags, processes=processes), environment(folder))


def parts(folder):
    return sorted(folder.glob("parts_*/*.npy"))


def wait_for_parts(process, folder, number):
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and len(parts(folder)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sampling_killed_again_and_again_makes_the_same_bytes_on_any_number_of_ranks(
    undisturbed, undisturbed_samples, tmp_path
):
    flags, chance = sampling(undisturbed), random.Random(0)
    for processes, enough in ((None, 3), (2, 8), (None, 12), (2, 16)):
        process = start_sampling(tmp_path, flags, processes)
        wait_for_parts(process, tmp_path, enough)
        time.sleep(chance.uniform(0, 0.2))
        kill_run(process, tmp_path)
        kept = parts(tmp_path)
        assert enough <= len(kept) < 30
        kept[0].write_bytes(kept[0].read_bytes()[:100])  # as an old disk may
    run(SAMPLE, tmp_path, *flags)
    assert (tmp_path / "samples_60x8x8x3.npz").read_bytes() == undisturbed_samples
    assert json.loads((tmp_path / "manifest.json").read_text())["samples"] == "samples_60x8x8x3.npz"
    assert not parts(tmp_path)


def test_a_rank_that_dies_while_sampling_costs_the_others_nothing_they_wrote(
    undisturbed, undisturbed_samples, tmp_path
):
    flags = sampling(undisturbed)
    process = start_sampling(tmp_path, flags, processes=2)
    wait_for_parts(process, tmp_path, 6)
    os.kill(pid_of_rank(1, tmp_path), signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)
    kept = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert process.returncode != 0 and len(kept) >= 6
    process = start_sampling(tmp_path, flags, processes=None)
    wait_for_parts(process, tmp_path, len(kept) + 1)
    assert all(path.stat().st_mtime_ns == kept[path] for path in parts(tmp_path) if path in kept)
    process.communicate(timeout=TIMEOUT)
    assert (tmp_path / "samples_60x8x8x3.npz").read_bytes() == undisturbed_samples


# -- the slow set ------------------------------------------------------------------------------------------------------

LONG = [*TINY_DIGITS, "--max_steps", 600, "--save_interval", 3, "--keep_checkpoints", 2, "--lr", "1e-3",
        "--ema_rate", "0.9", "--diffusion_steps", "50"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2], ids=["one process", "two processes"])
def test_fifty_kills_at_any_moment_change_nothing(processes, tmp_path):
    """Half of them at a random time after the start, half after some more steps."""
    run(TRAIN, tmp_path / "undisturbed", *LONG, processes=processes)
    folder, chance = tmp_path / "killed", random.Random(1)
    for kill in range(25):
        arguments = command(TRAIN, *LONG, "--num_workers", kill % 3, processes=processes)
        process = begin(arguments, environment(folder))
        if kill % 2:
            time.sleep(chance.uniform(0, 5))  # a start takes about as long
        else:
            before = rows(folder)[-1]["step"] if (folder / "progress.csv").exists() and rows(folder) else 0
            deadline = time.monotonic() + TIMEOUT
            goal = before + chance.randint(1, 8)
            while process.poll() is None and not has_logged(folder, goal):
                assert time.monotonic() < deadline
                time.sleep(0.005)
        assert process.poll() is None, "it ended before all kills"
        kill_run(process, folder)
    run(TRAIN, folder, *LONG, processes=processes)
    for kind in ("model", "ema_0.9_"):
        assert_same_weights(weights(tmp_path / "undisturbed", 600, kind), weights(tmp_path / "killed", 600, kind))
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(tmp_path / "undisturbed")]

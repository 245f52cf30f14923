"""Loader processes end with the process that started them, in whichever way that ends; a signal is heeded meanwhile."""

import os
import shutil
import signal
import sys
import time

import pytest
from support import TIMEOUT, TINY_DIGITS, begin, command, environment, names_in_order, processes_of, rows, run_command

from masked_diffusion.processes.preemption import STOPPED

pytestmark = pytest.mark.e2e

OPEN = """
import sys
from masked_diffusion.image_datasets import load_data
data = load_data(data_dir="builtin:digits", batch_size=2, image_size=8, num_workers=2, random_flip=False)
next(data)
"""
# An error in a loader process; as at an interactive prompt, the traceback stays, and what it has seen.
FAIL = """
from masked_diffusion.image_datasets import DigitsDataset
def load(self, index, rng=None):
    raise ValueError("no image")
DigitsDataset.load = load
data = load_data(data_dir="builtin:digits", batch_size=2, image_size=8, num_workers=2, random_flip=False)
try:
    next(data)
except ValueError as error:
    kept = error
print("failed", "no image" in str(kept))
"""


@pytest.mark.parametrize("script", [OPEN, OPEN + FAIL], ids=["never closed", "an error is kept"])
def test_a_process_ends_although_its_loader_was_not_closed(tmp_path, script):
    done = run_command([sys.executable, "-c", script], environment(tmp_path), timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert ("failed True" in done.stdout) == (FAIL in script)


TRAIN = "scripts/image_train.py"


def test_a_signal_is_heeded_while_a_disk_hangs_and_what_was_trained_is_saved(colour_folder, tmp_path):
    data = shutil.copytree(colour_folder, tmp_path / "data")
    run = tmp_path / "run"
    flags = [*TINY_DIGITS, "--data_dir", data, "--num_workers", "1", "--batch_size", "4", "--max_steps", "100000"]
    process = begin(command(TRAIN, *flags), environment(run))
    deadline = time.monotonic() + TIMEOUT
    seen = [0]

    def steps():
        return len(rows(run)) if (run / "progress.csv").exists() else 0

    def hangs():
        seen.append(steps())
        return seen[-1] == seen[-2]

    def wait_until(happened):
        while not happened():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(1)

    wait_until(steps)
    # A file that is listed, and whose content never comes.
    os.mkfifo(tmp_path / "fifo")
    os.replace(tmp_path / "fifo", names_in_order(data)[20])
    wait_until(hangs)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == STOPPED, said
    assert (run / f"checkpoint{steps():06d}.json").exists()
    assert processes_of(run) == []

"""A disk that hangs is said and leaves a run that loads its images itself, which heeds signals meanwhile."""

import os
import signal
import threading
import time

import pytest
import torch
from support import TINY_DIGITS, call

from masked_diffusion.image_datasets import DigitsDataset
from masked_diffusion.processes import waiting
from masked_diffusion.processes.loader_processes import iterate
from masked_diffusion.processes.preemption import STOPPED
from masked_diffusion.processes.reading_thread import read_watched
from masked_diffusion.processes.waiting import LoaderError, StoppedWaitingError

TRAIN = "scripts/image_train.py"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 1.0)


@pytest.fixture
def disk():
    """A disk that hangs until the test is over, and that leaves no thread then."""
    before = set(threading.enumerate())
    answers = threading.Event()
    yield answers
    answers.set()
    for thread in set(threading.enumerate()) - before:
        if thread.name == "reading":
            thread.join(10)
            assert not thread.is_alive()


class Items:
    def __init__(self, trouble, disk):
        self.trouble, self.disk = trouble, disk

    def __getitem__(self, index):
        if index == self.trouble:
            self.disk.wait()
        return torch.tensor(index)


def test_the_file_that_is_waited_for_is_named(disk):
    batches = iterate(Items(3, disk), 0, name_of="image {}.png".format, batch_sampler=[[0, 1], [2, 3]])
    assert next(batches).tolist() == [0, 1]
    began = time.monotonic()
    with pytest.raises(LoaderError, match=r"--data_dir: image 3.png has not come for \d+ s; see whether .* hangs"):
        next(batches)
    assert time.monotonic() - began < 8


def test_a_wait_ends_when_the_run_is_asked_to_stop(disk):
    batches = iterate(Items(0, disk), 0, lambda: True, batch_sampler=[[0]])
    with pytest.raises(StoppedWaitingError, match="waiting for item 0"):
        next(batches)


def test_what_reading_raises_is_raised_as_it_is():
    def fail():
        raise FileNotFoundError("the bucket is gone")

    with pytest.raises(FileNotFoundError, match="the bucket is gone"):
        read_watched(fail, "an image")


@pytest.fixture
def hanging_digits(monkeypatch, disk):
    """Let the disk hang from the n-th image on. Returns whether it does, as an event."""
    load, hangs = DigitsDataset.load, threading.Event()

    def hang_from(number):
        numbers = iter(range(number))

        def load_some(self, index, rng=None):
            if next(numbers, None) is None:
                hangs.set()
                disk.wait()
            return load(self, index, rng)

        monkeypatch.setattr(DigitsDataset, "load", load_some)
        return hangs

    return hang_from


@pytest.mark.parametrize("number, saves", [(5, False), (16 + 4 * 4, True)], ids=["first images", "training"])
def test_a_training_on_a_disk_that_hangs_ends_in_one_line(monkeypatch, tmp_path, capsys, hanging_digits, number, saves):
    hanging_digits(number)
    status = call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, "--max_steps", 9)
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and ": error: --data_dir: image " in line, line
    assert "has not come for" in line and bool(list(tmp_path.glob("model00000*.pt"))) is saves


def test_a_signal_is_heeded_while_an_image_is_waited_for(monkeypatch, tmp_path, hanging_digits):
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 60.0)
    hangs = hanging_digits(16 + 4 * 4)

    def stop():
        hangs.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert call(monkeypatch, TRAIN, tmp_path, *TINY_DIGITS, "--max_steps", 9) == STOPPED
    assert list(tmp_path.glob("checkpoint00000*.json"))

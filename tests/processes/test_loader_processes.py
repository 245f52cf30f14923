"""Loader processes that cannot deliver end a run soon, in a sentence, and leave nothing behind."""

import multiprocessing
import os
import resource
import signal
import tempfile
import time
from multiprocessing import process
from pathlib import Path

import pytest
import torch
from support import TINY_DIGITS, call, make_colour_folder

from masked_diffusion.image_datasets import load_data, open_dataset
from masked_diffusion.processes import loader_processes, waiting
from masked_diffusion.processes.loader_processes import iterate
from masked_diffusion.processes.waiting import LoaderError, StoppedWaitingError, progress


@pytest.fixture(autouse=True)
def _no_handler_of_other_tests():
    """A loader of torch that another test made in this process leaves its handler, which raises anywhere."""
    former = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, former)


class Items:
    """1000 items; of the one numbered ``trouble``, ``cause`` is called while it is loaded."""

    def __init__(self, trouble=-1, cause=lambda: None):
        self.trouble, self.cause = trouble, cause

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index == self.trouble:
            self.cause()
        return torch.full((3,), float(index))


def hang():
    time.sleep(1000)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "SILENCE_SECONDS", 1.5)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert multiprocessing.active_children() == []


def firsts(batches):
    return [batch[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_data_set(num_workers):
    batches = iterate(Items(), num_workers, batch_sampler=[[0, 1], [2], [5, 4]])
    assert firsts(batches) == [[0, 1], [2], [5, 4]]


def test_a_disk_that_hangs_ends_the_wait_with_what_to_do():
    batches = iterate(Items(trouble=2, cause=hang), 1, batch_sampler=[[0, 1], [2, 3], [4]])
    assert next(batches)[0, 0] == 0
    began = time.monotonic()
    with pytest.raises(LoaderError) as raised:
        next(batches)
    assert time.monotonic() - began < 8
    assert all(knob in str(raised.value) for knob in ("--data_dir hangs", "TMPDIR", "/dev/shm", "ulimit -n"))
    assert str(raised.value).endswith("--num_workers 0") and "\n" not in str(raised.value)


def test_the_files_that_hang_are_named(tmp_path):
    folder = make_colour_folder(tmp_path / "data", per_class=2)
    dataset = open_dataset(str(folder), image_size=8)
    fifo = folder / "green" / "1.png"  # listed; its content never comes
    fifo.unlink()
    os.mkfifo(fifo)
    batches = load_data(data_dir=str(folder), batch_size=6, image_size=8, num_workers=1, dataset=dataset)
    with pytest.raises(LoaderError, match=rf"they waited for {fifo}; see whether the storage of --data_dir hangs"):
        next(batches)


def test_of_many_files_that_hang_three_are_named():
    class Hanging(Items):
        def __getitem__(self, index):
            hang()

    batches = iterate(Hanging(), 4, name_of="{}.png".format, batch_sampler=[[n, n + 4] for n in range(4)])
    with pytest.raises(LoaderError, match="they waited for 0.png, 1.png, 2.png and 1 more; see"):
        next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_slow_items_are_waited_for(num_workers):
    class Slow(Items):
        def __getitem__(self, index):
            time.sleep(0.6)
            return super().__getitem__(index)

    assert firsts(iterate(Slow(), num_workers, batch_sampler=[[0, 1, 2, 3, 4]])) == [
        [0, 1, 2, 3, 4]
    ]  # 3 s without a batch


def read_on(seconds):
    """Read for so long, a little at a time."""
    until = time.monotonic() + seconds
    with open("/dev/zero", "rb", buffering=0) as file:
        while time.monotonic() < until:
            file.read(1 << 16)
            time.sleep(0.1)


def test_an_item_that_is_read_on_is_waited_for_but_not_for_ever(monkeypatch):
    trouble = Items(trouble=0, cause=lambda: read_on(3))
    assert firsts(iterate(trouble, 1, batch_sampler=[[0]])) == [[0]]
    monkeypatch.setattr(waiting, "SLOW_ITEM_SECONDS", 2.0)
    began = time.monotonic()
    with pytest.raises(LoaderError, match="nothing came from them for"):
        next(iterate(Items(trouble=0, cause=lambda: read_on(1000)), 1, batch_sampler=[[0]]))
    assert time.monotonic() - began < 8


def test_reading_and_computing_are_progress_and_sleeping_is_not():
    def after(work):
        before = progress(Path("/proc/self"))
        work()
        return [b > a for a, b in zip(before, progress(Path("/proc/self")), strict=True)]

    def compute():
        until = time.process_time() + 1.1
        while time.process_time() < until:
            pass

    assert after(compute)[0] and after(lambda: read_on(0.2))[2]
    sleeping = multiprocessing.get_context("fork").Process(target=hang)
    sleeping.start()
    time.sleep(0.5)
    before = progress(Path(f"/proc/{sleeping.pid}"))
    time.sleep(0.5)
    assert progress(Path(f"/proc/{sleeping.pid}")) == before and len(before) == 3
    sleeping.kill()
    sleeping.join()
    assert progress(Path(f"/proc/{sleeping.pid}")) == []


def test_the_time_of_a_suspended_run_does_not_count():
    context = multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Event()

    def slow():
        begun.set()
        time.sleep(3)

    def load():
        os.setpgid(0, 0)
        assert firsts(iterate(Items(trouble=0, cause=slow), 1, batch_sampler=[[0]])) == [[0]]
        done.set()

    run = context.Process(target=load)
    run.start()
    try:
        assert begun.wait(20)
        time.sleep(0.4)  # or the item's begin would be a sign of life that is seen afterwards
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(2.4)
        os.killpg(run.pid, signal.SIGCONT)
        assert done.wait(20)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.join()


def test_a_wait_ends_when_the_run_is_asked_to_stop():
    asked = []
    batches = iterate(Items(trouble=1, cause=hang), 1, lambda: bool(asked), batch_sampler=[[0], [1]])
    next(batches)
    asked.append(True)
    began = time.monotonic()
    with pytest.raises(StoppedWaitingError):
        next(batches)
    assert time.monotonic() - began < 1.4


def test_a_killed_process_is_said_when_its_batch_is_waited_for_and_not_before():
    batches = iterate(Items(trouble=9, cause=hang), 1, batch_sampler=[[n] for n in range(100)])
    next(batches)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # torch would raise here, whatever is done at the time
    with pytest.raises(LoaderError, match=r"was killed.*memory.*--num_workers 0"):
        for _ in batches:
            pass


@pytest.fixture
def long_tmpdir(monkeypatch, tmp_path):
    folder = tmp_path / ("x" * 133)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(process.current_process()._config, "tempdir", str(folder))


def test_processes_are_not_left_when_not_all_can_be_started(monkeypatch):
    start, started = multiprocessing.Process.start, []

    def fail_at_the_second(self):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(self)
        start(self)

    monkeypatch.setattr(multiprocessing.Process, "start", fail_at_the_second)
    with pytest.raises(LoaderError, match="temporarily unavailable.*--num_workers 0"):
        next(iterate(Items(), 2, batch_sampler=[[0]]))
    started[0].join(5)


@pytest.mark.usefixtures("long_tmpdir")
def test_a_long_tmpdir_is_named_before_anything_is_waited_for():
    with pytest.raises(LoaderError, match=r"TMPDIR .*x{133} is too long.*--num_workers 0"):
        next(iterate(Items(), 2, batch_sampler=[[0]]))


@pytest.mark.usefixtures("long_tmpdir")
def test_a_training_whose_loaders_cannot_deliver_ends_in_one_line(monkeypatch, tmp_path, capsys):
    status = call(monkeypatch, "scripts/image_train.py", tmp_path / "run", *TINY_DIGITS, "--num_workers", 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and ": error: " in line and "TMPDIR" in line and line.endswith("--num_workers 0")


def test_few_open_files_are_named():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    numbers = list(map(int, os.listdir("/proc/self/fd")))
    held = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(numbers) + 10, hard))
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(numbers) + 3 - len(numbers))]
        with pytest.raises(LoaderError, match=r"files.*ulimit -n.*--num_workers 0"):
            list(iterate(Items(), 2, batch_sampler=[[0]]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in held:
            os.close(number)


def test_too_little_shared_memory_is_named(monkeypatch):
    def allocate():
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    with pytest.raises(LoaderError, match=r"/dev/shm is missing or too small.*--num_workers 0"):
        next(iterate(Items(trouble=0, cause=allocate), 1, batch_sampler=[[0]]))
    monkeypatch.setattr(loader_processes, "SHARED_MEMORY", "/dev/no_such_folder")
    with pytest.raises(LoaderError, match=r"/dev/no_such_folder is missing or too small"):
        next(iterate(Items(), 1, batch_sampler=[[0]]))


def test_a_bus_error_is_for_want_of_shared_memory():
    trouble = Items(trouble=0, cause=lambda: os.kill(os.getpid(), signal.SIGBUS))
    with pytest.raises(LoaderError, match="/dev/shm is missing or too small"):
        next(iterate(trouble, 1, batch_sampler=[[0]]))


def test_what_an_item_raises_is_raised_as_it_is():
    def fail():
        raise OSError("the bucket is gone")

    with pytest.raises(OSError, match="the bucket is gone"):
        next(iterate(Items(trouble=0, cause=fail), 1, batch_sampler=[[0]]))

"""Trains the runs of a study, each in an ordinary run folder of its own."""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import image_train
from studying.plan import Run

from masked_diffusion.processes.preemption import STOPPED, StopSignals

TRAINING = Path(__file__).resolve().parent.parent / "image_train.py"
POLL_SECONDS = 0.2


class PassedOn(StopSignals):
    """Stop signals that reach the trainings at once, whatever this process is doing. A training saves and ends with
    status STOPPED, or dies of the signal where it has not begun."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: dict[subprocess.Popen[bytes], Run] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for process in list(self.processes):
            process.send_signal(number)
        super()._handle(number, frame)


class Trainer:
    """Trains runs, each in a folder of its own: in this process, or several at a time in processes of their own.

    status: of what ended the trainings early; 0 while nothing did.
    """

    def __init__(self, folder: Path, launcher: str, jobs: int, flags: list[str]) -> None:
        self.folder = folder
        self.status = 0
        self._launcher = shlex.split(launcher)
        self._jobs = jobs
        self._flags = flags

    def result_of(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def train(self, commands: dict[Run, list[str]]) -> Iterator[Run]:
        """Yield each run when its training has ended, until one is stopped. Raises RuntimeError for one that fails,
        when the others have saved and ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._jobs > 1 or self._launcher:
            yield from self._train_apart(commands)
            return
        for run, command in commands.items():
            if not self._ended(run, self.call(run, image_train.main, [*command, *self._flags])):
                return
            yield run

    def try_out(self, run: Run, command: list[str]) -> None:
        """Make a dry run in this process. Raises RuntimeError where it fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        dry = ["--dry_run", "True", "--out", str(self.folder / "dry_run")]  # which is not made
        if status := self.call(run, image_train.main, [*command, *self._flags, *dry]):
            raise RuntimeError(f"{run.name}: its dry run ended with status {status}; see {self.output_of(run)}")

    def _train_apart(self, commands: dict[Run, list[str]]) -> Iterator[Run]:
        waiting = list(commands.items())
        signals = PassedOn()
        with signals:
            try:
                while signals.processes or (waiting and not self.status):
                    while waiting and len(signals.processes) < self._jobs and not (self.status or signals.asked()):
                        self._start(*waiting.pop(0), signals)
                    for process in [process for process in signals.processes if process.poll() is not None]:
                        run = signals.processes.pop(process)
                        if self._ended(run, STOPPED if process.returncode and signals.asked() else process.returncode):
                            yield run
                    if signals.asked() and waiting:
                        self.status = STOPPED
                    time.sleep(POLL_SECONDS)
            finally:
                for process in signals.processes:
                    process.terminate()
                for process in signals.processes:
                    process.wait()

    def _start(self, run: Run, command: list[str], signals: PassedOn) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **self._environment(run)}
        arguments = [*self._launcher, sys.executable, str(TRAINING), *command, *self._flags]
        with self.output_of(run).open("a", encoding="utf-8") as file:
            process = subprocess.Popen(arguments, env=env, stdout=file, stderr=subprocess.STDOUT)
        signals.processes[process] = run
        if signals.received is not None:  # it came while the process was started
            process.send_signal(signals.received)

    def _ended(self, run: Run, status: int) -> bool:
        """Whether a training came to its end."""
        if status not in (0, STOPPED):
            raise RuntimeError(f"{run.name}: its training ended with status {status}; see {self.output_of(run)}")
        self.status = self.status or status
        return status == 0

    def output_of(self, run: Run) -> Path:
        return self.folder / f"{run.name}.txt"

    def _environment(self, run: Run) -> dict[str, str]:
        return {"OPENAI_LOGDIR": str(self.folder / run.name), "OPENAI_LOG_FORMAT": "csv,log"}

    def call(self, run: Run, main: Callable[[list[str]], int], command: list[str]) -> int:
        """Call a script in this process, with its output in the run's files. Returns its exit status."""
        former = dict(os.environ)
        os.environ.update(self._environment(run))
        try:
            with (
                self.output_of(run).open("a", encoding="utf-8") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
            ):
                return main(command)
        finally:
            os.environ.clear()
            os.environ.update(former)

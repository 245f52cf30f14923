"""Trains the runs of a study, each in an ordinary run folder of its own."""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import image_train
from studying.plan import Run

from masked_diffusion.processes.preemption import STOPPED

TRAINING = Path(__file__).resolve().parent.parent / "image_train.py"


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
        """Yield each run when its training has ended, until one is stopped. Raises RuntimeError for one that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._jobs == 1 and not self._launcher:
            for run, command in commands.items():
                if not self._ended(run, self._train_here(run, command)):
                    return
                yield run
            return
        waiting = list(commands.items())
        running: dict[Future[int], Run] = {}
        with ThreadPoolExecutor(self._jobs) as pool:
            while running or (waiting and not self.status):
                while waiting and len(running) < self._jobs and not self.status:
                    run, command = waiting.pop(0)
                    running[pool.submit(self._train_apart, run, command)] = run
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    run = running.pop(future)
                    if self._ended(run, future.result()):
                        yield run

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

    def _train_here(self, run: Run, command: list[str]) -> int:
        return self.call(run, image_train.main, [*command, *self._flags])

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

    def _train_apart(self, run: Run, command: list[str]) -> int:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **self._environment(run)}
        arguments = [*self._launcher, sys.executable, str(TRAINING), *command, *self._flags]
        with self.output_of(run).open("a", encoding="utf-8") as file:
            return subprocess.run(arguments, env=env, stdout=file, stderr=subprocess.STDOUT).returncode

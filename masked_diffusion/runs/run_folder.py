"""The output folder of a run: whose it is, and that one process alone writes there."""

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from masked_diffusion.files import lock, move_aside, numbered, remove_unfinished, write_json
from masked_diffusion.logger import named_folder, output_folder
from masked_diffusion.processes.launchers import Job
from masked_diffusion.processes.refusals import NotNowError
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import CONFIG_NAME, RunConfig, contradiction, read_config

LOCK_SECONDS = 10.0  # for a killed process to be gone
LOCK_NAMES = {".training.lock", ".sampling.lock"}


def own_folder(stack: contextlib.ExitStack, out: str = "", leave_no_trace: bool = False) -> Path:
    """The folder that ``--out`` or ``OPENAI_LOGDIR`` names or, without them, a dated one that no other start has.

    The dated one is made at once, because another start may come in the same second. It goes with the stack if nothing
    was written into it. leave_no_trace: only find its name.
    """
    folder = output_folder(out=out)
    if named_folder(out):
        return folder
    with writing_to(folder):
        for number in count(1):
            own = numbered(folder, number) if number > 1 else folder
            if leave_no_trace and not own.exists():
                return own
            with contextlib.suppress(FileExistsError):
                if not leave_no_trace:
                    own.mkdir()
                    stack.callback(_remove_unused, own)
                    return own
    raise AssertionError("numbers do not end")


def _remove_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= LOCK_NAMES:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def note_job(folder: Path, job: Job | None) -> None:
    """Leave in a folder which job writes there, for :func:`is_restart`."""
    if job is not None:
        write_json(folder / checkpoint.JOB_NAME, {"name": job.name, "command": job.command, "attempt": job.attempt})


def is_restart(folder: Path, job: Job | None, leave_no_trace: bool = False) -> bool:
    """Whether an earlier attempt of this job has begun to write here: what the command asked for then is done, and must
    not be done again to its work.

    A first attempt removes what a job of the same name has left, so hold the folder. leave_no_trace: it does not.
    """
    if job is None:
        return False
    marker = folder / checkpoint.JOB_NAME
    if not any(job.attempt):
        if not leave_no_trace:
            marker.unlink(missing_ok=True)
        return False
    try:
        former = json.loads(marker.read_text(encoding="utf-8"))
        return [former["name"], former["command"]] == [job.name, job.command] and former["attempt"] < job.attempt
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def held(folder: Path, work: str) -> Iterator[None]:
    """Be the only process that does this work in a folder, until the block ends or the process does, however it ends.

    work: ``training`` or ``sampling``; one may go on beside the other. Raises ValueError when another process still
    holds the folder after ``LOCK_SECONDS``. Of several machines, one sees the other's lock where their file system
    passes locks on.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f".{work}.lock").open("a+")
    with file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise NotNowError(
                    f"OPENAI_LOGDIR {folder}: {file.read() or 'another process'} is {work} there; wait for its end or "
                    "stop it, or give another OPENAI_LOGDIR"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def claim_folder(folder: Path, run_config: RunConfig) -> list[str]:
    """Make the output folder and write the configuration into it: this shows, too, that it can be written.

    What killed processes left half-written is removed. Returns what the user has to be told. Raises ValueError where
    the configuration would describe another run's weights.
    """
    has_other_config, messages = describes_another_run(folder, run_config), []
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if has_other_config:
            [moved] = move_aside(folder / CONFIG_NAME)
            messages.append(f"moved the {CONFIG_NAME} of another run, which saved nothing, to {moved.name}")
        remove_unfinished(folder, checkpoint.is_run_file)
        write_json(folder / CONFIG_NAME, run_config.as_json())
    return messages


def check_folder(folder: Path, run_config: RunConfig, overwrite: bool) -> list[str]:
    """Show that :func:`claim_folder` would succeed, and leave no trace."""
    if not overwrite:
        describes_another_run(folder, run_config)
    with writing_to(folder):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    return []


def describes_another_run(folder: Path, run_config: RunConfig) -> bool:
    """Whether the configuration in a folder is another run's, one that saved nothing. Raises ValueError if it did."""
    former = read_config(folder)
    difference = contradiction(former, run_config) if former is not None else None
    if difference and (found := checkpoint.weights_in(folder)):
        raise ValueError(
            f"OPENAI_LOGDIR {folder}: {found[-1].name} is of a run with {difference}; give another OPENAI_LOGDIR, or "
            "--overwrite True to move that run aside"
        )
    return difference is not None


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What fails in here is the output folder's fault, and is said so."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"OPENAI_LOGDIR {folder}: cannot write there ({error.strerror}); give a folder that you may write to"
        ) from error

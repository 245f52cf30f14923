"""The output folder of a run: whose it is, and that one process alone writes there."""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from masked_diffusion.files import move_aside, remove_unfinished, write_json
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import CONFIG_NAME, RunConfig, contradiction, read_config

LOCK_SECONDS = 10.0  # for a killed process to be gone


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
        while not _lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise ValueError(
                    f"OPENAI_LOGDIR {folder}: {file.read() or 'another process'} is {work} there; wait for its end or "
                    "stop it, or give another OPENAI_LOGDIR"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    """Whether the file is now this process's. Where there are no locks, it is."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        # Not flock: loader processes would inherit it, and outlive a killed process with it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


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

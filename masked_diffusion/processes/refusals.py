"""Repeat a refusal when torchrun starts a refused command again: it does so however often ``--max-restarts`` says."""

import contextlib
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from masked_diffusion.files import write_json

# What the file system says of an input that is wrong. Whatever else it says may have passed at the next attempt.
OF_THE_INPUT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


class NotNowError(ValueError):
    """Something that another attempt may no longer meet, such as a process that has not ended yet."""


def parent_process() -> str:
    """A name for the process that started this one, which no other process has or gets."""
    return f"{socket.gethostname()} {os.getppid()} {_started(os.getppid())}"


def note_refusal(error: BaseException, environ: Mapping[str, str]) -> None:
    """Leave the sentence of a refusal for the restarts of this torchrun on this machine.

    Leaves nothing where no restart follows, and where the next attempt may succeed: see :func:`outlasts_a_restart`.
    """
    restarts, allowed = _restarts(environ)
    if restarts < allowed and outlasts_a_restart(error):
        with contextlib.suppress(OSError):  # then the next attempt looks again, and refuses again
            write_json(_marker(), {"launcher": parent_process(), "said": str(error)})


def former_refusal(environ: Mapping[str, str]) -> str | None:
    """What an earlier attempt of this torchrun was refused with on this machine; None if it was not."""
    restarts, allowed = _restarts(environ)
    if not restarts:
        return None
    marker = _marker()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        left = json.loads(marker.read_text(encoding="utf-8"))
        if restarts >= allowed:  # nobody else will ask
            marker.unlink()
        if left["launcher"] == parent_process():
            return str(left["said"])
    return None


def outlasts_a_restart(error: BaseException | None) -> bool:
    """Whether the same command would be refused again: the input is wrong, and not the moment."""
    while error is not None:
        of_storage = isinstance(error, OSError) and not isinstance(error, OF_THE_INPUT)
        if of_storage or isinstance(error, NotNowError | RuntimeError):
            return False
        error = error.__cause__
    return True


def _restarts(environ: Mapping[str, str]) -> tuple[int, int]:
    """How often torchrun has started this command again, and how often it may."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    numbers = [int(environ.get(name, "0")) for name in names]
    return numbers[0], numbers[1]


def _marker() -> Path:
    name = hashlib.sha256(parent_process().encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir(), f"masked_diffusion_refused_{name}.json")


def _started(process: int) -> str:
    """When a process was started, as far as that can be told: its number may be another one's later."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""

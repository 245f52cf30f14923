"""Write files so that a crash leaves the old or the new one, and move old files aside instead of losing them."""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_UNFINISHED = re.compile(r"\.(.+)\.\d+\.tmp")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears under its name only when it is complete and on disk.

    The temporary file lies in the same folder: a rename is atomic only inside one file system. It is removed when
    writing fails. Its name is nobody else's: several machines may write one file of a shared folder at once.
    """
    partial = path.with_name(f".{path.name}.{secrets.randbits(64)}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, is_owned: Callable[[str], bool]) -> None:
    """Remove the temporary files that :func:`atomic_write` left in a folder when its process was killed.

    is_owned: whether the caller alone writes files of this name there. The number in a temporary name does not say
    whose it is.
    """
    for path in folder.glob(".*.tmp"):
        match = _UNFINISHED.fullmatch(path.name)
        if match and is_owned(match[1]):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, so that a rename in it is durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def numbered(path: Path, number: int) -> Path:
    """``samples.npz``, 2 -> ``samples_2.npz``; the same for folders."""
    return path.with_name(f"{path.stem}_{number}{path.suffix}")


def move_aside(*paths: Path) -> list[Path]:
    """Rename those of ``paths`` that exist to one common free number. Returns the new names."""
    number = 1
    while any(numbered(path, number).exists() for path in paths):
        number += 1
    existing = [path for path in paths if path.exists()]
    return [path.rename(numbered(path, number)) for path in existing]


def write_beside_former(path: Path, content: bytes) -> list[Path]:
    """Write a file atomically. One of other content under its name is moved aside to a numbered name first.

    A file of this very content is left as it is. Returns the new name of what was moved, if anything was.
    """
    if path.is_file() and path.read_bytes() == content:
        return []
    moved = move_aside(path)
    with atomic_write(path) as file:
        file.write(content)
    return moved


def lock(file: IO[Any]) -> bool:
    """Make an open file this process's until it is closed. Returns whether it is; where there are no locks, it is."""
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


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """Folder for what can be made again: ``masked_diffusion`` in $XDG_CACHE_HOME, else in ~/.cache.

    None for a user without a home folder: then nothing is kept.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masked_diffusion"
    except RuntimeError:  # as Path.home says that there is none
        return None

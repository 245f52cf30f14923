"""Lists of a large folder's files, kept between runs: on network storage, listing a million files takes minutes.

A list holds as long as every folder it was read from has the modification time of then: adding, removing or renaming a
file changes that of its folder. Links may lead anywhere, so a folder with links in it is listed anew each time.
"""

import contextlib
import hashlib
import json
import time
from pathlib import Path

from masked_diffusion.files import atomic_write, cache_folder

FEWEST_FILES = 10_000
# A folder that was changed just now may change again without getting another time, where clocks are coarse or apart.
QUIET_SECONDS = 60


def pack_paths(paths: list[str]) -> bytes:
    """Paths as one text, separated by NUL, which no path contains."""
    return "\0".join(paths).encode("utf-8", "surrogateescape")


def unpack_paths(packed: bytes) -> list[str]:
    """What :func:`pack_paths` packed."""
    return packed.decode("utf-8", "surrogateescape").split("\0")


def kept_listing(root: Path) -> list[str] | None:
    """The files below a folder as they were listed before; None where they were not, or where a folder has changed."""
    try:
        header, _, packed = _file_of(root).read_bytes().partition(b"\n")
        folders: dict[str, list[int]] = json.loads(header)
        current = all(_state(root / folder) == state for folder, state in folders.items())
    except (OSError, ValueError, AttributeError):  # none, not readable, or a folder is gone
        return None
    return unpack_paths(packed) if current else None


def keep_listing(root: Path, folders: list[str], files: list[str]) -> None:
    """Keep the list of files of a folder, if it is large and at rest. folders: all that were listed, below root."""
    if len(files) < FEWEST_FILES:
        return
    with contextlib.suppress(OSError):  # it saves time, and no more
        states = {folder: _state(root / folder) for folder in folders}
        if max(changed for changed, _ in states.values()) > time.time_ns() - QUIET_SECONDS * 10**9:
            return
        path = _file_of(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(states).encode() + b"\n" + pack_paths(files))


def _file_of(root: Path) -> Path:
    return cache_folder() / "listings" / hashlib.sha256(str(root.resolve()).encode("utf-8", "replace")).hexdigest()


def _state(folder: Path) -> list[int]:
    status = folder.stat()
    return [status.st_mtime_ns, status.st_ino]

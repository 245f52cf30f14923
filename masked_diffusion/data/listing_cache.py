"""Lists of a large folder's files, kept between runs: on network storage, listing a million files takes minutes.

A list holds as long as every folder it was read from has the times, size and number of then, and as a sample of the
folders has as many entries: adding, removing or renaming a file changes these of its folder. Copies that keep a
folder's modification time change its other time. Where times seem not to change at all, no list is kept. Links may lead
anywhere, so a folder with links in it is listed anew each time.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from masked_diffusion.data.path_table import PathList, PathTable
from masked_diffusion.files import atomic_write, cache_folder

FEWEST_FILES = 10_000
# A folder that was changed just now may change again without getting another time, where clocks are coarse or apart.
QUIET_SECONDS = 60
# Folders whose entries are counted before a kept list is believed; evenly spaced, the same on all ranks.
COUNTED_FOLDERS = 16
NAMED = 5  # of the things that are left out


@dataclass
class Listing:
    """What was found in a data folder and the folders below it.

    files: images, below the folder, sorted. skipped: number of files of other extensions, by extension in lower case.
    empty: folders that have no image in or below them. kept_in: where the list was kept, if not made anew. found:
    images, as they come while the folder is listed.
    """

    files: PathTable = field(default_factory=PathTable)
    skipped: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    kept_in: Path | None = None
    found: PathList = field(default_factory=PathList)

    @property
    def notes(self) -> list[str]:
        """What a user should know of it, a line each."""
        parts = []
        if self.skipped:
            kinds = sorted(self.skipped.items(), key=lambda kind: (-kind[1], kind[0]))
            parts.append(f"{self.skipped.total()} files ({some([f'{name} {number}' for name, number in kinds])})")
        if self.empty:
            parts.append(f"folders without images: {some(self.empty)}")
        lines = [f"left out: {'; '.join(parts)}"] if parts else []
        if self.kept_in is not None:
            lines.append(f"the list of files is the one of the last start; remove {self.kept_in} to list them anew")
        return lines


def some(items: list[str]) -> str:
    """The first few of a list, and their number."""
    return ", ".join(items[:NAMED]) + (f", ... ({len(items)} in all)" if len(items) > NAMED else "")


def kept_listing(root: Path) -> Listing | None:
    """The files below a folder as they were listed before; None where they were not, or where a folder has changed."""
    path = _file_of(root)
    if path is None:
        return None
    try:
        content = path.read_bytes()
        end = content.index(b"\n")
        record, packed = json.loads(content[:end]), memoryview(content)[end + 1 :]
        folders: dict[str, list[int]] = record["folders"]
        current = all(_state(root / folder) == state[:-1] for folder, state in folders.items())
        counted = sorted(folders)[:: -(-len(folders) // COUNTED_FOLDERS)]
        current = current and all(len(os.listdir(root / folder)) == folders[folder][-1] for folder in counted)
        current = current and hashlib.sha256(packed).hexdigest() == record["sha256"]
        listing = Listing(PathTable.unpacked(packed), Counter(record["skipped"]), record["empty"], path)
    except (OSError, ValueError, TypeError, AttributeError, LookupError):  # none, not readable, or a folder is gone
        return None
    return listing if current else None


def keep_listing(root: Path, folders: dict[str, int], listing: Listing) -> None:
    """Keep the list of files of a folder, if it is large and at rest. folders: all that were listed, below root, and
    how many entries each has."""
    path = _file_of(root)
    if path is None or len(listing.files) < FEWEST_FILES:
        return
    with contextlib.suppress(OSError):  # it saves time, and no more
        states = {folder: [*_state(root / folder), entries] for folder, entries in folders.items()}
        if max(modified for modified, *_ in states.values()) > time.time_ns() - QUIET_SECONDS * 10**9:
            return
        if _times_stand_still([(modified, changed) for modified, changed, *_ in states.values()]):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = listing.files.packed()
        digest = hashlib.sha256(packed).hexdigest()  # a list that was cut off would be a shorter one
        header = {"folders": states, "skipped": listing.skipped, "empty": listing.empty, "sha256": digest}
        with atomic_write(path) as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(packed)


def _times_stand_still(times: list[tuple[int, int]]) -> bool:
    """Whether the file system seems to give no true times: none at all, or all folders' are one and the same."""
    return min(min(pair) for pair in times) <= 0 or (
        len(times) > 1 and len({time for pair in times for time in pair}) == 1
    )


def _file_of(root: Path) -> Path | None:
    cache = cache_folder()
    if cache is None:
        return None
    return cache / "listings" / hashlib.sha256(str(root.resolve()).encode("utf-8", "replace")).hexdigest()


def _state(folder: Path) -> list[int]:
    status = folder.stat()
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size, status.st_nlink]

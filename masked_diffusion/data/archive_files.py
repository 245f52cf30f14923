"""Reading blocks of an archive by their offset, from any process and thread."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from masked_diffusion.data.image_files import is_remote, patiently
from masked_diffusion.data.listing_cache import Listing

# Archives that a process holds open: some systems allow 256 files.
_OPEN = 64


class ArchiveFile:
    """A local file read at offsets. Each process opens it when it first reads; threads may share it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from offset on, fewer at the end of the file. Raises OSError when the storage fails."""
        return patiently(self.path, partial(self._read, offset, length))

    def _read(self, offset: int, length: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        blocks, missing = [], length
        # One call gives at most 2 GiB.
        while missing and (block := os.pread(self._descriptor, missing, offset + length - missing)):
            blocks.append(block)
            missing -= len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def size(self) -> int:
        """Bytes of the file."""
        return os.stat(self.path).st_size  # noqa: PTH116


class ArchiveFiles:
    """Local files read at offsets, by their numbers. A process holds some of them open; threads may share them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._opened: dict[int, ArchiveFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def __getitem__(self, number: int) -> ArchiveFile:
        file = self._opened.get(number)
        if file is None:
            if len(self._opened) >= _OPEN:
                self._opened.pop(next(iter(self._opened)), None)  # closed when no thread reads it any more
            file = self._opened[number] = ArchiveFile(self.paths[number])
        return file


def is_outside(name: str) -> bool:
    """Whether the name of an archive's member points out of the archive, as no honest one does."""
    return name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":"


def is_hidden(name: str) -> bool:
    """Whether a member is a hidden file or lies in a hidden folder."""
    return any(part.startswith(".") for part in name.split("/"))


def others_in(data_dir: str, taken: Collection[str]) -> list[str]:
    """What is left out of a folder of archives: the files beside those that are taken, a line, if there are any."""
    if is_remote(data_dir) or not Path(data_dir).is_dir():
        return []
    names = {Path(path).name for path in taken}
    beside = [entry for entry in Path(data_dir).iterdir() if entry.is_file() and not is_hidden(entry.name)]
    kinds = (entry.suffix.lower() or "no extension" for entry in beside if entry.name not in names)
    return Listing(skipped=Counter(kinds)).notes

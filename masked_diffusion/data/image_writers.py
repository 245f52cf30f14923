"""Write images into a zip archive, tar archives or a folder, in forms that ``sources.py`` reads.

Nothing has its own name before it is complete. What an interrupted process wrote is found again, and gone on with.
"""

import contextlib
import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from masked_diffusion.data.archive_files import is_hidden, is_outside
from masked_diffusion.data.image_files import EXTENSIONS, LABELS_NAME
from masked_diffusion.data.tar_images import expand_pattern, split_key
from masked_diffusion.data.zip_images import LOCAL_HEAD, LOCAL_MARK

_MODE = 0o644  # of members and files
_BLOCK = 1 << 20


class Written(NamedTuple):
    """An image to write. name: below the target. label: None without classes."""

    name: str
    content: bytes
    label: int | None


def unfinished(path: Path) -> Path:
    """What a file or folder is called until it is complete. Readers leave hidden names out."""
    return path.with_name(f".{path.name}.unfinished")


class Target(ABC):
    """Where images are written: ``open``, then ``add`` each, then ``finish``.

    path: what the user gave. finals: the files or folders that are there in the end, each of which appears complete.
    """

    path: Path
    finals: list[Path]

    @abstractmethod
    def holds(self, names: Iterable[str]) -> bool:
        """Whether images of these names, which are sorted, are read again under the same names once written."""

    @abstractmethod
    def open(self, number: int, class_names: list[str] | None) -> list[str]:
        """Begin, or go on where an interrupted process stopped. number: of all images. class_names: in label order,
        None without classes. Returns the names of the images that are there."""

    @abstractmethod
    def add(self, index: int, image: Written) -> None:
        """Write image ``index`` of all. They come in ascending order, but for those that an earlier try left out."""

    @abstractmethod
    def finish(self, labels: dict[str, int]) -> None:
        """Make everything appear under its own name. labels: of the images by name, empty without classes."""

    @abstractmethod
    def close(self) -> None:
        """Let go of open files, finished or not."""


class FolderTarget(Target):
    """Files in folders, and the labels in a ``dataset.json``."""

    def __init__(self, path: Path) -> None:
        self.path, self.finals = path, [path]
        self._root = unfinished(path)
        self._class_names: list[str] | None = None

    def holds(self, names: Iterable[str]) -> bool:
        previous = ""
        for name in names:
            if not _is_usual(name) or (previous and name.startswith(f"{previous}/")):  # a file is no folder
                return False
            previous = name
        return True

    def open(self, number: int, class_names: list[str] | None) -> list[str]:
        self._class_names = class_names
        self._root.mkdir(parents=True, exist_ok=True)
        found = []
        for folder, _, files in os.walk(self._root):
            below = Path(folder).relative_to(self._root)
            for file in files:
                if file.startswith("."):  # a process was killed while it wrote it
                    Path(folder, file).unlink()
                elif file != LABELS_NAME:
                    found.append((below / file).as_posix())
        return found

    def add(self, index: int, image: Written) -> None:
        path = self._root / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}.tmp")
        half.write_bytes(image.content)
        half.replace(path)

    def finish(self, labels: dict[str, int]) -> None:
        if self._class_names is not None:
            (self._root / LABELS_NAME).write_bytes(labels_json(labels, self._class_names))
        if hasattr(os, "sync"):
            os.sync()  # at once: a million files would take hours one by one
        self._root.rename(self.path)

    def close(self) -> None:
        """Nothing is open."""


class ZipTarget(Target):
    """A zip archive of stored members, as edm2's, and the labels in its ``dataset.json``. Its bytes depend on the
    images alone, not on the time nor on interruptions."""

    def __init__(self, path: Path) -> None:
        self.path, self.finals = path, [path]
        self._class_names: list[str] | None = None
        self._file: IO[bytes] | None = None

    def holds(self, names: Iterable[str]) -> bool:
        return all(map(_is_usual, names))

    def open(self, number: int, class_names: list[str] | None) -> list[str]:
        self._class_names = class_names
        path = unfinished(self.path)
        path.touch()
        self._file = path.open("r+b")
        whole = list(_whole_members(self._file))
        if whole and whole[-1].filename == LABELS_NAME:
            self._file.seek(whole.pop().header_offset)
        self._file.truncate()
        # zipfile appends where the file stands, and writes the directory of all members of which it has the list.
        self._archive = zipfile.ZipFile(self._file, "w")
        self._archive.filelist += whole
        return [member.filename for member in whole]

    def add(self, index: int, image: Written) -> None:
        self._archive.writestr(_member(image.name), image.content)

    def finish(self, labels: dict[str, int]) -> None:
        if self._class_names is not None:
            self._archive.writestr(_member(LABELS_NAME), labels_json(labels, self._class_names))
        self._archive.close()
        assert self._file is not None
        _settle(self._file, self.path)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a directory at the end of an unfinished archive is cut off again
                self._archive.close()
            self._file.close()


class TarTarget(Target):
    """webdataset's archives: an image ``key.png`` is followed by its label ``key.cls`` and, where classes have names,
    ``key.json`` with both. Images are split evenly over the archives of the pattern, in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finals = [Path(shard) for shard in expand_pattern(str(path))]
        self._file: IO[bytes] | None = None
        self._shard = -1

    def holds(self, names: Iterable[str]) -> bool:
        previous = ""
        for name in names:
            key, extension = split_key(name)
            if not _is_usual(name) or extension not in EXTENSIONS or key == previous:  # two would share a label
                return False
            previous = key
        return True

    def open(self, number: int, class_names: list[str] | None) -> list[str]:
        self._number, self._class_names = number, class_names
        self._has_names = class_names is not None and class_names != [str(n) for n in range(len(class_names))]
        found = []
        for path in self.finals:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() or unfinished(path).exists():
                with (path if path.exists() else unfinished(path)).open("rb") as file:
                    found += [name for name, _ in self._whole_images(file)]
        return found

    def add(self, index: int, image: Written) -> None:
        shard = index * len(self.finals) // self._number
        if shard != self._shard:
            self._finish_shard()
            self._begin_shard(shard)
        for name, content in self._members(image):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), _MODE
            self._archive.addfile(member, io.BytesIO(content))

    def finish(self, labels: dict[str, int]) -> None:
        self._finish_shard()
        for shard, path in enumerate(self.finals):
            if not path.exists():  # all its images were written before, or there are fewer images than archives
                self._begin_shard(shard)
                self._finish_shard()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_shard(self, shard: int) -> None:
        path, half = self.finals[shard], unfinished(self.finals[shard])
        if path.exists():  # complete but for an image that could not be read then
            path.rename(half)
        half.touch()
        self._shard, self._file = shard, half.open("r+b")
        ends = [end for _, end in self._whole_images(self._file)]
        self._file.seek(ends[-1] if ends else 0)
        self._file.truncate()
        self._archive = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._archive.close()
        _settle(self._file, self.finals[self._shard])
        self.close()

    def _members(self, image: Written) -> Iterator[tuple[str, bytes]]:
        yield image.name, image.content
        if image.label is None or self._class_names is None:
            return
        key = split_key(image.name)[0]
        yield f"{key}.cls", str(image.label).encode()
        if self._has_names:
            record = {"label": image.label, "class_name": self._class_names[image.label]}
            yield f"{key}.json", json.dumps(record, ensure_ascii=False).encode()

    def _whole_images(self, file: IO[bytes]) -> Iterator[tuple[str, int]]:
        """The images of an archive that are there with all that belongs to them, and where each one's members end."""
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if not size:
            return
        of_an_image = 1 if self._class_names is None else 2 + self._has_names
        names: list[str] = []
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None and archive.offset <= size:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep an object for each
                    names.append(member.name)
                    if len(names) == of_an_image:
                        yield names[0], archive.offset
                        names.clear()
        except tarfile.TarError:  # the end of what a killed process wrote
            return


def labels_json(labels: dict[str, int], class_names: list[str]) -> bytes:
    """edm2's ``dataset.json``, with the names of the classes beside the labels, which edm2 does not read."""
    return json.dumps({"labels": list(labels.items()), "class_names": class_names}, ensure_ascii=False).encode()


def _is_usual(name: str) -> bool:
    """Whether a name is taken for an image's in any form, and means one place."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    is_path = all(name.split("/")) and "\\" not in name and "\0" not in name
    return is_path and Path(name).suffix.lower() in EXTENSIONS and not is_hidden(name) and not is_outside(name)


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)  # of 1980: the time says nothing
    member.external_attr, member.create_system = _MODE << 16, 3
    return member


def _whole_members(file: IO[bytes]) -> Iterator[zipfile.ZipInfo]:
    """The members that an interrupted process wrote, up to the first that is not whole; the file stands behind them."""
    file.seek(0)
    while True:
        at = file.tell()
        head = file.read(LOCAL_HEAD.size)
        if len(head) == LOCAL_HEAD.size and head.startswith(LOCAL_MARK):
            *_, crc, packed, size, name_length, extra_length = LOCAL_HEAD.unpack(head)
            name = file.read(name_length)
            file.seek(extra_length, os.SEEK_CUR)
            if _checksum(file, packed) == crc and packed == size:
                member = _member(name.decode())
                member.header_offset, member.CRC = at, crc
                member.compress_size = member.file_size = size
                yield member
                continue
        file.seek(at)
        return


def _checksum(file: IO[bytes], length: int) -> int | None:
    """CRC-32 of the next bytes; None where there are fewer."""
    crc = 0
    while length:
        block = file.read(min(length, _BLOCK))
        if not block:
            return None
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc


def _settle(file: IO[bytes], path: Path) -> None:
    """Bring a complete file to disk and under its own name."""
    file.flush()
    os.fsync(file.fileno())
    unfinished(path).rename(path)


def target_of(dest: str) -> Target:
    """The target that a path names. Raises ValueError for a form that is not written."""
    path = Path(dest).expanduser()
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return ZipTarget(path)
    if suffix == ".tar":
        return TarTarget(path)
    if re.fullmatch(r"\.(gz|tgz|bz2|xz|zst|7z|rar|npz|npy|parquet|tfrecords?|lmdb|txt)", suffix):
        raise ValueError(f"DEST {dest}: {suffix} is not written; give a .zip, a .tar, a pattern of tars or a folder")
    return FolderTarget(path)

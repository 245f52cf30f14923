"""Images in tar archives, read by their offset: webdataset's shards, alone or many together.

Each archive's members are listed once; the list is kept in the cache folder until the archive's size or time changes.
Grouping is webdataset's: the key of ``a/b.cls`` and ``a/b.jpg`` is ``a/b``, all before the first dot of the base name.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from masked_diffusion.data.archive_files import ArchiveFiles, is_hidden, is_outside, others_in
from masked_diffusion.data.image_files import (
    EXTENSIONS,
    UnreadableImageError,
    is_remote,
    join,
    looked_in,
    read_bytes,
)
from masked_diffusion.data.label_files import LabelColumn, named
from masked_diffusion.data.listing_cache import Listing
from masked_diffusion.data.path_table import PathList, PathTable, last_of_each
from masked_diffusion.data.source import USUAL, Classes, ImageSource, SourceOptions
from masked_diffusion.files import atomic_write, cache_folder

FORMAT = 5  # of the kept lists
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAGIC, _MAGIC_AT = b"ustar", 257
_LABEL_FILES = (".cls", ".json", ".txt")  # the first that a sample has gives its label
_LONGEST_LABEL = 1 << 20  # bytes of such a file
_ZEROS_AT_ONCE = 1 << 20


@dataclass
class Shard:
    """The images of one archive. offsets, sizes: of their content, (N,) int64. labels: JSON of each, empty where there
    is none. class_names: of labels that are numbers, where the archive says them."""

    names: PathTable = field(default_factory=PathTable)
    offsets: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    sizes: np.ndarray = field(default_factory=partial(np.zeros, 0, np.int64))
    labels: PathTable = field(default_factory=PathTable)
    class_names: dict[int, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)  # by extension
    notes: list[str] = field(default_factory=list)


class Tar(ImageSource):
    """The images of tar archives: one file, ``shard-{000..123}.tar``, a folder of them, or a text file that lists them.

    Labels are those of ``.cls``, ``.json`` (``label`` or ``cls``) or ``.txt`` members of an image's key, where every
    image has one. Classes that are numbers have the names in ``class_name`` of ``.json`` members, where each has one.
    Raises FileNotFoundError or ValueError, naming --data_dir and the remedy, for missing archives, and for archives
    without images.
    """

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        self.data_dir = data_dir
        self.largest = options.max_image_bytes
        self._paths = shards_of(data_dir)
        shards = self._read_shards()
        notes = others_in(data_dir, self._paths)
        notes += Listing(skipped=sum((shard.skipped for shard in shards), Counter())).notes
        notes += [note for shard in shards for note in shard.notes]
        names = PathTable.joined(shard.names for shard in shards)
        if not len(names):
            raise ValueError(f"--data_dir {data_dir}: no images in these archives; give some that hold images")
        order = last_of_each(names)
        same_names = len(shards) > 1 and len(order) < len(names)
        if same_names:  # shards that count from 0 each
            prefixes = zip(_told_apart(self._paths), shards, strict=True)
            names = PathTable(f"{prefix}/{name}" for prefix, shard in prefixes for name in shard.names)
            order = last_of_each(names)
        if len(order) < len(names):
            notes.append(f"left out: {len(names) - len(order)} members of which later ones have the name")
        self.names = names.take(order)
        numbers = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])
        self._shards = numbers[order]
        self._offsets = np.concatenate([shard.offsets for shard in shards])[order]
        self._sizes = np.concatenate([shard.sizes for shard in shards])[order]
        labels = LabelColumn()
        for shard in shards:
            labels.extend(shard.labels)
        class_names = {label: name for shard in shards for label, name in shard.class_names.items()}
        self._labels = self._usable(labels.take(order), class_names, notes)
        if same_names and self._labels is None:
            missing = labels.count("")
            self.made_up_folders = f"{missing} of {len(labels)} images have no label" if missing else notes[-1]
        self.notes = notes
        self._files = ArchiveFiles(self._paths)

    def _read_shards(self) -> list[Shard]:
        """The images of each archive. Raises FileNotFoundError, naming the archive, for one that is missing."""
        for path in self._paths:
            if not Path(path).is_file():
                raise no_archive(self.data_dir, path)
        return [read_shard(path) for path in self._paths]

    def _usable(self, labels: LabelColumn, class_names: dict[int, str], notes: list[str]) -> Classes | None:
        """The classes of the images where all have a label that others have, too; captions are no classes."""
        missing = labels.count("")
        if missing:
            if missing < len(labels):
                notes.append(f"labels are not used: {missing} of {len(labels)} images have none")
            return None
        if len(labels) > 1 and isinstance(json.loads(labels[0]), str) and len(labels.different) == len(labels):
            notes.append("labels are not used: each image has another one, so they may be captions")
            return None
        classes = labels.classes(json.loads, f"labels in --data_dir {self.data_dir}")
        if not class_names or not set(np.unique(classes.labels).tolist()) <= class_names.keys():
            return classes
        return named(classes, [class_names.get(number, str(number)) for number in range(len(classes.names))])

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        if is_remote(data_dir):
            return False
        path = Path(data_dir)
        if _RANGE.search(data_dir) and not path.exists():
            return data_dir.endswith(".tar")
        if path.is_dir():
            return _holds_archives_alone(path)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(512)
        return head.startswith(_MAGIC, _MAGIC_AT) or head.partition(b"\n")[0].strip().endswith(b".tar")

    def sizes(self) -> np.ndarray:
        return self._sizes

    def classes(self) -> Classes | None:
        return self._labels

    def read(self, index: int) -> bytes:
        size = int(self._sizes[index])
        if size > self.largest:
            raise UnreadableImageError(self.name_of(index), f"{size} bytes are more than {self.largest}")
        number, offset = int(self._shards[index]), int(self._offsets[index])
        content = self._files[number].read(offset, size)
        if len(content) < size:
            where = f"{self._paths[number]} is cut off after {offset + len(content)} bytes"
            raise UnreadableImageError(self.name_of(index), where)
        return content


def no_archive(data_dir: str, path: str) -> FileNotFoundError:
    where = "" if is_remote(path) else looked_in(path)
    return FileNotFoundError(f"--data_dir {data_dir}: no such archive: {path}{where}; give the archives that there are")


def shards_of(data_dir: str) -> list[str]:
    """The archives that a path stands for, in order."""
    path = Path(data_dir)
    if is_remote(data_dir):
        if not data_dir.endswith(".txt"):
            return expand_pattern(data_dir)
        try:
            lines = read_bytes(data_dir).decode("utf-8-sig").splitlines()
        except FileNotFoundError as error:
            raise no_archive(data_dir, data_dir) from error
        folder = data_dir.rpartition("/")[0]
        names = [name for line in lines if line.strip() for name in expand_pattern(line.strip())]
        return [name if is_remote(name) else join(folder, name) for name in names]
    if path.is_dir():
        return sorted(str(entry) for entry in path.iterdir() if entry.suffix == ".tar" and not is_hidden(entry.name))
    if path.is_file():
        with path.open("rb") as file:
            if file.read(512).startswith(_MAGIC, _MAGIC_AT):
                return [data_dir]
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        listed = [line.strip() for line in lines if line.strip()]
        return [name for line in listed for name in expand_pattern(str(path.parent / line))]
    return expand_pattern(data_dir)


def expand_pattern(pattern: str) -> list[str]:
    """The names of a pattern: ``a-{08..10}.tar`` -> a-08.tar, a-09.tar, a-10.tar."""
    parts = _RANGE.split(pattern)  # text, first, last, text, ...
    choices: list[Iterable[str]] = [[parts[0]]]
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        choices.append([f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)])
        choices.append([text])
    return ["".join(choice) for choice in itertools.product(*choices)]


def _told_apart(paths: list[str]) -> list[str]:
    """What to call archives: their base names or, where these repeat, their paths below the folder around them all."""
    bases = [Path(path).name for path in paths]
    if len(set(bases)) == len(bases):
        return bases
    full = [os.path.abspath(path) for path in paths]  # noqa: PTH100  (without following links, as a user calls them)
    around = os.path.commonpath([os.path.dirname(path) for path in full])  # noqa: PTH120
    return [Path(path).relative_to(around).as_posix() for path in full]


def _holds_archives_alone(folder: Path) -> bool:
    """Whether tar archives lie in a folder, and no images and no folders."""
    found = False
    for entry in folder.iterdir():
        if is_hidden(entry.name):
            continue
        if entry.suffix.lower() in EXTENSIONS or entry.is_dir():
            return False
        found = found or entry.suffix == ".tar"
    return found


# One archive


def read_shard(path: str) -> Shard:
    """The images of an archive, from the kept list if the archive is as it was, else listed anew and kept."""
    status = Path(path).stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    place = kept_at(str(Path(path).resolve()))
    kept = None if place is None else kept_shard(place, state)
    if kept is not None:
        return kept
    with Path(path).open("rb") as file:
        shard = list_shard(path, file)
    if place is not None:
        keep_shard(place, shard, state)
    return shard


def kept_at(path: str) -> Path | None:
    """Where the list of an archive is kept; None for a user without a home folder."""
    cache = cache_folder()
    return None if cache is None else cache / "archives" / hashlib.sha256(path.encode("utf-8", "replace")).hexdigest()


def kept_shard(place: Path, state: list[Any]) -> Shard | None:
    """The list of an archive that is in this state; None where it was not kept, is damaged, or of another state."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, zipfile.BadZipFile):
        header, _, packed = place.read_bytes().partition(b"\n")
        record = json.loads(header)
        if record["state"] == [FORMAT, *state]:
            return _unpack(record, packed)
    return None


def keep_shard(place: Path, shard: Shard, state: list[Any]) -> None:
    with contextlib.suppress(OSError):  # it saves time, and no more
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as file:
            file.write(_pack(shard, [FORMAT, *state]))


def _pack(shard: Shard, state: list[Any]) -> bytes:
    header = {
        "state": state,
        "skipped": shard.skipped,
        "notes": shard.notes,
        "class_names": [*shard.class_names.items()],
    }
    arrays = io.BytesIO()
    names, labels = (np.frombuffer(texts.packed(), np.uint8) for texts in (shard.names, shard.labels))
    np.savez(arrays, names=names, labels=labels, offsets=shard.offsets, sizes=shard.sizes)
    return json.dumps(header).encode() + b"\n" + arrays.getvalue()


def _unpack(record: dict[str, Any], packed: bytes) -> Shard:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        offsets, sizes = (arrays[name].astype(np.int64) for name in ("offsets", "sizes"))
        texts = (arrays[name] if len(offsets) else None for name in ("names", "labels"))
        names, labels = (PathTable() if packed is None else PathTable.unpacked(packed) for packed in texts)
    class_names = {int(label): str(name) for label, name in record["class_names"]}
    return Shard(names, offsets, sizes, labels, class_names, Counter(record["skipped"]), record["notes"])


def list_shard(path: str, file: IO[bytes]) -> Shard:
    """List the images of an archive and their labels; also of archives that were joined end to end into one file.

    What is damaged or does not belong there is noted.
    """
    listing = _ShardListing(path)
    start: int | None = 0
    while start is not None:
        start = listing.take_archive(file, start)
    return listing.finish()


class _ShardListing:
    """The members of an archive, taken one by one."""

    def __init__(self, path: str) -> None:
        self.path, self.shard = path, Shard()
        self.names, self.offsets, self.sizes = PathList(), array("q"), array("q")
        self.label_of: dict[str, dict[str, str]] = {}
        self.left_out: Counter[str] = Counter()

    def take_archive(self, file: IO[bytes], start: int) -> int | None:
        """Take the members from an offset to the end of the archive there. Returns where another one begins."""
        at = start
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # it would keep an object for each
                    at = archive.offset
                    self._take(archive, member)
                at = archive.offset
            if not _is_end(file, at):  # next() gives None for a damaged header, too
                raise tarfile.ReadError("no header and no end of an archive is there")
            return _behind_zeros(file, at)
        except (tarfile.TarError, EOFError, ValueError) as error:
            self.shard.notes.append(
                f"{self.path} is cut off or damaged before byte {at} ({error}): what follows is not read"
            )
            return None

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = member.name.removeprefix("./")
        if is_outside(name):
            self.left_out["members with names that point out of it"] += 1
        elif not member.isreg() or member.issparse():
            self.left_out["members that are links or devices"] += not member.isdir()
        elif not is_hidden(name):
            key, extension = split_key(name)
            if extension in EXTENSIONS:
                self.names.append(name)
                self.offsets.append(member.offset_data)
                self.sizes.append(member.size)
            elif extension in _LABEL_FILES and member.size <= _LONGEST_LABEL:
                stream = archive.extractfile(member)
                content = b"" if stream is None else stream.read()
                if (label := _label(extension, content)) is not None:
                    self.label_of.setdefault(key, {})[extension] = label
                if extension == ".json":
                    self.shard.class_names |= _class_name(content)
            else:
                self.shard.skipped[extension or "no extension"] += 1

    def finish(self) -> Shard:
        shard = self.shard
        shard.names, shard.offsets, shard.sizes = self.names.table(), np.array(self.offsets), np.array(self.sizes)
        keys = [split_key(name)[0] for name in shard.names]
        label_files = (self.label_of.get(key, {}) for key in keys)
        shard.labels = PathTable(next((of[kind] for kind in _LABEL_FILES if kind in of), "") for of in label_files)
        self.left_out["labels without an image"] = len(self.label_of.keys() - set(keys))
        left_out = [f"left out of {self.path}: {number} {what}" for what, number in self.left_out.items() if number]
        self.shard.notes += left_out
        return self.shard


def _is_end(file: IO[bytes], offset: int) -> bool:
    """Whether a tar archive says that it ends there: with a block of zeros."""
    file.seek(offset)
    return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _behind_zeros(file: IO[bytes], offset: int) -> int | None:
    """Where the first block from an offset on is that is not of zeros; None where the file ends before."""
    file.seek(offset)
    while block := file.read(_ZEROS_AT_ONCE):
        if rest := block.lstrip(b"\0"):
            found = offset + len(block) - len(rest)
            return found - found % tarfile.BLOCKSIZE
        offset += len(block)
    return None


def split_key(name: str) -> tuple[str, str]:
    """The key and the extension of a member, as webdataset has them: ``a.b/c.seg.PNG`` -> ``a.b/c``, ``.seg.png``."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}", f"{dot}{extension}".lower()


def _label(extension: str, content: bytes) -> str | None:
    """JSON of the label in a member's content, None where there is none."""
    with contextlib.suppress(ValueError, AttributeError):
        text = content.decode("utf-8").strip()
        if extension == ".cls":
            return json.dumps(int(text))
        value = text
        if extension == ".json":
            record = json.loads(text)
            value = record.get("label", record.get("cls"))
        if value != "" and isinstance(value, str | int) and not isinstance(value, bool):
            return json.dumps(value)
    return None


def _class_name(content: bytes) -> dict[int, str]:
    """The number and the name of a class, where a ``.json`` member has both."""
    with contextlib.suppress(ValueError, AttributeError):
        record = json.loads(content)
        number, name = record.get("label", record.get("cls")), record.get("class_name")
        if isinstance(number, int) and not isinstance(number, bool) and isinstance(name, str) and name:
            return {number: name}
    return {}

"""Images in a zip archive, read by their offset without unpacking it; edm2's data sets are such archives.

The directory at the archive's end is read once, into arrays: Python's zipfile keeps an object of a kilobyte for each
member. (APPNOTE.TXT of PKWARE, sections 4.3 and 4.4)
"""

import stat
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from masked_diffusion.data.archive_files import ArchiveFile, is_hidden, is_outside
from masked_diffusion.data.image_files import LABELS_NAME, UnreadableImageError, is_remote, take_file
from masked_diffusion.data.label_files import found_labels
from masked_diffusion.data.listing_cache import Listing
from masked_diffusion.data.path_table import last_of_each
from masked_diffusion.data.source import USUAL, Classes, ImageSource, SourceOptions
from masked_diffusion.data.text_blocks import BLOCK_BYTES

_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_MEMBER, LOCAL_MARK = b"PK\x01\x02", b"PK\x03\x04"
_MEMBER_HEAD = struct.Struct("<4s6H3L5H2L")
LOCAL_HEAD = struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
_COLUMNS = "qqqIi"  # types of what is kept of each member: offset, packed, size, crc, method
_ENCRYPTED = 1  # of the flags
_LARGEST_LABELS = 2**30  # bytes of a dataset.json: ten million labels have about half of it
_LONGEST_ENTRY = _MEMBER_HEAD.size + 3 * 0xFFFF  # of the directory
_READ_AT_ONCE = 1 << 24  # bytes of it
_MISSING, _CUT_OFF = "there is no member where the archive's directory says", "the archive is cut off"
_DAMAGED = "damaged in the archive: size or checksum are not those of its directory"
_USUAL_EXTRA = 64  # bytes between a member's name and its content that are read along with it


class DirectoryError(Exception):
    """The list of an archive's members is damaged."""


class _Member(NamedTuple):
    name: str
    offset: int
    packed: int  # bytes in the archive
    size: int
    crc: int
    method: int  # -1 where it is encrypted
    is_link: bool


class Zip(ImageSource):
    """The images of a zip archive, stored or deflated. Labels are those of its ``dataset.json``, if it has one.

    Raises ValueError, naming --data_dir and the remedy, for an archive whose directory is damaged or without images.
    """

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        self.data_dir = data_dir
        self.largest = options.max_image_bytes
        self._file = ArchiveFile(data_dir)
        listing, columns, labels = Listing(), [array(kind) for kind in _COLUMNS], None
        outside: list[str] = []
        links = 0
        try:
            for member in _members(self._file):
                if is_outside(member.name):
                    outside.append(member.name)
                elif member.name.endswith("/") or is_hidden(member.name):
                    continue
                elif member.name == LABELS_NAME:
                    labels = member
                elif member.is_link:
                    links += 1
                elif take_file(listing, member.name):
                    fields = (member.offset, member.packed, member.size, member.crc, member.method)
                    for column, field in zip(columns, fields, strict=True):
                        column.append(field)
        except (struct.error, DirectoryError) as error:
            raise ValueError(
                f"--data_dir {data_dir}: its directory, at the end of the archive, is cut off or damaged ({error}); "
                "copy the archive again"
            ) from error
        found = listing.found.table()
        if not len(found):
            raise ValueError(f"--data_dir {data_dir}: no images in this archive; give one that holds images")
        order = last_of_each(found)
        self.names = found.take(order)
        self._offsets, self._packed, self._sizes, self._crcs, self._methods = (
            np.frombuffer(c, c.typecode)[order] for c in columns
        )
        self.notes = listing.notes
        if outside:
            self.notes.append(f"left out: {len(outside)} members with names that point out of it, such as {outside[0]}")
        if links:
            self.notes.append(f"left out: {links} members that are links")
        if len(order) < len(found):
            self.notes.append(f"left out: {len(found) - len(order)} members of which later ones have the name")
        self._labels = labels
        if labels is not None:
            for _ in self._blocks(labels):  # what is damaged is refused before a word of it is believed
                pass

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        if is_remote(data_dir) or not Path(data_dir).is_file():
            return False
        with Path(data_dir).open("rb") as file:
            return file.read(4) in (LOCAL_MARK, _END)

    def sizes(self) -> np.ndarray:
        return self._sizes

    def classes(self) -> Classes | None:
        if self._labels is None:
            return None
        return found_labels(partial(self._blocks, self._labels), f"{LABELS_NAME} of --data_dir {self.data_dir}", self)

    def read(self, index: int) -> bytes:
        fields = (self._offsets, self._packed, self._sizes, self._crcs, self._methods)
        offset, packed, size, crc, method = (int(field[index]) for field in fields)
        return self._content(_Member(self.names[index], offset, packed, size, crc, method, is_link=False))

    def _content(self, member: _Member) -> bytes:
        """A member unpacked. Raises UnreadableImageError for one that cannot be, OSError when the storage fails."""
        bad = self._checked(member, self.largest)
        ahead = LOCAL_HEAD.size + len(member.name.encode("utf-8", "surrogateescape")) + _USUAL_EXTRA
        block = self._file.read(member.offset, ahead + member.packed)
        if len(block) < LOCAL_HEAD.size or not block.startswith(LOCAL_MARK):
            raise bad(_MISSING)
        *_, name_length, extra_length = LOCAL_HEAD.unpack_from(block)
        start = LOCAL_HEAD.size + name_length + extra_length
        if len(block) < start + member.packed:
            block += self._file.read(member.offset + len(block), start + member.packed - len(block))
        packed = block[start : start + member.packed]
        if len(packed) < member.packed:
            raise bad(_CUT_OFF)
        content = packed
        if member.method == _DEFLATED:
            try:
                # One byte more than is said, to see that there is no more.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.size + 1)
            except zlib.error as error:
                raise bad(str(error)) from error
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise bad(_DAMAGED)
        return content

    def _blocks(self, member: _Member) -> Iterator[bytes]:
        """A list of labels unpacked, a block at a time. Raises as :meth:`_content`."""
        bad = self._checked(member, _LARGEST_LABELS)
        size, crc = 0, 0
        blocks = self._packed_blocks(member)
        try:
            for block in _inflated(blocks) if member.method == _DEFLATED else blocks:
                size, crc = size + len(block), zlib.crc32(block, crc)
                if size > member.size:
                    break
                yield block
        except zlib.error as error:
            raise bad(str(error)) from error
        if size != member.size or crc != member.crc:
            raise bad(_DAMAGED)

    def _packed_blocks(self, member: _Member) -> Iterator[bytes]:
        head = self._file.read(member.offset, LOCAL_HEAD.size)
        if len(head) < LOCAL_HEAD.size or not head.startswith(LOCAL_MARK):
            raise self._bad(member, _MISSING)
        *_, name_length, extra_length = LOCAL_HEAD.unpack(head)
        start = member.offset + LOCAL_HEAD.size + name_length + extra_length
        for at in range(0, member.packed, BLOCK_BYTES):
            length = min(BLOCK_BYTES, member.packed - at)
            block = self._file.read(start + at, length)
            if len(block) < length:
                raise self._bad(member, _CUT_OFF)
            yield block

    def _checked(self, member: _Member, largest: int) -> Callable[[str], UnreadableImageError]:
        """What to raise for a member, by the reason. Raises it where the directory has one."""
        bad = partial(self._bad, member)
        if member.method not in (_STORED, _DEFLATED):
            raise bad("encrypted" if member.method < 0 else f"compression method {member.method}, read are 0 and 8")
        if max(member.size, member.packed) > largest:
            raise bad(f"{member.size} bytes are more than {largest}, perhaps a decompression bomb")
        return bad

    def _bad(self, member: _Member, reason: str) -> UnreadableImageError:
        return UnreadableImageError(f"{self.data_dir}/{member.name}", reason)


def _inflated(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks unpacked, none of them longer than BLOCK_BYTES. Raises zlib.error."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    for block in blocks:
        while block and not inflate.eof:
            yield inflate.decompress(block, BLOCK_BYTES)
            block = inflate.unconsumed_tail
    yield inflate.flush()


def _members(file: ArchiveFile) -> Iterator[_Member]:
    """All members in the order of the directory. Raises DirectoryError or struct.error."""
    start, length, shift = _directory(file)
    directory, read, at = b"", 0, 0  # a part of it, how much was read, where the next entry is in the part
    while read < length or at < len(directory):
        if len(directory) - at < _LONGEST_ENTRY and read < length:
            part = file.read(start + read, min(_READ_AT_ONCE, length - read))
            if not part:
                raise DirectoryError("it ends too early")
            directory, read, at = directory[at:] + part, read + len(part), 0
        head = _MEMBER_HEAD.unpack_from(directory, at)
        mark, _, _, flags, method, _, _, crc, packed, size = head[:10]
        name_length, extra_length, comment_length, _, _, attributes, offset = head[10:]
        if mark != _MEMBER:
            raise DirectoryError(f"no entry at byte {start + read - len(directory) + at}")
        at += _MEMBER_HEAD.size
        name = directory[at : at + name_length]
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        size, packed, offset = _wide(extra, [size, packed, offset])
        mode = attributes >> 16
        yield _Member(
            _decoded(name), offset + shift, packed, size, crc, -1 if flags & _ENCRYPTED else method, stat.S_ISLNK(mode)
        )


def _directory(file: ArchiveFile) -> tuple[int, int, int]:
    """Where the directory starts, its bytes, and by how much all offsets are off (where something stands before)."""
    size = file.size()
    tail_start = max(0, size - (1 << 16) - 22 - 20)
    tail = file.read(tail_start, size - tail_start)
    at = tail.rfind(_END)
    if at < 0:
        raise DirectoryError("it is missing")
    _, _, _, _, _, length, offset, _ = struct.unpack_from("<4s4H2LH", tail, at)
    end = tail_start + at
    if at >= 20 and tail.startswith(_LOCATOR, at - 20):
        (end,) = struct.unpack_from("<Q", tail, at - 20 + 8)
        record = file.read(end, 56)
        if not record.startswith(_END64):
            raise DirectoryError("the record of its place is missing")
        length, offset = struct.unpack_from("<2Q", record, 40)
    start = end - length
    if start < 0 or start < offset:
        raise DirectoryError(f"{length} bytes of it do not lie before byte {end}")
    return start, length, start - offset


def _wide(extra: bytes, fields: list[int]) -> list[int]:
    """Size, packed size and offset, those that do not fit into 32 bits taken from the extra field."""
    if 0xFFFFFFFF not in fields:
        return fields
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(values, field) if field == 0xFFFFFFFF else field for field in fields]
        at += 4 + length
    return fields


def _decoded(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:  # an old archive
        return name.decode("cp437")

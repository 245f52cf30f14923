"""Where the content of each row lies in a parquet file, so that a row is read without the rest of its group.

The values of a column chunk lie one after another in its pages, each behind its length. Where pages are not compressed,
a row is read at its offset. Snappy, which is what writers use if they are not told otherwise, compresses 64 KiB at a
time without reference to what is before (format_description.txt of google/snappy), so the blocks around a row are
enough. By zstd, gzip and brotli a page is compressed as a whole, so a row costs its page, which writers make of a whole
group where it has few rows; without the tables and copies that pyarrow makes of one. Of other compressions, and of
pages that snappy really made smaller, there are no places. (parquet-format: README.md, Encodings.md, parquet.thrift)

Nothing here has to be right about a file to be safe: places are kept only when they give the very bytes that pyarrow
read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

# (offset, length) -> bytes of a file.
Read = Callable[[int, int], bytes]

_SNAPPY = "snappy"
_CODECS = {"UNCOMPRESSED": "", "SNAPPY": _SNAPPY, "ZSTD": "zstd", "GZIP": "gzip", "BROTLI": "brotli"}
_BLOCK = 1 << 16  # of snappy
# Elements of snappy that are worth looking at, one for so many bytes: pictures compress no further, and have few.
_BYTES_PER_ELEMENT = 256
_ANCHOR = 64  # bytes of a value by which it is looked for
_DATA_PAGE_V2 = 3
_LONGEST_HEADER = 1 << 16  # of a page: statistics in it are cut off after some thousand bytes


class ChangedFileError(Exception):
    """What lies at the places is not what was there when they were found."""


@dataclass(frozen=True)
class RowPlaces:
    """Places of the rows of one column chunk.

    starts, lengths: (N,) int64 and uint32, of rows in the text: the chunk's bytes from ``offset`` on or, where there
    are blocks, its pages decompressed. codec: of the blocks, empty without. Those of snappy are of 64 KiB, and a page
    begins with one; those of others are pages. offsets: (B,) int64, where the blocks lie in the file; packed, unpacked:
    (B,) uint32, their bytes there and in the text; begins: (B,) int64, where they begin in the text.
    """

    starts: np.ndarray
    lengths: np.ndarray
    offset: int
    codec: str
    offsets: np.ndarray
    packed: np.ndarray
    unpacked: np.ndarray
    begins: np.ndarray

    @property
    def nbytes(self) -> int:
        arrays = (self.starts, self.lengths, self.offsets, self.packed, self.unpacked, self.begins)
        return sum(array.nbytes for array in arrays)

    def read(self, read: Read, row: int) -> bytes:
        """The content of a row. Raises ChangedFileError where the file is not as it was, and what ``read`` raises."""
        start, length = int(self.starts[row]), int(self.lengths[row])
        if not length:
            return b""
        if not self.codec:
            content = read(self.offset + start, length)
            if len(content) < length:
                raise ChangedFileError
            return content
        first, last = np.searchsorted(self.begins, (start, start + length - 1), "right") - 1
        begin = int(self.offsets[first])
        packed = read(begin, int(self.offsets[last]) + int(self.packed[last]) - begin)
        within = start - int(self.begins[first])
        size = int(self.begins[last]) + int(self.unpacked[last]) - int(self.begins[first])
        if self.codec == _SNAPPY:
            packed = _varint(size) + packed
        return bytes(_unpack(self.codec, packed, size)[within : within + length])


def find_rows(read: Read, chunk: Any, values: Sequence[Any]) -> RowPlaces | None:
    """The places of all rows of a column chunk; None where they cannot be read one by one.

    chunk: a ``pyarrow.parquet.ColumnChunkMetaData``. values: what pyarrow read of it, a buffer for each row, or None.
    """
    pages_at = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
    offset = min(pages_at)
    codec = _CODECS.get(chunk.compression)
    if codec is None:
        return None
    # Groups may be large: beside the values, no more than the text is in memory.
    text: bytes | bytearray
    blocks = _Blocks([], [], [], [])
    try:
        if codec:
            text = _decompress(codec, read, offset, chunk.total_compressed_size, chunk.total_uncompressed_size, blocks)
        else:
            text = read(offset, chunk.total_compressed_size)
    except (_OtherPagesError, ChangedFileError):  # the latter since pyarrow read it
        return None
    starts = _starts_of(values, text)
    if starts is None:
        return None
    lengths = np.array([0 if value is None else len(value) for value in values], dtype=np.uint32)
    kinds = (np.int64, np.uint32, np.uint32, np.int64)
    numbers = [np.array(column, kind) for column, kind in zip(blocks, kinds, strict=True)]
    places = RowPlaces(starts, lengths, offset, codec, *numbers)
    return places if _give(places, read, values, text) else None


def _give(places: RowPlaces, read: Read, values: Sequence[Any], text: bytes | bytearray) -> bool:
    """Whether the places give the values. text: of :class:`RowPlaces`."""
    if places.codec not in ("", _SNAPPY):  # a page is not decompressed once for each of its rows: it was, for the text
        starts = places.starts.tolist()
        return all(text.startswith(bytes(value or b""), start) for start, value in zip(starts, values, strict=True))
    try:
        return all(places.read(read, row) == bytes(value or b"") for row, value in enumerate(values))
    except ChangedFileError:
        return False


def _starts_of(values: Sequence[Any], text: bytes | bytearray) -> np.ndarray | None:
    """Where each value begins in a text, (N,) int64, 0 for empty ones; None where one is not in it.

    A value mostly lies behind the one before. Equal ones may be there once (dictionary encoding). Values are compared
    at both ends; :func:`_give` compares the rest.
    """
    starts = np.zeros(len(values), dtype=np.int64)
    end = 0
    for row, value in enumerate(values):
        if not value:
            continue
        length, view = len(value), memoryview(value)
        head, tail = bytes(view[:_ANCHOR]), bytes(view[-_ANCHOR:])
        # First behind its length; text.find is not asked before it has to be.
        candidates = chain([end + 4], _occurrences(text, head, end), _occurrences(text, head, 0))
        at = next((at for at in candidates if text.startswith(head, at) and text.endswith(tail, at, at + length)), -1)
        if at < 0:
            return None
        starts[row], end = at, at + length
    return starts


def _occurrences(text: bytes | bytearray, anchor: bytes, begin: int) -> Iterator[int]:
    at = text.find(anchor, begin)
    while at >= 0:
        yield at
        at = text.find(anchor, at + 1)


# Pages


class _OtherPagesError(Exception):
    """Pages of which rows cannot be read one by one."""


class _Blocks(NamedTuple):
    """Columns of :class:`RowPlaces`."""

    offsets: list[int]
    packed: list[int]
    unpacked: list[int]
    begins: list[int]


def _decompress(codec: str, read: Read, offset: int, packed_size: int, size: int, blocks: _Blocks) -> bytearray:
    """The pages of a chunk decompressed. offset, packed_size: of the chunk in its file. size: of all pages,
    decompressed. Adds the blocks. Raises _OtherPagesError."""
    text, at, end = bytearray(), offset, offset + packed_size
    while at < end:
        header = _PageHeader(read(at, min(_LONGEST_HEADER, end - at)))
        begin = at + header.length
        at = begin + header.packed
        size -= header.unpacked
        if size < 0 or at > end:
            raise _OtherPagesError
        if header.kind == _DATA_PAGE_V2:  # compressed in part; with a dictionary, all values are in the page before
            continue
        packed = read(begin, header.packed)
        bounds = _block_bounds(packed, header.unpacked) if codec == _SNAPPY else [0, len(packed)]
        blocks.offsets.extend(begin + bound for bound in bounds[:-1])
        blocks.packed.extend(after - before for before, after in zip(bounds[:-1], bounds[1:], strict=True))
        starts = [len(text) + _BLOCK * number for number in range(len(bounds) - 1)]
        blocks.begins.extend(starts)
        text += _unpack(codec, packed, header.unpacked)
        ends = [*starts[1:], len(text)]
        blocks.unpacked.extend(end - start for start, end in zip(starts, ends, strict=True))
    return text


def _block_bounds(packed: bytes, size: int) -> list[int]:
    """Where each 64 KiB of a page begin in its compressed bytes, and the end. Raises _OtherPagesError."""
    at = len(_varint(size))
    bounds, done, elements = [at], 0, 0
    most = len(packed) // _BYTES_PER_ELEMENT + 16
    while at < len(packed):
        if done == len(bounds) * _BLOCK:
            bounds.append(at)
        elements += 1
        tag = packed[at]
        kind, length = tag & 3, (tag >> 2) + 1
        if kind == 0:  # a literal; of 61 to 64 the length follows in 1 to 4 bytes
            extra = max(0, length - 60)
            if extra:
                length = int.from_bytes(packed[at + 1 : at + 1 + extra], "little") + 1
            at += 1 + extra + length
        else:  # a copy of what was before, 2, 3 or 5 bytes long
            at += (2, 3, 5)[kind - 1]
            length = ((tag >> 2) & 7) + 4 if kind == 1 else length
        done += length
        if elements > most or done > len(bounds) * _BLOCK:
            raise _OtherPagesError
    if done != size or not size:
        raise _OtherPagesError
    return [*bounds, len(packed)]


def _unpack(codec: str, packed: bytes, size: int) -> memoryview:
    """Raises ChangedFileError for bytes that are not those of blocks."""
    import pyarrow

    try:
        return memoryview(pyarrow.Codec(codec).decompress(packed, decompressed_size=size))
    except OSError as error:  # not of the disk
        raise ChangedFileError from error


def _varint(number: int) -> bytes:
    """A number of 7 bits a byte, the least first."""
    parts = []
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


class _PageHeader:
    """A page's header in Thrift's compact protocol: its kind, its bytes before and after decompression, its length.

    Raises _OtherPagesError for what is none.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw, self.length = raw, 0
        try:
            fields = self._struct()
            self.kind, self.unpacked, self.packed = (int(fields[number]) for number in (1, 2, 3))
        except (IndexError, KeyError, RecursionError) as error:
            raise _OtherPagesError from error
        if min(self.unpacked, self.packed) < 0:
            raise _OtherPagesError

    def _byte(self) -> int:
        self.length += 1
        return self._raw[self.length - 1]

    def _number(self) -> int:
        number = shift = 0
        while (byte := self._byte()) & 0x80:
            number |= (byte & 0x7F) << shift
            shift += 7
        return number | byte << shift

    def _signed(self) -> int:
        number = self._number()
        return number >> 1 ^ -(number & 1)

    def _struct(self) -> dict[int, int]:
        """Numbers of the fields that are integers; the others are passed over."""
        fields: dict[int, int] = {}
        field = 0
        while (byte := self._byte()) != 0:
            field = field + (byte >> 4) if byte >> 4 else self._signed()
            fields[field] = self._value(byte & 0x0F)
        return fields

    def _value(self, kind: int) -> int:
        if kind in (1, 2):  # true and false, in the kind itself
            return 2 - kind
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 8:  # bytes
            length = self._number()
            self.length += length
        elif kind == 12:
            self._struct()
        else:  # no header of a page has lists, maps or floating point
            raise KeyError(kind)
        return 0

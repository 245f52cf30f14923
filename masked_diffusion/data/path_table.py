"""Lists of paths in a few arrays: ten million Python strings would have a gigabyte, and be copied into each process."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

_AT_ONCE = 1 << 16  # paths that are moved together
_KEY_BYTES = 8  # of a path that are compared together


class PathList:
    """A list of paths that grows, to become a :class:`PathTable`."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._lengths = array("I")
        for path in paths:
            self.append(path)

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, path: str) -> None:
        encoded = path.encode("utf-8", "surrogateescape")
        self._text += encoded
        self._lengths.append(len(encoded))

    def extend(self, paths: Sequence[str]) -> None:
        text = "".join(paths)
        if not text.isascii():
            for path in paths:
                self.append(path)
            return
        self._text += text.encode()
        self._lengths.extend(map(len, paths))

    def table(self) -> "PathTable":
        """The paths so far, in their order. The list must not grow any more."""
        table = PathTable.__new__(PathTable)
        table._text = np.frombuffer(self._text, dtype=np.uint8)
        table._ends = np.cumsum(np.frombuffer(self._lengths, dtype=np.uint32), dtype=np.int64)
        return table


class PathTable:
    """A read-only list of paths, kept in two arrays.

    Two arrays are shared when a process forks, and are sent quickly otherwise. A million Python strings would be copied
    into every loader process, because counting references touches their memory.
    """

    _text: np.ndarray  # of all, one after another, UTF-8
    _ends: np.ndarray  # (N,) int64, of each in it

    def __init__(self, paths: Iterable[str] = ()) -> None:
        made = PathList(paths).table()
        self._text, self._ends = made._text, made._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield self._text[start:end].tobytes().decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathTable):
            return NotImplemented
        return np.array_equal(self._ends, other._ends) and np.array_equal(self._text, other._text)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].tobytes().decode("utf-8", "surrogateescape")

    @classmethod
    def joined(cls, tables: Iterable["PathTable"]) -> "PathTable":
        """The paths of several tables, one after another."""
        texts, lengths = [np.zeros(0, np.uint8)], [np.zeros(0, np.int64)]
        for table in tables:
            texts.append(table._text)
            lengths.append(table._lengths)
        made = cls.__new__(cls)
        made._text, made._ends = np.concatenate(texts), np.cumsum(np.concatenate(lengths), dtype=np.int64)
        return made

    @classmethod
    def unpacked(cls, packed: bytes | memoryview | np.ndarray) -> "PathTable":
        """What :meth:`packed` packed, of one path or more."""
        characters = np.frombuffer(packed, dtype=np.uint8)
        ends = np.append(np.flatnonzero(characters == 0), len(characters))
        made = cls.__new__(cls)
        made._text, made._ends = characters[characters != 0], ends - np.arange(len(ends))
        return made

    def packed(self) -> bytearray:
        """The paths as one text, separated by NUL, which no path contains."""
        text = bytearray()
        for _, part in self._parts(np.arange(len(self)), gap=1):
            text += part.data
        del text[-1:]
        return text

    def take(self, indices: np.ndarray) -> "PathTable":
        """The paths with these indices, in this order."""
        made = PathTable.__new__(PathTable)
        made._ends = np.cumsum(self._lengths[indices], dtype=np.int64)
        made._text = np.empty(made._ends[-1] if len(indices) else 0, dtype=np.uint8)
        at = 0
        for _, part in self._parts(indices):
            made._text[at : at + len(part)] = part
            at += len(part)
        return made

    @property
    def _lengths(self) -> np.ndarray:
        return np.diff(self._ends, prepend=0)

    def _parts(self, indices: np.ndarray, gap: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Texts of some paths at a time, uint8, and where the first is among the indices; gap: NULs behind each."""
        for first in range(0, len(indices), _AT_ONCE):
            some = indices[first : first + _AT_ONCE]
            starts = np.where(some > 0, self._ends[some - 1], 0)
            lengths = self._ends[some] - starts + gap
            ends = np.cumsum(lengths)
            places = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])
            part = self._text.take(places, mode="clip") if len(self._text) else np.zeros(len(places), np.uint8)
            if gap:
                part[ends - 1] = 0
            yield first, part

    # Finding

    def hashes(self, salt: bytes) -> np.ndarray:
        """Hashes of the paths, (N,) int64. They are others in each process."""
        made = np.empty(len(self), dtype=np.int64)
        start = 0
        for first in range(0, len(self), _AT_ONCE):
            ends = self._ends[first : first + _AT_ONCE]
            text = self._text[start : ends[-1]].tobytes()
            places = [0, *(ends - start).tolist()]
            made[first : first + _AT_ONCE] = [hash(salt + text[a:b]) for a, b in pairwise(places)]
            start = ends[-1]
        return made

    def are(self, indices: np.ndarray, other: "PathTable", other_indices: np.ndarray) -> bool:
        """Whether the paths with these indices are those of another table, one by one."""
        if not np.array_equal(self._lengths[indices], other._lengths[other_indices]):
            return False
        pairs = zip(self._parts(indices), other._parts(other_indices), strict=True)
        return all(np.array_equal(part, other_part) for (_, part), (_, other_part) in pairs)

    # Sorting

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the paths as ``sorted`` has them, (N,) integers, equal ones in their order; and whether each of
        these is the last of equal ones, (N,) bool.
        """
        if not self._sorts_by_bytes():
            places = sorted(range(len(self)), key=self.__getitem__)
            pairs = zip(places, places[1:], strict=False)
            is_last = [self[index] != self[after] for index, after in pairs] + [True] * bool(places)
            return np.array(places, dtype=np.int64), np.array(is_last, dtype=bool)
        kind = np.int32 if len(self) < 2**31 else np.int64
        order, unlike = np.arange(len(self), dtype=kind), np.ones(len(self), dtype=bool)
        alike = np.arange(len(self), dtype=kind)  # places of paths that are not told apart yet from those beside them
        groups = np.zeros(len(self), dtype=kind)  # of each of these
        depth, longest = 0, int(self._lengths.max(initial=0))
        while len(alike) and depth < longest:
            paths = order[alike]
            keys = self._keys(paths, depth)
            by_key = np.lexsort((keys, groups))
            order[alike], keys = paths[by_key], keys[by_key]
            begins = np.ones(len(keys) + 1, dtype=bool)
            begins[1:-1] = (groups[1:] != groups[:-1]) | (keys[1:] != keys[:-1])
            alone = begins[:-1] & begins[1:]
            groups = np.cumsum(begins[:-1], dtype=kind)[~alone]
            alike = alike[~alone]
            depth += _KEY_BYTES
        unlike[alike[:-1][groups[1:] == groups[:-1]]] = False
        return order, unlike

    def _keys(self, indices: np.ndarray, depth: int) -> np.ndarray:
        """The next bytes of paths from a depth on as numbers that compare as they do, (n,) uint64."""
        keys = np.zeros(len(indices), dtype=np.uint64)
        for first in range(0, len(indices), _AT_ONCE):
            some = indices[first : first + _AT_ONCE]
            starts = np.where(some > 0, self._ends[some - 1], 0) + depth
            places = starts[:, None] + np.arange(_KEY_BYTES)
            characters = self._text.take(places, mode="clip")
            characters[places >= self._ends[some][:, None]] = 0
            keys[first : first + _AT_ONCE] = characters.view(">u8")[:, 0]
        return keys

    def _sorts_by_bytes(self) -> bool:
        """Whether the order of the strings is that of their bytes: of all that is UTF-8 without NUL."""
        for first, part in self._parts(np.arange(len(self)), gap=1):
            if np.count_nonzero(part == 0) != min(_AT_ONCE, len(self) - first):
                return False
            try:
                part.tobytes().decode("utf-8")
            except UnicodeDecodeError:
                return False
        return True


def last_of_each(names: PathTable) -> np.ndarray:
    """Indices of the names in their order, of equal ones the last, (n,) integers."""
    order, is_last = names.order()
    return order[is_last]


def places_in(rows: PathTable, files: PathTable) -> tuple[np.ndarray, int]:
    """The row in which each file stands, the last of several, -1 for none: (N,) int64; and how many rows are
    different.
    """
    salt = b""
    while (found := _places_by_hash(rows, files, salt)) is None:
        salt += b"+"
    return found


def _places_by_hash(rows: PathTable, files: PathTable, salt: bytes) -> tuple[np.ndarray, int] | None:
    """What :func:`places_in` returns; None where two different names have the same hash."""
    hashes = rows.hashes(salt)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    is_last = np.append(hashes[1:] != hashes[:-1], True)[: len(rows)]
    again = np.flatnonzero(~is_last)
    if not rows.are(order[again], rows, order[again + 1]):
        return None
    order, hashes = order[is_last], hashes[is_last]
    wanted = files.hashes(salt)
    at = np.searchsorted(hashes, wanted)
    at[at == len(hashes)] = 0
    is_found = hashes[at] == wanted if len(hashes) else np.zeros(len(files), dtype=bool)
    found = np.flatnonzero(is_found)
    places = np.full(len(files), -1, dtype=np.int64)
    places[found] = order[at[found]]
    return (places, len(order)) if files.are(found, rows, places[found]) else None

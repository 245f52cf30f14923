"""Images in parquet files, as snapshots of Hugging Face's hub have them: a column of {bytes, path}, one of labels."""

import contextlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from masked_diffusion.data.archive_files import ArchiveFiles, others_in
from masked_diffusion.data.image_files import EXTENSIONS, UnreadableImageError, is_remote
from masked_diffusion.data.row_places import ChangedFileError, RowPlaces, find_rows
from masked_diffusion.data.table_images import Table, choose_split, image_column, values_of

_MAGIC = b"PAR1"
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+.*\.parquet")  # train-00000-of-00005-0123456789abcdef.parquet
# Bytes of the places of rows that a process keeps: those of some million images.
_PLACES_BYTES = 2**27
# A row group is decoded as a whole when a process first meets it: one that is larger is refused.
MAX_GROUP_BYTES = 2**32
# Files that a process holds open.
_OPEN = 8


class Parquet(Table):
    """The images of a parquet file, or of those in a folder or its folder ``data``; of several splits, ``train``.

    kept_bytes: of row groups that a process keeps decoded, beside the one it reads. The hub's have 100 images each.
    """

    kept_bytes = 2**29
    _image_bytes = 0  # of all files, when they are decoded

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        if is_remote(data_dir):
            return False
        path = Path(data_dir)
        if path.is_file():
            with path.open("rb") as file:
                return file.read(4) == _MAGIC
        if not path.is_dir() or not (files := _parquet_files(path)):
            return False
        return _has_images(files[0]) or not _holds_images(path)  # a table beside folders of images is about them

    @classmethod
    def _files_of(cls, path: Path) -> tuple[list[str], list[str]]:
        if path.is_file():
            return [str(path)], []
        files = _parquet_files(path)
        beside = others_in(str(files[0].parent), [str(file) for file in files])
        split_of = {str(file): match[1] if (match := _SPLIT.fullmatch(file.name)) else "" for file in files}
        chosen, notes = choose_split(split_of, path, cls.kind)
        return chosen, [*notes, *beside]

    def _start(self) -> None:
        self._opened: dict[int, Any] = {}
        self._contents = ArchiveFiles(self._paths)
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
        # None: of a group whose rows have to be decoded together.
        self._places: OrderedDict[tuple[int, int], RowPlaces | None] = OrderedDict()
        self._places_bytes = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_opened", "_contents", "_kept", "_places", "_places_bytes", "_lock")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _schema(self, number: int) -> Any:
        return self._file(number).schema_arrow

    def _rows_of_groups(self, number: int) -> Iterable[int]:
        metadata = self._file(number).metadata
        self._image_bytes += _check_groups(metadata, self._column, self._paths[number], self.data_dir)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _small_columns(self, number: int, columns: Sequence[str]) -> dict[str, Iterator[Any]]:
        table = self._file(number).read(columns, use_threads=False)
        found = {}
        for column in columns:
            name, _, part = column.partition(".") if column not in table.column_names else (column, "", "")
            found[column] = values_of(table[name], part)
        return found

    def _content(self, number: int, group: int, row: int, index: int) -> bytes | None:
        """As any table's. Of sets that do not stay in memory, at the row's place in the file if that is known."""
        with self._lock:
            places = None if (number, group) in self._kept else self._places.get((number, group))
            if places is not None:
                self._places.move_to_end((number, group))
        if places is not None:
            with contextlib.suppress(ChangedFileError):  # decoding the group says what is wrong
                return places.read(self._contents[number].read, row)
        return super()._content(number, group, row, index)

    def _find_places(self, number: int, group: int, rows: Any) -> None:
        """Keep the places of the rows of a group, which were just decoded."""
        metadata = self._file(number).metadata.row_group(group)
        chunks = [metadata.column(index) for index in range(metadata.num_columns)]
        [chunk] = [c for c in chunks if c.path_in_schema in (self._column, f"{self._column}.bytes")]
        places = find_rows(self._contents[number].read, chunk, list(_buffers(rows)))
        self._places[number, group] = places
        self._places_bytes += places.nbytes if places else 0
        while self._places_bytes > _PLACES_BYTES:
            _, former = self._places.popitem(last=False)
            self._places_bytes -= former.nbytes if former else 0

    def _rows(self, number: int, group: int, index: int) -> Any:
        """The image column of a row group."""
        import pyarrow

        with self._lock:
            if (number, group) in self._kept:
                self._kept.move_to_end((number, group))
                return self._kept[number, group]
            try:
                table = self._file(number).read_row_group(group, [self._column], use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk, not the data
                raise UnreadableImageError(self.name_of(index), f"its row group is damaged: {error}") from error
            rows = self._kept[number, group] = table[self._column]
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > self.kept_bytes:
                self._kept.popitem(last=False)
            if self._image_bytes > self.kept_bytes and (number, group) not in self._places:
                self._find_places(number, group, rows)
            return rows

    def _file(self, number: int) -> Any:
        import pyarrow.parquet

        if number not in self._opened:
            if len(self._opened) >= _OPEN:
                self._opened.pop(next(iter(self._opened)))
            self._opened[number] = pyarrow.parquet.ParquetFile(self._paths[number], page_checksum_verification=True)
        return self._opened[number]


def _parquet_files(folder: Path) -> list[Path]:
    """Parquet files of a folder that has no images in it, or of its folder ``data``."""
    entries = list(folder.iterdir()) if not any(e.suffix.lower() in EXTENSIONS for e in folder.iterdir()) else []
    found = sorted(entry for entry in entries if entry.suffix == ".parquet" and not entry.name.startswith("."))
    inner = folder / "data"
    return found or (sorted(inner.glob("[!.]*.parquet")) if entries and inner.is_dir() else [])


def _buffers(rows: Any) -> Iterator[Any]:
    """The content of each row of a column of images, as a buffer, None where it has none."""
    for chunk in rows.chunks:
        parts = chunk.flatten()[chunk.type.get_field_index("bytes")] if hasattr(chunk, "flatten") else chunk
        yield from (value.as_buffer() if value.is_valid else None for value in parts)


def _check_groups(metadata: Any, column: str, path: str, data_dir: str) -> int:
    """The bytes of a file's images. Raises ValueError for a row group of which they are too many to be decoded."""
    total = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        if size > MAX_GROUP_BYTES:
            raise ValueError(
                f"--data_dir {data_dir}: row group {number} of {Path(path).name} has {size} bytes of images, more than "
                f"{MAX_GROUP_BYTES} that are decoded at a time; write the file with fewer rows in a group "
                "(row_group_size=100)"
            )
        total += size
    return total


def _has_images(path: Path) -> bool:
    """Whether a parquet file can be read and has a column of images."""
    try:
        import pyarrow.parquet
    except ImportError:
        return False
    try:
        image_column(pyarrow.parquet.read_schema(path), str(path))
    except (pyarrow.ArrowException, ValueError, OSError):
        return False
    return True


def _holds_images(folder: Path) -> bool:
    """Whether image files lie in the folders below a folder; hidden ones do not count."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".") for name in names):
            return True
    return False

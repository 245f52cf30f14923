"""Images in parquet files, as snapshots of Hugging Face's hub have them: a column of {bytes, path}, one of labels."""

import json
import os
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion.data.archive_files import MAX_IMAGE_BYTES, is_outside
from masked_diffusion.data.image_files import EXTENSIONS, PathTable, UnreadableImageError, is_remote
from masked_diffusion.data.label_files import classes_of
from masked_diffusion.data.source import Classes, ImageSource

_MAGIC = b"PAR1"
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+.*\.parquet")  # train-00000-of-00005-0123456789abcdef.parquet
_IMAGE_NAMES = ("image", "img", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "cls")
# Bytes of row groups that a process keeps decoded, beside the one it reads. The hub's groups have 100 images each.
_KEPT_BYTES = 2**29
# A row group is decoded as a whole, in each loader process: one that is larger is refused.
MAX_GROUP_BYTES = 2**32
# Files that a process holds open.
_OPEN = 8


class Parquet(ImageSource):
    """The images of a parquet file, or of those in a folder or its folder ``data``; of several splits, ``train``.

    The image column is the one of {bytes, path}, or of binary values; where there are several, ``image`` or ``img``.
    The label column is ``label``; names of classes are taken from the features that datasets stores with the file.
    Raises ValueError, naming --data_dir and the remedy: without pyarrow, for damaged files, and for other columns.
    """

    def __init__(self, data_dir: str) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"--data_dir {data_dir}: parquet files are read with pyarrow; install it: pip install "
                "'masked-diffusion[parquet]'"
            ) from error
        self.data_dir = data_dir
        self._paths, self.notes = _files_of(Path(data_dir))
        self._start()
        paths: list[str | None] = []
        labels: list[Any] = []
        groups: list[tuple[int, int, int]] = []  # file, row group, its rows
        try:
            schema = self._file(0).schema_arrow
            self._column, path_column = _image_column(schema, data_dir)
            label_column = next((name for name in _LABEL_NAMES if name in schema.names), None)
            for number, path in enumerate(self._paths):
                file = self._file(number)
                _check_groups(file.metadata, self._column, path, data_dir)
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                groups += [(number, group, count) for group, count in enumerate(rows)]
                columns = [name for name in (path_column, label_column) if name]
                table = file.read(columns, use_threads=False) if columns else None
                if path_column and table is not None:
                    paths += [row and row["path"] for row in table[self._column].to_pylist()]
                if label_column and table is not None:
                    labels += table[label_column].to_pylist()
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise ValueError(
                f"--data_dir {data_dir}: a parquet file is damaged, or not as the others ({error}); copy it again"
            ) from error
        counts = [count for *_, count in groups]
        if not sum(counts):
            raise ValueError(f"--data_dir {data_dir}: these parquet files have no rows; give some that hold images")
        own_names = self._own_names(paths)
        names = own_names or self._made_up_names(groups)
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = PathTable(names[index] for index in order)
        self._groups = np.array([group[:2] for group in groups])
        self._group_of = np.repeat(np.arange(len(groups)), counts)[order]
        self._row_of = np.concatenate([np.arange(count) for count in counts])[order]
        self._labels = _classes(schema, label_column, [labels[index] for index in order] if labels else [], data_dir)
        if own_names is None and self._labels is None:
            missing = labels.count(None) if label_column else len(names)
            self.made_up_folders = f"{missing} of {len(names)} images have no label"

    def _own_names(self, paths: list[str | None]) -> list[str] | None:
        """The images' own paths, where each has one and no two the same."""
        own = [path for path in paths if path and not is_outside(path)]
        return own if own and len(own) == len(paths) == len(set(own)) else None

    def _made_up_names(self, groups: list[tuple[int, int, int]]) -> list[str]:
        """The file's name and the row of each image."""
        rows_of = np.zeros(len(self._paths), dtype=np.int64)
        for number, _, count in groups:
            rows_of[number] += count
        return [f"{Path(self._paths[n]).name}/{row:08d}" for n, rows in enumerate(rows_of) for row in range(rows)]

    def _start(self) -> None:
        self._opened: dict[int, Any] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_opened", "_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def sizes(self) -> np.ndarray:
        return np.full(len(self), -1, dtype=np.int64)  # they stand nowhere but in the data

    def classes(self) -> Classes | None:
        return self._labels

    def read(self, index: int) -> bytes:
        value = self._rows(int(self._group_of[index]), index)[int(self._row_of[index])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not content:
            raise UnreadableImageError(self.name_of(index), "the row has no bytes; the image is in a file elsewhere")
        if len(content) > MAX_IMAGE_BYTES:
            raise UnreadableImageError(self.name_of(index), f"{len(content)} bytes are more than {MAX_IMAGE_BYTES}")
        return bytes(content)

    def _rows(self, group: int, index: int) -> Any:
        """The image column of a row group."""
        import pyarrow

        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group]
            number, of_file = (int(value) for value in self._groups[group])
            try:
                table = self._file(number).read_row_group(of_file, [self._column], use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk, not the data
                raise UnreadableImageError(self.name_of(index), f"its row group is damaged: {error}") from error
            rows = self._kept[group] = table[self._column]
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
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


def _files_of(path: Path) -> tuple[list[str], list[str]]:
    """The files to read, of several splits those of ``train``, and what to say of the others."""
    if path.is_file():
        return [str(path)], []
    files = _parquet_files(path)
    split_of = {file: match[1] if (match := _SPLIT.fullmatch(file.name)) else "" for file in files}
    splits = sorted(set(split_of.values()))
    if len(splits) == 1:
        return [str(file) for file in files], []
    if "train" not in splits:
        raise ValueError(
            f"--data_dir {path}: its parquet files are of several splits ({', '.join(splits)}) and none is train; give "
            "a folder with the files of one, or one file"
        )
    others = ", ".join(split or "no split" for split in splits if split != "train")
    return [str(file) for file in files if split_of[file] == "train"], [f"left out: files of other splits: {others}"]


def _check_groups(metadata: Any, column: str, path: str, data_dir: str) -> None:
    """Raises ValueError for a row group of which the images are too large to be decoded."""
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


def _has_images(path: Path) -> bool:
    """Whether a parquet file can be read and has a column of images."""
    try:
        import pyarrow.parquet
    except ImportError:
        return False
    try:
        _image_column(pyarrow.parquet.read_schema(path), str(path))
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


def _image_column(schema: Any, data_dir: str) -> tuple[str, str | None]:
    """The name of the image column and of the path in it, if it has one."""
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found: dict[str, str | None] = {}
    for column in schema:
        if is_binary(column.type):
            found[column.name] = None
        elif types.is_struct(column.type):
            parts = {part.name: part.type for part in column.type}
            if is_binary(parts.get("bytes")) if "bytes" in parts else False:
                found[column.name] = f"{column.name}.path" if "path" in parts else None
    choice = list(found)[0] if len(found) == 1 else next((name for name in _IMAGE_NAMES if name in found), None)
    if choice is None:
        raise ValueError(
            f"--data_dir {data_dir}: which column has the images? There are {', '.join(schema.names)}; name the one of "
            f"bytes, or of {{bytes, path}}, {_IMAGE_NAMES[0]}"
        )
    return choice, found[choice]


def _classes(schema: Any, column: str | None, labels: list[Any], data_dir: str) -> Classes | None:
    """Classes of the label column, their names from the features that datasets stores; None without labels."""
    if column is None or not labels or any(label is None for label in labels):
        return None
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    classes = classes_of(labels, f"column {column} of --data_dir {data_dir}")
    if names and classes.labels.max() < len(names) and not any(isinstance(label, str) for label in labels):
        return Classes([str(name) for name in names], classes.labels)
    return classes

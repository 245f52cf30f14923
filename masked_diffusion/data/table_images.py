"""What tables of images have in common: the column of images, that of labels, names and classes. Read with pyarrow."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion.data.archive_files import is_outside
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.data.label_files import LabelColumn, named
from masked_diffusion.data.path_table import PathList, PathTable
from masked_diffusion.data.source import USUAL, Classes, ImageSource, SourceOptions

_ROWS_AT_ONCE = 1 << 16  # of small columns
_IMAGE_NAMES = ("image", "img", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "cls")


class Table(ImageSource):
    """The images of the rows of one or several files with the same columns.

    The image column is the one of {bytes, path}, or of binary values; where there are several, ``image`` or ``img``; or
    ``options.image_column``. The label column is ``label``, or ``options.label_column``; names of classes are taken
    from the features that datasets stores with the file. Raises ValueError, naming --data_dir and the remedy: without
    pyarrow, for damaged files, and for other columns.
    """

    kind = "parquet"  # what to call the files in messages

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"--data_dir {data_dir}: {self.kind} files are read with pyarrow; install it: pip install "
                "'masked-diffusion[parquet]'"
            ) from error
        self.data_dir = data_dir
        self.largest = options.max_image_bytes
        self._paths, self.notes = self._files_of(Path(data_dir))
        self._start()
        paths, labels = _OwnNames(), LabelColumn()
        groups: list[tuple[int, int, int]] = []  # file, group of rows, its rows
        try:
            schema = self._schema(0)
            self._column, path_column = image_column(schema, data_dir, options.image_column)
            label_column = _label_column(schema, data_dir, options.label_column)
            for number in range(len(self._paths)):
                groups += [(number, group, rows) for group, rows in enumerate(self._rows_of_groups(number))]
                columns = [name for name in (path_column, label_column) if name]
                table = self._small_columns(number, columns) if columns else {}
                if path_column:
                    paths.extend(table[path_column])
                if label_column:
                    labels.extend(table[label_column])
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise ValueError(
                f"--data_dir {data_dir}: its {self.kind} files are damaged, or not alike ({error}); copy them again"
            ) from error
        counts = [count for *_, count in groups]
        if not sum(counts):
            raise ValueError(f"--data_dir {data_dir}: these {self.kind} files have no rows; give some that hold images")
        own_names = paths.table()
        names = PathTable(self._made_up_names(groups)) if own_names is None else own_names
        order, _ = names.order()
        self.names = names.take(order)
        self._groups = np.array([group[:2] for group in groups])
        self._group_of = np.repeat(np.arange(len(groups), dtype=np.int32), counts)[order]
        self._row_of = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])[order]
        self._labels = self._usable(schema, label_column, labels.take(order) if len(labels) else labels, options)
        if own_names is None and self._labels is None:
            missing = labels.count(None) if label_column else len(names)
            self.made_up_folders = f"{missing} of {len(names)} images have no label"

    # What a kind of files has of its own

    @classmethod
    @abstractmethod
    def _files_of(cls, path: Path) -> tuple[list[str], list[str]]:
        """The files to read, and what to say of those that are left out."""

    @abstractmethod
    def _start(self) -> None:
        """Have no file open, in a new process."""

    @abstractmethod
    def _schema(self, number: int) -> Any:
        """The columns of a file, as a ``pyarrow.Schema``."""

    @abstractmethod
    def _rows_of_groups(self, number: int) -> Iterable[int]:
        """How many rows each of a file's groups has."""

    @abstractmethod
    def _small_columns(self, number: int, columns: Sequence[str]) -> dict[str, Iterator[Any]]:
        """The values of columns of a file by their names, such as ``label`` and ``image.path``."""

    @abstractmethod
    def _rows(self, number: int, group: int, index: int) -> Any:
        """The images of a group of rows: by their numbers in it, pyarrow scalars. Raises UnreadableImageError, naming
        image ``index``, where they are damaged."""

    # The source

    def _made_up_names(self, groups: list[tuple[int, int, int]]) -> Iterator[str]:
        """The file's name and the row of each image."""
        rows_of = np.zeros(len(self._paths), dtype=np.int64)
        for number, _, count in groups:
            rows_of[number] += count
        return (f"{Path(self._paths[n]).name}/{row:08d}" for n, rows in enumerate(rows_of) for row in range(rows))

    def sizes(self) -> np.ndarray:
        return np.full(len(self), -1, dtype=np.int64)  # they stand nowhere but in the data

    def classes(self) -> Classes | None:
        return self._labels

    def read(self, index: int) -> bytes:
        number, group = (int(value) for value in self._groups[self._group_of[index]])
        content = self._content(number, group, int(self._row_of[index]), index)
        if not content:
            raise UnreadableImageError(self.name_of(index), "the row has no bytes; the image is in a file elsewhere")
        if len(content) > self.largest:
            raise UnreadableImageError(self.name_of(index), f"{len(content)} bytes are more than {self.largest}")
        return bytes(content)

    def _content(self, number: int, group: int, row: int, index: int) -> bytes | None:
        """The content of an image, None where its row has none. Raises as :meth:`_rows`."""
        value = self._rows(number, group, index)[row].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def _usable(self, schema: Any, column: str | None, labels: LabelColumn, options: SourceOptions) -> Classes | None:
        """Classes of the label column, their names from the features that datasets stores; None without labels."""
        if column is None or not len(labels):
            return None
        if missing := labels.count(None):
            if options.label_column:
                raise ValueError(
                    f"--label_column {column}: {missing} of {len(labels)} rows of --data_dir {self.data_dir} have no "
                    "label; fill it, or train without classes (--class_cond False)"
                )
            self.notes = [*self.notes, f"labels are not used: {missing} of {len(labels)} images have none"]
            return None
        classes = labels.classes(lambda label: label, f"column {column} of --data_dir {self.data_dir}")
        if any(isinstance(label, str) for label in labels.different):
            return classes
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = features.get(column, {}).get("names") or ()
        return named(classes, [str(name) for name in names])


def values_of(column: Any, part: str = "") -> Iterator[Any]:
    """The values of a column of pyarrow, or of a part of each, some rows at a time."""
    for first in range(0, len(column), _ROWS_AT_ONCE):
        values = column.slice(first, _ROWS_AT_ONCE).to_pylist()
        yield from (value and value[part] for value in values) if part else values


class _OwnNames:
    """The images' own paths, as far as each has one."""

    def __init__(self) -> None:
        self._paths, self._all_have = PathList(), True

    def extend(self, paths: Iterable[str | None]) -> None:
        for path in paths:
            self._all_have = self._all_have and bool(path) and not is_outside(path or "")
            if self._all_have:
                self._paths.append(path or "")

    def table(self) -> PathTable | None:
        """The paths where each image has one and no two have the same, else None."""
        table = self._paths.table()
        usable = self._all_have and len(table) > 0 and bool(table.order()[1].all())
        return table if usable else None


def image_column(schema: Any, data_dir: str, asked: str = "") -> tuple[str, str | None]:
    """The name of the image column and of the path in it, if it has one. asked: the name that the user says."""
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
    if asked:
        if asked not in found:
            raise ValueError(
                f"--image_column {asked}: no column of --data_dir {data_dir} with images has this name; those that may "
                f"have images are {', '.join(found) or 'none'}"
            )
        return asked, found[asked]
    choice = list(found)[0] if len(found) == 1 else next((name for name in _IMAGE_NAMES if name in found), None)
    if choice is None:
        raise ValueError(
            f"--data_dir {data_dir}: which column has the images? There are {', '.join(schema.names)}; give the one of "
            "bytes, or of {bytes, path}, as --image_column"
        )
    return choice, found[choice]


def _label_column(schema: Any, data_dir: str, asked: str) -> str | None:
    if not asked:
        return next((name for name in _LABEL_NAMES if name in schema.names), None)
    import pyarrow.types as types

    if asked not in schema.names:
        raise ValueError(
            f"--label_column {asked}: --data_dir {data_dir} has no such column; there are {', '.join(schema.names)}"
        )
    kind = schema.field(asked).type
    if not any(is_kind(kind) for is_kind in (types.is_integer, types.is_string, types.is_large_string)):
        raise ValueError(
            f"--label_column {asked}: holds {kind} in --data_dir {data_dir}; labels are integers or names of classes"
        )
    return asked


def choose_split(files: dict[str, str], data_dir: Path, kind: str) -> tuple[list[str], list[str]]:
    """Of files and the split of each, those of the only split, else of ``train``; and what to say of the others.

    Raises ValueError where it is not clear.
    """
    splits = sorted(set(files.values()))
    if len(splits) == 1:
        return list(files), []
    if "train" not in splits:
        raise ValueError(
            f"--data_dir {data_dir}: its {kind} files are of several splits ({', '.join(splits)}) and none is train; "
            "give a folder with the files of one, or one file"
        )
    others = ", ".join(split or "no split" for split in splits if split != "train")
    return [file for file, split in files.items() if split == "train"], [f"left out: files of other splits: {others}"]

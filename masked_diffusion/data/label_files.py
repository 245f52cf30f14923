"""Labels that stand in a file beside the images: edm2's ``dataset.json``, a CSV, or JSON lines."""

import csv
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion.data.class_names import sort_class_names
from masked_diffusion.data.image_files import read_blocks, read_bytes
from masked_diffusion.data.path_table import PathList, PathTable, places_in
from masked_diffusion.data.source import Classes, Source
from masked_diffusion.data.text_blocks import FileBlocks, JSONText, LongLineError, lines, parts_of, texts

MAX_CLASSES = 1_000_000
_AT_ONCE = 1 << 15  # rows that are Python objects at a time
_FILE_AND_LABEL = itemgetter("file", "label")


class NoLabelError(ValueError):
    """Something in a file of labels is none; part of a message."""


class OtherJSONError(ValueError):
    """A file that should have labels is whole JSON, but of another kind."""


@dataclass(frozen=True)
class LabelTable:
    """origin: what to call the file in messages. files: names below the data folder, in the order of the file. labels:
    of each of them; of a file that stands there more than once, the last counts. class_names: of labels 0, 1, ...,
    where the file has them. nowhere: number of further names, which no file can have."""

    origin: str
    files: PathTable
    labels: "LabelColumn"
    class_names: Sequence[str] = ()
    nowhere: int = 0

    def classes_and_notes(self, files: PathTable) -> tuple[Classes | None, list[str]]:
        """The classes of images, None where the file has no labels; and what a user should know: labels of files that
        are not among the images. Raises ValueError for images without a label.
        """
        if not len(self.files) + self.nowhere:
            return None, []
        rows, different = places_in(self.files, files)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise ValueError(
                f"{self.origin}: no label for {len(missing)} of {len(rows)} images, such as {files[missing[0]]}; add "
                "them, or train without classes (--class_cond False)"
            )
        labels = self.labels.take(rows)
        classes = labels.classes(lambda label: label, self.origin)
        if all(isinstance(label, int) for label in labels.different):
            classes = named(classes, self.class_names)
        left_out = different + self.nowhere - len(rows)
        return classes, [f"left out: {left_out} labels of {self.origin} without an image"] if left_out else []


def classes_of(labels: Iterable[int | str], origin: str) -> Classes:
    """Classes of a label or class name for each image.

    Labels (integers) stay what they are, whether or not each has images; names get labels in the order of
    ``sort_class_names``. Raises ValueError, naming ``origin``, for labels below 0 or above MAX_CLASSES.
    """
    labels = list(labels)
    if all(isinstance(label, int) for label in labels):
        numbers = np.array(labels, dtype=np.int64)
        if numbers.min() < 0 or numbers.max() >= MAX_CLASSES:
            raise ValueError(f"{origin}: labels are {numbers.min()} ... {numbers.max()}, they should begin at 0")
        return Classes([str(number) for number in range(numbers.max() + 1)], numbers)
    names = sort_class_names(str(label) for label in labels)
    label_of = {name: label for label, name in enumerate(names)}
    return Classes(names, np.array([label_of[str(label)] for label in labels], dtype=np.int64))


class LabelColumn:
    """The labels of images, of which each different one is kept once: ten million of them are few classes.

    A label is an integer or a name, or what stands for none, such as None.
    """

    def __init__(self) -> None:
        self._number_of: dict[Any, int] = {}
        self._numbers = array("i")

    def __len__(self) -> int:
        return len(self._numbers)

    def extend(self, labels: Iterable[Any]) -> None:
        number_of = self._number_of
        for label in labels:
            label = str(label) if isinstance(label, list | dict) else label
            self._numbers.append(number_of.setdefault(label, len(number_of)))

    def __getitem__(self, index: int) -> Any:
        return list(self._number_of)[self._numbers[index]]

    def count(self, label: Any) -> int:
        """How many images have this label."""
        return int(np.count_nonzero(np.frombuffer(self._numbers, np.int32) == self._number_of.get(label, -1)))

    def take(self, indices: np.ndarray) -> "LabelColumn":
        """The labels of these images, in this order."""
        taken = LabelColumn()
        taken._number_of = self._number_of
        taken._numbers = array("i", np.frombuffer(self._numbers, np.int32)[indices].tobytes())
        return taken

    @property
    def different(self) -> list[Any]:
        """The labels that images have, in the order in which they were first met."""
        used = np.unique(np.frombuffer(self._numbers, np.int32))
        values = list(self._number_of)
        return [values[number] for number in used]

    def classes(self, label_of: Callable[[Any], int | str], origin: str) -> Classes:
        """What :func:`classes_of` makes of all labels. label_of: turns what was given into one."""
        numbers = np.frombuffer(self._numbers, np.int32)
        used = np.unique(numbers)
        names, labels = classes_of([label_of(value) for value in self.different], origin)
        lookup = np.zeros(len(self._number_of), dtype=np.int64)
        lookup[used] = labels
        return Classes(names, lookup[numbers])


def named(classes: Classes, names: Sequence[str]) -> Classes:
    """Classes of numbers, called by these names in label order; as they are where one has no name, or two share one."""
    if len(names) < len(classes.names) or len(set(names)) < len(names):
        return classes
    return Classes(list(names), classes.labels)


def read_label_file(path: str) -> LabelTable:
    """A ``--labels_file``, local or remote. Raises ValueError or OSError, naming the file."""
    try:
        # A pipe has no beginning to go back to; of a remote file, each block would be a request.
        blocks = partial(parts_of, read_bytes(path)) if not Path(path).is_file() else partial(read_blocks, path)
        return read_labels(blocks, f"--labels_file {path}")
    except OSError as error:
        raise type(error)(f"--labels_file {path}: {error.strerror or error}") from error


def found_labels(blocks: FileBlocks, origin: str, source: Source) -> Classes | None:
    """The classes of a source's images, from a ``dataset.json`` that was found beside them.

    Other programs have files of this name: JSON of another form gives None and a note of the source. Raises ValueError,
    naming ``origin``, for a damaged file, and for images without a label.
    """
    try:
        classes, notes = read_labels(blocks, origin).classes_and_notes(source.names)
    except OtherJSONError:
        classes, notes = None, [f"labels are not used: {origin} is no list of labels but other JSON"]
    source.notes = list(dict.fromkeys([*source.notes, *notes]))
    return classes


def read_labels(blocks: FileBlocks, origin: str) -> LabelTable:
    """Labels of edm2's form, ``{"labels": [[file, label], ...]}``, of JSON lines with ``file`` and ``label``, or of a
    CSV with a header that has these columns.

    A label in JSON is an integer, a one-hot list, or a class's name; in a CSV it is a class's name. edm2's form may
    have ``"class_names": ["cat", ...]`` beside its labels, as ``scripts/make_dataset.py`` writes it. Raises ValueError,
    naming ``origin`` and what is expected; an OtherJSONError for JSON of another kind.
    """
    try:
        starts = (text.lstrip()[:1] for text in texts(blocks()))
        rows = _from_json(blocks) if next(filter(None, starts), "") == "{" else _from_csv(blocks)
        return rows.table(origin)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error) as error:
        kind = OtherJSONError if _is_other_json(blocks) else ValueError
        raise kind(
            f"{origin}: not a list of labels ({error}); give a CSV with the columns file and label, JSON lines such as "
            '{"file": "a/1.png", "label": "cat"}, or {"labels": [["a/1.png", 0], ...]}'
        ) from error


class _Rows:
    """Rows as they are read. What is wrong with one is kept until the whole file was read: a file that is damaged is
    refused as that.

    damage: the first row that is none. class_names: see :class:`LabelTable`.
    """

    def __init__(self) -> None:
        self.damage: Exception | None = None
        self.class_names: Sequence[str] = ()
        self._no_label: Exception | None = None
        self._files, self._labels = PathList(), LabelColumn()
        self._nowhere: set[str] = set()

    def extend(self, rows: Iterable[Any], split: Callable[[Any], tuple[Any, Any]]) -> None:
        """Add rows. split: gives the name and the label of one, or raises what is wrong with it."""
        files, labels = list[str](), list[int | str]()
        try:
            for row in rows:
                file, label = split(row)
                files.append(str(file))
                labels.append(label if type(label) is int else self._checked(label))
        except (ValueError, TypeError, LookupError) as error:
            self.damage = self.damage or error
        if self.damage is None and self._no_label is None:
            self._add(files, labels)

    def _checked(self, value: Any) -> int | str:
        try:
            return _label(value)
        except (ValueError, TypeError) as error:
            self._no_label = self._no_label or error
            return 0

    def _add(self, files: list[str], labels: list[int | str]) -> None:
        if not _is_path("".join(files)):
            self._nowhere.update(file for file in files if not _is_path(file))
            kept = [(file, label) for file, label in zip(files, labels, strict=True) if _is_path(file)]
            files, labels = [file for file, _ in kept], [label for _, label in kept]
        self._files.extend(files)
        self._labels.extend(labels)

    def table(self, origin: str) -> LabelTable:
        """All rows. Raises what was wrong with the first one that was none, or had no label."""
        if error := self.damage or self._no_label:
            raise error
        return LabelTable(origin, self._files.table(), self._labels, self.class_names, len(self._nowhere))


def _is_path(name: str) -> bool:
    """Whether a file can have this name: JSON has halves of surrogate pairs, of which no path is made."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _from_json(blocks: FileBlocks) -> _Rows:
    try:
        return _from_whole_json(blocks)
    except ValueError as error:  # several objects
        try:
            return _from_json_lines(blocks)
        except LongLineError:
            raise error from None


def _from_whole_json(blocks: FileBlocks) -> _Rows:
    record, rows = _read_whole_json(blocks)
    if "labels" not in record:
        rows.extend([record], _FILE_AND_LABEL)
    elif not record["labels"]:
        rows.damage = NoLabelError("its labels are no pairs of a file and a label")
    names = record.get("class_names")
    if "labels" in record and isinstance(names, list) and all(isinstance(name, str) and name for name in names):
        rows.class_names = names
    return rows


def _read_whole_json(blocks: FileBlocks) -> tuple[dict[str, Any], _Rows]:
    """What an object has of ``file``, ``label`` and ``class_names``, and for ``labels`` whether they are meant as
    edm2's; and these. Raises ValueError for what is not JSON."""
    text = JSONText(texts(blocks()))
    record, rows = dict[str, Any](), _Rows()
    for key in text.members():
        if key == "labels":
            record[key], rows = _read_pairs(text)
        else:
            value = text.value()
            record |= {key: value} if key in ("file", "label", "class_names") else {}
    text.finish()
    return record, rows


def _read_pairs(text: JSONText) -> tuple[bool, _Rows]:
    """Whether the next value is meant as edm2's list of pairs, whatever is wrong with some of them, null as an empty
    one; and the pairs."""
    rows = _Rows()
    if text.peek() != "[":
        return text.value() is None, rows
    number, are_pairs = 0, False
    for some in text.elements():
        number += len(some)
        are_pairs = are_pairs or any(map(_is_pair, some))
        rows.extend(some, lambda pair: pair)
    return are_pairs or not number, rows


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _from_json_lines(blocks: FileBlocks) -> _Rows:
    rows, values = _Rows(), _json_lines(blocks)
    while some := list(islice(values, _AT_ONCE)):
        rows.extend(some, _FILE_AND_LABEL)
    return rows


def _json_lines(blocks: FileBlocks) -> Iterator[Any]:
    for line in lines(texts(blocks())):
        try:
            yield json.loads(line)
        except ValueError:  # an empty one, or one with rarer ends of lines in it
            yield from (json.loads(part) for part in line.splitlines() if part.strip())


def _is_other_json(blocks: FileBlocks) -> bool:
    """Whether this is whole JSON, or JSON lines, in which nothing looks like a list of labels."""
    try:
        text = JSONText(texts(blocks()))
        if text.peek() == "{":
            record, _ = _read_whole_json(blocks)
            return "file" not in record and not record.get("labels")
        if text.peek() == "[":
            for _ in text.elements():
                pass
        else:
            text.value()
        text.finish()
        return True
    except (ValueError, RecursionError):
        pass
    try:
        return not any(isinstance(value, dict) and _looks_like_labels(value) for value in _json_lines(blocks))
    except (ValueError, RecursionError):
        return False


def _looks_like_labels(row: dict[str, Any]) -> bool:
    labels = row.get("labels", False)
    return "file" in row or labels in (None, []) or (isinstance(labels, list) and any(map(_is_pair, labels)))


def _from_csv(blocks: FileBlocks) -> _Rows:
    table = csv.reader(lines(texts(blocks())), skipinitialspace=True)
    header = next(table, [])
    if not {"file", "label"} <= set(header):
        raise NoLabelError(f"its first line is {','.join(header)[:100]!r}")
    file, label = (len(header) - 1 - header[::-1].index(name) for name in ("file", "label"))

    def cells(row: list[str]) -> tuple[str | None, str | None]:
        return row[file] if file < len(row) else None, row[label] if label < len(row) else None

    rows = _Rows()
    while some := list(islice(table, _AT_ONCE)):
        rows.extend(filter(None, some), cells)
    return rows


def _label(value: Any) -> int | str:
    if isinstance(value, list):
        if sorted(value) != [0] * (len(value) - 1) + [1]:
            raise NoLabelError(f"{value!r:.100} is not one-hot")
        return value.index(1)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise NoLabelError(f"{value!r:.100} is no label")
    return value

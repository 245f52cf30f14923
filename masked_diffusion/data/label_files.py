"""Labels that stand in a file beside the images: edm2's ``dataset.json``, a CSV, or JSON lines."""

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from masked_diffusion.data.class_names import sort_class_names
from masked_diffusion.data.image_files import read_bytes
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.data.source import Classes, Source

MAX_CLASSES = 1_000_000


class NoLabelError(ValueError):
    """Something in a file of labels is none; part of a message."""


class OtherJSONError(ValueError):
    """A file that should have labels is whole JSON, but of another kind."""


@dataclass(frozen=True)
class LabelTable:
    """origin: what to call the file in messages. of_file: a file's name below the data folder -> its label or class.
    class_names: of labels 0, 1, ..., where the file has them."""

    origin: str
    of_file: dict[str, int | str]
    class_names: Sequence[str] = ()

    def notes(self, files: PathTable) -> list[str]:
        """What a user should know of the table beside these images: labels of files that are not among them."""
        number = len(self.of_file) - sum(name in self.of_file for name in files)
        return [f"left out: {number} labels of {self.origin} without an image"] if number else []

    def of(self, files: PathTable) -> Classes | None:
        """The classes of images. None where the file has no labels. Raises ValueError for images without a label."""
        if not self.of_file:
            return None
        found = [self.of_file.get(name) for name in files]
        if missing := [index for index, label in enumerate(found) if label is None]:
            raise ValueError(
                f"{self.origin}: no label for {len(missing)} of {len(found)} images, such as {files[missing[0]]}; add "
                "them, or train without classes (--class_cond False)"
            )
        classes = classes_of([label for label in found if label is not None], self.origin)
        numbered = all(isinstance(label, int) for label in found)
        return named(classes, self.class_names) if numbered else classes


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
        return read_labels(read_bytes(path), f"--labels_file {path}")
    except OSError as error:
        raise type(error)(f"--labels_file {path}: {error.strerror or error}") from error


def found_labels(content: bytes, origin: str, source: Source) -> Classes | None:
    """The classes of a source's images, from a ``dataset.json`` that was found beside them.

    Other programs have files of this name: JSON of another form gives None and a note of the source. Raises ValueError,
    naming ``origin``, for a damaged file, and for images without a label.
    """
    try:
        table = read_labels(content, origin)
        classes, notes = table.of(source.names), table.notes(source.names)
    except OtherJSONError:
        classes, notes = None, [f"labels are not used: {origin} is no list of labels but other JSON"]
    source.notes = list(dict.fromkeys([*source.notes, *notes]))
    return classes


def read_labels(content: bytes, origin: str) -> LabelTable:
    """Labels of edm2's form, ``{"labels": [[file, label], ...]}``, of JSON lines with ``file`` and ``label``, or of a
    CSV with a header that has these columns.

    A label in JSON is an integer, a one-hot list, or a class's name; in a CSV it is a class's name. edm2's form may
    have ``"class_names": ["cat", ...]`` beside its labels, as ``scripts/make_dataset.py`` writes it. Raises ValueError,
    naming ``origin`` and what is expected; an OtherJSONError for JSON of another kind.
    """
    try:
        text = content.decode("utf-8-sig")
        pairs, class_names = _from_json(text) if text.lstrip().startswith("{") else (_from_csv(text), ())
        return LabelTable(origin, {str(file): _label(label) for file, label in pairs}, class_names)
    except (ValueError, TypeError, LookupError, AttributeError, csv.Error) as error:
        kind = OtherJSONError if _is_other_json(content) else ValueError
        raise kind(
            f"{origin}: not a list of labels ({error}); give a CSV with the columns file and label, JSON lines such as "
            '{"file": "a/1.png", "label": "cat"}, or {"labels": [["a/1.png", 0], ...]}'
        ) from error


def _from_json(text: str) -> tuple[list[tuple[Any, Any]], Sequence[str]]:
    try:
        value = json.loads(text)
    except ValueError:  # several objects
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [(row["file"], row["label"]) for row in rows], ()
    if "labels" not in value:
        return [(value["file"], value["label"])], ()
    if not _are_pairs(value["labels"]):
        raise NoLabelError("its labels are no pairs of a file and a label")
    names = value.get("class_names")
    are_names = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return [(file, label) for file, label in value["labels"] or ()], names if are_names else ()


def _are_pairs(labels: Any) -> bool:
    """Whether this is meant as edm2's list of pairs, whatever is wrong with some of them; null is an empty one."""
    return labels is None or (
        isinstance(labels, list) and (not labels or any(isinstance(pair, list) and len(pair) == 2 for pair in labels))
    )


def _is_other_json(content: bytes) -> bool:
    """Whether this is whole JSON, or JSON lines, in which nothing looks like a list of labels."""
    try:
        text = content.decode("utf-8-sig")
        try:
            values = [json.loads(text)]
        except ValueError:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        return False
    return not any(
        isinstance(value, dict) and ("file" in value or ("labels" in value and _are_pairs(value["labels"])))
        for value in values
    )


def _from_csv(text: str) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    if not {"file", "label"} <= set(rows.fieldnames or ()):
        raise NoLabelError(f"its first line is {','.join(rows.fieldnames or ())[:100]!r}")
    return [(row["file"], row["label"]) for row in rows]


def _label(value: Any) -> int | str:
    if isinstance(value, list):
        if sorted(value) != [0] * (len(value) - 1) + [1]:
            raise NoLabelError(f"{value!r:.100} is not one-hot")
        return value.index(1)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise NoLabelError(f"{value!r:.100} is no label")
    return value

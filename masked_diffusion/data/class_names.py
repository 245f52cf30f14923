"""Class names a user may write in place of labels: those of the data, and ImageNet's in words; and their order."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice

IMAGENET_CLASSES = 1000


class ClassNames:
    """Names of a model's classes. class_names: in label order, as recorded with the training; empty when unknown.

    Models of ImageNet (WordNet ids for names, or 1000 classes of unknown names) are also asked for in words. Names
    compare in Unicode's form NFC, for a Mac writes the é of a folder as two characters. Where names are numbers, a
    number is a name and never a label.
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] = ()) -> None:
        self._num_classes = num_classes
        # In lower case -> as it is written -> labels.
        self._labels: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for label, names in enumerate(names_by_label(num_classes, class_names)):
            for name in names:
                name = _in_one_form(name)
                self._labels[name.lower()][name].add(label)
        self._numbers_are_names = any(map(_is_number, class_names))
        self._examples = list(class_names[:5])
        if all(map(_is_wordnet_id, class_names)):
            words = (name for name in self._labels if not _is_wordnet_id(name) and len(self._meant(name)) == 1)
            self._examples = list(islice(words, 5))

    def _meant(self, item: str) -> dict[int, str]:
        """Labels that a name can mean, with the spelling of each: those of exactly this one, else of any case."""
        item = _in_one_form(item)
        spellings = self._labels.get(item.lower(), {})
        if item in spellings:
            spellings = {item: spellings[item]}
        return {label: name for name, labels in spellings.items() for label in labels}

    def row(self, name: str) -> int | None:
        """The label of the one class that has this name; None where none or several have it."""
        found = list(self._meant(name))
        return found[0] if len(found) == 1 else None

    def row_of_number(self, number: int) -> int | None:
        """The label that a number means: that of the class of this name where names are numbers, else itself.

        None for a number that means none.
        """
        if self._numbers_are_names:
            return self.row(str(number))
        return number if 0 <= number < self._num_classes else None

    def label(self, item: str) -> int:
        """A label or a class name as a label. Where names are numbers, or both could be meant, it is the name.

        A name may be written in any case, but the exact one wins. Raises ValueError for a name no class has or several
        have, and for a label outside 0 ... K - 1.
        """
        found = self._meant(item)
        if len(found) == 1:
            return next(iter(found))
        if found:
            choice = ", ".join(f"{label} ({found[label]})" for label in sorted(found))
            raise ValueError(f"--labels {item}: several classes have this name; choose one of {choice}")
        try:
            label = int(item)
        except ValueError:
            raise ValueError(f"--labels {item}: no class of this name{self._such_as}") from None
        if self._numbers_are_names:
            raise ValueError(f"--labels {item}: no class of this name; here numbers are names{self._such_as}")
        if (row := self.row_of_number(label)) is None:
            raise ValueError(f"--labels {item}: labels are 0 ... {self._num_classes - 1}")
        return row

    @property
    def _such_as(self) -> str:
        return f"; names are such as {', '.join(self._examples)}" if self._examples else ""

    def labels(self, text: str) -> list[int]:
        """A comma list of labels and names. A name with commas in it may be written as it is or in double quotes.

        Raises ValueError as :meth:`label`, and for an empty list.
        """
        parts, labels = text.split(","), []
        while parts:
            if not parts[0].strip():
                parts.pop(0)
                continue
            # The shortest run of parts that is a name or a label; if there is none, the first part is what is wrong.
            ends = range(1, min(len(parts), self._most_parts) + 1)
            tried = ((end, _unquoted(",".join(parts[:end]).strip())) for end in ends)
            end, item = next((pair for pair in tried if self._is_known(pair[1])), (1, parts[0].strip()))
            labels.append(self.label(item))
            del parts[:end]
        if not labels:
            raise ValueError(f"--labels {text!r}: give labels or class names, separated by commas")
        return labels

    @property
    def _most_parts(self) -> int:
        return 1 + max((name.count(",") for name in self._labels), default=0)

    def _is_known(self, item: str) -> bool:
        return bool(self._meant(item)) or (_is_number(item) and not self._numbers_are_names)


def same_names(former: Sequence[str] | None, now: Sequence[str] | None, same_images: bool = False) -> bool:
    """Whether two lists in label order mean the same classes, in any form of Unicode.

    same_images: of the same images, numbers in place of names do: the names in archives were not read at first.
    """
    if former is None or now is None or len(former) != len(now):
        return former == now
    numbers = [str(label) for label in range(len(former))]
    return in_one_form(former) == in_one_form(now) or (same_images and list(former) == numbers)


def in_one_form(names: Iterable[str]) -> list[str]:
    """Class names to be compared: a copy of a folder may write an é in the other form of Unicode."""
    return [_in_one_form(name) for name in names]


def _in_one_form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _unquoted(item: str) -> str:
    return item[1:-1] if len(item) > 1 and item[0] == item[-1] == '"' else item


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def sort_class_names(names: Iterable[str]) -> list[str]:
    """Distinct names in the order of their labels: by value when all are integers, else as strings."""
    distinct = sorted(set(names))
    if all(re.fullmatch(r"[+-]?\d+", name) for name in distinct):
        distinct.sort(key=int)
    return distinct


def names_by_label(num_classes: int, class_names: Sequence[str] = ()) -> list[list[str]]:
    """The names of each class, as recorded and, of ImageNet's, in words, too; empty when none are known.

    num_classes, class_names: as of :class:`ClassNames`.
    """
    if not all(map(_is_wordnet_id, class_names)) or (not class_names and num_classes != IMAGENET_CLASSES):
        return [[name] for name in class_names]
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = {wordnet_id: info.label_name_to_description(wordnet_id) for wordnet_id in info.label_names()}
    described = ([wordnet_id, *words.get(wordnet_id, "").split(",")] for wordnet_id in class_names or words)
    return [[name.strip() for name in names if name.strip()] for names in described]


def _is_wordnet_id(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()

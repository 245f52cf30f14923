"""Text files that are read a block at a time: their lines, and the values of a JSON text one after another."""

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

# Gives the blocks of a file from its beginning, each time that it is called.
FileBlocks = Callable[[], Iterable[bytes]]
BLOCK_BYTES = 1 << 22
LONGEST_LINE = 1 << 26  # characters; a line of labels has some hundreds, a one-hot one up to a few million
_LONGEST_MARK = 16  # characters; more than a word or an escape of JSON has, such as -Infinity
_DECODER = json.JSONDecoder()


class TextError(ValueError):
    """A text that is damaged; part of a message."""


class LongLineError(TextError):
    """A line of more than LONGEST_LINE characters."""


def parts_of(content: bytes) -> Iterator[bytes]:
    """Content that is in memory, in blocks."""
    for start in range(0, len(content), BLOCK_BYTES):
        yield content[start : start + BLOCK_BYTES]


def texts(blocks: Iterable[bytes]) -> Iterator[str]:
    """Blocks of UTF-8, a byte order mark left out, as text.

    Raises TextError for what is none, with the sentence and the place that ``bytes.decode`` gives for the whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    head, read = b"", 0
    for block in chain(blocks, [None]):
        head, read = (head + (block or b""))[:3], read + len(block or b"")
        try:
            yield decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            before = read - len(error.object) - len(codecs.BOM_UTF8) * (head == codecs.BOM_UTF8)
            first, last = before + error.start, before + error.end - 1
            byte = f"byte 0x{error.object[error.start]:02x} in position {first}"
            which = byte if first == last else f"bytes in position {first}-{last}"
            raise TextError(f"'utf-8' codec can't decode {which}: {error.reason}") from error


def lines(parts: Iterable[str]) -> Iterator[str]:
    """The lines of a text with their ends, which are ``\\n``, ``\\r`` or ``\\r\\n``. Raises LongLineError."""
    rest = ""
    for part in parts:
        *whole, rest = io.StringIO(rest + part, newline="") if rest or part else [""]
        yield from whole
        if rest.endswith("\n"):  # a \r may be half of an end
            yield rest
            rest = ""
        if len(rest) > LONGEST_LINE:
            raise LongLineError(f"a line has more than {LONGEST_LINE} characters")
    if rest:
        yield rest


class JSONText:
    """A JSON text whose values are read one after another, with no more of it in memory than a value and a block.

    Each method reads on from where the last one stopped, and raises ValueError for what is not JSON there.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        self._parts = iter(parts)
        self._text, self._at = "", 0
        self._one_by_one_to = 0  # the place up to which elements are not read many at once

    def peek(self) -> str:
        """The next character behind white space, empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\n\r":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_MARK
                # Twice as much each time: a long value is not read once for each block that it has.
                if not (is_cut and self._read_on(len(self._text) - self._at)):
                    raise
            else:
                length = end - self._at
                if end + _LONGEST_MARK < len(self._text) or not self._read_on():  # a number may go on
                    self._at += length
                    return value

    def members(self) -> Iterator[str]:
        """The keys of an object. Before the next one, its value is to be read."""
        self._take("{")
        if self.peek() == "}":
            return self._take("}")
        while True:
            if self.peek() != '"':
                raise TextError("a key is missing")
            key = self.value()
            self._take(":")
            yield key
            if self.peek() == "}":
                return self._take("}")
            self._take(",")

    def elements(self) -> Iterator[list[Any]]:
        """The elements of an array, some at a time."""
        self._take("[")
        if self.peek() == "]":
            return self._take("]")
        while True:
            if some := self._many():
                yield some
                continue
            yield [self.value()]
            if self.peek() == "]":
                return self._take("]")
            self._take(",")

    def finish(self) -> None:
        """See that nothing follows."""
        if self.peek():
            raise TextError("something follows the JSON")

    def _many(self) -> list[Any]:
        """Elements that are whole in the block, read at once as json reads a list; none where that is not to be had.

        Text up to a ``],`` is decoded as an array of its own. That is one where it ends with an element, and only
        there: JSON has one reading from left to right.
        """
        if self._at < self._one_by_one_to:
            return []
        end = self._text.rfind("],", self._at) + 1
        if not end and self._read_on():
            end = self._text.rfind("],", self._at) + 1
        if end:
            try:
                some = json.loads(f"[{self._text[self._at : end]}]")
            except ValueError:
                pass
            else:
                self._at = end + 1
                return some
        self._one_by_one_to = end or len(self._text)
        return []

    def _take(self, mark: str) -> None:
        if self.peek() != mark:
            raise TextError(f"{mark} is missing")
        self._at += 1

    def _read_on(self, least: int = 1) -> bool:
        """Forget what was read, and add so many characters or more, up to the end. Returns whether there were any."""
        parts, added = [self._text[self._at :]], 0
        while added < least and (part := next(self._parts, None)) is not None:
            parts.append(part)
            added += len(part)
        self._one_by_one_to = max(0, self._one_by_one_to - self._at)
        self._text, self._at = "".join(parts), 0
        return added > 0

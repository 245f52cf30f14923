"""How long a run waits for an item of its data: as long as something reads on, and no longer than a disk may hang."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# How often a wait for a batch looks for a signal and for signs of life.
POLL_SECONDS = 1.0
# Without a batch, and without an item begun, read on or finished by any reader, for so long, nothing more is to come.
SILENCE_SECONDS = 45.0
# Nor does it where an item is read on for so long.
SLOW_ITEM_SECONDS = 600.0


class LoaderError(RuntimeError):
    """The data do not come. The message is one sentence with the cause and what to do."""


class StoppedWaitingError(RuntimeError):
    """The wait for a batch ended because the run is asked to stop."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


def index_of(item: Any) -> int:
    """The index of an item of a data set: the item itself, or the end of a tuple such as (epoch, index)."""
    return int(item[-1] if isinstance(item, tuple) else item)


class Patience:
    """A wait for readers. It is over when they are silent for too long, or finish nothing for very long.

    signs: what changes while a reader begins, reads on or finishes an item. items: how many were begun and finished.
    silence_seconds: how long the signs may stay the same; None for ``SILENCE_SECONDS``.
    """

    def __init__(
        self, signs: Callable[[], list[Any]], items: Callable[[], int], silence_seconds: float | None = None
    ) -> None:
        self._signs, self._items = signs, items
        self._silence_seconds = SILENCE_SECONDS if silence_seconds is None else silence_seconds
        self._seen = signs(), items()
        self._silent_for = 0.0
        self.without_item_for = 0.0
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Ask about every ``POLL_SECONDS``."""
        now = time.monotonic()
        # While this process was suspended, so were the readers, as a rule: that time does not count.
        waited, self._last = min(now - self._last, 2 * POLL_SECONDS), now
        signs, items = self._signs(), self._items()
        self._silent_for = 0.0 if signs != self._seen[0] else self._silent_for + waited
        self.without_item_for = 0.0 if items != self._seen[1] else self.without_item_for + waited
        self._seen = signs, items
        return self._silent_for > self._silence_seconds or self.without_item_for > max(
            SLOW_ITEM_SECONDS, self._silence_seconds
        )


def progress(task: Path) -> list[int]:
    """The whole seconds that a process or thread has computed, its reads from mapped files and the bytes of its other
    reads, as far as the system says. A slow item moves them. One that hangs does not, although it may wake up now and
    then. task: its folder in /proc."""
    numbers = []
    with contextlib.suppress(OSError):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        numbers = [(int(fields[11]) + int(fields[12])) // os.sysconf("SC_CLK_TCK"), int(fields[9])]
        numbers.append(int((task / "io").read_text().split()[1]))
    return numbers

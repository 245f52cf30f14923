"""stdout and stderr that never fail: a full disk or a closed pipe costs what is written there, and not the work."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LastingStream:
    """A text stream whose writing never raises. failure: what writing raised first, None while all is well.

    stream: None stands for one that was closed before the program began.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.failure: Exception | None = None
        if stream is None:
            self.failure = OSError(errno.EBADF, "it is closed")
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  (as long as the program)
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self.failure = self.failure or error
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.failure = self.failure or error

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:  # it is closed
            return False

    def settle(self) -> None:
        """Let go of what cannot be written: at its end, Python would try again, and fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:  # noqa: PTH123
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Have a stdout and a stderr that never fail until the block ends."""
    _open_descriptors()
    former: Any = (sys.stdout, sys.stderr)
    ours = [LastingStream(stream) for stream in former]
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in ours:
            stream.settle()
        sys.stdout, sys.stderr = former


def failed_streams() -> dict[str, Exception]:
    """Which of the two could not be written, and why."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    return {
        name: stream.failure for name, stream in streams.items() if isinstance(stream, LastingStream) and stream.failure
    }


def _open_descriptors() -> None:
    """Open the null device in the place of closed descriptors. The next file opened would get their number, and with
    it what libraries write to stderr."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            os.set_inheritable(number, True)

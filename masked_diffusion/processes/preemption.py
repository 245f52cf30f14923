"""Being asked to stop: SIGTERM, SIGINT or SIGUSR1 lets a run finish its step and save, a second one ends it at once."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# Exit status of a run that saved because it was asked to stop (EX_TEMPFAIL: start it again and it goes on).
STOPPED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches launcher and processes alike, and the launcher passes a signal of its own on: that is one request.
SAME_REQUEST_SECONDS = 1.0


# Read early: after the launcher's end it would be another one's.
_PARENT = os.getppid()


def ignore_signals(_: int = 0) -> None:
    """In a loader process: signals to the whole process group, such as torchrun sends, are the run's to follow. Its
    loaders end with it; without them it could not finish its step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Launcher:
    """torchrun, if it started this process. Its ranks are in sessions of their own and survive when it is killed: left
    to themselves, they would write into the folder in which the same command already runs again."""

    def __init__(self) -> None:
        self._pid = _PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None

    def has_ended(self) -> bool:
        """Whether there was one, and it is gone."""
        return self._pid is not None and os.getppid() != self._pid


class StopSignals:
    """Inside the context, the first signal is noted in ``received``; a later one has its default effect."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._when = 0.0
        self._owner = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader process, forked with these handlers
            return
        if self.received is None:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

"""Stop on request: SIGTERM, SIGINT or SIGUSR1 lets a run finish its step and save; a second one ends it at once."""

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
    """Ignore signals in a loader process. torchrun signals the whole process group; only the training follows.

    A training needs its loaders to finish its step, and ends them when it ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Launcher:
    """The torchrun that started this process, if one did.

    Ranks have sessions of their own and survive when torchrun is killed. They have to notice and stop: otherwise they
    would write into a folder in which the same command already runs again.
    """

    def __init__(self) -> None:
        self._pid = _PARENT if "TORCHELASTIC_RUN_ID" in os.environ else None

    def has_ended(self) -> bool:
        """True when torchrun started this process and has ended since."""
        return self._pid is not None and os.getppid() != self._pid


class StopSignals:
    """Note the first signal in ``received`` while inside the context. A later signal has its default effect."""

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

    def asked(self) -> bool:
        """Whether a signal was received."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a loader process, forked with these handlers
            return
        if self.received is None:
            self.received, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

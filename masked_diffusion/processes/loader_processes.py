"""Loader processes that a signal does not end, and that all the same end with whoever started them."""

import atexit
import contextlib
import weakref
from collections.abc import Generator
from typing import Any

from torch.utils.data import DataLoader

_OPEN: "weakref.WeakSet[Generator[Any, None, None]]" = weakref.WeakSet()


def iterate(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    """A loader's batches. Its processes end when this fails, is closed or collected, and at exit at the latest.

    They ignore signals (:func:`masked_diffusion.processes.preemption.ignore_signals`), also the one that
    multiprocessing sends at exit before it waits for them: nobody else would end them.
    """
    batches = _iterate(loader)
    _OPEN.add(batches)
    return batches


def _iterate(loader: DataLoader[Any]) -> Generator[Any, None, None]:
    iterator: Any = iter(loader)
    try:
        yield from iterator
    finally:
        # Collecting it ends them, too, but an error keeps it alive. Without processes there is no such method.
        getattr(iterator, "_shutdown_workers", lambda: None)()


@atexit.register
def _close_all() -> None:
    for batches in list(_OPEN):
        with contextlib.suppress(ValueError):  # a thread is reading from it
            batches.close()

"""Loader processes that end a run in a sentence where they cannot deliver, and that end with whoever started them."""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Listener
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from masked_diffusion.processes import waiting
from masked_diffusion.processes.preemption import ignore_signals
from masked_diffusion.processes.reading_thread import Watched, iterate_here
from masked_diffusion.processes.waiting import (
    LoaderError,
    Patience,
    StoppedWaitingError,
    never,
)

SHARED_MEMORY = "/dev/shm"
# Less than this is suspected when nothing comes: a few batches of images and noise.
LITTLE_MEMORY = 64 << 20
FEW_FILES = 256
PR_SET_PDEATHSIG = 1

_OPEN: "weakref.WeakSet[Generator[Any, None, None]]" = weakref.WeakSet()
_END = object()


def iterate(
    dataset: Dataset[Any],
    num_workers: int,
    asked_to_stop: Callable[[], bool] = never,
    silence_seconds: float | None = None,
    name_of: Callable[[int], str] = "item {}".format,
    **settings: Any,
) -> Generator[Any, None, None]:
    """Batches of a data set, loaded by ``num_workers`` processes, or by a thread of this one for 0.

    settings: of :class:`torch.utils.data.DataLoader`. asked_to_stop: asked every ``POLL_SECONDS`` of a wait.
    silence_seconds: how long an item may take without being read on; None for ``SILENCE_SECONDS``. name_of: the file of
    an item's index (see ``waiting.index_of``), for messages about what does not come.
    The processes end when this fails, is closed or collected, at exit, and when this process is killed.
    Raises LoaderError when the data do not come, StoppedWaitingError when asked to stop during a wait, and what loading
    an item raises.
    """
    # The loader seeds its processes: from its own generator, not from the global one.
    settings["generator"] = torch.Generator()
    if not num_workers:
        batches = iterate_here(dataset, name_of, asked_to_stop, silence_seconds, settings)
    else:
        batches = _iterate(dataset, num_workers, name_of, asked_to_stop, silence_seconds, settings)
    _OPEN.add(batches)
    return batches


def _iterate(
    dataset: Dataset[Any],
    num_workers: int,
    name_of: Callable[[int], str],
    asked_to_stop: Callable[[], bool],
    silence_seconds: float | None,
    settings: dict[str, Any],
) -> Generator[Any, None, None]:
    iterator: Any = None
    watched = None
    try:
        with _blaming():
            if cause := _blocked_transport():
                raise _cannot_deliver(cause)
            watched = Watched(dataset, name_of, RawArray("Q", num_workers), RawArray("q", num_workers))
            end_with_parent = threading.current_thread() is threading.main_thread()
            begin = _begin_with_parent if end_with_parent else ignore_signals
            loader = DataLoader(
                watched, num_workers=num_workers, worker_init_fn=begin, timeout=waiting.POLL_SECONDS, **settings
            )
            with _kept_child_handler(), _all_or_none_started():
                iterator = iter(loader)
        while (batch := _next(iterator, watched, asked_to_stop, silence_seconds)) is not _END:
            yield batch
    except (LoaderError, StoppedWaitingError):
        # Processes that hang while they read hold no lock; the others are asked to end.
        for worker in watched.reading(iterator._workers) if watched is not None and iterator is not None else []:
            worker.kill()
        raise
    finally:
        if iterator is not None:  # collecting it ends them, too, but an error keeps it alive
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # they ignore the signal that this sends them before


def _next(iterator: Any, watched: Watched, asked_to_stop: Callable[[], bool], silence_seconds: float | None) -> Any:
    """The next batch, or ``_END``."""
    patience = Patience(lambda: watched.signs_of_life(iterator._workers), watched.items, silence_seconds)
    while True:
        try:
            with _blaming(iterator):
                return next(iterator, _END)
        except _NotYetError:
            pass
        if asked_to_stop():
            raise StoppedWaitingError(f"asked to stop while waiting for {watched.awaited()}")
        if patience.is_over():
            silence = f"nothing came from them for {patience.without_item_for:.0f} s"
            raise _cannot_deliver(_suspected_cause(f"{silence}, while they waited for {watched.awaited()}"))


class _NotYetError(Exception):
    """No batch within ``POLL_SECONDS``."""


def _begin_with_parent(_: int = 0) -> None:
    """In a loader process: be killed when the process that forked it ends, however it does."""
    ignore_signals()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _kept_child_handler() -> Iterator[None]:
    """torch's handler of SIGCHLD raises wherever the training is when a loader process dies, in the middle of a step.
    A dead one is found, too, when its batch is waited for."""
    former = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    try:
        yield
    finally:
        if former is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, former)


@contextlib.contextmanager
def _all_or_none_started() -> Iterator[None]:
    """A loader that fails while it starts its processes forgets those that it has started."""
    before = set(multiprocessing.active_children())
    try:
        yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        raise


# -- causes ------------------------------------------------------------------------------------------------------------


def _cannot_deliver(cause: str) -> LoaderError:
    return LoaderError(f"the loader processes cannot deliver: {cause}; or load without them, with --num_workers 0")


@contextlib.contextmanager
def _blaming(iterator: Any = None) -> Iterator[None]:
    """Errors of the loader itself become a LoaderError or _NotYetError; what an item raised passes."""
    try:
        yield
    except LoaderError:
        raise
    except (RuntimeError, OSError, EOFError) as error:
        text = str(error)
        if text.startswith("DataLoader timed out"):
            raise _NotYetError from None
        cause = _known_cause(text, [worker.exitcode for worker in iterator._workers] if iterator is not None else [])
        if cause is None and text.startswith("Caught "):
            raise
        raise _cannot_deliver(
            cause or _suspected_cause(f"{type(error).__name__} {' '.join(text.split())}".strip())
        ) from error


def _known_cause(text: str, exit_codes: list[int | None]) -> str | None:
    if "Too many open files" in text or "ancdata" in text:
        return _too_few_files()
    if "shared memory" in text or "Bus error" in text or -signal.SIGBUS in exit_codes:
        return _too_little_memory()
    if "exited unexpectedly" in text or "killed by signal" in text:
        return "one of them was killed, as the kernel does where memory is short; start fewer with --num_workers"
    return None


def _blocked_transport() -> str | None:
    """What keeps tensors from being handed over, found out before anything is waited for."""
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":
        return None
    if not os.access(SHARED_MEMORY, os.W_OK):
        return _too_little_memory()
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        if "too long" not in str(error):
            raise
        return _too_long_path()
    return None


def _suspected_cause(symptom: str) -> str:
    limits = _file_limit()
    if limits is not None and limits < FEW_FILES:
        return _too_few_files()
    with contextlib.suppress(OSError):
        status = os.statvfs(SHARED_MEMORY)
        if status.f_bavail * status.f_frsize < LITTLE_MEMORY:
            return _too_little_memory()
    return f"{symptom}; see whether the storage of --data_dir hangs, and to TMPDIR, {SHARED_MEMORY} and ulimit -n"


def _too_long_path() -> str:
    return f"TMPDIR {tempfile.gettempdir()} is too long for the name of a socket; set a TMPDIR of at most 70 characters"


def _too_little_memory() -> str:
    return f"{SHARED_MEMORY} is missing or too small; enlarge it (in Docker with --shm-size)"


def _too_few_files() -> str:
    return f"too few files may be open at once, {_file_limit()}; raise ulimit -n"


def _file_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@atexit.register
def _close_all() -> None:
    for batches in list(_OPEN):
        with contextlib.suppress(ValueError):  # a thread is reading from it
            batches.close()

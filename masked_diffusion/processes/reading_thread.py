"""Read data in a thread of this process, so that a disk that hangs neither swallows signals nor keeps the run."""

import contextlib
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from masked_diffusion.processes import waiting
from masked_diffusion.processes.waiting import LoaderError, Patience, StoppedWaitingError, index_of, never, progress

NAMED = 3  # files in a message
Read = TypeVar("Read")
_END = object()


class ReadingThread:
    """A thread that does what it is given, one thing at a time. One that hangs is left behind and ends no later than
    the process. device: the CUDA device that it pins memory for, if any."""

    def __init__(self, device: int | None = None) -> None:
        self._works: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(device,), daemon=True, name="reading")
        self._thread.start()

    def _serve(self, device: int | None) -> None:
        if device is not None:  # each thread has a current device of its own
            torch.cuda.set_device(device)
        while (work := self._works.get()) is not None:
            try:
                self._results.put((work(), None))
            except BaseException as error:  # for the one who waits
                self._results.put((None, error))

    def do(
        self,
        work: Callable[[], Read],
        name: Callable[[], str],
        items: Callable[[], int] = lambda: 0,
        asked_to_stop: Callable[[], bool] = never,
        silence_seconds: float | None = None,
    ) -> Read:
        """What ``work`` returns or raises.

        name: what is read at the moment, for the message. items: how many were begun and finished; counted in a batch.
        Raises LoaderError, naming the file, when it is not read on for ``silence_seconds``, and StoppedWaitingError
        when asked to stop meanwhile.
        """
        self._works.put(work)
        task = Path(f"/proc/self/task/{self._thread.native_id}")
        patience: Patience | None = None
        while True:
            try:
                result, error = self._results.get(timeout=waiting.POLL_SECONDS)
            except Empty:
                patience = patience or Patience(lambda: [items(), *progress(task)], items, silence_seconds)
                if asked_to_stop():
                    raise StoppedWaitingError(f"asked to stop while waiting for {name()}") from None
                if patience.is_over():
                    raise LoaderError(
                        f"--data_dir: {name()} has not come for {patience.without_item_for:.0f} s; see whether its "
                        "storage hangs, and start again when it answers"
                    ) from None
                continue
            if error is not None:
                raise error
            return result

    def close(self) -> None:
        """Let the thread end after what it does now."""
        self._works.put(None)


def read_watched(read: Callable[[], Read], name: str) -> Read:
    """What ``read`` returns or raises, read in a thread of its own; see :meth:`ReadingThread.do`."""
    with contextlib.closing(ReadingThread()) as thread:
        return thread.do(read, lambda: name)


def iterate_here(
    dataset: Dataset[Any],
    name_of: Callable[[int], str],
    asked_to_stop: Callable[[], bool],
    silence_seconds: float | None,
    settings: dict[str, Any],
) -> Generator[Any, None, None]:
    """Batches of a data set, each read when it is asked for; see ``loader_processes.iterate``."""
    watched = Watched(dataset, name_of, [0], [0])
    device = torch.cuda.current_device() if settings.get("pin_memory") and torch.cuda.is_available() else None
    with contextlib.closing(ReadingThread(device)) as thread:
        iterator = iter(DataLoader(watched, **settings))
        how = watched.awaited, watched.items, asked_to_stop, silence_seconds
        while (batch := thread.do(lambda: next(iterator, _END), *how)) is not _END:
            yield batch


class Watched(Dataset[Any]):
    """A data set that counts, for each reader, the items that it began and those that it finished, and notes the index
    of the last one. name_of: the file of an index. counts, indices: a number for each loader process, which they share,
    or for the thread that reads here."""

    def __init__(self, dataset: Dataset[Any], name_of: Callable[[int], str], counts: Any, indices: Any) -> None:
        self.dataset, self._name_of = dataset, name_of
        self._counts, self._indices = counts, indices

    def __getitem__(self, item: Any) -> Any:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        self._indices[number] = index_of(item)
        self._counts[number] += 1
        try:
            return self.dataset[item]
        finally:
            self._counts[number] += 1

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def items(self) -> int:
        """How many items were begun, and how many finished, in one number."""
        return sum(self._counts)

    def signs_of_life(self, workers: list[Any]) -> list[object]:
        """What changes as long as processes begin, read on or finish items."""
        return [self.items(), *(progress(Path(f"/proc/{worker.pid}")) for worker in self.reading(workers))]

    def reading(self, workers: list[Any]) -> list[Any]:
        """Those processes that have begun an item and not finished it."""
        return [worker for worker, count in zip(workers, self._counts, strict=False) if count % 2]

    def awaited(self) -> str:
        """What is read at the moment."""
        indices = dict.fromkeys(self._indices[number] for number, count in enumerate(self._counts) if count % 2)
        names = [self._name_of(index) for index in indices]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + more if names else "a batch"

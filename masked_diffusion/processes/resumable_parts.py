"""Work in batches that any number of ranks make, a file each: it goes on after a kill, and no rank waits for another
one but rank 0, at the end."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from masked_diffusion.processes.preemption import Launcher

POLL_SECONDS = 0.5
STALL_SECONDS = 2 * 3600.0


class Parts(ABC):
    """num_items items in batches of batch_size, the last of which may be smaller; their files lie in parts_folder."""

    def __init__(self, num_items: int, batch_size: int, parts_folder: Path) -> None:
        self.num_items = num_items
        self.batch_size = batch_size
        self.parts_folder = parts_folder

    @property
    def num_batches(self) -> int:
        return -(-self.num_items // self.batch_size)

    def indices(self, batch: int) -> range:
        """Numbers of a batch's items."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_items))

    @abstractmethod
    def has_part(self, batch: int) -> bool:
        """Whether a batch is there, from this run or one before."""

    def missing(self, rank: int, world_size: int) -> list[int]:
        """The batches that a rank still has to make: k belongs to rank k mod W."""
        return [batch for batch in range(rank, self.num_batches, world_size) if not self.has_part(batch)]

    def mark_failed(self, rank: int) -> None:
        """Let rank 0 know that this rank will write no more parts."""
        (self.parts_folder / f"rank{rank}.failed").touch()

    def failed(self) -> list[str]:
        """Ranks that will write no more parts."""
        return sorted(path.stem for path in self.parts_folder.glob("*.failed"))

    def forget_failures(self) -> None:
        """Remove what an earlier run said of its ranks."""
        for marker in self.parts_folder.glob("*.failed"):
            marker.unlink()


def make_parts(
    parts: Parts,
    make: Callable[[int, Callable[[int], object]], None],
    rank: int,
    world_size: int,
    missing: list[int] | None = None,
) -> None:
    """Make this rank's batches and, on rank 0, wait until the others' are there too.

    make: writes the part of one batch, and tells its second argument of every few items that are done. missing: what
    ``parts.missing`` said, where ``make`` is prepared for just these batches in this order. Raises RuntimeError when
    torchrun has ended, also through what ``make`` tells, and on rank 0 when another one failed or nothing has come for
    ``STALL_SECONDS``; all parts stay.
    """
    launcher = Launcher()

    def tell(number: int) -> None:
        bar.update(number)
        if launcher.has_ended():
            raise RuntimeError("torchrun has ended; start the same command again to continue")

    missing = parts.missing(rank, world_size) if missing is None else missing
    present = set(range(rank, parts.num_batches, world_size)).difference(missing)
    with tqdm(total=parts.num_items, unit="image", disable=rank != 0) as bar:
        bar.update(_num_items(parts, present))
        try:
            for batch in missing:
                tell(0)
                make(batch, tell)
        except BaseException:
            if not launcher.has_ended():  # else a run that was started again would take it for its own rank's
                parts.mark_failed(rank)
            raise
        if rank == 0:
            _wait_for_others(parts, world_size, bar)


def _num_items(parts: Parts, batches: set[int]) -> int:
    return sum(len(parts.indices(batch)) for batch in batches)


def _wait_for_others(parts: Parts, world_size: int, bar: tqdm) -> None:
    waiting = {batch for batch in range(parts.num_batches) if batch % world_size}
    last_news = time.monotonic()
    while waiting:
        done = {batch for batch in waiting if parts.has_part(batch)}
        if done:
            last_news = time.monotonic()
            bar.update(_num_items(parts, done))
            waiting -= done
        elif parts.failed() or time.monotonic() - last_news > STALL_SECONDS:
            reason = f"{', '.join(parts.failed())} failed" if parts.failed() else "no part has come for hours"
            raise RuntimeError(
                f"{len(waiting)} batches of other ranks are missing, and {reason}; start the same command again to "
                "continue (on several machines the output folder must be shared)"
            )
        if waiting:
            time.sleep(POLL_SECONDS)

"""Resumable work split over ranks: one file per batch.

Finished files survive a kill. Only rank 0 waits for the others, once, at the end.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from masked_diffusion.dist_util import Ranks
from masked_diffusion.processes.preemption import Launcher

POLL_SECONDS = 0.5
STALL_SECONDS = 2 * 3600.0


class Parts(ABC):
    """Batches of a work of ``num_items`` items, one file per batch in ``parts_folder``; the last may be smaller."""

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
        """True when a batch's file is complete, from this run or an earlier one."""

    def missing(self, rank: int, world_size: int) -> list[int]:
        """List the batches that a rank still has to make. Batch k belongs to rank k mod W."""
        return [batch for batch in range(rank, self.num_batches, world_size) if not self.has_part(batch)]

    def mark_failed(self, rank: int) -> None:
        """Tell rank 0 that this rank will write no more parts."""
        (self.parts_folder / f"rank{rank}.failed").touch()

    def failed(self) -> list[str]:
        """Names of the ranks that will write no more parts."""
        return sorted(path.stem for path in self.parts_folder.glob("*.failed"))

    def forget_failures(self) -> None:
        """Remove the marks of failed ranks that an earlier run left."""
        for marker in self.parts_folder.glob("*.failed"):
            marker.unlink()


def make_parts(
    parts: Parts,
    make: Callable[[int, Callable[[int], object]], None],
    ranks: Ranks,
    missing: list[int] | None = None,
) -> None:
    """Make this rank's batches. On rank 0, then wait for the other ranks' batches.

    make: writes the part of one batch and calls its second argument with the number of items done, every few items.
    missing: the batches to make, in the order that ``make`` expects; None asks ``parts.missing``.
    Raises RuntimeError when torchrun has ended, and on rank 0 when another rank failed or no part came for
    ``STALL_SECONDS``. All finished parts stay.
    """
    launcher = Launcher()

    def tell(number: int) -> None:
        bar.update(number)
        if launcher.has_ended():
            raise RuntimeError("torchrun has ended; start the same command again to continue")

    missing = parts.missing(ranks.rank, ranks.world_size) if missing is None else missing
    present = set(range(ranks.rank, parts.num_batches, ranks.world_size)).difference(missing)
    with tqdm(total=parts.num_items, unit="image", disable=not ranks.is_main) as bar:
        bar.update(_num_items(parts, present))
        try:
            for batch in missing:
                tell(0)
                make(batch, tell)
        except BaseException:
            if not launcher.has_ended():  # else a run that was started again would take it for its own rank's
                parts.mark_failed(ranks.rank)
            raise
        if ranks.is_main:
            _wait_for_others(parts, ranks.world_size, bar)


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

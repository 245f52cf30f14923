"""Several processes that share the batches of a set: who computes which, and how the first one gets them all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's rank among `size` processes. Batch k of a set is computed by process k mod size.

    With more than one, a torch.distributed process group has to be there.
    """

    rank: int = 0
    size: int = 1

    def in_order(self, own: Iterable[T], total: int) -> Iterator[T]:
        """Yield all `total` results in the order of the batches on rank 0, nothing elsewhere.

        own: this process's results, of batches rank, rank + size, …; computed while they are asked for.
        """
        results = iter(own)
        for start in range(0, total, self.size):
            mine = next(results) if start + self.rank < total else None
            if self.size == 1:
                assert mine is not None
                yield mine
                continue
            gathered = self._gather(mine)
            yield from gathered[: total - start]
        next(results, None)  # lets the stream check its end

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, gathered)
        return gathered or []

    def agree(self, value: T) -> T:
        """The first process's value, on all of them."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


ALONE = Share()


def share_of_launcher() -> Share:
    """This process's share under torchrun, from the variables it sets; ALONE where RANK or WORLD_SIZE is missing.

    Raises ValueError for values that are no place among processes, and where processes could not meet.
    """
    if not {"RANK", "WORLD_SIZE"} <= set(os.environ):
        return ALONE
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(f"RANK={rank} WORLD_SIZE={size}: expected a rank below the number of processes; unset both")
    if int(size) > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise ValueError(
            f"RANK={rank} WORLD_SIZE={size}: MASTER_ADDR and MASTER_PORT are not set; start with torchrun, or unset all"
        )
    return Share(int(rank), int(size))


def connect(share: Share) -> None:
    """Join the launcher's processes; features travel between them through the CPU's memory."""
    if share.size > 1:
        import torch.distributed as dist

        # The others wait while the first process computes roots and radii of a reference.
        dist.init_process_group("gloo", timeout=timedelta(days=1))


def disconnect(share: Share) -> None:
    """Leave the launcher's processes."""
    if share.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()

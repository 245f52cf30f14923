"""Let the processes of a run meet in a key-value store, which may still hold what former processes wrote."""

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.1


def meet(store: "dist.Store", rank: int, world_size: int, timeout: timedelta) -> str:
    """Wait until all ranks are there. Returns a name for this meeting, equal on all ranks and unique.

    A launcher that restarts a job keeps its store, so keys alone prove nothing: every process brings a number of its
    own. Rank 0 calls the roll of the numbers it finds, each rank confirms a roll with its own number in it, and only
    a roll that all have confirmed counts. Raises TimeoutError that names the missing ranks, as far as known.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    own = uuid.uuid4().hex[:16]
    store.set(f"here/{rank}", own)
    while time.monotonic() < deadline:
        numbers = [_read(store, f"here/{r}") for r in range(world_size)] if rank == 0 else []
        if rank == 0 and all(numbers):
            store.set("roll", ",".join(numbers))
        roll = _read(store, "roll")
        if roll.split(",")[rank : rank + 1] == [own]:
            store.set(f"confirmed/{rank}", roll)
            if rank == 0 and all(_read(store, f"confirmed/{r}") == roll for r in range(world_size)):
                store.set("begun", roll)
            if _read(store, "begun") == roll:
                return hashlib.sha256(roll.encode()).hexdigest()
        time.sleep(POLL_SECONDS)
    silent = [str(r) for r in range(world_size) if not _read(store, f"here/{r}")]
    raise TimeoutError(f"missing: {', '.join(silent)}" if silent else "some have left again")


def _read(store: "dist.Store", key: str) -> str:
    """Read a key without waiting. Returns an empty value when the key is missing; ``get`` alone would wait."""
    return store.get(key).decode() if store.check([key]) else ""

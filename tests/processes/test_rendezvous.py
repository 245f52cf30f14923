"""Meeting in a store that remembers."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from masked_diffusion.processes.rendezvous import meet

LONG, SHORT = timedelta(seconds=30), timedelta(seconds=0.5)


def meet_all(store, world_size, timeout=LONG):
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: meet(store, rank, world_size, timeout), range(world_size)))


def test_all_ranks_get_one_name_and_every_meeting_another():
    store = dist.HashStore()
    names = [meet_all(store, 3) for _ in range(3)]
    assert all(len(set(meeting)) == 1 for meeting in names)
    assert len({meeting[0] for meeting in names}) == 3


def test_a_process_alone_waits_for_nobody():
    assert meet(dist.HashStore(), 0, 1, LONG)


def test_missing_ranks_are_named():
    with pytest.raises(TimeoutError, match="missing: 1, 3"), ThreadPoolExecutor(2) as pool:
        store = dist.HashStore()
        other = pool.submit(meet, store, 2, 4, SHORT)
        try:
            meet(store, 0, 4, SHORT)
        finally:
            assert isinstance(other.exception(), TimeoutError)


@pytest.mark.parametrize("early", [0, 1])
def test_what_a_former_process_wrote_does_not_stand_for_a_living_one(early):
    """Rank ``early`` of a restarted job comes back first: it must not go on with the dead one's values."""
    store = dist.HashStore()
    former = meet_all(store, 2)[0]
    with pytest.raises(TimeoutError, match="left again"):
        meet(store, early, 2, SHORT)
    late = meet_all(store, 2)
    assert late[0] == late[1] != former


def test_a_rank_that_never_came_the_first_time_does_not_spoil_the_second():
    store = dist.HashStore()
    with pytest.raises(TimeoutError):
        meet(store, 0, 2, SHORT)
    first, second = meet_all(store, 2)
    assert first == second

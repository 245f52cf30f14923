"""The order of the stream: index arithmetic that must hold for every size, position and number of ranks."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_diffusion.data.data_stream import DataOrder, Item, RankBatches

sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63)
positions = st.integers(0, 500)


def take(number: int, order: DataOrder, batch_size: int, **where: int) -> list[list[Item]]:
    return list(islice(RankBatches(order, batch_size, **where), number))


def flat(batches: list[list[Item]]) -> list[Item]:
    return [item for batch in batches for item in batch]


@given(size=sizes, seed=seeds, epochs=st.integers(1, 4))
def test_each_epoch_holds_each_image_once(size, seed, epochs):
    order = DataOrder(size, seed)
    for epoch in range(epochs):
        items = [order[position] for position in range(epoch * size, (epoch + 1) * size)]
        assert {e for e, _ in items} == {epoch}
        assert sorted(index for _, index in items) == list(range(size))


@given(size=sizes, seed=seeds, batch=st.integers(1, 12), world=st.integers(1, 6), start=positions)
def test_ranks_side_by_side_are_one_rank_with_the_global_batch(size, seed, batch, world, start):
    ranks = [
        take(4, DataOrder(size, seed), batch, position=start, rank=rank, world_size=world) for rank in range(world)
    ]
    together = [flat(list(shares)) for shares in zip(*ranks, strict=True)]
    assert together == take(4, DataOrder(size, seed), batch * world, position=start)


@given(size=sizes, seed=seeds, batch=st.integers(1, 60), done=st.integers(0, 6), start=positions)
def test_resuming_at_a_position_continues_the_stream(size, seed, batch, done, start):
    whole = take(done + 3, DataOrder(size, seed), batch, position=start)
    assert take(3, DataOrder(size, seed), batch, position=start + done * batch) == whole[done:]


@given(size=sizes, seed=seeds, batch=st.integers(1, 60), start=positions)
def test_resuming_with_another_batch_size_continues_the_stream(size, seed, batch, start):
    ahead = flat(take(batch, DataOrder(size, seed), 7, position=start))
    assert flat(take(7, DataOrder(size, seed), batch, position=start)) == ahead


@given(
    size=sizes,
    seed=seeds,
    ways=st.integers(1, 4).flatmap(
        lambda share: st.tuples(
            st.just(12 * share),  # a global batch that all these numbers of processes can share
            st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 4)), min_size=1, max_size=5),
        )
    ),
)
def test_a_run_killed_at_any_step_and_resumed_on_any_number_of_processes_sees_what_one_process_sees(size, seed, ways):
    """lives: number of processes and of steps until the kill, each from where the one before was saved."""
    global_batch, lives = ways
    seen, position = [], 0
    for world, steps in lives:
        ranks = [
            take(steps, DataOrder(size, seed), global_batch // world, position=position, rank=rank, world_size=world)
            for rank in range(world)
        ]
        seen += [flat(list(shares)) for shares in zip(*ranks, strict=True)]
        position += steps * global_batch
    assert seen == take(len(seen), DataOrder(size, seed), global_batch)


def test_set_smaller_than_a_batch_wraps():
    (batch,) = take(1, DataOrder(3, seed=0), 8)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert take(2, DataOrder(1, seed=0), 2) == [[(0, 0), (1, 0)], [(2, 0), (3, 0)]]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(DataOrder(50, seed).permutation(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == len(orders)


def test_deterministic_is_the_order_of_the_files_in_every_epoch():
    order = DataOrder(3, seed=5, deterministic=True)
    assert [order[position] for position in range(7)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


@settings(max_examples=30)
@given(size=sizes, seed=seeds, visits=st.lists(positions, max_size=20))
def test_order_does_not_depend_on_what_was_asked_before(size, seed, visits):
    order = DataOrder(size, seed)
    assert [order[position] for position in visits] == [DataOrder(size, seed)[position] for position in visits]


def test_order_is_frozen():
    """A resumed run relies on it: a change here (ours or numpy's) breaks every run in progress."""
    assert DataOrder(10, seed=0).permutation(0).tolist() == [7, 0, 9, 6, 4, 1, 3, 2, 8, 5]
    assert DataOrder(10, seed=1).permutation(7).tolist() == [5, 6, 0, 1, 8, 4, 7, 3, 9, 2]


def test_a_permutation_is_made_once_per_epoch(monkeypatch):
    made = []
    permutation = DataOrder.permutation
    monkeypatch.setattr(DataOrder, "permutation", lambda self, epoch: made.append(epoch) or permutation(self, epoch))
    take(25, DataOrder(10, seed=0), 4)
    assert made == list(range(10))


def test_indices_are_plain_integers():
    """numpy integers would change the keys of the random numbers: repr(np.int64(3)) is not repr(3)."""
    epoch, index = DataOrder(5, seed=0)[7]
    assert type(epoch) is int and type(index) is int
    assert isinstance(DataOrder(5, seed=0, deterministic=True).permutation(0), np.ndarray)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"batch_size": 0}, "--batch_size 0"),
        ({"batch_size": -3}, "--batch_size -3"),
        ({"position": -1}, "position -1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1"),
    ],
)
def test_impossible_shares_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        RankBatches(DataOrder(5, seed=0), **{"batch_size": 1, **wrong})


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="0 images"):
        DataOrder(0, seed=0)

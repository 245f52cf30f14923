"""Decide which image comes when: the order of the training stream, and each rank's share of it.

The data are one endless stream: a permutation of all images per epoch, one after the other, keyed by (seed, epoch).
A *position* is the number of images that all ranks together have consumed. It is the only state: a run resumes from
it on any number of ranks. A global batch is the next batch_size * world_size items, may span
epochs, and is cut into one run of batch_size items per rank, in rank order.
"""

from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Generic, TypeVar

import numpy as np

from masked_diffusion.randomness import numpy_generator

Item = tuple[int, int]  # (epoch, image index)
# If so many images in a row cannot be read, it is not for the images.
MAX_REPLACEMENTS = 100
# Batches that a rank has in hand beyond the one it works on.
READ_AHEAD = 2
T = TypeVar("T")


class DataOrder:
    """The stream as a sequence: ``order[position]`` is (epoch, index) of the item at a position >= 0.

    num_items: images in the set, at least 1. deterministic: every epoch in the order of the files.
    Holds one permutation at a time, so walking forwards costs one permutation per epoch.
    Raises ValueError for an empty set.
    """

    def __init__(self, num_items: int, seed: int, deterministic: bool = False) -> None:
        if num_items < 1:
            raise ValueError(f"a data set of {num_items} images has no order: at least 1 is needed")
        self.num_items = num_items
        self.seed = seed
        self.deterministic = deterministic
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Item:
        if position < 0:
            raise IndexError(f"position {position}: the stream starts at 0")
        epoch, offset = divmod(position, self.num_items)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self.permutation(epoch)
        return epoch, int(self._permutation[offset])

    def permutation(self, epoch: int) -> np.ndarray:
        """(num_items,) int64 image indices of one epoch, in their order."""
        if self.deterministic:
            return np.arange(self.num_items)
        return numpy_generator(self.seed, "order", epoch).permutation(self.num_items)


class BlockOrder(DataOrder):
    """The stream of archives that are far away: neighbours in an archive come near each other.

    An epoch is a permutation of the blocks, one after the other; each run of ``window`` images of it is then shuffled.
    Both are keyed by (seed, epoch), so that this, too, is a permutation of all images that a position resumes.

    blocks: block of each image, (num_items,) int64, 0, 1, ... without a gap. places: of each image in its archive,
    (num_items,) int64; only their order counts. window: at least 1.
    """

    def __init__(
        self, blocks: np.ndarray, places: np.ndarray, window: int, seed: int, deterministic: bool = False
    ) -> None:
        super().__init__(len(blocks), seed, deterministic)
        self.window = window
        self._by_block = np.lexsort((places, blocks))
        self._bounds = np.searchsorted(blocks[self._by_block], np.arange(blocks.max() + 2))

    def permutation(self, epoch: int) -> np.ndarray:
        if self.deterministic:
            return super().permutation(epoch)
        rng = numpy_generator(self.seed, "block_order", epoch)
        parts = [
            self._by_block[self._bounds[block] : self._bounds[block + 1]]
            for block in rng.permutation(len(self._bounds) - 1)
        ]
        items = np.concatenate(parts)
        for start in range(0, len(items), self.window):
            rng.shuffle(items[start : start + self.window])
        return items


def candidates(item: Item, num_items: int, seed: int) -> Iterator[int]:
    """List the images to try in turn for an item of the stream: its own, then MAX_REPLACEMENTS drawn from the set.

    They depend only on (seed, epoch, index), so every process replaces an unreadable image by the same other one.
    """
    epoch, index = item
    yield index
    rng = numpy_generator(seed, "replacement", epoch, index)
    for _ in range(MAX_REPLACEMENTS):
        yield int(rng.integers(num_items))


class RankBatches:
    """One rank's endless batches, each a list of batch_size (epoch, index); iterating again starts anew.

    batch_size: items per rank. position: items consumed by all ranks before the first batch.
    Sets smaller than a batch wrap: the batch then holds an image once per epoch it spans.
    Raises ValueError for a batch size below 1, a negative position, or a rank outside 0 … world_size - 1.
    """

    def __init__(
        self, order: DataOrder, batch_size: int, *, position: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"--batch_size {batch_size}: must be at least 1 (images per process and step)")
        if position < 0:
            raise ValueError(f"position {position}: the number of images consumed cannot be negative")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}: must be between 0 and the number of ranks - 1")
        self.order = order
        self.batch_size = batch_size
        self.global_batch = batch_size * world_size
        self.first = position + rank * batch_size

    def __iter__(self) -> Iterator[list[Item]]:
        for start in count(self.first, self.global_batch):
            yield [self.order[position] for position in range(start, start + self.batch_size)]


class ReadAhead(Generic[T]):
    """Yield batches in their order, each fetched READ_AHEAD steps before its turn.

    A rank whose data fail can still do its part of this step and the next one, and tell the others meanwhile
    (``Ranks.any`` answers a step late). All ranks then stop together and nothing is lost. failure: the error, if any.
    """

    def __init__(self, batches: Iterator[T]) -> None:
        self._batches = batches
        self._ready: deque[T] = deque()
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def fetch(self) -> int:
        """Read ahead. Returns how many batches are in hand: more than READ_AHEAD, or fewer after a failure."""
        while self.failure is None and len(self._ready) <= READ_AHEAD:
            try:
                self._ready.append(next(self._batches))
            except Exception as error:
                self.failure = error
        return len(self._ready)

    def __next__(self) -> T:
        self.fetch()
        if self.failure is not None and not self._ready:
            raise self.failure
        return self._ready.popleft()

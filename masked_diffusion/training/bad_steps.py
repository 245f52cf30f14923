"""Steps whose loss or gradients are not finite."""

import sys
from collections.abc import Callable

from torch import Tensor

from masked_diffusion.dist_util import Ranks
from masked_diffusion.logger import Logger
from masked_diffusion.training.meter import DelayedFlag


class BadSteps:
    """Counts the bad steps in a row, one step late, so that the host never waits for the step that it has just begun.

    name_of: the name of an image by its index. Each bad step is logged with its images; other ranks than 0 say theirs
    on stderr.
    """

    def __init__(self, name_of: Callable[[int], str], ranks: Ranks, logger: Logger) -> None:
        self.in_a_row = 0
        self._is_bad = DelayedFlag(ranks.device)
        self._name_of = name_of
        self._ranks = ranks
        self._logger = logger
        self._batch: tuple[Tensor, Tensor, Tensor]

    def put(self, good: Tensor, t: Tensor, epochs: Tensor, indices: Tensor) -> None:
        """Take in a step. good: () bool on the device. t, epochs, indices: (N,), of the images that it was shown."""
        self._is_bad.put(~good)
        self._batch = (t, epochs, indices)

    def check(self, step: int, excused: Callable[[], bool]) -> None:
        """Count the step that was put last. excused: asked of a bad one, whether it is none after all."""
        if not self._is_bad.get() or excused():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        columns = (values.tolist() for values in self._batch)
        images = ", ".join(f"{self._name_of(i)} (epoch {e}, t {t})" for t, e, i in zip(*columns, strict=True))
        message = f"step {step}: loss or gradients are not finite, the update was skipped; the batch was {images}"
        if self._ranks.is_main:
            self._logger.text(message)
        else:
            sys.stderr.write(f"rank {self._ranks.rank}: {message}\n")

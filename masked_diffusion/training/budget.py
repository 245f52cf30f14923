"""How far a training is on its way to its end, which is so many steps or so much compute."""

import copy
import time
from functools import cached_property
from typing import Any

from masked_diffusion.choices import ratio_schedule
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.cost import cost, plain_cost
from masked_diffusion.training.train_config import TERA, TrainConfig


class Budget:
    """What a training has spent of what it may spend.

    step: completed updates. compute: their multiply-adds, of all ranks; what is computed again to save memory does not
    count. seconds: their time, up to the last :meth:`lap`. model: with whole weights, such as the skeleton of a shared
    model. samples: images of an update.

    Raises ValueError for a limit of compute that is less than a step's.
    """

    def __init__(self, config: TrainConfig, model: LatentTransformer, samples: int) -> None:
        self._config = config
        self._model = model
        self._samples = samples
        self._costs: dict[int | None, int] = {}  # of an update, by the number of kept tokens
        self.step = self.compute = 0
        self.seconds = 0.0
        self._begin_lap()
        if config.max_compute and self.next_cost > config.max_multiply_adds:
            raise ValueError(
                f"--max_compute {config.max_compute}: one step takes {self.next_cost / TERA:.3g} TFLOPs; give more"
            )

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Take over what was spent before this start. state: of :meth:`state_dict`; without ``compute``, as those of
        0.1.0 are, it is reckoned."""
        while "compute" not in state and self.step < step:
            self.advance()
        self.step, self.compute = step, state.get("compute", self.compute)
        self.seconds = state.get("seconds", 0.0)
        self._begin_lap()

    def state_dict(self) -> dict[str, Any]:
        """What is spent by now."""
        return {"compute": self.compute, "seconds": self.seconds + time.monotonic() - self._lap_began}

    def lap(self) -> float:
        """Images per second since the last lap or the start, without pauses."""
        steps, seconds = self.step - self._lap_step, max(time.monotonic() - self._lap_began, 1e-9)
        self.seconds += seconds
        self._begin_lap()
        return steps * self._samples / seconds

    def _begin_lap(self) -> None:
        self._lap_step, self._lap_began = self.step, time.monotonic()

    def pause(self, seconds: float) -> None:
        """Leave out a time that was not spent in training."""
        self._lap_began += seconds

    def columns(self) -> dict[str, float]:
        """What a row of the log says."""
        plain_samples = self.compute / plain_cost(self._model)
        return {"seconds": self.seconds, "tflops": self.compute / TERA, "plain_samples": plain_samples}

    @cached_property
    def total(self) -> int | None:
        """What may be spent, multiply-adds or steps; None for any number of steps."""
        return self._config.max_multiply_adds or self._config.last_step

    @property
    def spent(self) -> int:
        """In the unit of the total."""
        return self.compute if self._config.max_compute else self.step

    @property
    def done(self) -> float:
        """Share of the run that is done, 0 where it has no end."""
        return self.spent / self.total if self.total else 0.0

    @property
    def is_finale(self) -> bool:
        """Whether no token leaves in the next update."""
        return self.total is not None and self.spent >= self.total * (1 - self._config.finale)

    @property
    def ratio_share(self) -> float:
        """Share of the mask ratio that holds in the next update, 0 for no dropped token."""
        return 0.0 if self.is_finale else ratio_schedule(self._config.ratio_schedule)(self.done)

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        lr = self._config.lr_at(self.step, self.done)
        return lr * self._config.finale_lr if self._config.finale and self.is_finale else lr

    @property
    def next_cost(self) -> int:
        """Multiply-adds of the next update."""
        share = self.ratio_share
        num_keep = self._model.num_keep(0.5, share) if share < 1 and self._model.mask_ratio is not None else None
        if num_keep not in self._costs:
            self._costs[num_keep] = self._samples * cost(self._model, num_keep)
        return self._costs[num_keep]

    def advance(self) -> None:
        """Note an update."""
        self.compute += self.next_cost
        self.step += 1

    @property
    def last_step(self) -> int | None:
        """The step that the run ends with, None for no end. With a limit of compute, it is the last one within it."""
        return self.at_end().step if self._config.max_compute else self._config.last_step

    def at_end(self) -> "Budget":
        """What will be spent when the run ends. Only of a run that has an end."""
        ahead, total = copy.copy(self), self.total
        assert total is not None
        while ahead.spent + (ahead.next_cost if self._config.max_compute else 1) <= total:
            ahead.advance()
        return ahead

"""The weight averages of a training: those of a fixed rate, and those of a fixed share of the training's length."""

from functools import partial
from pathlib import Path

from torch import nn

from masked_diffusion.dist_util import Ranks
from masked_diffusion.logger import Logger
from masked_diffusion.runs.checkpoint import snapshot
from masked_diffusion.runs.posthoc_ema import Snapshots, gamma_of, power_rate
from masked_diffusion.training.optimizers import EMA
from masked_diffusion.training.sharding import whole
from masked_diffusion.training.train_config import TrainConfig

POWER = "power"  # what the names of the averages of --ema_power begin with, in file names, too


def averages_of(config: TrainConfig, model: nn.Module) -> list[EMA]:
    """All averages that the settings ask for; the first one is drawn and scored."""
    rates = [EMA(model, rate, partial(_rate, float(rate), config.ema_warmup)) for rate in config.ema_rates]
    powers = [EMA(model, POWER + std, partial(power_rate, gamma_of(float(std)))) for std in config.ema_powers]
    return rates + powers


def _rate(rate: float, warms_up: bool, update: int) -> float:
    """The rate of update number 1, 2, ...; while it warms up, few updates make a short average."""
    return min(rate, update / (9 + update)) if warms_up else rate


class SnapshotSaver:
    """Keeps snapshots of the averages of ``--ema_power``, from which others can be made after the training, also at the
    step where a run ends or is stopped.

    start_step: where the run begins in this folder; snapshots after it are of steps that run again, and go.
    """

    def __init__(
        self, averages: list[EMA], interval: int, ranks: Ranks, logger: Logger, run: Path, start_step: int
    ) -> None:
        self._averages = {ema.rate.removeprefix(POWER): ema for ema in averages if ema.rate.startswith(POWER)}
        self._interval = interval
        self._ranks = ranks
        self._logger = logger
        self._snapshots = Snapshots(run)
        self._forget_after: int | None = start_step

    def is_due(self, step: int, run_ends: bool = False) -> bool:
        """Whether a step has a snapshot: every ``interval`` steps. run_ends: asked after that, of the last step."""
        return bool(self._averages) and (step % self._interval == 0) != run_ends

    def save(self, step: int) -> None:
        """Write a snapshot of each average, on rank 0. Collective: every rank must call it, for their shards.

        A disk that is full costs the snapshot, not the training.
        """
        states = {std: ema.state_dict() for std, ema in self._averages.items()}
        states = snapshot(states, whole, keep=self._ranks.is_main)
        if not self._ranks.is_main:
            return
        try:
            if self._forget_after is not None:
                self._snapshots.forget_after(self._forget_after)
                self._forget_after = None
            self._snapshots.add(step, states)
        except (OSError, ValueError) as error:
            self._logger.text(f"no snapshot of the averages at step {step}: {error}")

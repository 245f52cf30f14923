"""The checkpoints of a training: what they hold, how they get to disk, and how a training goes on from one."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from masked_diffusion.diffusion.levels import Levels
from masked_diffusion.dist_util import Ranks
from masked_diffusion.logger import Logger
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.training.optimizers import EMA, GuardedOptimizer
from masked_diffusion.training.sharding import whole
from masked_diffusion.training.train_config import TrainConfig

WRITING = "writing a checkpoint"


@dataclass(frozen=True)
class TrainingState:
    """All that steps change."""

    model: LatentTransformer
    emas: list[EMA]
    optimizer: GuardedOptimizer
    scaler: torch.amp.GradScaler
    schedule_sampler: Levels

    def files(self, step: int, weights_format: str, numbers: dict[str, Any]) -> dict[str, Any]:
        """The files of a checkpoint and their content, in whichever way the ranks share it. All ranks have to call it.

        numbers: further ones for the state file, such as the position in the data.
        """
        state = {
            "step": step,
            **numbers,
            "scaler": self.scaler.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
        }
        return {
            checkpoint.model_file(step, weights_format): self.model.state_dict(),
            **{checkpoint.ema_file(ema.rate, step, weights_format): ema.state_dict() for ema in self.emas},
            checkpoint.opt_file(step): self.optimizer.state_dict(),
            checkpoint.state_file(step): state,
        }

    def load(self, start: checkpoint.Start) -> float:
        """Take over everything a checkpoint has beside the weights; published ones have no state file.

        Returns the learning rate that it was saved at. Raises ValueError or FileNotFoundError, naming the file.
        """
        for ema in self.emas:
            path = checkpoint.sibling(start, partial(checkpoint.ema_file, ema.rate))
            averaged = checkpoint.read_weights(path)
            checkpoint.check_names(self.model, averaged, path)
            ema.load_state_dict(averaged)
        path = start.folder / checkpoint.opt_file(start.step)
        try:
            former_lr = self.optimizer.load_state_dict(checkpoint.read_file(path))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not this model's optimizer state ({error})") from None
        if (state := checkpoint.read_state(start)) is not None:
            if state["scaler"]:  # empty without --use_fp16
                self.scaler.load_state_dict(state["scaler"])
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        return former_lr


@dataclass(eq=False)
class Saver:
    """Writes the checkpoints of a run, beside its further steps, and says in the log how that ended.

    begun_step: the newest step whose writing has begun; at first the step that the run goes on from, which is not
    written again, and nor is step 0.
    """

    state: TrainingState
    config: TrainConfig
    run_config: RunConfig
    ranks: Ranks
    logger: Logger
    folder: Path
    begun_step: int

    def __post_init__(self) -> None:
        self._written_step = self.begun_step
        self._writer = checkpoint.CheckpointWriter(self.folder, self.config.keep_checkpoints, self.config.keep_every)

    def save(self, step: int, position: int, meter: dict[str, Any], spent: dict[str, Any]) -> None:
        """Begin to write a checkpoint on rank 0. All ranks have to call it, for their shards.

        meter: the state of the meter, for the next row of the log. spent: ``compute`` and ``seconds`` so far.
        """
        self.finish()  # one at a time: a snapshot takes as much memory as the training's state
        numbers = {
            "position": position,
            "batch_size": self.run_config.training["batch_size"],
            "global_batch": self.config.batch_size * self.ranks.world_size,
            "stream": self.run_config.stream,
            "meter": meter,
            **spent,
        }
        files = self.state.files(step, self.config.weights_format, numbers)
        files = checkpoint.snapshot(files, whole, keep=self.ranks.is_main)
        if self.ranks.is_main:
            self._writer.start(step, files, self.run_config.as_json())
        self.begun_step = step

    def has_written(self, step: int) -> bool:
        """Wait for what is being written. Returns whether a step is on disk, on rank 0; other ranks do not know."""
        self.report(wait=True)
        return self._written_step == step

    def on_disk(self, step: int) -> bool:
        """:meth:`has_written` of rank 0, on all ranks. Collective; nobody gives up waiting for a slow disk."""
        return self.ranks.from_main_patiently(lambda: self.has_written(step), WRITING)

    def finish(self) -> OSError | None:
        """:meth:`report` of what is being written, of rank 0, on all ranks; else as :meth:`on_disk`."""
        return self.ranks.from_main_patiently(lambda: self.report(wait=True), WRITING)

    def report(self, wait: bool = False) -> OSError | None:
        """Say how the writing of a checkpoint ended, if it did, and return what kept it from being written. A disk that
        is full now may have room at the next save, so that is no reason to lose the training."""
        outcome = self._writer.outcome(wait)
        if outcome is None:
            return None
        step, error = outcome
        if error is None:
            self._written_step = step
            self.logger.text(f"saved the checkpoint of step {step} in {self.folder}")
        else:
            self.logger.text(f"could not save the checkpoint of step {step} ({error})")
        return error

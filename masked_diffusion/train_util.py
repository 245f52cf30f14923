"""The training loop: one step reads like the paper's method section."""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from masked_diffusion.data.bad_images import BadImages
from masked_diffusion.data.data_stream import READ_AHEAD, ReadAhead
from masked_diffusion.diffusion.levels import Levels
from masked_diffusion.diffusion.objectives import Objective
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.logger import Logger
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.block_modes import compile_blocks, recompute_blocks
from masked_diffusion.models.policies import View
from masked_diffusion.models.tokens import Draw, level_of_pixels
from masked_diffusion.processes.preemption import STOPPED, Launcher, StopSignals
from masked_diffusion.processes.waiting import StoppedWaitingError
from masked_diffusion.randomness import numpy_generator
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.training.averages import SnapshotSaver, averages_of
from masked_diffusion.training.bad_steps import BadSteps
from masked_diffusion.training.budget import Budget
from masked_diffusion.training.meter import Meter
from masked_diffusion.training.optimizers import GuardedOptimizer
from masked_diffusion.training.preview import Preview
from masked_diffusion.training.saver import Saver, TrainingState
from masked_diffusion.training.sharding import Shared, no_sync, share, total_norm
from masked_diffusion.training.train_config import TrainConfig
from masked_diffusion.training.training_eval import (
    Evaluation,
    EvaluationError,
    EvaluationStoppedError,
    Scores,
    describe_scores,
)

Batch = dict[str, Tensor]
UNIFORMS = ("t", "second_t")  # draws that become noise levels on the host


@dataclass(kw_only=True, eq=False)
class TrainLoop:
    """Train a model until the configured end.

    data: endless (images, extras) from :func:`masked_diffusion.image_datasets.load_data`, already at the
    ``position``, the number of items consumed so far. bad_images: of the data set that they come from. start: where to
    begin, read here. evaluation, preview: None for none. signals: end the data's waits, too.
    """

    config: TrainConfig
    run_config: RunConfig
    model: LatentTransformer
    objective: Objective
    schedule_sampler: Levels
    first_stage: FirstStage
    data: ReadAhead[tuple[Tensor, Batch]]
    bad_images: BadImages
    ranks: Ranks
    logger: Logger
    folder: Path
    start: checkpoint.Start
    position: int
    evaluation: Evaluation | None = None
    signals: StopSignals = field(default_factory=StopSignals)
    preview: Preview | None = None

    def __post_init__(self) -> None:
        config, model, start, ranks, logger = self.config, self.model.train(), self.start, self.ranks, self.logger
        self.shared_model, self.skeleton = prepare_model(model, start, config, ranks, logger)
        self.optimizer = GuardedOptimizer(model.parameters(), config, ranks)
        self.scaler = gradient_scaler(config, ranks.device)
        self.step = self.start_step = start.step
        self._goes_on_here = start.folder == self.folder
        # Alike on all ranks. The next start evaluates this step, so no other one may follow.
        self._stopped_evaluating = False
        self.budget = Budget(config, self.skeleton, self.global_batch)
        self.emas = averages_of(config, model)
        state = TrainingState(model, self.emas, self.optimizer, self.scaler, self.schedule_sampler)
        if start.step:
            self._load(state, start)
        self.saver = Saver(state, config, self.run_config, ranks, logger, self.folder, start.step)
        begins = start.step if self._goes_on_here else 0
        self.snapshots = SnapshotSaver(self.emas, config.ema_snapshot_interval, ranks, logger, self.folder, begins)
        self.bad_steps = BadSteps(self.bad_images.dataset.name_of, ranks, logger)
        self.views = model.views
        self.meter = Meter(names_of_losses(model, self.objective), ranks)
        # The row of an evaluated step was written after its checkpoint.
        if start.step and (not self._evaluation_is_due() or self._lacks_evaluation()):
            load_meter(self.meter, start)

    def _load(self, state: TrainingState, start: checkpoint.Start) -> None:
        former, now = state.load(start), self.config.lr
        self.budget.begin(start.step, checkpoint.read_state(start) or {})
        if not self.config.lr_changes and former != now:
            self.logger.text(f"learning rate {now} from here on (the checkpoint had {former})")

    @property
    def global_batch(self) -> int:
        return self.config.batch_size * self.ranks.world_size

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end, or until a signal asks to stop; a last checkpoint is always written.

        Returns the exit status: 0, or ``preemption.STOPPED`` when there is more to do. Raises FloatingPointError after
        too many bad steps, RuntimeError for too many bad images, and what reading the data raised, all after saving.
        """
        end, lacks_evaluation = self.budget.last_step, self._lacks_evaluation()
        if end is not None and self.step >= end and not lacks_evaluation:
            self.logger.text(f"nothing to do: the run ends at step {end}, and step {self.step} is reached")
            return 0
        stopping, failure, launcher = False, None, Launcher()
        self.shared_model.train()
        with self.signals as signals, progress_bar(end, self.step, self.ranks) as bar:

            def asked() -> bool:
                return signals.asked() or launcher.has_ended()

            if lacks_evaluation:
                self.log(bar, self._evaluate(asked))
                stopping = self._stopped_evaluating
            if not stopping and (end is None or self.step < end):
                stopping = not all_have_a_batch(self.data, self.ranks, self.step, self.logger)
            while not (stopping or failure) and (end is None or self.step < end):
                images, extras = next(self.data)
                self.bad_images.note(extras)
                self.train_step(images, extras)
                bar.update(1)
                scores = self._evaluate(asked) if self._evaluation_is_due() else None
                if scores is not None or self.step % self.config.log_interval == 0 or self.step == end:
                    self.log(bar, scores)
                if self.snapshots.is_due(self.step):
                    self.snapshots.save(self.step)
                if self.step % self.config.save_interval == 0 and self.step not in (end, self.saver.begun_step):
                    self.save()
                self.saver.report()
                failure = self._failure()
                stopping = self.ranks.any(asked() or self.data.failure is not None) or self._stopped_evaluating
            self._check_last_step()
            failure = failure or self._failure()
            if self.step > self.start_step and self.snapshots.is_due(self.step, run_ends=True):
                self.snapshots.save(self.step)
            self.save_and_wait()
        return self._leave(failure, self.step == end and not self._stopped_evaluating, launcher.has_ended())

    def _failure(self) -> Exception | None:
        """A reason to stop that all ranks see alike."""
        if self.config.max_bad_steps and self.bad_steps.in_a_row >= self.config.max_bad_steps:
            return FloatingPointError(  # bad steps change nothing, so what is saved is the last good state
                f"{self.bad_steps.in_a_row} steps in a row were not finite; the state before them is saved as step "
                f"{self.step} (--max_bad_steps {self.config.max_bad_steps})"
            )
        if problem := self.bad_images.problem():
            return RuntimeError(f"{problem}; the state is saved as step {self.step}")
        return None

    def _leave(self, failure: Exception | None, ended: bool, torchrun_ended: bool) -> int:
        """The exit status of a run that has saved; raises what ended it."""
        if ended and failure is None:
            return 0
        if not isinstance(self.data.failure, StoppedWaitingError):
            failure = failure or self.data.failure
        # No rank fails before rank 0 has saved: a launcher ends the others with it.
        failures = self.ranks.sum_(torch.tensor(int(failure is not None), device=self.ranks.device)).item()
        if failure is not None:
            self.logger.text(f"stopped after step {self.step}: {failure}")
            raise failure
        if failures:
            self.logger.text(f"stopped after step {self.step}: another process could not read its data")
            return 1
        cause = "because torchrun has ended" if torchrun_ended else "by a signal"
        self.logger.text(f"stopped {cause} after step {self.step}; the same command goes on from here")
        return STOPPED

    def train_step(self, images: Tensor, extras: Batch) -> None:
        """One update. images: (N, C, H, W) in [-1, 1]; extras: labels ``y`` and the draws of each image."""
        draws = draws_on(self.ranks.device, extras, self.schedule_sampler)
        images = images.to(self.ranks.device, non_blocking=True)
        t, weights = self.schedule_sampler.from_uniform(extras["t"], self.ranks.device)  # (N,), (N,)
        batch_size = len(images)
        size = self.config.microbatch if self.config.microbatch > 0 else batch_size
        losses = []
        for start in range(0, batch_size, size):
            part = slice(start, start + size)
            part_draws = {name: value[part] for name, value in draws.items()}
            z = self.first_stage.encode(images[part], noise=part_draws.get("posterior"))  # (n, C, h, w)
            is_last = part.stop >= batch_size
            losses.append(self._backward(z, t[part], weights[part], part_draws, batch_size, is_last))
        self._check_last_step()
        good = self._update()
        self.bad_steps.put(good, t, extras["epoch"], extras["used"])
        teach(self.schedule_sampler, self.ranks, t, torch.cat(losses), good)

    def _backward(self, z: Tensor, t: Tensor, weights: Tensor, draws: Batch, batch_size: int, is_last: bool) -> Tensor:
        """Add a microbatch's gradients. Each view runs backward by itself, so that the two graphs never live
        together; ranks exchange gradients in the step's very last pass. Returns the unweighted losses, (n,)."""
        terms: dict[str, Tensor] = {}
        for view in self.views:
            synchronize = is_last and view is self.views[-1]
            with contextlib.nullcontext() if synchronize else no_sync(self.shared_model):
                losses = self._losses(z, t, draws, view)
                # Parts add up to the batch mean, whatever their number.
                self.scaler.scale((weights * losses["loss"]).sum() / batch_size).backward()
            terms |= {view.prefix + name: value.detach() for name, value in losses.items()}
        self.meter.add_losses(self.objective.share(t), terms)
        return sum(terms[view.prefix + "loss"] for view in self.views)  # type: ignore[return-value]

    def _losses(self, z: Tensor, t: Tensor, draws: Batch, view: View) -> dict[str, Tensor]:
        """Loss terms of a view, each (n,). Views share t and nothing else."""
        draw = None
        if view.drops:  # as many tokens in all parts of a step and on all ranks, or they would wait for each other
            u = numpy_generator(self.config.seed, "mask_ratio", self.step).random()
            draw = self.model.draw(draws["token_noise"], u, draws.get("path_noise"), self.budget.ratio_share)
        level, pixel_level = levels_of(draw, t, draws, z.shape[-1])
        model_kwargs = {"y": draws["y"], "label_noise": draws[f"{view.prefix}label_noise"], "draw": draw}
        how = draws[f"{view.prefix}noise"], self.model.policy.counts(draw), self.model.policy.extra(draw), pixel_level
        return self.objective.training_losses(self._network, z, level, model_kwargs, *how)

    def _network(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """The model under the configured compute precision; parameters and losses stay float32."""
        half = self.config.half
        with torch.autocast(self.ranks.device.type, dtype=half, enabled=half is not None):
            return self.shared_model(x, t, **kwargs)

    def _update(self) -> Tensor:
        """Optimizer and EMA from the reduced gradients; neither moves where these are not finite.

        That is decided on the device, alike on all ranks. Returns () bool, whether they were.
        """
        self.scaler.unscale_(self.optimizer.torch_optimizer)
        gradients = [p for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(p.grad for p in gradients if p.grad is not None)
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(gradients, self.config.grad_clip, norm)
        good = norm.isfinite()
        self.meter.add_update(norm, good)
        self.optimizer.step(self.budget.lr, good)
        self.scaler.update()
        self.optimizer.zero_grad()
        for ema in self.emas:
            ema.update(self.model, good, self.step + 1)
        self.step += 1
        self.budget.advance()
        self.position += self.global_batch
        return good

    def _check_last_step(self) -> None:
        # An fp16 overflow only lowers the scale, as long as it can.
        self.bad_steps.check(self.step, excused=lambda: self.config.use_fp16 and self.scaler.get_scale() > 1)

    # -- logging -------------------------------------------------------------------------------------------------------

    def log(self, bar: tqdm, scores: Scores | None = None) -> None:
        """One row of means over all ranks since the last one, with the scores of an evaluation."""
        self._tell_bad_images()
        row = self.meter.flush()
        row["param_norm"] = total_norm(p.detach() for p in self.model.parameters()).item()
        rate = self.budget.lap()
        row |= {"lr": self.optimizer.lr, "images_per_second": rate, **self.budget.columns()}
        row["bad_images"] = len(self.bad_images.found)
        if self.evaluation is not None:  # the same columns in all rows
            row |= scores or self.evaluation.no_scores
        bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{rate:.1f}")
        self.logger.row({"step": self.step, "samples": self.position, **row})

    def _tell_bad_images(self) -> None:
        for message in self.bad_images.gather():
            self.logger.text(message)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _lacks_evaluation(self) -> bool:
        """Whether the run was stopped after it had saved the step it goes on from, and before that was judged."""
        if self.evaluation is None or not (self._goes_on_here and self._evaluation_is_due()):
            return False
        return not self.evaluation.is_done(self.step)

    def _evaluation_is_due(self) -> bool:
        return self.evaluation is not None and self.evaluation.is_due(self.step)

    def _evaluate(self, asked_to_stop: Callable[[], bool]) -> Scores:
        """Scores of the first EMA; none, and a line in the log, where there is no way to them.

        What is judged is saved first, and not lost if judging it is interrupted.
        """
        assert self.evaluation is not None
        if self.saver.begun_step != self.step:
            self.save()
        began = time.monotonic()
        try:
            with self.emas[0].averaged_model(self.skeleton) as averaged:
                scores = self.evaluation.run(self.step, averaged, asked_to_stop)
        except EvaluationError as error:
            self._stopped_evaluating = isinstance(error, EvaluationStoppedError)
            self.logger.text(f"no score of step {self.step}: {error}")
            return {}
        finally:
            self.budget.pause(time.monotonic() - began)
        best = ""
        if self.saver.on_disk(self.step) and self.ranks.is_main:
            best = self.evaluation.note_best(self.step, scores)
        self.logger.text(f"step {self.step}: {describe_scores(scores)}{best}")
        return scores

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to write a checkpoint, and draw a preview, on rank 0. All ranks have to call it, for their shards."""
        self._tell_bad_images()  # a run that goes on from here does not come across them again
        self.saver.save(self.step, self.position, self.meter.state_dict(), self.budget.state_dict())
        if self.preview is not None:
            # Of shards, all ranks gather the average: what fails there on one of them has to end all.
            with self.emas[0].averaged_model(self.skeleton) as averaged:
                if self.ranks.is_main:
                    self.preview.draw(self.step, averaged, self.folder, self.logger.text)

    def save_and_wait(self) -> None:
        """Have the present state on disk. Raises OSError when it cannot be written."""
        if not self.saver.on_disk(self.step):
            self.save()
            if error := self.saver.finish():
                raise error


def names_of_losses(model: LatentTransformer, objective: Objective) -> list[str]:
    """The terms of a training's losses, of all views."""
    by_view = {view: [*objective.loss_names, *(model.policy.extra_names if view.drops else [])] for view in model.views}
    return [view.prefix + name for view, names in by_view.items() for name in names]


def draws_on(device: torch.device, extras: Batch, levels: Levels) -> Batch:
    """The draws of a batch on a device, without ``t``. Those of second noise levels have become levels."""
    draws = {name: value.to(device, non_blocking=True) for name, value in extras.items() if name not in UNIFORMS}
    if "second_t" in extras:
        draws["second_t"] = levels.from_uniform(extras["second_t"], device)[0]
    return draws


def levels_of(draw: Draw | None, t: Tensor, draws: Batch, side: int) -> tuple[Tensor, Tensor | None]:
    """The noise levels of a view, (n,) or (n, 2), and of its pixels where an image has two, (n, 1, side, side)."""
    if draw is None or draw.group is None:
        return t, None
    levels = torch.stack([t, draws["second_t"]], dim=1)
    return levels, level_of_pixels(levels, draw.group, side)


def prepare_model(
    model: LatentTransformer, start: checkpoint.Start, config: TrainConfig, ranks: Ranks, logger: Logger
) -> Shared:
    """Give a model the weights to start from, and run it as the settings say, on all ranks."""
    if start.step:
        path = checkpoint.sibling(start, checkpoint.model_file)
        checkpoint.load_weights(model, checkpoint.read_weights(path), path)
    if config.grad_checkpointing:
        recompute_blocks(model)
    if config.compile and (problem := compile_blocks(model, ranks.device)):
        logger.text(f"--compile True is ignored: this machine cannot compile ({problem})")
    return share(model, config.shard, ranks, config.half)


def gradient_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """The loss scale of float16; of no effect in other precisions."""
    return torch.amp.GradScaler(
        device.type,
        init_scale=2.0**20,
        growth_factor=2.0**config.fp16_scale_growth,
        backoff_factor=0.5,
        growth_interval=1,
        enabled=config.use_fp16,
    )


def progress_bar(end: int | None, step: int, ranks: Ranks) -> tqdm:
    """A bar over the steps, on rank 0."""
    # A bar in a job's log file is a line per update: there it is refreshed once a minute.
    interval = 0.5 if sys.stderr.isatty() else 60.0
    return tqdm(total=end, initial=step, unit="step", mininterval=interval, disable=not ranks.is_main, leave=False)


def all_have_a_batch(data: ReadAhead, ranks: Ranks, step: int, logger: Logger) -> bool:
    """Whether every rank has a first batch: where one has none, no rank may begin a step, which they share."""
    in_hand = data.fetch()
    lacking = ranks.sum_(torch.tensor(int(not in_hand), device=ranks.device)).item()
    if lacking:
        logger.text(f"step {step + 1} is not begun: a process has no batch")
    else:  # A rank with one batch has none for the second step: the question of now is answered after the first.
        ranks.any(in_hand < READ_AHEAD)
    return not lacking


def teach(sampler: Levels, ranks: Ranks, t: Tensor, losses: Tensor, good: Tensor) -> None:
    """Once per step, from the losses of all ranks in sample order: ranks hold consecutive parts of a batch."""
    if sampler.learns:
        pairs = ranks.concat(torch.stack([t.double(), losses.double()], dim=1)).cpu()
        if good.item():
            sampler.update_with_all_losses(pairs[:, 0].tolist(), pairs[:, 1].tolist())


def load_meter(meter: Meter, start: checkpoint.Start) -> None:
    """Go on with the means of a checkpoint, for the steps since its last row of the log."""
    state = checkpoint.read_state(start)
    if state is not None and "meter" in state:  # those of 0.1.0 have none
        meter.load_state_dict(state["meter"])

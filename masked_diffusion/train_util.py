"""The training loop: one step reads like the paper's method section."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from masked_diffusion.data.bad_images import BadImages
from masked_diffusion.data.data_stream import ReadAhead
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.gaussian_diffusion import GaussianDiffusion
from masked_diffusion.logger import Logger
from masked_diffusion.models import MDTv2, family_of
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.block_modes import compile_blocks, recompute_blocks
from masked_diffusion.processes.preemption import STOPPED, Launcher, StopSignals
from masked_diffusion.randomness import numpy_generator
from masked_diffusion.resample import ScheduleSampler
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.runs.family_defaults import SAMPLING
from masked_diffusion.sampling.image_sampler import ImageSampler, SamplerConfig
from masked_diffusion.sampling.pictures import grid, save_picture
from masked_diffusion.training.meter import DelayedFlag, Meter
from masked_diffusion.training.optimizers import EMA, OPTIMIZERS, GuardedOptimizer
from masked_diffusion.training.sharding import SHARDINGS, no_sync, share, total_norm, whole
from masked_diffusion.training.training_eval import (
    Evaluation,
    EvaluationError,
    EvaluationStoppedError,
    Scores,
    describe_scores,
)

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop, named as the flags. batch_size: per process. microbatch: at most so many images
    in one pass; -1 for the whole batch. max_steps, lr_anneal_steps: 0 for no end, no annealing. grad_clip: largest norm
    of the whole model's gradient, 0 for any."""

    opt: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.0
    grad_clip: float = 0.0
    shard: str = "none"
    lr_anneal_steps: int = 0
    max_steps: int = 0
    batch_size: int = 1
    microbatch: int = -1
    ema_rate: str = "0.9999"
    log_interval: int = 10
    save_interval: int = 10000
    use_fp16: bool = False
    fp16_scale_growth: float = 1e-3
    use_bf16: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    seed: int = 0
    max_bad_steps: int = 10
    max_bad_share: float = 0.01
    keep_checkpoints: int = 0
    keep_every: int = 0
    weights_format: str = "pt"
    preview_samples: int = 16
    preview_steps: int = 25

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_interval", "save_interval", "preview_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in (
            "weight_decay",
            "grad_clip",
            "lr_anneal_steps",
            "max_steps",
            "preview_samples",
            "keep_checkpoints",
            "keep_every",
            "max_bad_steps",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must not be negative")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share {self.max_bad_share}: must be in [0, 1], a share of the images")
        for name, choices in (("opt", OPTIMIZERS), ("shard", SHARDINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: unknown; choose one of {', '.join(choices)}")
        if not self.lr > 0:
            raise ValueError(f"--lr {self.lr}: must be positive")
        if self.keep_every and not self.keep_checkpoints:
            raise ValueError(f"--keep_every {self.keep_every}: needs --keep_checkpoints; without it all are kept")
        if self.microbatch == 0 or self.microbatch < -1:
            raise ValueError(f"--microbatch {self.microbatch}: must be at least 1, or -1 for the whole batch")
        if self.use_fp16 and self.use_bf16:
            raise ValueError("--use_fp16 and --use_bf16: choose one")
        if self.weights_format not in checkpoint.WEIGHTS_FORMATS:
            known = ", ".join(checkpoint.WEIGHTS_FORMATS)
            raise ValueError(f"--weights_format {self.weights_format}: unknown; choose one of {known}")
        for rate in self.ema_rates:
            try:
                valid = 0 <= float(rate) < 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"--ema_rate {self.ema_rate}: expected numbers in [0, 1), separated by commas")

    @property
    def ema_rates(self) -> list[str]:
        """The rates as they were written, which is how files are named after them."""
        return list(dict.fromkeys(rate.strip() for rate in self.ema_rate.split(",")))

    @property
    def half(self) -> torch.dtype | None:
        """What autocast computes in, None for full precision."""
        return torch.float16 if self.use_fp16 else torch.bfloat16 if self.use_bf16 else None

    @property
    def last_step(self) -> int | None:
        """Where the run ends, None for never."""
        ends = [end for end in (self.lr_anneal_steps, self.max_steps) if end]
        return min(ends) if ends else None

    def on_ranks(self, world_size: int, former: dict[str, Any] | None) -> "TrainConfig":
        """These settings with the global batch of the run that is resumed, when only the number of processes changed.

        former: the checkpoint's ``batch_size`` (the flag) and ``global_batch``, None where there are none. A pass
        never holds more images than it did. Raises ValueError when the processes cannot share the batch equally.
        """
        if former is None or former.get("batch_size") != self.batch_size:
            return self
        global_batch = former["global_batch"]
        if global_batch % world_size:
            raise ValueError(
                f"the run to resume has a global batch of {global_batch}, which {world_size} processes cannot share "
                "equally: start another number of them, or choose a new batch with --batch_size"
            )
        batch_size = global_batch // world_size
        microbatch = self.batch_size if self.microbatch < 0 and batch_size > self.batch_size else self.microbatch
        return dataclasses.replace(self, batch_size=batch_size, microbatch=microbatch)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after ``step`` completed ones."""
        if not self.lr_anneal_steps:
            return self.lr
        return self.lr * (1 - step / self.lr_anneal_steps)


class TrainLoop:
    """Train a model until the configured end.

    data: endless iterator of (images, extras) from :func:`masked_diffusion.image_datasets.load_data`, already at the
    ``position``, the number of items consumed so far. bad_images: of the data set that they come from. start: where to
    begin; its checkpoint is read here. evaluation: None for none.
    """

    def __init__(
        self,
        *,
        config: TrainConfig,
        run_config: RunConfig,
        model: LatentTransformer,
        diffusion: GaussianDiffusion,
        schedule_sampler: ScheduleSampler,
        first_stage: FirstStage,
        data: Iterator[tuple[Tensor, Batch]],
        bad_images: BadImages,
        ranks: Ranks,
        logger: Logger,
        folder: Path,
        start: checkpoint.Start,
        position: int,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.config = config
        self.run_config = run_config
        self.diffusion = diffusion
        self.schedule_sampler = schedule_sampler
        self.first_stage = first_stage
        self.data = ReadAhead(data)
        self.bad_images = bad_images
        self.ranks = ranks
        self.logger = logger
        self.folder = folder
        self.evaluation = evaluation

        self.model = model.train()
        if start.step:
            path = checkpoint.sibling(start, checkpoint.model_file)
            checkpoint.load_weights(self.model, checkpoint.read_weights(path), path)
        if config.grad_checkpointing:
            recompute_blocks(self.model)
        if config.compile and (problem := compile_blocks(self.model, ranks.device)):
            logger.text(f"--compile True is ignored: this machine cannot compile ({problem})")
        self.shared_model, self.skeleton = share(self.model, config.shard, ranks, config.half)
        self.optimizer = GuardedOptimizer(
            model.parameters(), config.opt, config.lr, config.weight_decay, config.shard, ranks
        )
        self.scaler = torch.amp.GradScaler(
            ranks.device.type,
            init_scale=2.0**20,
            growth_factor=2.0**config.fp16_scale_growth,
            backoff_factor=0.5,
            growth_interval=1,
            enabled=config.use_fp16,
        )
        self.step = self.start_step = start.step
        self._goes_on_here = start.folder == folder
        # Alike on all ranks. The next start evaluates this step, so no other one may follow.
        self._stopped_evaluating = False
        self.emas = [EMA(self.model, rate) for rate in config.ema_rates]
        self.position = position
        self.writer = checkpoint.CheckpointWriter(folder, config.keep_checkpoints, config.keep_every)
        self.saved_step = self.start_step  # nothing is saved at step 0, nor again at the step resumed from
        self._bad_step = DelayedFlag(ranks.device)
        self._bad_steps = 0  # in a row
        self._last_batch: tuple[Tensor, Tensor, Tensor]  # t, epoch of the items, index of the images shown
        if start.step:
            self._load(start)
        self.masks = model.mask_ratio is not None
        names = self._loss_names()
        self.meter = Meter(names, diffusion.num_timesteps, ranks)
        self._last_log = (time.monotonic(), self.step)

    @property
    def global_batch(self) -> int:
        return self.config.batch_size * self.ranks.world_size

    def _loss_names(self) -> list[str]:
        loss_type, learned = self.diffusion.loss_type, self.diffusion.model_var_type.is_learned
        names = ["loss"] if loss_type.is_vb else ["loss", "mse", "vb"] if learned else ["loss", "mse"]
        return [*names, *(f"m_{name}" for name in names)] if self.masks else names

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end, or until a signal asks to stop; a last checkpoint is always written.

        Returns the exit status: 0, or ``preemption.STOPPED`` when there is more to do. Raises FloatingPointError after
        too many bad steps, RuntimeError for too many bad images, and what reading the data raised, all after saving.
        """
        end, lacks_evaluation = self.config.last_step, self._lacks_evaluation()
        if end is not None and self.step >= end and not lacks_evaluation:
            self.logger.text(f"nothing to do: the run ends at step {end}, and step {self.step} is reached")
            return 0
        stopping, failure, launcher = False, None, Launcher()
        self.shared_model.train()
        with StopSignals() as signals, self._progress_bar(end) as bar:

            def asked() -> bool:
                return signals.received is not None or launcher.has_ended()

            if lacks_evaluation:
                self.log(bar, self._evaluate(asked))
                stopping = self._stopped_evaluating
            while not (stopping or failure) and (end is None or self.step < end):
                images, extras = next(self.data)
                self.bad_images.note(extras)
                self.train_step(images, extras)
                bar.update(1)
                evaluates = self.evaluation is not None and self.evaluation.is_due(self.step)
                if evaluates:  # what is judged is kept, and not lost if judging it is interrupted
                    self._tell_bad_images()
                    self.save()
                    self.log(bar, self._evaluate(asked))
                elif self.step % self.config.log_interval == 0 or self.step == end:
                    self.log(bar)
                if self.step % self.config.save_interval == 0 and self.step != end and not evaluates:
                    self._tell_bad_images()  # a run that goes on from here does not come across them again
                    self.save()
                self._report_save()
                failure = self._failure()
                stopping = self.ranks.any(asked() or self.data.failure is not None) or self._stopped_evaluating
            self._check_last_step()
            failure = failure or self._failure()
            self._tell_bad_images()
            self.save_and_wait()
        return self._leave(failure, self.step == end and not self._stopped_evaluating, launcher.has_ended())

    def _failure(self) -> Exception | None:
        """A reason to stop that all ranks see alike."""
        if self.config.max_bad_steps and self._bad_steps >= self.config.max_bad_steps:
            return FloatingPointError(  # bad steps change nothing, so what is saved is the last good state
                f"{self._bad_steps} steps in a row were not finite; the state before them is saved as step "
                f"{self.step} (--max_bad_steps {self.config.max_bad_steps})"
            )
        if problem := self.bad_images.problem():
            return RuntimeError(f"{problem}; the state is saved as step {self.step}")
        return None

    def _leave(self, failure: Exception | None, ended: bool, torchrun_ended: bool) -> int:
        """The exit status of a run that has saved; raises what ended it."""
        if ended and failure is None:
            return 0
        failure = failure or self.data.failure
        # No rank fails before rank 0 has saved: a launcher ends the others with it.
        failures = self.ranks.sum_(torch.tensor(int(failure is not None), device=self.ranks.device)).item()
        if failure is not None:
            raise failure
        if failures:
            self.logger.text(f"stopped after step {self.step}: another process could not read its data")
            return 1
        cause = "because torchrun has ended" if torchrun_ended else "by a signal"
        self.logger.text(f"stopped {cause} after step {self.step}; the same command goes on from here")
        return STOPPED

    def train_step(self, images: Tensor, extras: Batch) -> None:
        """One update. images: (N, C, H, W) in [-1, 1]; extras: labels ``y`` and the draws of each image."""
        draws = {name: value.to(self.ranks.device, non_blocking=True) for name, value in extras.items() if name != "t"}
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
        self._teach_schedule_sampler(t, torch.cat(losses), good)
        self._last_batch = (t, extras["epoch"], extras["used"])

    def _backward(self, z: Tensor, t: Tensor, weights: Tensor, draws: Batch, batch_size: int, is_last: bool) -> Tensor:
        """Add a microbatch's gradients. Each view runs backward by itself, so that the two graphs never live
        together; ranks exchange gradients in the step's very last pass. Returns the unweighted losses, (n,)."""
        views = [("", False), ("m_", True)] if self.masks else [("", False)]
        terms: dict[str, Tensor] = {}
        for prefix, enable_mask in views:
            synchronize = is_last and enable_mask == self.masks
            with contextlib.nullcontext() if synchronize else no_sync(self.shared_model):
                view = self._losses(z, t, draws, prefix, enable_mask)
                # Parts add up to the batch mean, whatever their number.
                self.scaler.scale((weights * view["loss"]).sum() / batch_size).backward()
            terms |= {prefix + name: value.detach() for name, value in view.items()}
        self.meter.add_losses(t, terms)
        return sum(terms[prefix + "loss"] for prefix, _ in views)  # type: ignore[return-value]

    def _losses(self, z: Tensor, t: Tensor, draws: Batch, prefix: str, enable_mask: bool) -> dict[str, Tensor]:
        """Loss terms of the full or the masked view, each (n,). The two share t and nothing else."""
        model_kwargs: dict[str, Any] = {"y": draws["y"], "label_noise": draws[f"{prefix}label_noise"]}
        if enable_mask:
            model_kwargs |= {"enable_mask": True, "token_noise": draws["token_noise"]}
            if isinstance(self.model, MDTv2):  # of one length in all parts of a step, or they would wait for each other
                ratio_noise = numpy_generator(self.config.seed, "mask_ratio", self.step).random()
                model_kwargs["ratio_noise"] = ratio_noise
        return self.diffusion.training_losses(self._network, z, t, model_kwargs, noise=draws[f"{prefix}noise"])

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
        self.optimizer.step(self.config.lr_at(self.step), good)
        self.scaler.update()
        self.optimizer.zero_grad()
        for ema in self.emas:
            ema.update(self.model, good)
        self._bad_step.put(~good)
        self.step += 1
        self.position += self.global_batch
        return good

    def _check_last_step(self) -> None:
        """Count bad steps in a row, one step late. An fp16 overflow only lowers the scale, as long as it can."""
        if not self._bad_step.get() or (self.config.use_fp16 and self.scaler.get_scale() > 1):
            self._bad_steps = 0
            return
        self._bad_steps += 1
        t, epochs, indices = (values.tolist() for values in self._last_batch)
        name_of = self.bad_images.dataset.name_of
        images = ", ".join(f"{name_of(i)} (epoch {e}, t {t})" for i, e, t in zip(indices, epochs, t, strict=True))
        message = f"step {self.step}: loss or gradients are not finite, the update was skipped; the batch was {images}"
        if self.ranks.is_main:
            self.logger.text(message)
        else:
            sys.stderr.write(f"rank {self.ranks.rank}: {message}\n")

    def _teach_schedule_sampler(self, t: Tensor, losses: Tensor, good: Tensor) -> None:
        """Once per step, from the losses of all ranks in sample order: ranks hold consecutive parts of a batch."""
        if self.schedule_sampler.learns:
            pairs = self.ranks.concat(torch.stack([t.double(), losses.double()], dim=1)).cpu()
            if good.item():
                self.schedule_sampler.update_with_all_losses(pairs[:, 0].long().tolist(), pairs[:, 1].tolist())

    # -- logging -------------------------------------------------------------------------------------------------------

    def _progress_bar(self, end: int | None) -> tqdm:
        # A bar in a job's log file is a line per update: there it is refreshed once a minute.
        interval = 0.5 if sys.stderr.isatty() else 60.0
        return tqdm(
            total=end, initial=self.step, unit="step", mininterval=interval, disable=not self.ranks.is_main, leave=False
        )

    def log(self, bar: tqdm, scores: Scores | None = None) -> None:
        """One row of means over all ranks since the last one, with the scores of an evaluation."""
        self._tell_bad_images()
        row = self.meter.flush()
        row["param_norm"] = total_norm(p.detach() for p in self.model.parameters()).item()
        now, (then, step_then) = time.monotonic(), self._last_log
        rate = (self.step - step_then) / max(now - then, 1e-9)
        self._last_log = (now, self.step)
        row |= {"lr": self.config.lr_at(self.step - 1), "images_per_second": rate * self.global_batch}
        row["bad_images"] = len(self.bad_images.found)
        if self.evaluation is not None:  # the same columns in all rows
            row |= scores or self.evaluation.no_scores
        bar.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{rate * self.global_batch:.1f}")
        self.logger.row({"step": self.step, "samples": self.position, **row})

    def _tell_bad_images(self) -> None:
        for message in self.bad_images.gather():
            self.logger.text(message)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _lacks_evaluation(self) -> bool:
        """Whether the run was stopped after it had saved the step it goes on from, and before that was judged."""
        if self.evaluation is None or not (self._goes_on_here and self.evaluation.is_due(self.step)):
            return False
        return not self.evaluation.is_done(self.step)

    def _evaluate(self, asked_to_stop: Callable[[], bool]) -> Scores:
        """Scores of the first EMA; none, and a line in the log, where there is no way to them."""
        assert self.evaluation is not None
        began = time.monotonic()
        try:
            with self.emas[0].averaged_model(self.skeleton) as averaged:
                scores = self.evaluation.run(self.step, averaged, asked_to_stop)
        except EvaluationError as error:
            self._stopped_evaluating = isinstance(error, EvaluationStoppedError)
            self.logger.text(f"no score of step {self.step}: {error}")
            return {}
        finally:
            self._last_log = (self._last_log[0] + time.monotonic() - began, self._last_log[1])  # trained images count
        best = ""
        if self.ranks.is_main:
            self._report_save(wait=True)
            if self.saved_step == self.step:
                best = self.evaluation.note_best(self.step, scores)
        self.logger.text(f"step {self.step}: {describe_scores(scores)}{best}")
        return scores

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to write a checkpoint, and draw a preview, on rank 0. All ranks have to call it, for their shards."""
        self._report_save(wait=True)  # one at a time: a snapshot takes as much memory as the training's state
        parts = checkpoint.snapshot(self._parts(), whole, keep=self.ranks.is_main)
        if self.ranks.is_main:
            self.writer.start(self.step, parts, self.run_config.as_json())
        if self.config.preview_samples:
            # Of shards, all ranks gather the average: what fails there on one of them has to end all.
            with self.emas[0].averaged_model(self.skeleton) as averaged:
                if self.ranks.is_main:
                    self._preview(averaged)

    def _parts(self) -> dict[str, Any]:
        """The files of a checkpoint and their content, in whichever way the ranks share it."""
        form = self.config.weights_format
        state = {
            "step": self.step,
            "position": self.position,
            "batch_size": self.run_config.training["batch_size"],
            "global_batch": self.global_batch,
            "scaler": self.scaler.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
        }
        return {
            checkpoint.model_file(self.step, form): self.model.state_dict(),
            **{checkpoint.ema_file(ema.rate, self.step, form): ema.state_dict() for ema in self.emas},
            checkpoint.opt_file(self.step): self.optimizer.state_dict(),
            checkpoint.state_file(self.step): state,
        }

    def save_and_wait(self) -> None:
        """Have the present state on disk. Raises OSError when it cannot be written."""
        self._report_save(wait=True)
        # Only rank 0 knows what is written, and shards come from all.
        if self.ranks.from_main(lambda: self.saved_step != self.step):
            self.save()
            if error := self._report_save(wait=True):
                raise error

    def _report_save(self, wait: bool = False) -> OSError | None:
        """Say how the writing of a checkpoint ended, if it did. A disk that is full now may have room at the next save,
        so that is no reason to lose the training."""
        outcome = self.writer.outcome(wait)
        if outcome is None:
            return None
        step, error = outcome
        if error is None:
            self.saved_step = step
            self.logger.text(f"saved the checkpoint of step {step} in {self.folder}")
        else:
            self.logger.text(f"could not save the checkpoint of step {step} ({error})")
        return error

    def _load(self, start: checkpoint.Start) -> None:
        """Everything a checkpoint has beside the weights; published ones have no state file."""
        for ema in self.emas:
            path = checkpoint.sibling(start, partial(checkpoint.ema_file, ema.rate))
            averaged = checkpoint.read_weights(path)
            checkpoint.check_names(self.model, averaged, path)
            ema.load_state_dict(averaged)
        path = start.folder / checkpoint.opt_file(start.step)
        try:
            former = self.optimizer.load_state_dict(checkpoint.read_file(path))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not this model's optimizer state ({error})") from None
        if (state := checkpoint.read_state(start)) is not None:
            if state["scaler"]:  # empty without --use_fp16
                self.scaler.load_state_dict(state["scaler"])
            self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        now = self.config.lr_at(self.step)
        if not self.config.lr_anneal_steps and former != now:
            self.logger.text(f"learning rate {now} from here on (the checkpoint had {former})")

    def _preview(self, averaged: Callable[..., Tensor]) -> None:
        """A grid of samples from an average, the same seeds and labels each time; a line where there can be none."""
        count = self.config.preview_samples
        num_classes, class_cond = self.run_config.model.num_classes, self.run_config.class_cond
        steps = min(self.config.preview_steps, self.run_config.diffusion.diffusion_steps)
        guidance = SAMPLING[family_of(self.run_config.model.model)]
        sampler = SamplerConfig(num_sampling_steps=steps, sampler="ddim", cfg_cond=class_cond, **guidance)
        try:
            make = ImageSampler(averaged, self.run_config, sampler, self.first_stage, self.ranks.device)
            images = make(range(count), [i % num_classes if class_cond else num_classes for i in range(count)])
            save_picture(grid(images), self.folder / f"preview_{self.step:06d}.png")
        except (OSError, torch.OutOfMemoryError, FloatingPointError) as error:
            self.logger.text(f"no preview of step {self.step}: {error}")  # a picture is no reason to stop


def training_record(config: TrainConfig, **further: Any) -> dict[str, Any]:
    """What ``config.json`` says of the training beside model, process and data."""
    return {**dataclasses.asdict(config), **further}

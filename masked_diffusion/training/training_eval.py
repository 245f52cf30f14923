"""Score a training: sample its EMA on all ranks and let the evaluator judge the samples.

The evaluator runs as a separate program beside rank 0, so its libraries and the training's never share a process, and a
crash of the evaluator does not end the training. Samples draw by their own keys and leave the training's draws alone.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masked_diffusion.diffusion.guidance import Denoiser
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.randomness import stream_entry
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import RunConfig, library_versions
from masked_diffusion.sampling.image_sampler import ImageSampler, NewAway, labels_for
from masked_diffusion.sampling.sample_set import SampleSet
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.training.eval_config import METRICS, EvalConfig

FOLDER_NAME = "evaluation"
REPORT_NAME = "report.json"
LOG_NAME = "evaluator.log"
POLL_SECONDS = 0.2
TRIAL_IMAGES = 8
COUNT = "eval_num_samples"
# What launchers tell their processes. The evaluator is alone.
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
OF_MPI_AND_SLURM = ("OMPI_", "PMI_", "PMIX_", "SLURM_")

Scores = dict[str, float]


class EvaluationError(RuntimeError):
    """An evaluation gave no score. Raised on all ranks."""


class EvaluationStoppedError(EvaluationError):
    """An evaluation ended because a rank was asked to stop. Raised on all ranks."""


@dataclass(eq=False)
class Evaluation:
    """Evaluates one training. program: the evaluator's script. folder: of the run; each evaluation has a folder in it.
    sampler: of :meth:`EvalConfig.sampler`. new_away, guide_record: of its guidance, see
    :func:`masked_diffusion.sampling.guides.open_away`.

    Its methods are called by all ranks together. Raises ValueError or FileNotFoundError where it cannot work.
    """

    config: EvalConfig
    program: Path
    run_config: RunConfig
    first_stage: FirstStage
    ranks: Ranks
    folder: Path
    sampler: SamplerConfig
    new_away: NewAway | None
    guide_record: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.program.is_file():
            raise FileNotFoundError(
                f"--eval_interval {self.config.eval_interval}: the evaluator is not part of the installed package, and "
                f"{self.program} does not exist; train with the script of a clone of the repository"
            )
        self._labels = labels_for(self.run_config, "random", self.config.eval_num_samples, self.sampler.seed)
        # What draws the images of a model, in eval mode.
        self.sampler_of = partial(
            ImageSampler, config=self.run_config, sampler=self.sampler, first_stage=self.first_stage,
            device=self.ranks.device, stream=self.run_config.stream, new_away=self.new_away,
        )  # fmt: skip

    @property
    def no_scores(self) -> Scores:
        """The evaluation's columns in a row without an evaluation."""
        return dict.fromkeys([*METRICS, COUNT], math.nan)

    def is_due(self, step: int) -> bool:
        return step > 0 and step % self.config.eval_interval == 0

    def is_done(self, step: int) -> bool:
        """True when this step has a score."""
        return self.ranks.from_main(lambda: (self._step_folder(step) / REPORT_NAME).is_file())

    def try_out(self, leave_no_trace: bool = False) -> None:
        """Score a few images of noise, to find a wrong reference, network or library before the training starts.

        This also fills the evaluator's cache of the reference's features. Raises ValueError with the evaluator's
        words."""
        with contextlib.ExitStack() as stack:
            noise = None
            if self.ranks.is_main:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                side = self.run_config.model.image_size
                pixels = np.random.default_rng(0).integers(0, 256, (TRIAL_IMAGES, side, side, 3), dtype=np.uint8)
                noise = folder / "noise.npz"
                np.savez(noise, arr_0=pixels)
            try:
                self._score(noise, lambda: False, ["--no_cache"] if leave_no_trace else [])
            except EvaluationError as error:
                raise ValueError(
                    f"--eval_ref {self.config.eval_ref}: the evaluator cannot work with it: {error}"
                ) from None

    def run(self, step: int, model: Denoiser, asked_to_stop: Callable[[], bool]) -> Scores:
        """Sample ``model``, in eval mode, and score it. asked_to_stop: may differ between ranks; ends the work soon.

        The samples are removed once they have a report: the checkpoint can make them again. Those without stay, and
        the next attempt goes on from them. Raises EvaluationError, on all ranks.
        """
        settings = self._settings(step)
        size, count = self.run_config.model.image_size, self.config.eval_num_samples
        samples = SampleSet(self._step_folder(step), count, size, self.config.eval_batch_size, settings)
        make = self.sampler_of(model)
        circumstances = {"processes": self.ranks.world_size, "versions": library_versions()}
        self._on_main(lambda: samples.open({**circumstances, "passes_per_image": make.passes()}))
        self._sample(samples, make, asked_to_stop)
        with_labels = self.run_config.class_cond
        self._on_main(lambda: samples.assemble(self._labels if with_labels else None))
        self._score(samples.path, asked_to_stop, ["--out", str(samples.folder / REPORT_NAME)])
        scores: Scores = self._on_main(lambda: self._read_report(samples))
        self._on_main(lambda: samples.path.unlink())
        return scores

    def note_best(self, step: int, scores: Scores) -> str:
        """Record the checkpoint of ``step`` if no other one has a lower FID, on rank 0. Returns what to say of it."""
        former = checkpoint.read_best(self.folder)
        # A record of this step or a later one is of steps that ran again.
        if former is not None and former["step"] < step and former.get("eval_fid", math.inf) <= scores["eval_fid"]:
            return f"; the best is step {former['step']}"
        known = {name: value for name, value in scores.items() if not math.isnan(value)}
        try:
            checkpoint.record_best(self.folder, {"step": step, **known})
        except OSError as error:
            return f", the best so far, which cannot be recorded ({error})"
        return ", the best so far"

    def _step_folder(self, step: int) -> Path:
        return self.folder / FOLDER_NAME / f"{step:06d}"

    def _settings(self, step: int) -> dict[str, Any]:
        """What determines the images, for their manifest."""
        of_training = ("ema_rate", "seed", "lr", "data_dir")
        return {
            "step": step,
            "model": self.run_config.model.record(),
            **self.run_config.objective.record(),
            "training": {name: self.run_config.training.get(name) for name in of_training},
            "sampler": self.sampler.record(),
            "labels": "random" if self.run_config.class_cond else None,
            "num_samples": self.config.eval_num_samples,
            "batch_size": self.config.eval_batch_size,
            **stream_entry(self.run_config.stream),
            **({"guide": self.guide_record} if self.guide_record else {}),
        }

    def _sample(self, samples: SampleSet, make: ImageSampler, asked_to_stop: Callable[[], bool]) -> None:
        """Batch k on rank k mod W, in rounds that all ranks end together: none waits for another one for long, and what
        one of them meets is known to all."""
        ranks = self.ranks
        for first in range(0, samples.num_batches, ranks.world_size):
            batch, failure = first + ranks.rank, None
            try:
                if batch < samples.num_batches and not samples.has_part(batch):
                    samples.make_part(batch, make, self._labels)
            except Exception as error:  # of whatever kind: a score is no reason to lose a training
                failure = error
            self._agree(failure, asked_to_stop())
        missing = samples.missing(0, 1) if ranks.is_main else []
        where = f"{len(missing)} parts are not in {samples.parts_folder}: on several machines it must be shared"
        self._agree(FileNotFoundError(where) if missing else None)

    def _score(self, samples: Path | None, asked_to_stop: Callable[[], bool], flags: list[str]) -> None:
        """Run the evaluator beside rank 0. samples: on rank 0. The ranks meet now and then, so that a long score is
        no reason for any of them to give up."""
        child: subprocess.Popen[bytes] | None = None
        failure: Exception | None = None
        if samples is not None and self.ranks.is_main:
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()  # the evaluator has the same GPU
            try:
                with samples.with_name(LOG_NAME).open("w") as log:
                    command = self._command(samples, flags)
                    child = subprocess.Popen(command, env=lone_environment(), stdout=log, stderr=log)
            except OSError as error:
                failure = error
        self._agree(failure)
        running = True
        try:
            while running:
                status = child.poll() if child is not None else None
                running = self._any(child is not None and status is None)
                self._agree(None, asked_to_stop())
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            if child is not None and child.poll() is None:
                child.kill()
                child.wait()
        if samples is not None and child is not None and child.returncode:
            failure = EvaluationError(_last_line(samples.with_name(LOG_NAME)))
        self._agree(failure)

    def _command(self, samples: Path, flags: list[str]) -> list[str]:
        config = self.config
        graph = ["--graph", str(Path(config.eval_graph).expanduser())] if config.eval_graph else []
        reference = str(Path(config.eval_ref).expanduser())
        program = [sys.executable, str(self.program), reference, str(samples)]
        return [*program, "--backend", config.eval_backend, *graph, *flags]

    def _read_report(self, samples: SampleSet) -> Scores:
        metrics = json.loads((samples.folder / REPORT_NAME).read_text(encoding="utf-8"))["metrics"]
        values = {column: metrics.get(name) for column, name in METRICS.items()}
        scores = {column: math.nan if value is None else value for column, value in values.items()}
        return {**scores, COUNT: samples.num_samples}

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Run a function on rank 0 and give its result to all. Raises EvaluationError on all ranks when it fails."""
        try:
            return self.ranks.from_main(work)
        except Exception as error:  # of whatever kind: a score is no reason to lose a training
            raise EvaluationError(str(error)) from error

    def _any(self, flag: bool) -> bool:
        return self.ranks.sum_(torch.tensor(float(flag), device=self.ranks.device)).item() > 0

    def _agree(self, failure: Exception | None, stop: bool = False) -> None:
        """Raise EvaluationError on all ranks if one of them has failed or is asked to stop."""
        if self._any(stop):
            raise EvaluationStoppedError("the run is asked to stop")
        if self._any(failure is not None):
            raise EvaluationError(str(failure) if failure is not None else "another process failed") from failure


def describe_scores(scores: Scores) -> str:
    """Describe scores for the log, with the evaluator's names and the number of samples."""
    numbers = [f"{name} {scores[column]:.4g}" for column, name in METRICS.items() if not math.isnan(scores[column])]
    return f"{', '.join(numbers)} of {scores[COUNT]:.0f} samples"


def lone_environment() -> dict[str, str]:
    """Return this process's environment without the variables of a launcher."""
    told = OF_TORCHRUN + OF_MPI_AND_SLURM
    return {name: value for name, value in os.environ.items() if not name.startswith(told)}


def _last_line(log: Path) -> str:
    """Return the last line that the evaluator wrote; it says why it ended."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ended without a word, see {log}"

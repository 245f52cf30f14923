"""What a study measures of a run's samples, and of the memory of its steps."""

import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studying.plan import Run
from studying.settings import Study
from studying.trainer import Trainer
from torch import Tensor

from masked_diffusion.programs.read_digits import EMBEDDED, Classifier, embedded_images, predict, train_classifier
from masked_diffusion.runs.trained import Trained
from masked_diffusion.sampling.image_sampler import ImageSampler, SamplerConfig

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "evaluations"))
from fidelity_metrics import RunningMoments, Statistics, frechet_distance  # noqa: E402

BATCH, MEGA = 64, 1e6
SAMPLING_STEPS = 25


def sampler_of(trained: Trained, device: torch.device | str) -> ImageSampler:
    """Samples without guidance, of the same noise for every run."""
    steps = {"num_sampling_steps": SAMPLING_STEPS, "sampler": trained.config.objective.default_sampler}
    sampler = SamplerConfig.of_family(trained.config.model.model, **steps)
    return ImageSampler(trained.model, trained.config, sampler, trained.first_stage, device)


class Judge:
    """Judges samples by the classifier of an embedded data set, beside as many of its held-out images."""

    def __init__(self, name: str, count: int) -> None:
        self._classifier = train_classifier(name)
        pixels, labels = embedded_images(f"{name}-test")
        chosen = spread(len(pixels), count)
        self._labels, self._real = labels[chosen], statistics(self._classifier, pixels[chosen])
        training, _ = embedded_images(name)
        as_many = training[spread(len(training), len(chosen))]
        self._floor = frechet_distance(statistics(self._classifier, as_many), self._real)

    def of(self, trained: Trained, device: torch.device | str) -> dict[str, float]:
        """``read_right``: the share of samples that are read as their class. ``fd``: the Fréchet distance of features.
        ``fd_floor``: that of as many training images.

        There is a sample of each label of the held-out images that are compared with.
        """
        make = sampler_of(trained, device)
        parts = torch.arange(len(self._labels)).split(BATCH)
        images = [make(part.tolist(), self._labels[part].tolist()) for part in parts]
        pixels = torch.from_numpy(np.concatenate(images))
        right = float((predict(self._classifier, pixels) == self._labels).float().mean())
        distance = frechet_distance(statistics(self._classifier, pixels), self._real)
        return {"read_right": right, "fd": distance, "fd_floor": self._floor}


def judge_of(study: Study, samples: int) -> Judge | None:
    """The judge of a study's samples; None where there is no classifier of its data, or no samples are wanted.

    samples: as many as there are held-out images, at most.
    """
    name = study.data_dir.removeprefix("builtin:")
    embedded = EMBEDDED.get(name)
    held_out = study.held_out_dir == f"{study.data_dir}-test"
    if not samples or embedded is None or embedded.side != study.image_size or not held_out:
        return None
    return Judge(name, samples)


def spread(number: int, count: int) -> Tensor:
    """Places of at most so many images, evenly over all."""
    return torch.linspace(0, number - 1, min(count, number)).round().long()


@torch.no_grad()
def statistics(classifier: Classifier, pixels: Tensor) -> Statistics:
    """Of the classifier's features of images (N, S, S, 3)."""
    moments = RunningMoments()
    moments.add(classifier.features(pixels).numpy())
    return moments.statistics()


def megabytes_by_policy(trainer: Trainer, commands: Mapping[Run, list[str]]) -> dict[str, float]:
    """What a training step under each policy keeps for its backward pass: MB, found by a dry run in this process.

    Raises RuntimeError for a command that cannot be run.
    """
    found: dict[str, float] = {}
    for run, command in commands.items():
        if run.policy not in found:
            with KeptBytes() as kept:
                trainer.try_out(run, command)
            found[run.policy] = kept.most / MEGA
    return found


class KeptBytes:
    """Inside the context: the most bytes that autograd keeps for backward passes at a time, on any device.

    Tensors that share their storage count once. Weights that a backward pass needs are among them.
    """

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._uses: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def __enter__(self) -> "KeptBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._hooks.__exit__(*raised)

    def _keep(self, tensor: Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self._now += size * (not self._uses[place])
        self._uses[place] += 1
        self.most = max(self.most, self._now)
        kept = _Kept(tensor)
        weakref.finalize(kept, self._release, place, size)
        return kept

    def _release(self, place: int, size: int) -> None:
        self._uses[place] -= 1
        self._now -= size * (not self._uses[place])


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

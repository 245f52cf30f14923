"""A picture of how far a training is: a grid of samples from its weight average."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from masked_diffusion.first_stage import FirstStage
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.sampling.image_sampler import ImageSampler, NewAway, labels_for
from masked_diffusion.sampling.pictures import grid, save_picture
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.training.train_config import TrainConfig


def preview_sampler(config: TrainConfig, run_config: RunConfig) -> SamplerConfig:
    """How the previews of a training are sampled. Raises ValueError for guidance that lacks its checkpoint."""
    takes_path = config.preview_guide_from == "checkpoint"
    return SamplerConfig.of_family(
        run_config.model.model,
        num_sampling_steps=min(config.preview_steps, run_config.most_steps or config.preview_steps),
        sampler="ddim",
        cfg_cond=run_config.class_cond,
        cfg_channels=run_config.objective.guided_channels,
        guide_from=config.preview_guide_from,
        guide_path=config.guide_path if takes_path else "",
    )


class Preview:
    """Draws ``preview_{step:06d}.png``, the same seeds and labels each time.

    report: told of a preview that cannot be drawn, which is no reason to stop. new_away: of :func:`preview_sampler`'s
    guidance, None for the null label.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_config: RunConfig,
        first_stage: FirstStage,
        device: torch.device,
        folder: Path,
        report: Callable[[str], None],
        new_away: NewAway | None = None,
    ) -> None:
        self._count = config.preview_samples
        self._run_config = run_config
        self._first_stage = first_stage
        self._device = device
        self._folder = folder
        self._report = report
        self._new_away = new_away
        self._sampler = preview_sampler(config, run_config)

    def draw(self, step: int, averaged: Callable[..., Tensor]) -> None:
        """averaged: the model with its averaged weights, in eval mode."""
        labels = labels_for(self._run_config, "balanced", self._count).tolist()
        try:
            make = ImageSampler(
                averaged,
                self._run_config,
                self._sampler,
                self._first_stage,
                self._device,
                stream=self._run_config.stream,
                new_away=self._new_away,
            )
            save_picture(grid(make(range(self._count), labels)), self._folder / f"preview_{step:06d}.png")
        except (OSError, torch.OutOfMemoryError, FloatingPointError) as error:
            self._report(f"no preview of step {step}: {error}")

"""A picture of how far a training is: a grid of samples from its weight average."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from masked_diffusion.diffusion.guidance import Denoiser
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.sampling.image_sampler import ImageSampler, NewAway, labels_for
from masked_diffusion.sampling.pictures import grid, save_picture
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.training.guide_config import GuideConfig
from masked_diffusion.training.train_config import TrainConfig


def preview_sampler(config: TrainConfig, guides: GuideConfig, run_config: RunConfig) -> SamplerConfig:
    """How the previews of a training are sampled. Raises ValueError for guidance that lacks its checkpoint."""
    scale = {} if config.preview_cfg_scale is None else {"cfg_scale": config.preview_cfg_scale}
    guidance = guides.of_kind(config.preview_guide_from) if run_config.class_cond else {}
    return SamplerConfig.of_family(
        run_config.model.model,
        num_sampling_steps=min(config.preview_steps, run_config.most_steps or config.preview_steps),
        sampler="ddim",
        cfg_channels=run_config.objective.guided_channels,
        **scale,
        **guidance,
    )


@dataclass(eq=False)
class Preview:
    """Draws ``preview_{step:06d}.png``, the same seeds and labels each time.

    count: images of the grid. sampler: of :func:`preview_sampler`. new_away: of its guidance, None for the null label.
    """

    count: int
    sampler: SamplerConfig
    run_config: RunConfig
    first_stage: FirstStage
    device: torch.device
    new_away: NewAway | None

    def __post_init__(self) -> None:
        # What draws the images of a model, in eval mode.
        self.sampler_of = partial(
            ImageSampler, config=self.run_config, sampler=self.sampler, first_stage=self.first_stage,
            device=self.device, stream=self.run_config.stream, new_away=self.new_away,
        )  # fmt: skip

    def draw(self, step: int, averaged: Denoiser, folder: Path, report: Callable[[str], None]) -> None:
        """Draw the preview of a step. averaged: the model with its averaged weights, in eval mode. report: told of a
        preview that cannot be drawn, which is no reason to stop."""
        labels = labels_for(self.run_config, "balanced", self.count).tolist()
        try:
            images = self.sampler_of(averaged)(range(self.count), labels)
            save_picture(grid(images), folder / f"preview_{step:06d}.png")
        except (OSError, torch.OutOfMemoryError, FloatingPointError) as error:
            report(f"no preview of step {step}: {error}")

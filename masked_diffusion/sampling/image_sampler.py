"""A trained model with its sampler, guidance and first stage: sample numbers and labels -> images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from masked_diffusion.data.class_names import ClassNames
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import GUIDED_CHANNELS, SCHEDULES, Denoiser, guided
from masked_diffusion.diffusion.objectives import Objective
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.randomness import STREAM, SampleNoise, numpy_generator
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.sampling.inpainting import Inpainting
from masked_diffusion.sampling.pictures import to_uint8


@dataclass(frozen=True)
class SamplerConfig:
    """How a trained model is sampled; named as the flags.

    num_sampling_steps: steps of the sampling. sampler: a name of ``samplers.SAMPLERS``. cfg_cond: guide with
    the schedule ``guidance`` (a name of ``guidance.SCHEDULES``) up to cfg_scale. cfg_interval: first and last original
    timestep that ``interval`` guides at. cfg_channels: 3 or 4 latent channels are guided. cfg_skip_tol: where the
    weight is within this of 1, no unconditional half is computed. Raises ValueError for other values.
    """

    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    clip_denoised: bool = False
    cfg_cond: bool = False
    guidance: str = "power_cosine"
    cfg_scale: float = 3.8
    scale_pow: float = 4.0
    cfg_interval: list[int] | None = None
    cfg_channels: int = GUIDED_CHANNELS
    cfg_skip_tol: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_sampling_steps < 1:
            raise ValueError(f"--num_sampling_steps {self.num_sampling_steps}: must be at least 1")
        if self.sampler not in samplers.SAMPLERS:
            raise ValueError(f"--sampler {self.sampler}: unknown; choose one of {', '.join(samplers.SAMPLERS)}")
        if self.guidance not in SCHEDULES:
            raise ValueError(f"--guidance {self.guidance}: unknown; choose one of {', '.join(SCHEDULES)}")
        if self.guidance == "interval" and self.cfg_interval is None:
            raise ValueError("--guidance interval: give the timesteps to guide at, such as --cfg_interval 80-470")
        if self.cfg_channels not in (3, 4):
            raise ValueError(f"--cfg_channels {self.cfg_channels}: choose 3 (as published) or 4")
        if not self.cfg_skip_tol >= 0:  # NaN is not
            raise ValueError(f"--cfg_skip_tol {self.cfg_skip_tol}: must be 0 or more, such as 0.01")

    @property
    def guidance_settings(self) -> dict[str, Any]:
        """The settings of the chosen schedule alone."""
        return {name: getattr(self, name) for name in SCHEDULES[self.guidance].settings}

    def guidance_record(self) -> dict[str, Any] | None:
        """What a manifest says of the guidance."""
        if not self.cfg_cond:
            return None
        record = {"schedule": self.guidance, "cfg_scale": self.cfg_scale, **self.guidance_settings}
        return {**record, "cfg_channels": self.cfg_channels, "cfg_skip_tol": self.cfg_skip_tol}

    def build_guidance(self, model: Denoiser, config: RunConfig) -> Denoiser:
        """The model guided at every timestep as these settings say; the model itself without guidance.

        Raises ValueError for an interval outside the trained process.
        """
        if not self.cfg_cond:
            return model
        return guided(model, config.model.num_classes, self._weight(config), self.cfg_channels)

    def guided_levels(self, config: RunConfig, objective: Objective) -> set[float]:
        """The levels of the grid whose guidance weight differs from 1 by more than ``cfg_skip_tol``."""
        if not self.cfg_cond:
            return set()
        levels = torch.tensor(objective.grid())
        weights = self._weight(config)(objective.timesteps(levels))
        return set(levels[(weights - 1).abs() > self.cfg_skip_tol].tolist())

    def _weight(self, config: RunConfig) -> Callable[[Tensor], Tensor]:
        steps = config.diffusion.diffusion_steps
        if self.guidance == "interval" and self.cfg_interval is not None and self.cfg_interval[1] >= steps:
            raise ValueError(f"--cfg_interval {'-'.join(map(str, self.cfg_interval))}: timesteps are 0 ... {steps - 1}")
        return partial(
            SCHEDULES[self.guidance].weight,
            cfg_scale=self.cfg_scale,
            diffusion_steps=steps,
            **self.guidance_settings,
        )

    def build_objective(self, config: RunConfig) -> Objective:
        """The objective for a sampling of ``num_sampling_steps``.

        Raises ValueError when the process has fewer steps, or the sampler does not serve the objective.
        """
        samplers.check_serves(self.sampler, config.objective.objective)
        if self.num_sampling_steps > config.diffusion.diffusion_steps:
            raise ValueError(
                f"--num_sampling_steps {self.num_sampling_steps}: the process has {config.diffusion.diffusion_steps}"
            )
        return config.build_objective(self.num_sampling_steps)


class ImageSampler:
    """A model with everything that makes images of it: guidance, sampler, first stage.

    model: ``model(x, t, y)``, in eval mode, on ``device``. progress: show a bar over the sampling steps. stream: of the
    noise, see ``randomness.STREAMS``.
    """

    def __init__(
        self,
        model: Denoiser,
        config: RunConfig,
        sampler: SamplerConfig,
        first_stage: FirstStage,
        device: torch.device | str,
        progress: bool = False,
        stream: int = STREAM,
    ) -> None:
        self._progress = progress
        self._first_stage = first_stage
        self._latent_shape = config.model.latent_shape
        self._seed = sampler.seed
        self._stream = stream
        self._device = device
        self._clip = sampler.clip_denoised
        self._objective = sampler.build_objective(config)
        self._grid = self._objective.grid()
        self._new_step = partial(samplers.SAMPLERS[sampler.sampler].start, self._objective.schedule)
        self._model = model
        self._guide = partial(sampler.build_guidance, config=config)
        # Decided here, before any step. What the guidance refuses is refused here, too.
        self._guided_levels = sampler.guided_levels(config, self._objective)

    def states(
        self, indices: Sequence[int], labels: Sequence[int], inpainting: Inpainting | None = None
    ) -> Iterator[samplers.Step]:
        """The latents of the samples with these numbers and labels after every step of the sampler."""
        noise = SampleNoise(self._seed, indices, stream=self._stream)
        y = torch.tensor(list(labels), device=self._device)
        x_T = noise.randn(self._latent_shape, self._device)
        denoiser: Denoiser = self._model
        predictor: Callable[..., samplers.Predict] = self._objective.predictor
        if inpainting is not None:
            denoiser = inpainting.denoiser(denoiser, self._seed, indices)
            predictor = partial(inpainting.predictor, self._objective, noise=x_T)
            noisiest = torch.tensor(self._grid[:1], device=self._device).expand(len(y))
            x_T = inpainting.hold(self._objective, x_T, noisiest, noise=x_T)
        plain, guided = (
            predictor(model, clip_denoised=self._clip, model_kwargs={"y": y})
            for model in (denoiser, self._guide(denoiser))
        )

        def predict(x_t: Tensor, level: Tensor) -> samplers.Prediction:
            return (guided if level[0].item() in self._guided_levels else plain)(x_t, level)

        levels = tqdm(self._grid, unit="step", disable=not self._progress)
        return samplers.loop(self._new_step(), predict, x_T, levels, noise.randn_like)

    @torch.no_grad()
    def pixels(self, latents: Tensor, indices: Sequence[int]) -> np.ndarray:
        """Latents (N, C, h, w) of these samples -> images (N, H, W, 3) uint8. Raises FloatingPointError for NaN."""
        images = self._first_stage.decode(latents)
        if not images.isfinite().all():
            raise FloatingPointError(f"samples {list(indices)}: the images are not finite; sample in float32")
        return to_uint8(images)

    def __call__(
        self, indices: Sequence[int], labels: Sequence[int], inpainting: Inpainting | None = None
    ) -> np.ndarray:
        """Images of the samples with these numbers and labels: (N, H, W, 3) uint8."""
        return self.pixels(samplers.last(self.states(indices, labels, inpainting)), indices)

    def trajectory(
        self, indices: Sequence[int], labels: Sequence[int], frames: int, inpainting: Inpainting | None = None
    ) -> np.ndarray:
        """Images of the states after :meth:`shown_steps`: (frames, N, H, W, 3) uint8."""
        shown = self.shown_steps(frames)
        states = self.states(indices, labels, inpainting)
        kept = {number: state.sample for number, state in enumerate(states, start=1) if number in shown}
        return np.stack([self.pixels(kept[number], indices) for number in shown])

    def shown_steps(self, frames: int) -> list[int]:
        """Numbers of ``frames`` evenly spaced steps of the sampler, from 1 to the last; one frame is the last."""
        steps = len(self._grid)
        return np.linspace(1, steps, frames).round().astype(int).tolist() if frames > 1 else [steps]


def choose_labels(text: str, num_samples: int, num_classes: int, names: ClassNames, seed: int) -> np.ndarray:
    """Labels of all samples, (num_samples,) int64.

    text: ``random`` (keyed by seed and sample index), ``balanced`` (0, 1, ..., K - 1, 0, 1, ...), or a comma list of
    labels or class names, repeated as often as needed. Raises ValueError for a label or name the model does not have.
    """
    if text == "balanced":
        return np.arange(num_samples, dtype=np.int64) % num_classes
    if text == "random":
        labels = [numpy_generator(seed, "label", i).integers(num_classes) for i in range(num_samples)]
        return np.array(labels, dtype=np.int64)
    return np.resize(np.array(names.labels(text), dtype=np.int64), num_samples)

"""A trained model with its sampler, guidance and first stage: sample numbers and labels -> images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from masked_diffusion.data.class_names import ClassNames
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import Away, Denoiser, Guidance
from masked_diffusion.first_stage import ChannelStatistics, FirstStage
from masked_diffusion.randomness import STREAM, SampleNoise, numpy_generator
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.sampling.inpainting import Inpainting
from masked_diffusion.sampling.pictures import to_uint8
from masked_diffusion.sampling.sampler_config import SamplerConfig


class Draws(Protocol):
    """Random numbers of a batch's samples, in the order in which they are asked for."""

    def randn(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """(N, *shape) float32 normal."""
        ...


# Of the draws of a batch's samples, what guidance leads them away from.
NewAway = Callable[[Draws], Away]


@dataclass(eq=False)
class ImageSampler:
    """A model with everything that makes images of it: guidance, sampler, first stage.

    model: ``model(x, t, y)``, in eval mode, on ``device``. progress: show a bar over the sampling steps. stream: of the
    noise, see ``randomness.STREAMS``. new_away: see :func:`masked_diffusion.sampling.guides.open_away`; None is the
    null label.
    """

    model: Denoiser
    config: RunConfig
    sampler: SamplerConfig
    first_stage: FirstStage
    device: torch.device | str
    progress: bool = False
    stream: int = STREAM
    new_away: NewAway | None = None

    def __post_init__(self) -> None:
        config, sampler, new_away = self.config, self.sampler, self.new_away
        self._objective = sampler.build_objective(config)
        if torch.device(self.device).type == "mps" and not config.objective.is_discrete:
            raise ValueError(
                f"--device mps: samplers of --objective {config.objective.objective} compute in float64, which MPS "
                "does not have; use --device cpu"
            )
        if sampler.clip_denoised and ChannelStatistics.recorded(config.first_stage) is not None:
            raise ValueError(
                "--clip_denoised True: it clamps to [-1, 1], and this model's channels are normalised, so that they "
                "reach further; leave it out"
            )
        entry = samplers.SAMPLERS[sampler.sampler]
        self._grid = self._objective.grid(entry.last_level)
        self._new_step = partial(entry.starts[config.objective.objective], self._objective.path(self._grid))
        self._level_dtype = torch.long if config.objective.is_discrete else torch.float64
        self._idle_levels = set(self._grid)
        self._new_guidance: Callable[[Draws], Guidance] | None = None
        if sampler.cfg_cond:
            build = partial(sampler.build_guidance, config.model.num_classes, config.most_steps)

            def new_guidance(draws: Draws) -> Guidance:
                return build(None if new_away is None else new_away(draws)).at(self._objective.timesteps)

            self._new_guidance = new_guidance
            guidance = new_guidance(SampleNoise(sampler.seed, []))
            # Decided here, before any step, without waiting for the device.
            levels = torch.tensor(self._grid, dtype=self._level_dtype)
            self._idle_levels = set(levels[guidance.is_idle(self._objective.time(levels))].tolist())

    def passes(self) -> float:
        """Passes of the model that an image costs; a weak prediction may be less than one."""
        cost = alone = 1.0
        if self._new_guidance is not None:
            away = self._new_guidance(SampleNoise(self.sampler.seed, [])).away
            cost, alone = away.cost, away.alone
        costs: list[float] = []

        def predict(x_t: Tensor, level: Tensor) -> samplers.Prediction:
            costs.append(alone if level[0].item() in self._idle_levels else cost)
            return samplers.Prediction(x_t, x_t, x_t, x_t)

        # Some samplers look at a level twice, or not, so they are asked.
        samplers.last(samplers.loop(self._new_step(), predict, torch.zeros(1, 1, 1, 1), self._grid, torch.zeros_like))
        return sum(costs)

    def states(
        self, indices: Sequence[int], labels: Sequence[int], inpainting: Inpainting | None = None
    ) -> Iterator[samplers.Step]:
        """The latents of the samples with these numbers and labels after every step of the sampler."""
        noise = SampleNoise(self.sampler.seed, indices, stream=self.stream)
        y = torch.tensor(list(labels), device=self.device)
        x_T = noise.randn(self.config.model.latent_shape, self.device)
        models = [self.model, self.model]
        if self._new_guidance is not None:
            draws = SampleNoise(self.sampler.seed, indices, "guide", self.stream)
            guidance = self._new_guidance(draws)
            models = [guidance.unled(self.model), guidance.lead(self.model)]
        predictor: Callable[..., samplers.Predict] = self._objective.predictor
        if inpainting is not None:
            halves = SampleNoise(self.sampler.seed, indices, "halves", self.stream)
            models = [inpainting.denoiser(model, halves) for model in models]
            predictor = partial(inpainting.predictor, self._objective, noise=x_T)
            noisiest = torch.tensor(self._grid[:1], dtype=self._level_dtype, device=self.device).expand(len(y))
            x_T = inpainting.hold(self._objective, self._objective.prior(x_T), noisiest, noise=x_T)
        else:
            x_T = self._objective.prior(x_T)
        plain, guided = (
            predictor(model, clip_denoised=self.sampler.clip_denoised, model_kwargs={"y": y}) for model in models
        )

        def predict(x_t: Tensor, level: Tensor) -> samplers.Prediction:
            return (plain if level[0].item() in self._idle_levels else guided)(x_t, level)

        levels = tqdm(self._grid, unit="step", disable=not self.progress)
        step = self._new_step()
        if inpainting is not None:
            step = inpainting.keeping(step, self._grid[-1])
        return samplers.loop(step, predict, x_T, levels, noise.randn_like)

    @torch.no_grad()
    def pixels(self, latents: Tensor, indices: Sequence[int]) -> np.ndarray:
        """Latents (N, C, h, w) of these samples -> images (N, H, W, 3) uint8. Raises FloatingPointError for NaN."""
        images = self.first_stage.decode(latents.float())
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


def labels_for(config: RunConfig, text: str, num_samples: int, seed: int = 0, class_cond: bool = True) -> np.ndarray:
    """Labels of all samples, (num_samples,) int64; the null label for all where the model or the caller has no classes.

    text: ``random`` (keyed by seed and sample index), ``balanced`` (0, 1, ..., K - 1, 0, 1, ...), or a comma list of
    labels or class names, repeated as often as needed. class_cond: False asks for no classes. Raises ValueError for a
    label or name the model does not have.
    """
    num_classes = config.model.num_classes
    if text not in ("balanced", "random"):
        listed = ClassNames(num_classes, config.class_names).labels(text)
        labels = np.resize(np.array(listed, dtype=np.int64), num_samples)
    elif text == "balanced":
        labels = np.arange(num_samples, dtype=np.int64) % num_classes
    else:
        drawn = [numpy_generator(seed, "label", i).integers(num_classes) for i in range(num_samples)]
        labels = np.array(drawn, dtype=np.int64)
    return labels if class_cond and config.class_cond else np.full_like(labels, num_classes)

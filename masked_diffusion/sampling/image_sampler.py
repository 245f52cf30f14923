"""A trained model with its sampler, guidance and first stage: sample numbers and labels -> images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from masked_diffusion.data.class_names import ClassNames
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import GUIDED_CHANNELS, Away, Denoiser, Guidance, NullLabel, find_schedule
from masked_diffusion.diffusion.objectives import Objective
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.models import family_of
from masked_diffusion.randomness import STREAM, SampleNoise, numpy_generator
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.runs.family_defaults import SAMPLING
from masked_diffusion.sampling.inpainting import Inpainting
from masked_diffusion.sampling.pictures import to_uint8
from masked_diffusion.settings import setting

CONTINUOUS_STEPS = 1000  # what guidance schedules count the time of a continuous objective in
# Which edition of a sampler's steps this is; those that are not named step as in 0.1.0, or were not there.
STEPS_EDITION = {"heun": 2}
GUIDE_FROM = ("null_label", "checkpoint", "masked")
# Of the draws of a batch's samples, what guidance leads them away from.
NewAway = Callable[[SampleNoise], Away]


@dataclass(frozen=True)
class SamplerConfig:
    """How a trained model is sampled; named as the flags.

    num_sampling_steps: steps of the sampling. sampler: a name of ``samplers.SAMPLERS``. cfg_cond: guide with
    the schedule ``guidance`` (see ``guidance.find_schedule``) up to cfg_scale. guide_from: what predictions are led
    away from, one of ``GUIDE_FROM``. guide_path: the weaker model of ``checkpoint``. guide_labels: ``same`` labels for
    it, or ``null``. guide_ratio: share of the tokens that ``masked`` masks; None is the training's. cfg_interval: first
    and last original timestep that ``interval`` guides at. cfg_channels: 3 or 4 latent channels are guided.
    cfg_skip_tol: where the weight is within this of 1, no weak prediction is computed. Raises ValueError for other
    values.
    """

    num_sampling_steps: int = setting(250, "steps of the sampler, whichever it is", "sampling")
    sampler: str = setting(
        "ddpm", "ddpm or ddim; or, for fewer steps, a solver without noise: dpmsolver++, unipc, heun", "sampling"
    )
    clip_denoised: bool = setting(False, "clamp every estimate of x_0 to [-1, 1]", "sampling")
    cfg_cond: bool = setting(False, "guide with the schedule --guidance up to --cfg_scale", "guidance")
    guide_from: str = setting(
        "null_label",
        "what predictions are led away from: null_label (classifier-free guidance), checkpoint (the weaker model of "
        "--guide_path) or masked (the model's own masked view)",
        "guidance",
    )
    guide_path: str = setting("", "checkpoint of the weaker model, with --guide_from checkpoint", "guidance")
    guide_labels: str = setting("same", "what the model of --guide_path is given: same labels, or null", "guidance")
    guide_ratio: float | None = setting(
        None, "share of the tokens that --guide_from masked masks; None is the training's", "guidance"
    )
    guidance: str = setting(
        "power_cosine",
        "weight over time: power_cosine, constant, linear, beta:A,B, or interval (1 outside of --cfg_interval)",
        "guidance",
    )
    cfg_scale: float = setting(
        3.8, "largest weight of the guidance; needs --cfg_cond True; DiT has 1.5 by default", "guidance"
    )
    scale_pow: float = setting(4.0, "power of --guidance power_cosine; needs --cfg_cond True", "guidance")
    cfg_interval: list[int] | None = setting(
        None, "first and last timestep that --guidance interval guides at, such as 80-470", "guidance"
    )
    cfg_channels: int = setting(GUIDED_CHANNELS, "latent channels that are guided: 3, as published, or 4", "guidance")
    cfg_skip_tol: float = setting(
        0.0,
        "do not compute the weak prediction where the weight is within this of 1, such as 0.01: faster",
        "guidance",
    )
    seed: int = setting(0, "with a sample's number, determines its noise and label", "sampling")

    def __post_init__(self) -> None:
        if self.num_sampling_steps < 1:
            raise ValueError(f"--num_sampling_steps {self.num_sampling_steps}: must be at least 1")
        if self.sampler not in samplers.SAMPLERS:
            raise ValueError(f"--sampler {self.sampler}: unknown; choose one of {', '.join(samplers.SAMPLERS)}")
        if self.guide_from not in GUIDE_FROM:
            raise ValueError(f"--guide_from {self.guide_from}: unknown; choose one of {', '.join(GUIDE_FROM)}")
        self._check_guide()
        find_schedule(self.guidance)
        if self.guidance == "interval" and self.cfg_interval is None:
            raise ValueError("--guidance interval: give the timesteps to guide at, such as --cfg_interval 80-470")
        if self.cfg_channels not in (3, 4):
            raise ValueError(f"--cfg_channels {self.cfg_channels}: choose 3 (as published) or 4")
        if not self.cfg_skip_tol >= 0:  # NaN is not
            raise ValueError(f"--cfg_skip_tol {self.cfg_skip_tol}: must be 0 or more, such as 0.01")
        if not 0 <= self.cfg_scale < float("inf"):
            raise ValueError(f"--cfg_scale {self.cfg_scale}: must be 0 or more, such as 1.5")

    def _check_guide(self) -> None:
        """Raise ValueError where what guides, and what it needs, do not belong together."""
        if (self.guide_from == "checkpoint") != bool(self.guide_path):
            raise ValueError("--guide_from checkpoint and --guide_path: give both, or none")
        if self.guide_labels not in ("same", "null"):
            raise ValueError(f"--guide_labels {self.guide_labels}: choose same or null")
        if self.guide_labels == "null" and self.guide_from != "checkpoint":
            raise ValueError("--guide_labels null: needs --guide_from checkpoint")
        if self.guide_ratio is not None and self.guide_from != "masked":
            raise ValueError(f"--guide_ratio {self.guide_ratio}: needs --guide_from masked")
        if self.guide_ratio is not None and not 0 < self.guide_ratio < 1:
            raise ValueError(f"--guide_ratio {self.guide_ratio}: must be between 0 and 1, a share of the tokens")

    @classmethod
    def of_family(cls, model: str, **settings: Any) -> "SamplerConfig":
        """The settings that the family of a model's name is published with, but for ``settings``."""
        return cls(**{**SAMPLING[family_of(model)], **settings})

    @property
    def guidance_settings(self) -> dict[str, Any]:
        """The settings of the chosen schedule alone."""
        schedule, settings = find_schedule(self.guidance)
        return {**{name: getattr(self, name) for name in schedule.settings}, **settings}

    def record(self) -> dict[str, Any]:
        """All settings, for a manifest."""
        # Sets that were begun before there was the flag stay the same ones.
        silent = self.guide_from == "null_label"
        said = {name: value for name, value in asdict(self).items() if not (silent and name.startswith("guide_"))}
        return said | self.steps_record()

    def steps_record(self) -> dict[str, int]:
        """What a manifest says of the sampler's steps where 0.1.0 took others: its sets are not gone on with."""
        return {"sampler_steps": STEPS_EDITION[self.sampler]} if self.sampler in STEPS_EDITION else {}

    def guidance_record(self) -> dict[str, Any] | None:
        """What a manifest says of the guidance."""
        if not self.cfg_cond:
            return None
        record = {"schedule": self.guidance, "cfg_scale": self.cfg_scale, **self.guidance_settings}
        return {**record, "cfg_channels": self.cfg_channels, "cfg_skip_tol": self.cfg_skip_tol}

    def build_guidance(self, num_classes: int, diffusion_steps: int, away: Away | None = None) -> Guidance:
        """The guidance that ``cfg_cond`` asks for, of a model of so many classes and a process of so many steps.

        away: None is the null label.
        Raises ValueError for an interval outside the trained process.
        """
        if self.guidance == "interval" and self.cfg_interval is not None and self.cfg_interval[1] >= diffusion_steps:
            interval = "-".join(map(str, self.cfg_interval))
            raise ValueError(f"--cfg_interval {interval}: timesteps are 0 ... {diffusion_steps - 1}")
        weight = partial(
            find_schedule(self.guidance)[0].weight,
            cfg_scale=self.cfg_scale,
            diffusion_steps=diffusion_steps,
            **self.guidance_settings,
        )
        return Guidance(away or NullLabel(num_classes), weight, self.cfg_channels, self.cfg_skip_tol)

    def build_objective(self, config: RunConfig) -> Objective:
        """The objective for a sampling of ``num_sampling_steps``.

        Raises ValueError when the process has fewer steps, or the sampler does not serve the objective.
        """
        samplers.check_serves(self.sampler, config.objective.objective)
        if config.most_steps is not None and self.num_sampling_steps > config.most_steps:
            raise ValueError(f"--num_sampling_steps {self.num_sampling_steps}: the process has {config.most_steps}")
        return config.build_objective(self.num_sampling_steps)


class ImageSampler:
    """A model with everything that makes images of it: guidance, sampler, first stage.

    model: ``model(x, t, y)``, in eval mode, on ``device``. progress: show a bar over the sampling steps. stream: of the
    noise, see ``randomness.STREAMS``. new_away: see :func:`masked_diffusion.sampling.guides.open_away`; None is the
    null label.
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
        new_away: NewAway | None = None,
    ) -> None:
        self._progress = progress
        self._first_stage = first_stage
        self._latent_shape = config.model.latent_shape
        self._seed = sampler.seed
        self._stream = stream
        self._device = device
        self._clip = sampler.clip_denoised
        self._objective = sampler.build_objective(config)
        entry = samplers.SAMPLERS[sampler.sampler]
        self._grid = self._objective.grid(entry.last_level)
        self._new_step = partial(entry.starts[config.objective.objective], self._objective.path(self._grid))
        self._level_dtype = torch.long if config.objective.is_discrete else torch.float64
        self._model = model
        self._idle_levels = set(self._grid)
        self._new_guidance: Callable[[SampleNoise], Guidance] | None = None
        if sampler.cfg_cond:
            steps = config.most_steps or CONTINUOUS_STEPS
            build = partial(sampler.build_guidance, config.model.num_classes, steps)

            def new_guidance(draws: SampleNoise) -> Guidance:
                return build(None if new_away is None else new_away(draws)).at(self._objective.timesteps)

            self._new_guidance = new_guidance
            guidance = new_guidance(SampleNoise(sampler.seed, []))
            # Decided here, before any step, without waiting for the device.
            levels = torch.tensor(self._grid, dtype=self._level_dtype)
            self._idle_levels = set(levels[guidance.is_idle(self._objective.time(levels))].tolist())

    def passes(self) -> float:
        """Passes of the model that an image costs; a weak prediction may be less than one."""
        cost = 1.0 if self._new_guidance is None else self._new_guidance(SampleNoise(self._seed, [])).away.cost
        costs: list[float] = []

        def predict(x_t: Tensor, level: Tensor) -> samplers.Prediction:
            costs.append(1.0 if level[0].item() in self._idle_levels else cost)
            return samplers.Prediction(x_t, x_t, x_t, x_t)

        # Some samplers look at a level twice, or not, so they are asked.
        samplers.last(samplers.loop(self._new_step(), predict, torch.zeros(1, 1, 1, 1), self._grid))
        return sum(costs)

    def states(
        self, indices: Sequence[int], labels: Sequence[int], inpainting: Inpainting | None = None
    ) -> Iterator[samplers.Step]:
        """The latents of the samples with these numbers and labels after every step of the sampler."""
        noise = SampleNoise(self._seed, indices, stream=self._stream)
        y = torch.tensor(list(labels), device=self._device)
        x_T = noise.randn(self._latent_shape, self._device)
        models = [self._model, self._model]
        if self._new_guidance is not None:
            draws = SampleNoise(self._seed, indices, "guide", self._stream)
            models[1] = self._new_guidance(draws).lead(self._model)
        predictor: Callable[..., samplers.Predict] = self._objective.predictor
        if inpainting is not None:
            halves = SampleNoise(self._seed, indices, "halves", self._stream)
            models = [inpainting.denoiser(model, halves) for model in models]
            predictor = partial(inpainting.predictor, self._objective, noise=x_T)
            noisiest = torch.tensor(self._grid[:1], dtype=self._level_dtype, device=self._device).expand(len(y))
            x_T = inpainting.hold(self._objective, self._objective.prior(x_T), noisiest, noise=x_T)
        else:
            x_T = self._objective.prior(x_T)
        plain, guided = (predictor(model, clip_denoised=self._clip, model_kwargs={"y": y}) for model in models)

        def predict(x_t: Tensor, level: Tensor) -> samplers.Prediction:
            return (plain if level[0].item() in self._idle_levels else guided)(x_t, level)

        levels = tqdm(self._grid, unit="step", disable=not self._progress)
        return samplers.loop(self._new_step(), predict, x_T, levels, noise.randn_like)

    @torch.no_grad()
    def pixels(self, latents: Tensor, indices: Sequence[int]) -> np.ndarray:
        """Latents (N, C, h, w) of these samples -> images (N, H, W, 3) uint8. Raises FloatingPointError for NaN."""
        images = self._first_stage.decode(latents.float())
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

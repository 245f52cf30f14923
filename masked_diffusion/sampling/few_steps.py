"""What few steps cost a sampler, measured on Gaussian data, whose best denoiser is a formula."""

import dataclasses

import torch
from torch import Tensor

from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.levels import normal_quantile
from masked_diffusion.diffusion.objectives import Objective
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.sampling.sampler_config import SamplerConfig

DEVIATION = 0.5  # of the data
TOLERANCE = 0.12
MORE_STEPS = (25, 50, 100)  # with the last, all samplers are within 3%
COUNT = 2048  # of the samples


def check_few_steps(config: RunConfig, sampler: SamplerConfig, allowed: bool) -> str | None:
    """Refuse a sampler whose few steps lead far off, naming what would come near.

    allowed: by ``--few_steps True``. Returns what to warn of then. Raises ValueError where it is not allowed.
    """
    if (text := few_steps_warning(config, sampler)) is None or allowed:
        return text
    steps, objective = sampler.num_sampling_steps, config.objective.objective
    errors = {
        name: abs(width_error(config, dataclasses.replace(sampler, sampler=name)))
        for name, entry in samplers.SAMPLERS.items()
        if objective in entry.starts and name != sampler.sampler
    }
    nearest = min(errors, key=errors.__getitem__)
    better = f"; with --sampler {nearest} it is {errors[nearest]:.0%}" if errors[nearest] <= TOLERANCE else ""
    few = "one step" if steps == 1 else f"{steps} steps"
    raise ValueError(f"{text}{better}; give --few_steps True to make images with {few} all the same")


def few_steps_warning(config: RunConfig, sampler: SamplerConfig, flags: str = "") -> str | None:
    """What to say of a sampler whose few steps lead far off; None where they do not.

    flags: how the sampler and its steps were asked for, where not as ``--sampler`` and ``--num_sampling_steps``.

    The published spacing is even in time. Of 10 steps of a linear process the last long one begins where the noise has
    0.38 of the signal's scale, and all samplers but Heun's take it in first order. Cut into twelve, it costs little.
    """
    steps = sampler.num_sampling_steps
    if steps >= MORE_STEPS[-1] or abs(error := width_error(config, sampler)) <= TOLERANCE:
        return None
    text = (
        f"{flags or f'--sampler {sampler.sampler} --num_sampling_steps {steps}'}: samples of Gaussian data of "
        f"deviation {DEVIATION} come out {abs(error):.0%} too {'narrow' if error < 0 else 'wide'}, because steps are "
        "long where little noise is left"
    )
    for more in (number for number in MORE_STEPS if steps < number <= (config.most_steps or number)):
        left = abs(width_error(config, dataclasses.replace(sampler, num_sampling_steps=more)))
        if left <= TOLERANCE:
            return f"{text}; with {more} steps it is {left:.0%}"
    return text


def width_error(config: RunConfig, sampler: SamplerConfig) -> float:
    """By which part the standard deviation of samples differs from that of Gaussian data, with the best denoiser."""
    objective = sampler.build_objective(config)
    entry = samplers.SAMPLERS[sampler.sampler]
    grid = objective.grid(entry.last_level)
    step = entry.starts[config.objective.objective](objective.path(grid))
    generator = torch.Generator().manual_seed(0)

    def randn_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    # Not drawn: where the sampler draws nothing, the deviation is exact.
    noise = normal_quantile((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT).view(COUNT, 1, 1, 1)
    x_T = objective.prior(noise / noise.std())
    states = samplers.loop(step, _best_predictor(objective, config), x_T, grid, randn_like)
    return samplers.last(states).std().item() / DEVIATION - 1


def _best_predictor(objective: Objective, config: RunConfig) -> samplers.Predict:
    def nothing(x: Tensor, time: Tensor) -> Tensor:
        """In place of a network: its estimate of x_0 is replaced."""
        return torch.zeros_like(x).repeat(1, 2 if config.diffusion.learn_sigma else 1, 1, 1)

    def predict(x_t: Tensor, level: Tensor) -> samplers.Prediction:
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        signal = objective.q_sample(one, level[:1], 0 * one)  # x_t = signal x_0 + rest noise
        rest = objective.q_sample(0 * one, level[:1], one)
        x_0 = signal * DEVIATION**2 * x_t / (signal**2 * DEVIATION**2 + rest**2)
        return objective.predictor(nothing, clip_denoised=False, denoised_fn=lambda _: x_0)(x_t, level)

    return predict

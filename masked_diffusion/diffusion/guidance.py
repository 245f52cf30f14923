"""Classifier-free guidance (2207.12598): weights over time, and the wrapper that makes a denoiser of a model.

Guidance wraps the model; samplers know nothing of it. This module imports nothing of ours, so that the models'
``forward_with_cfg`` and :func:`guided` can share its arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Denoiser = Callable[..., Tensor]

# The published numbers guide three of the four latent channels (inherited from DiT, where it was a slip).
GUIDED_CHANNELS = 3


def power_cosine_weight(t: Tensor, cfg_scale: float, diffusion_steps: int = 1000, scale_pow: float = 4.0) -> Tensor:
    """Guidance weight of MDT's power-cosine schedule: 1 at the noisiest timestep, ``cfg_scale`` at t = 0.

    t: (N,) original timesteps in [0, diffusion_steps). Returns (N,) float32,
    ``w(t) = (cfg_scale - 1) (1 - cos(pi (1 - t / diffusion_steps) ^ scale_pow)) / 2 + 1``.
    """
    ramp = (1 - torch.cos(math.pi * (1 - t / diffusion_steps) ** scale_pow)) / 2
    return (cfg_scale - 1) * ramp + 1


def constant_weight(t: Tensor, cfg_scale: float, diffusion_steps: int = 1000) -> Tensor:
    """``cfg_scale`` at every timestep, as DiT guides. t: (N,). Returns (N,) float32."""
    return torch.full_like(t, cfg_scale, dtype=torch.float32)


def interval_weight(t: Tensor, cfg_scale: float, diffusion_steps: int, cfg_interval: Sequence[int]) -> Tensor:
    """``cfg_scale`` inside an interval of timesteps, ends included, else 1 (Kynkaanniemi et al., 2404.07724).

    t: (N,) original timesteps. Returns (N,) float32.
    """
    low, high = cfg_interval
    return torch.where((t >= low) & (t <= high), cfg_scale, 1.0)


# Flags that only guidance heeds.
GUIDANCE_FLAGS = ("guidance", "cfg_scale", "scale_pow", "cfg_interval", "cfg_channels", "cfg_skip_tol")


class WeightSchedule(NamedTuple):
    """How the guidance weight depends on time.

    weight: ``weight(t, cfg_scale, diffusion_steps, **settings)``, (N,) original timesteps -> (N,) float32. settings:
    those that no other schedule has.
    """

    weight: Callable[..., Tensor]
    settings: tuple[str, ...] = ()


SCHEDULES = {
    "power_cosine": WeightSchedule(power_cosine_weight, ("scale_pow",)),
    "constant": WeightSchedule(constant_weight),
    "interval": WeightSchedule(interval_weight, ("cfg_interval",)),
}


def foreign_settings(guidance: str) -> dict[str, str]:
    """Settings of the other schedules, which have no effect on this one, and whose they are."""
    others = {name: schedule for name, schedule in SCHEDULES.items() if name != guidance}
    return {setting: name for name, schedule in others.items() for setting in schedule.settings}


def combine(
    cond: Tensor, uncond: Tensor, weight: Tensor, latent_channels: int, cfg_channels: int = GUIDED_CHANNELS
) -> Tensor:
    """``uncond + weight (cond - uncond)`` on the first ``cfg_channels`` latent channels, or all where there are fewer.

    cond, uncond: (N, C_out, H, W); weight: (N,). Returns the guided channels, (N, <= cfg_channels, H, W).
    """
    guided_channels = min(cfg_channels, latent_channels)
    weight = weight.view(-1, 1, 1, 1)
    return uncond[:, :guided_channels] + weight * (cond - uncond)[:, :guided_channels]


def guided(
    model: Denoiser, y_null: int, weight: Callable[[Tensor], Tensor], cfg_channels: int = GUIDED_CHANNELS
) -> Denoiser:
    """Wrap ``model(x, t, y)`` so that it predicts with classifier-free guidance.

    weight: (N,) timesteps -> (N,) guidance weights. Both halves share x, so the caller's state stays (N, C, H, W).
    The channels that are not guided are the conditional half's.
    """

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = torch.cat([y, torch.full_like(y, y_null)])
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        eps = combine(cond, uncond, weight(t), x.shape[1], cfg_channels)
        return torch.cat([eps, cond[:, eps.shape[1] :]], dim=1)

    return denoise

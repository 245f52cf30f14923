"""Classifier-free guidance (2207.12598): weights over time, and the wrapper that makes a denoiser of a model.

Guidance wraps the model; samplers know nothing of it. This module imports nothing of ours, so that the models'
``forward_with_cfg`` and :func:`guided` can share its arithmetic.
"""

import math
from collections.abc import Callable

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


def combine(cond: Tensor, uncond: Tensor, weight: Tensor, latent_channels: int) -> Tensor:
    """``uncond + weight (cond - uncond)`` on the first three (or fewer) latent channels.

    cond, uncond: (N, C_out, H, W); weight: (N,). Returns the guided channels, (N, min(3, latent_channels), H, W).
    """
    guided_channels = min(GUIDED_CHANNELS, latent_channels)
    weight = weight.view(-1, 1, 1, 1)
    return uncond[:, :guided_channels] + weight * (cond - uncond)[:, :guided_channels]


def guided(model: Denoiser, y_null: int, weight: Callable[[Tensor], Tensor]) -> Denoiser:
    """Wrap ``model(x, t, y)`` so that it predicts with classifier-free guidance.

    weight: (N,) timesteps -> (N,) guidance weights. Both halves share x, so the caller's state stays (N, C, H, W).
    The channels that are not guided are the conditional half's.
    """

    def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = torch.cat([y, torch.full_like(y, y_null)])
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        eps = combine(cond, uncond, weight(t), x.shape[1])
        return torch.cat([eps, cond[:, eps.shape[1] :]], dim=1)

    return denoise

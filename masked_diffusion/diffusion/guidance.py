"""Guidance: weights over time, what a prediction is led away from, and the wrapper that makes a denoiser of a model.

Guidance wraps the model; samplers know nothing of it. This module imports nothing of ours, so that the models'
``forward_with_cfg`` and :class:`Guidance` can share its arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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
GUIDANCE_FLAGS = ("guide_from", "guidance", "cfg_scale", "scale_pow", "cfg_interval", "cfg_channels", "cfg_skip_tol")


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
    strong: Tensor, weak: Tensor, weight: Tensor, latent_channels: int, channels: int = GUIDED_CHANNELS
) -> Tensor:
    """``weak + weight (strong - weak)`` on the first ``channels`` latent channels, or all where there are fewer.

    strong, weak: (N, C_out, H, W); weight: (N,). Returns the guided channels, (N, <= channels, H, W).
    """
    guided_channels = min(channels, latent_channels)
    weight = weight.view(-1, 1, 1, 1)
    return weak[:, :guided_channels] + weight * (strong - weak)[:, :guided_channels]


class Away(Protocol):
    """What a guided prediction is led away from: the weak prediction beside the strong one.

    cost: passes of the model per guided step. It decides its own batching: how many passes it makes, and of how many
    rows each.
    """

    @property
    def cost(self) -> float: ...

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        """The strong and the weak prediction, each (N, C_out, H, W).

        x: (N, C, H, W). t: (N,) original timesteps. y: (N,) labels. view: further arguments of the model for these N
        rows, such as ``draw``; each has a method ``repeat`` that repeats its rows.
        """
        ...

    def record(self) -> dict[str, Any]:
        """What a manifest says of it beside the weight's schedule."""
        ...


@dataclass(frozen=True)
class NullLabel:
    """Classifier-free guidance (2207.12598): the weak prediction is that of the null label, in the same pass."""

    null_label: int
    cost: float = 2.0

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        twice = {name: value.repeat(2) for name, value in view.items()}
        strong, weak = model(torch.cat([x, x]), torch.cat([t, t]), labels, **twice).chunk(2)
        return strong, weak

    def record(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Guidance:
    """Leads the predictions of a model away from weaker ones.

    weight: (N,) original timesteps -> (N,) guidance weights; 1 gives the strong prediction. channels: how many latent
    channels are guided, all where there are fewer; the others are the strong prediction's. skip_tol: where the weight
    is within this of 1, no weak prediction is computed.
    """

    away: Away
    weight: Callable[[Tensor], Tensor]
    channels: int = GUIDED_CHANNELS
    skip_tol: float = 0.0

    def is_idle(self, t: Tensor) -> Tensor:
        """Whether the weak prediction has no say at these timesteps, (N,) bool. t: (N,) original timesteps."""
        return (self.weight(t) - 1).abs() <= self.skip_tol

    def lead(self, model: Denoiser) -> Denoiser:
        """Wrap ``model(x, t, y)`` so that it is guided at every timestep. The caller's state stays (N, C, H, W)."""

        def denoise(x: Tensor, t: Tensor, y: Tensor, **view: Any) -> Tensor:
            strong, weak = self.away.both(model, x, t, y, **view)
            eps = combine(strong, weak, self.weight(t), x.shape[1], self.channels)
            return torch.cat([eps, strong[:, eps.shape[1] :]], dim=1)

        return denoise

"""Guidance: weights over time, what a prediction is led away from, and the wrapper that makes a denoiser of a model.

Guidance wraps the model; samplers know nothing of it. This module knows no model, so that the models'
``forward_with_cfg`` and :class:`Guidance` can share its arithmetic.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from masked_diffusion.choices import GUIDED_CHANNELS, PUBLISHED_CHANNELS

Denoiser = Callable[..., Tensor]


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


def interval_weight(t: Tensor, cfg_scale: float, diffusion_steps: int, cfg_interval: Sequence[float]) -> Tensor:
    """``cfg_scale`` inside an interval of timesteps, ends included, else 1 (Kynkaanniemi et al., 2404.07724).

    t: (N,) original timesteps. Returns (N,) float32.
    """
    low, high = cfg_interval
    return torch.where((t >= low) & (t <= high), cfg_scale, 1.0)


def linear_weight(t: Tensor, cfg_scale: float, diffusion_steps: int) -> Tensor:
    """1 at the noisiest end, rising in a line to ``cfg_scale`` at t = 0. t: (N,). Returns (N,) float32."""
    return 1 + (cfg_scale - 1) * (1 - t / diffusion_steps)


def beta_weight(t: Tensor, cfg_scale: float, diffusion_steps: int, beta: Sequence[float]) -> Tensor:
    """1 + (cfg_scale - 1) times the density of a beta distribution over t / diffusion_steps, of height 1.

    t: (N,) original timesteps. beta: its parameters, each 1 or more. Returns (N,) float32.
    """
    a, b = beta
    mode = (a - 1) / (a + b - 2) if a + b > 2 else 0.5

    def density(u: Tensor) -> Tensor:
        return u ** (a - 1) * (1 - u) ** (b - 1)

    height = density(torch.tensor(mode, dtype=torch.float64))
    return (1 + (cfg_scale - 1) * density(t.double() / diffusion_steps) / height).float()


# How the weight depends on time: ``weight(t, cfg_scale, diffusion_steps, **settings)``, (N,) original timesteps -> (N,)
# float32. settings: those that choices.SCHEDULES has beside the same name.
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "power_cosine": power_cosine_weight,
    "constant": constant_weight,
    "interval": interval_weight,
    "linear": linear_weight,
    "beta": beta_weight,
}


def combine(
    strong: Tensor, weak: Tensor, weight: Tensor, latent_channels: int, channels: int = GUIDED_CHANNELS
) -> Tensor:
    """``weak + weight (strong - weak)`` on the first ``channels`` latent channels, or all where there are fewer or more
    than the published latents have.

    strong, weak: (N, C_out, H, W); weight: (N,). Returns the guided channels, (N, guided, H, W).
    """
    guided_channels = min(channels, latent_channels) if latent_channels <= PUBLISHED_CHANNELS else latent_channels
    weight = weight.view(-1, 1, 1, 1)
    return weak[:, :guided_channels] + weight * (strong - weak)[:, :guided_channels]


class Away(Protocol):
    """What a guided prediction is led away from: the weak prediction beside the strong one.

    cost: passes of the model per guided step. alone: passes of a step that needs the strong prediction only. It decides
    its own batching: how many passes it makes, and of how many rows each.
    """

    @property
    def cost(self) -> float: ...

    @property
    def alone(self) -> float: ...

    def strong(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> Tensor:
        """The strong prediction alone, (N, C_out, H, W). Arguments as of :meth:`both`."""
        ...

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        """The strong and the weak prediction, each (N, C_out, H, W).

        x: (N, C, H, W). t: (N,) original timesteps. y: (N,) labels. view: further arguments of the model for these N
        rows, such as ``draw``; each has a method ``repeat`` that repeats its rows.
        """
        ...


class _OfWholeModel:
    """What is led away is the model's prediction as it is without guidance."""

    alone = 1.0

    def strong(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> Tensor:
        return model(x, t, y, **view)


@dataclass(frozen=True)
class NullLabel(_OfWholeModel):
    """Classifier-free guidance (2207.12598): the weak prediction is that of the null label, in the same pass."""

    null_label: int
    cost: float = 2.0

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        twice = {name: value.repeat(2) for name, value in view.items()}
        strong, weak = model(torch.cat([x, x]), torch.cat([t, t]), labels, **twice).chunk(2)
        return strong, weak


@dataclass(frozen=True)
class OtherModel(_OfWholeModel):
    """Autoguidance (2406.02507): the weak prediction is that of a weaker model, for the same label.

    null_label: give the weaker model this label instead, for both kinds of guidance in one; None for the same label.
    """

    weak: Denoiser
    null_label: int | None = None
    cost: float = 2.0

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        labels = y if self.null_label is None else torch.full_like(y, self.null_label)
        return model(x, t, y, **view), self.weak(x, t, labels, **view)


@dataclass(frozen=True)
class PathDrop(_OfWholeModel):
    """Path-drop guidance (SPRINT, 2510.21986): the weak prediction has the null label and leaves out the route.

    Both are rows of one batch, so that they share the blocks outside of the route. past: of a number n, the model's
    arguments for a batch whose last n rows do not enter the route.
    """

    null_label: int
    past: Callable[[int], dict[str, Any]]
    cost: float

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        view = {name: value.repeat(2) for name, value in view.items()} | self.past(len(x))
        strong, weak = model(torch.cat([x, x]), torch.cat([t, t]), labels, **view).chunk(2)
        return strong, weak


@dataclass(frozen=True)
class SparserSelf:
    """Both predictions are the model's for the same label; fewer tokens go through the weak one (2601.01608).

    noise: drawn anew at each call, one for both predictions: at equal rates both have the same tokens, and nothing is
    left to guide. strong_view, weak_view: of the noise, the model's arguments; a strong_view of None is all tokens.
    Where a caller has a view of its own, such as inpainting's, the strong prediction takes that one.
    """

    noise: Callable[[], Tensor]
    strong_view: Callable[[Tensor], dict[str, Any]] | None
    weak_view: Callable[[Tensor], dict[str, Any]]
    cost: float
    alone: float = 1.0

    def strong(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> Tensor:
        if self.strong_view is not None and not view:
            view = self.strong_view(self.noise())
        return model(x, t, y, **view)

    def both(self, model: Denoiser, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> tuple[Tensor, Tensor]:
        noise = self.noise()
        if self.strong_view is not None and not view:
            view = self.strong_view(noise)
        return model(x, t, y, **view), model(x, t, y, **self.weak_view(noise))


@dataclass(frozen=True)
class Guidance:
    """Leads the predictions of a model away from weaker ones.

    weight: (N,) original timesteps -> (N,) guidance weights; 1 gives the strong prediction. channels: how many latent
    channels are guided, all where there are fewer, or more than 4; the others are the strong prediction's. skip_tol:
    where the weight is within this of 1, no weak prediction is computed.
    """

    away: Away
    weight: Callable[[Tensor], Tensor]
    channels: int = GUIDED_CHANNELS
    skip_tol: float = 0.0

    def at(self, timesteps: Callable[[Tensor], Tensor]) -> "Guidance":
        """The guidance of a network that is given another time. timesteps: maps its time to original timesteps."""
        return replace(self, weight=lambda time: self.weight(timesteps(time)))

    def is_idle(self, t: Tensor) -> Tensor:
        """Whether the weak prediction has no say at these timesteps, (N,) bool. t: (N,) original timesteps."""
        return (self.weight(t) - 1).abs() <= self.skip_tol

    def unled(self, model: Denoiser) -> Denoiser:
        """Wrap ``model(x, t, y)`` so that it gives the strong prediction, for timesteps at which guidance is idle."""
        return partial(self.away.strong, model)

    def lead(self, model: Denoiser) -> Denoiser:
        """Wrap ``model(x, t, y)`` so that it is guided at every timestep. The caller's state stays (N, C, H, W)."""

        def denoise(x: Tensor, t: Tensor, y: Tensor, **view: Any) -> Tensor:
            strong, weak = self.away.both(model, x, t, y, **view)
            eps = combine(strong, weak, self.weight(t), x.shape[1], self.channels)
            return torch.cat([eps, strong[:, eps.shape[1] :]], dim=1)

        return denoise

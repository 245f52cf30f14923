"""Objectives: at which noise levels a network is trained, what it predicts there, and what that says of clean data.

A level is an objective's own measure of noise: an int64 timestep for ``ddpm``. Code outside of an objective never looks
into a level. It asks the objective for a grid of levels, the share of noise of a level, or a prediction at a level.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masked_diffusion.diffusion.samplers import Predict
from masked_diffusion.gaussian_diffusion import GaussianDiffusion, Model, Reduction, Terms, mean_flat
from masked_diffusion.resample import ScheduleSampler, create_named_schedule_sampler


@dataclass(frozen=True)
class ObjectiveConfig:
    """What ``config.json`` says of the objective; named as the flags. Raises ValueError for an unknown name."""

    objective: str = "ddpm"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective {self.objective}: unknown; choose one of {', '.join(OBJECTIVES)}")


class Objective(ABC):
    """What a network is trained for, and what its output means.

    Levels are tensors (N,); data, noise and states are (N, C, H, W).
    """

    @property
    @abstractmethod
    def loss_names(self) -> list[str]:
        """The terms that :meth:`training_losses` returns, ``loss`` first."""

    @abstractmethod
    def levels(self, name: str) -> ScheduleSampler:
        """The distribution of training levels called ``name``. Raises ValueError for one that it does not have."""

    @abstractmethod
    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        level: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        counts: Reduction = mean_flat,
    ) -> Terms:
        """Losses at these levels, each (N,); see :meth:`GaussianDiffusion.training_losses`."""

    @abstractmethod
    def q_sample(self, x_start: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """The state at a level: clean data with this noise."""

    @abstractmethod
    def predictor(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Predict:
        """What samplers need of ``model``; arguments as :meth:`GaussianDiffusion.predictor`."""

    @property
    @abstractmethod
    def schedule(self) -> Any:
        """What a sampler of :data:`samplers.SAMPLERS` is started with."""

    @abstractmethod
    def grid(self) -> Sequence[float]:
        """The levels at which a sampling asks for predictions, noisiest first."""

    @abstractmethod
    def share(self, level: Tensor) -> Tensor:
        """The share of noise, (N,) float64 in [0, 1), for the quartiles of the log."""

    @abstractmethod
    def timesteps(self, level: Tensor) -> Tensor:
        """What guidance schedules take for the time, (N,): the network's timestep."""


class DDPM(Objective):
    """The published objective: a :class:`GaussianDiffusion` at its timesteps, which are the levels.

    build_process: makes the process, respaced to the steps of the sampling where it is for one.
    """

    def __init__(self, config: ObjectiveConfig, build_process: Callable[[], GaussianDiffusion]) -> None:
        self.config = config
        self.process = build_process()

    @property
    def loss_names(self) -> list[str]:
        if self.process.loss_type.is_vb:
            return ["loss"]
        return ["loss", "mse", "vb"] if self.process.model_var_type.is_learned else ["loss", "mse"]

    def levels(self, name: str) -> ScheduleSampler:
        return create_named_schedule_sampler(name, self.process)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        level: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        counts: Reduction = mean_flat,
    ) -> Terms:
        return self.process.training_losses(model, x_start, level, model_kwargs, noise, counts)

    def q_sample(self, x_start: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        return self.process.q_sample(x_start, level, noise)

    def predictor(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Predict:
        return self.process.predictor(model, clip_denoised, denoised_fn, model_kwargs=model_kwargs)

    @property
    def schedule(self) -> GaussianDiffusion:
        return self.process

    def grid(self) -> Sequence[int]:
        return range(self.process.num_timesteps - 1, -1, -1)

    def share(self, level: Tensor) -> Tensor:
        return level.to(torch.float64) / self.process.num_timesteps

    def timesteps(self, level: Tensor) -> Tensor:
        return self.process.original_timesteps(level)


# Name -> how the objective is made of its settings and of the process that the diffusion flags describe.
OBJECTIVES: dict[str, Callable[[ObjectiveConfig, Callable[[], GaussianDiffusion]], Objective]] = {"ddpm": DDPM}

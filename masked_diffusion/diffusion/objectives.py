"""Define the objectives: at which noise levels a network is trained, what it predicts, and what that says of clean
data.

A level is an objective's own measure of noise: an int64 timestep for ``ddpm``, ``x0`` and ``v``, the time in [0, 1] for
``flow``, the standard deviation of the noise for ``edm``. Code outside of an objective never looks into a level. It
asks the objective for a grid of levels, the share of noise of a level, or a prediction at a level.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.levels import InverseLaw, Levels, Uncertainty, normal_quantile, shifted
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.samplers import Predict
from masked_diffusion.gaussian_diffusion import (
    Extra,
    GaussianDiffusion,
    Model,
    ModelMeanType,
    Reduction,
    Terms,
    add_terms,
    mean_flat,
)
from masked_diffusion.resample import create_named_schedule_sampler

BuildProcess = Callable[..., GaussianDiffusion]  # keywords: settings of ``create_diffusion`` to change
BELOW_ONE = 1 - 1e-12  # the largest share of noise, of the last quartile


class Objective(ABC):
    """What a network is trained for, and what its output means.

    Levels are tensors (N,), in trainings also (N, K); data, noise and states are (N, C, H, W).
    """

    @property
    @abstractmethod
    def loss_names(self) -> list[str]:
        """Return the names of the terms of :meth:`training_losses`, ``loss`` first."""

    @abstractmethod
    def levels(self, name: str) -> Levels:
        """Return the law of training levels called ``name``. Raises ValueError for one that it does not have."""

    @abstractmethod
    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        level: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        counts: Reduction = mean_flat,
        extra: Extra | None = None,
        pixel_level: Tensor | None = None,
    ) -> Terms:
        """Losses at these levels, each (N,); see :meth:`GaussianDiffusion.training_losses`.

        pixel_level: (N, 1, H, W), the level of each pixel where images have several; level is then (N, K), all of an
        image's, as the network is given them. Raises ValueError where the objective has one level per image.
        """

    @abstractmethod
    def q_sample(self, x_start: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Return the state at a level: clean data with this noise."""

    @abstractmethod
    def predictor(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Predict:
        """Wrap ``model`` into what samplers call. Arguments as :meth:`GaussianDiffusion.predictor`."""

    @abstractmethod
    def grid(self, last_level: float | None = None) -> Sequence[float]:
        """Return the levels at which a sampling begins its steps, noisiest first. last_level: see
        :class:`samplers.Sampler`.
        """

    @abstractmethod
    def path(self, levels: Sequence[float]) -> Any:
        """Return what a sampler of :data:`samplers.SAMPLERS` is started with. levels: of :meth:`grid`."""

    def prior(self, noise: Tensor) -> Tensor:
        """Return the state at the noisiest level of a grid."""
        return noise

    @abstractmethod
    def share(self, level: Tensor) -> Tensor:
        """Return the share of noise, (N,) float64 in [0, 1), for the quartiles of the log."""

    @abstractmethod
    def time(self, level: Tensor) -> Tensor:
        """Return the time that the network is given at a level, (N,)."""

    def timesteps(self, time: Tensor) -> Tensor:
        """Turn the network's time into what guidance schedules take, (N,): 0 for clean data, 1000 for noise."""
        return time


class DDPM(Objective):
    """The published objective: a :class:`GaussianDiffusion`, whose timesteps are the levels.

    build_process: makes the process; for a sampling, it respaces it to the steps of the sampling. num_steps: these,
    which the process knows already.
    """

    def __init__(self, config: ObjectiveConfig, build_process: BuildProcess, num_steps: int | None = None) -> None:
        self.config = config
        self.process = build_process()

    @property
    def loss_names(self) -> list[str]:
        if self.process.loss_type.is_vb:
            return ["loss"]
        return ["loss", "mse", "vb"] if self.process.model_var_type.is_learned else ["loss", "mse"]

    def levels(self, name: str) -> Levels:
        return create_named_schedule_sampler(name, self.process)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        level: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        counts: Reduction = mean_flat,
        extra: Extra | None = None,
        pixel_level: Tensor | None = None,
    ) -> Terms:
        if pixel_level is not None:
            raise ValueError(f"--objective {self.config.objective}: has one noise level per image; use flow")
        return self.process.training_losses(model, x_start, level, model_kwargs, noise, counts, extra)

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

    def grid(self, last_level: float | None = None) -> Sequence[int]:
        return range(self.process.num_timesteps - 1, -1, -1)

    def path(self, levels: Sequence[float]) -> GaussianDiffusion:
        return self.process

    def share(self, level: Tensor) -> Tensor:
        return level.to(torch.float64) / self.process.num_timesteps

    def time(self, level: Tensor) -> Tensor:
        return self.process.original_timesteps(level)


class X0(DDPM):
    """The process with a network that predicts x_0. The variance is fixed."""

    def __init__(self, config: ObjectiveConfig, build_process: BuildProcess, num_steps: int | None = None) -> None:
        super().__init__(config, partial(build_process, predict_xstart=True, learn_sigma=False))


class V(DDPM):
    """The process with a network that predicts v = alpha eps - sigma x_0 (2202.00512). The variance is fixed."""

    def __init__(self, config: ObjectiveConfig, build_process: BuildProcess, num_steps: int | None = None) -> None:
        super().__init__(config, partial(build_process, predict_xstart=False, learn_sigma=False))
        self.process.model_mean_type = ModelMeanType.VELOCITY


class Continuous(Objective):
    """An objective on the path x = alpha(level) x_0 + sigma(level) eps of continuous levels, 0 for clean data.

    num_steps: of a sampling. A subclass says what the network is given, what it should return, and what that says of
    x_0; its loss is the squared error of what the network returns, times :meth:`weight`.
    """

    def __init__(self, config: ObjectiveConfig, build_process: BuildProcess, num_steps: int | None = None) -> None:
        self.config = config
        self.num_steps = num_steps

    def levels(self, name: str) -> Levels:
        check_uniform(name, self.config)
        return (Uncertainty if self.config.learned_uncertainty else InverseLaw)(self.level_of)

    @abstractmethod
    def level_of(self, u: Tensor) -> Tensor:
        """Return training levels (N,) float32 by inversion of uniforms in [0, 1), (N,) float64; they rise with them."""

    @abstractmethod
    def alpha(self, level: Any) -> Any:
        """Return the scale of the clean data at a level, a number or a tensor."""

    @abstractmethod
    def sigma(self, level: Any) -> Any:
        """Return the scale of the noise at a level, a number or a tensor."""

    def net_input(self, x: Tensor, level: Tensor) -> Tensor:
        """Return what the network is given for the state x. level: (N, 1, 1, 1)."""
        return x

    @abstractmethod
    def target(self, x_start: Tensor, noise: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """Return what the network should return. level: (N, 1, 1, 1)."""

    @abstractmethod
    def denoised(self, output: Tensor, x: Tensor, level: Tensor) -> Tensor:
        """Estimate x_0 from what the network returned. level: (N, 1, 1, 1)."""

    def weight(self, level: Tensor) -> Tensor | float:
        """Return the weight in the loss of the squared error of what the network returns. level: (N, 1, 1 or H, 1 or
        W).
        """
        return 1.0

    @abstractmethod
    def slope(self, prediction: samplers.Prediction) -> Tensor:
        """Return dx / dlevel of the probability-flow ODE."""

    @property
    def loss_names(self) -> list[str]:
        return ["loss", "mse"]

    def _network(
        self, model: Model, x: Tensor, level: Tensor, wide: Tensor, model_kwargs: dict[str, Any] | None
    ) -> Tensor:
        """Call the network for the state x. wide: the level of each pixel, (N, 1, 1 or H, 1 or W)."""
        output = model(self.net_input(x, wide).float(), self.time(level).float(), **(model_kwargs or {})).float()
        if output.shape[1] != x.shape[1]:
            raise ValueError(
                f"the model returned {output.shape[1]} channels, --objective {self.config.objective} needs "
                f"{x.shape[1]}; train it with --learn_sigma False"
            )
        return output

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        level: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
        counts: Reduction = mean_flat,
        extra: Extra | None = None,
        pixel_level: Tensor | None = None,
    ) -> Terms:
        noise = torch.randn_like(x_start) if noise is None else noise
        wide = level.view(-1, 1, 1, 1) if pixel_level is None else pixel_level
        x = self._state(x_start, wide, noise)
        output = self._network(model, x, level, wide, model_kwargs)
        target = self.target(x_start, noise, x, wide).float()
        mse = counts(self.weight(wide) * (target - output) ** 2)
        terms = {"loss": mse, "mse": mse}
        if extra is not None:
            add_terms(terms, extra(self.denoised(output, x, wide), x))
        return terms

    def q_sample(self, x_start: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        return self._state(x_start, samplers.on_device_of(x_start, level).view(-1, 1, 1, 1), noise)

    def _state(self, x_start: Tensor, wide: Tensor, noise: Tensor) -> Tensor:
        return self.alpha(wide) * x_start + self.sigma(wide) * noise

    def predictor(
        self,
        model: Model,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Predict:
        def predict(x: Tensor, level: Tensor) -> samplers.Prediction:
            level = samplers.on_device_of(x, level)
            wide, x = level.view(-1, 1, 1, 1), x.double()
            pred_xstart = self.denoised(self._network(model, x, level, wide, model_kwargs).double(), x, wide)
            if denoised_fn is not None:
                pred_xstart = denoised_fn(pred_xstart)
            if clip_denoised:
                pred_xstart = pred_xstart.clamp(-1, 1)
            return samplers.Prediction(pred_xstart, (x - self.alpha(wide) * pred_xstart) / self.sigma(wide))

        return predict

    def path(self, levels: Sequence[float]) -> samplers.Path:
        return ObjectivePath(self, levels)


@dataclass
class ObjectivePath:
    """A :class:`samplers.Path` of a continuous objective."""

    objective: Continuous
    levels: Sequence[float]

    def after(self, level: float) -> float:
        following = self.levels.index(level) + 1
        return self.levels[following] if following < len(self.levels) else 0.0

    def alpha(self, level: float) -> float:
        return float(self.objective.alpha(level))

    def sigma(self, level: float) -> float:
        return float(self.objective.sigma(level))

    def slope(self, prediction: samplers.Prediction) -> Tensor:
        return self.objective.slope(prediction)


class Flow(Continuous):
    """Rectified flow: x = (1 - t) x_0 + t eps, and the network predicts v = eps - x_0 (2209.03003, SiT 2401.08740).

    The network is given 1000 t.
    """

    def level_of(self, u: Tensor) -> Tensor:
        config = self.config
        if config.level_law == "logit_normal":
            u = torch.sigmoid(config.level_mean + config.level_std * normal_quantile(u))
        return shifted(u, config.time_shift).float()

    def alpha(self, level: Any) -> Any:
        return 1 - level

    def sigma(self, level: Any) -> Any:
        return level

    def target(self, x_start: Tensor, noise: Tensor, x: Tensor, level: Tensor) -> Tensor:
        return noise - x_start

    def denoised(self, output: Tensor, x: Tensor, level: Tensor) -> Tensor:
        return x - level * output

    def slope(self, prediction: samplers.Prediction) -> Tensor:
        return prediction.eps - prediction.pred_xstart

    def grid(self, last_level: float | None = None) -> list[float]:
        steps = self.num_steps or 1
        if last_level is None:
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        else:
            times = torch.linspace(1, last_level, steps, dtype=torch.float64)
        return shifted(times, self.config.time_shift).tolist()

    def share(self, level: Tensor) -> Tensor:
        return level.double().clamp(max=BELOW_ONE)

    def time(self, level: Tensor) -> Tensor:
        return 1000 * level


class EDM(Continuous):
    """EDM's preconditioned denoiser (2206.00364): x = x_0 + sigma eps, D = c_skip x + c_out F(c_in x, log(sigma) / 4).

    The loss of D has the weight 1 / c_out^2, so it is the plain squared error of F. Samplings run over EDM's grid.
    """

    SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0

    def __init__(self, config: ObjectiveConfig, build_process: BuildProcess, num_steps: int | None = None) -> None:
        super().__init__(config, build_process, num_steps)
        if config.sigma_data is None:
            raise ValueError("--objective edm: give the standard deviation of the latents with --sigma_data")
        self.sigma_data = config.sigma_data

    def level_of(self, u: Tensor) -> Tensor:
        return (self.config.p_mean + self.config.p_std * normal_quantile(u)).exp().float()

    def alpha(self, level: Any) -> Any:
        return level * 0 + 1

    def sigma(self, level: Any) -> Any:
        return level

    def _scales(self, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out, c_in."""
        total = level**2 + self.sigma_data**2
        return self.sigma_data**2 / total, level * self.sigma_data / total.sqrt(), 1 / total.sqrt()

    def net_input(self, x: Tensor, level: Tensor) -> Tensor:
        return self._scales(level)[2] * x

    def target(self, x_start: Tensor, noise: Tensor, x: Tensor, level: Tensor) -> Tensor:
        c_skip, c_out, _ = self._scales(level)
        return (x_start - c_skip * x) / c_out

    def denoised(self, output: Tensor, x: Tensor, level: Tensor) -> Tensor:
        c_skip, c_out, _ = self._scales(level)
        return c_skip * x + c_out * output

    def slope(self, prediction: samplers.Prediction) -> Tensor:
        return prediction.eps

    def grid(self, last_level: float | None = None) -> list[float]:
        steps = self.num_steps or 1
        ramp = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        high, low = self.SIGMA_MAX ** (1 / self.RHO), self.SIGMA_MIN ** (1 / self.RHO)
        return ((high + ramp * (low - high)) ** self.RHO).tolist()

    def prior(self, noise: Tensor) -> Tensor:
        return self.SIGMA_MAX * noise

    def share(self, level: Tensor) -> Tensor:
        relative = level.double() / self.sigma_data
        return (relative / (1 + relative)).clamp(max=BELOW_ONE)

    def time(self, level: Tensor) -> Tensor:
        return level.log() / 4

    def timesteps(self, time: Tensor) -> Tensor:
        return 1000 * self.share((4 * time.double()).exp())


def check_uniform(name: str, config: ObjectiveConfig) -> None:
    """Raise ValueError for a --schedule_sampler that a continuous objective does not have."""
    if name != "uniform":
        raise ValueError(
            f"--schedule_sampler {name}: --objective {config.objective} has no numbered timesteps to choose from; "
            "leave the flag out, and see --level_law, --level_mean and --p_mean"
        )


# Name -> how the objective is made of its settings, of the process that the diffusion flags describe, and of the number
# of steps of a sampling (None for the training).
OBJECTIVES: dict[str, Callable[[ObjectiveConfig, BuildProcess, int | None], Objective]] = {
    "ddpm": DDPM,
    "x0": X0,
    "v": V,
    "flow": Flow,
    "edm": EDM,
}

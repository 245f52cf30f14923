"""Samplers of training timesteps: uniform, or by the history of the losses (2102.09672, section 3.3)."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masked_diffusion.diffusion.levels import Levels
from masked_diffusion.gaussian_diffusion import GaussianDiffusion


class ScheduleSampler(Levels):
    """A distribution over timesteps."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """(T,) float64 positive, not necessarily normalised."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Draw from torch's global generator: timesteps (N,) int64 and importance weights (N,) float32."""
        return self.from_uniform(torch.rand(batch_size, dtype=torch.float64), device)

    def from_uniform(self, u: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        p = self.weights() / self.weights().sum()
        t = np.searchsorted(np.cumsum(p), u.numpy(), side="right").clip(max=len(p) - 1)
        importance = 1 / (len(p) * p[t])
        weights = torch.from_numpy(importance).float()
        return torch.from_numpy(t).to(device, non_blocking=True), weights.to(device, non_blocking=True)


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self._weights = np.ones(diffusion.num_timesteps)

    def weights(self) -> np.ndarray:
        return self._weights


class LossSecondMomentResampler(ScheduleSampler):
    """Timesteps in proportion to the root mean square of their last losses (2102.09672, Eq. 18).

    Uniform until every timestep has ``history_per_term`` losses; ``uniform_prob`` is mixed in afterwards.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._losses = np.zeros((diffusion.num_timesteps, history_per_term))  # oldest first once full
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    @property
    def learns(self) -> bool:
        return True

    def weights(self) -> np.ndarray:
        num_timesteps = len(self._counts)
        if (self._counts < self.history_per_term).any():
            return np.ones(num_timesteps)
        weights = np.sqrt((self._losses**2).mean(axis=1))
        weights /= weights.sum()
        return weights * (1 - self.uniform_prob) + self.uniform_prob / num_timesteps

    def update_with_all_losses(self, ts: Sequence[float], losses: Sequence[float]) -> None:
        for t, loss in zip(map(int, ts), losses, strict=True):
            if not math.isfinite(loss):
                continue  # one would leave no weight to any other timestep, for good
            if self._counts[t] == self.history_per_term:
                self._losses[t] = np.roll(self._losses[t], -1)
                self._losses[t, -1] = loss
            else:
                self._losses[t, self._counts[t]] = loss
                self._counts[t] += 1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": torch.from_numpy(self._losses.copy()), "counts": torch.from_numpy(self._counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"losses", "counts"} or state["losses"].shape != self._losses.shape:
            raise ValueError("the checkpoint has no loss history for this --schedule_sampler and --diffusion_steps")
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


SCHEDULE_SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> ScheduleSampler:
    """Build the sampler called ``name``. Raises ValueError, listing the names, for an unknown one."""
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(f"--schedule_sampler {name}: unknown; choose one of {', '.join(SCHEDULE_SAMPLERS)}")
    return SCHEDULE_SAMPLERS[name](diffusion)

"""Laws of the noise levels that a network is trained at."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Levels(ABC):
    """A distribution over levels, with the importance weights that keep the loss unbiased."""

    @abstractmethod
    def from_uniform(self, u: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Levels (N,) and importance weights (N,) float32, by inversion of uniforms that somebody else drew.

        u: (N,) float64 in [0, 1) on the CPU.
        """

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:  # noqa: B027
        """Learn from one step's losses of the whole global batch, in sample order."""

    @property
    def learns(self) -> bool:
        """Whether losses have to be collected for :meth:`update_with_all_losses`."""
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"the checkpoint has the state of another --schedule_sampler: {', '.join(state)}")


class InverseLaw(Levels):
    """Levels of a continuous law. inverse: maps uniforms (N,) float64 to levels (N,)."""

    def __init__(self, inverse: Callable[[Tensor], Tensor]) -> None:
        self._inverse = inverse

    def from_uniform(self, u: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        levels = self._inverse(u.double()).to(device, non_blocking=True)
        return levels, torch.ones(len(u), device=device)


def normal_quantile(u: Tensor) -> Tensor:
    """Standard normal values of uniforms in [0, 1), in float64."""
    return torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards the noise: ``shift t / (1 + (shift - 1) t)``, which adds log(shift) to the logit
    (2403.03206, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)

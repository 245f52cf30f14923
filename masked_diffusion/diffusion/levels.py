"""Provide the distributions of the noise levels at which a network is trained."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_LOSS = 1e-12  # that an uncertainty is learned of: its weight is 1 over it


class Levels(ABC):
    """A distribution of levels, with the importance weights that keep the loss unbiased."""

    @abstractmethod
    def from_uniform(self, u: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return levels (N,) and importance weights (N,) float32 for uniforms that the caller drew.

        u: (N,) float64 in [0, 1) on the CPU.
        """

    def update_with_all_losses(self, ts: Sequence[float], losses: Sequence[float]) -> None:  # noqa: B027
        """Learn from the losses of a step's whole global batch, in sample order. ts: their levels."""

    @property
    def learns(self) -> bool:
        """True when losses have to be collected for :meth:`update_with_all_losses`."""
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"the checkpoint has the state of another --schedule_sampler: {', '.join(state)}")


class InverseLaw(Levels):
    """Levels of a continuous distribution. inverse: maps uniforms (N,) float64 to levels (N,)."""

    def __init__(self, inverse: Callable[[Tensor], Tensor]) -> None:
        self._inverse = inverse

    def from_uniform(self, u: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        levels = self._inverse(u.double()).to(device, non_blocking=True)
        return levels, torch.ones(len(u), device=device)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError("the checkpoint was trained with --learned_uncertainty True; go on with it")


class Uncertainty(InverseLaw):
    """Levels of a continuous distribution, weighted by a learned uncertainty (EDM2, 2312.02696).

    EDM2 trains a small network u(level) on ``loss / e^u + u``. Its best value is e^u = the mean loss at the level. This
    class keeps that mean itself: a running mean in each of NUM_BINS equally probable parts of the distribution. The
    weight is 1 / e^u, so that all levels come to matter alike. The means belong to the state of the training, not to
    the network.
    """

    NUM_BINS = 64
    LEAST_RATE = 1e-3  # of a new loss in its mean; the first ones count alike

    def __init__(self, inverse: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inverse)
        self._edges = inverse(torch.arange(1, self.NUM_BINS, dtype=torch.float64) / self.NUM_BINS).double()
        self._means = torch.ones(self.NUM_BINS, dtype=torch.float64)
        self._counts = torch.zeros(self.NUM_BINS, dtype=torch.int64)

    @property
    def learns(self) -> bool:
        return True

    def from_uniform(self, u: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        levels, _ = super().from_uniform(u, device)
        means = self._means[(u.double() * self.NUM_BINS).long()]
        return levels, (1 / means).float().to(device, non_blocking=True)

    def update_with_all_losses(self, ts: Sequence[float], losses: Sequence[float]) -> None:
        bins = torch.bucketize(torch.tensor(ts, dtype=torch.float64), self._edges, right=True)
        for i, loss in zip(bins.tolist(), losses, strict=True):
            if not math.isfinite(loss):
                continue  # one would leave no weight to its bin, for good
            self._counts[i] += 1
            rate = max(1 / self._counts[i].item(), self.LEAST_RATE)
            self._means[i] += rate * (max(loss, LEAST_LOSS) - self._means[i])

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._means.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"means", "counts"} or len(state["means"]) != self.NUM_BINS:
            raise ValueError(
                "the checkpoint was trained without --learned_uncertainty True; go on without it, or start a new run "
                "from its weights with --init_from"
            )
        self._means, self._counts = state["means"].clone(), state["counts"].clone()


def normal_quantile(u: Tensor) -> Tensor:
    """Turn uniforms in [0, 1) into standard normal values, in float64."""
    return torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards the noise: ``shift t / (1 + (shift - 1) t)``.

    This adds log(shift) to the logit (2403.03206, section 5.3.2).
    """
    return shift * t / (1 + (shift - 1) * t)

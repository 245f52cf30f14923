"""Spaced diffusion: the same process on a subset of its timesteps (2102.09672, section 4)."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masked_diffusion.gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | list[int] | None) -> set[int]:
    """Which of ``num_timesteps`` original timesteps a shorter process uses.

    section_counts: step counts of equal sections of the process, as a list or a comma-separated string (``"250"``,
    ``"10,15,20"``); ``"ddimN"`` for the fixed stride of DDIM's paper; None or "" for all. Raises ValueError for a
    count that cannot be had or a string that is no such list.
    """
    if section_counts is None or section_counts == "":
        return set(range(num_timesteps))
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_stride(num_timesteps, _count(section_counts[len("ddim") :], section_counts))
        section_counts = [_count(count, section_counts) for count in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(section_counts))
    start, steps = 0, []
    for i, count in enumerate(section_counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(f"cannot take {count} timesteps of a section of {length}")
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        # The position is summed up, not multiplied: published step lists have its rounding.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return set(steps)


def _count(text: str, whole: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"timestep respacing {whole!r}: expected counts such as 250, ddim50 or 10,15,20") from None


def _ddim_stride(num_timesteps: int, count: int) -> set[int]:
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise ValueError(f"cannot take exactly {count} of {num_timesteps} timesteps with an integer stride")


class SpacedDiffusion(GaussianDiffusion):
    """A process on the timesteps ``use_timesteps`` of the process with ``betas``.

    ``timestep_map[i]`` is the original timestep of step i, and what the model sees. Raises ValueError for timesteps
    outside the original process.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: np.ndarray, **kwargs: Any) -> None:
        self.timestep_map = sorted(set(use_timesteps))
        self.original_num_steps = len(betas)
        if not self.timestep_map or not 0 <= self.timestep_map[0] <= self.timestep_map[-1] < len(betas):
            raise ValueError(f"use_timesteps: expected some of 0 ... {len(betas) - 1}")
        alphas_cumprod = np.cumprod(1 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        previous = np.append(1.0, alphas_cumprod[:-1])
        super().__init__(betas=1 - alphas_cumprod / previous, **kwargs)
        self._map_on_device: dict[torch.device, Tensor] = {}

    def original_timesteps(self, t: Tensor) -> Tensor:
        if t.device not in self._map_on_device:
            self._map_on_device[t.device] = torch.tensor(self.timestep_map, device=t.device)
        return self._map_on_device[t.device][t]

"""Weight averages of any length after a training, from snapshots of a few (EDM2, 2312.02696, section 3).

An average of power gamma weighs the parameters after update t by t^gamma. Its length is the standard deviation of that
weight in units of the training's length, ``std``. A weighted sum of snapshots whose weight is nearest to the one asked
for, in the sense of least squares, is the average asked for.

A folder of snapshots holds ``base.pt`` (a state dict in float32), a file for each snapshot, which is the average less
the base in float16, each tensor divided by a scale, and ``index.json``, which names the files that belong together.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masked_diffusion.choices import check_std
from masked_diffusion.files import atomic_write, write_json
from masked_diffusion.runs.checkpoint import read_file

FOLDER_NAME = "ema_snapshots"
HALF_PRECISION = 2.0**-11  # relative rounding of float16
MOST_MISFIT = 0.1  # from which an average is said to be none of its length
BASE_NAME, INDEX_NAME = "base.pt", "index.json"


def gamma_of(std: float) -> float:
    """The power of an average of relative length ``std``, the root of std^2 = (g + 1) / ((g + 2)^2 (g + 3)).

    Raises ValueError outside (0, 0.28].
    """
    check_std(std)
    t = std**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_rate(gamma: float, update: int) -> float:
    """The rate of update number 1, 2, ... that makes a running average one of power ``gamma``; the first is 0."""
    return (1 - 1 / update) ** (gamma + 1)


def inner_product(steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
    """Integrals of the products of weights t^gamma on [0, step], each of integral 1. Arguments broadcast."""
    until = np.minimum(steps_a, steps_b)
    shared = (until / steps_a) ** (gammas_a + 1) * (until / steps_b) ** (gammas_b + 1)
    return (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1) * shared / until


def solve(steps: Sequence[int], stds: Sequence[float], step: int, std: float) -> np.ndarray:
    """How much of each snapshot makes the average of length ``std`` at ``step``. Returns (M,) float64.

    steps, stds: (M,) of the snapshots.
    """
    products, wanted, _ = _products(steps, stds, step, std)
    return np.linalg.lstsq(products, wanted, rcond=None)[0]


def misfit(steps: Sequence[int], stds: Sequence[float], step: int, std: float) -> float:
    """How far what :func:`solve` finds is from the average of length ``std``, as a share of it.

    It is the distance of the updates' weights in the sense of least squares, and what float16 may add to it: a sum of
    large and opposite shares enlarges the rounding of the snapshots. Arguments as of :func:`solve`.
    """
    products, wanted, whole = _products(steps, stds, step, std)
    weights = solve(steps, stds, step, std)
    left = 1 - (2 * weights @ wanted - weights @ products @ weights) / whole
    return float(np.sqrt(max(0.0, left)) + HALF_PRECISION * np.abs(weights).sum())


def _products(
    steps: Sequence[int], stds: Sequence[float], step: int, std: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Inner products of the snapshots' weights: with each other (M, M), with those asked for (M,), of these alone."""
    at, gammas = np.array(steps, dtype=np.float64), np.array([gamma_of(value) for value in stds])
    end, gamma = np.float64(step), np.float64(gamma_of(std))
    wanted = inner_product(at, gammas, end, gamma)
    return inner_product(at[:, None], gammas[:, None], at, gammas), wanted, float(inner_product(end, gamma, end, gamma))


@dataclass(frozen=True)
class Snapshot:
    """One file of the folder: the average of length ``std``, as the flag had it, at a step."""

    step: int
    std: str

    @property
    def name(self) -> str:
        return f"power{self.std}_{self.step:06d}.pt"


class Snapshots:
    """The snapshots in a run's folder. They are written by one process."""

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER_NAME

    def all(self) -> list[Snapshot]:
        """The snapshots that belong together, by step; none where there is no folder. Raises ValueError for a damaged
        index, naming it."""
        path = self.folder / INDEX_NAME
        try:
            return [Snapshot(int(step), str(std)) for step, std in json.loads(path.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a list of snapshots ({error})") from None

    def forget_after(self, step: int) -> None:
        """Remove the snapshots after a step, from which a run goes on in another way."""
        found = self.all()
        if later := [snapshot for snapshot in found if snapshot.step > step]:
            self._write_index([snapshot for snapshot in found if snapshot.step <= step])
            for snapshot in later:
                (self.folder / snapshot.name).unlink(missing_ok=True)

    def add(self, step: int, averages: dict[str, dict[str, Tensor]]) -> None:
        """Write snapshots of a step. averages: std as the flag has it -> state dict in float32, on the CPU."""
        found = self.all()
        if not found:
            self.folder.mkdir(exist_ok=True)
            _save(self.folder / BASE_NAME, next(iter(averages.values())))
        base = read_file(self.folder / BASE_NAME)
        new = [Snapshot(step, std) for std in averages]
        for snapshot in new:
            _save(self.folder / snapshot.name, _pack(averages[snapshot.std], base))
        self._write_index([*(snapshot for snapshot in found if snapshot not in new), *new])

    def _write_index(self, snapshots: Sequence[Snapshot]) -> None:
        write_json(self.folder / INDEX_NAME, [[snapshot.step, snapshot.std] for snapshot in snapshots])

    def used_for(self, step: int | None = None) -> tuple[list[Snapshot], int]:
        """The snapshots that make averages at a step, None for the last one, and the step.

        Raises FileNotFoundError, naming it, for a missing snapshot, and where there are none; ValueError for a step
        that cannot be had.
        """
        found = self.all()
        if not found:
            raise FileNotFoundError(
                f"{self.folder}: no snapshots; train with --ema_power, such as --ema_power 0.05,0.10"
            )
        steps = sorted({snapshot.step for snapshot in found})
        step = steps[-1] if step is None else step
        if step not in steps:
            nearest = min(steps, key=lambda known: abs(known - step))
            raise ValueError(f"--step {step}: no snapshot of this step in {self.folder}; the nearest is of {nearest}")
        used = [snapshot for snapshot in found if snapshot.step <= step]
        missing = [name for name in (BASE_NAME, *(s.name for s in used)) if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder / missing[0]}: this snapshot is missing; restore it, or train again")
        return used, step

    def misfit(self, std: float, step: int | None = None) -> float:
        """How far :meth:`reconstruct` is from an average of length ``std``, see :func:`misfit`."""
        used, step = self.used_for(step)
        return misfit([s.step for s in used], [float(s.std) for s in used], step, std)

    def reconstruct(self, std: float, step: int | None = None) -> tuple[dict[str, Tensor], int]:
        """The average of length ``std`` at a step, None for the last one: a state dict in float32, and the step.

        Raises ValueError for a length that cannot be had, and as :meth:`used_for`.
        """
        used, step = self.used_for(step)
        weights = solve([s.step for s in used], [float(s.std) for s in used], step, std)
        base = read_file(self.folder / BASE_NAME)
        sums = {name: weights.sum() * value.double() for name, value in base.items() if value.is_floating_point()}
        for snapshot, weight in zip(used, weights.tolist(), strict=True):
            packed = read_file(self.folder / snapshot.name)
            for name, total in sums.items():
                total += weight * packed["scales"][name] * packed["changes"][name].double()
        return {name: sums[name].float() if name in sums else value for name, value in base.items()}, step


def _pack(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Any]:
    """A state as its change since the base. Each tensor is divided by its largest change, so that float16 suffices."""
    changes = {name: value - base[name] for name, value in state.items() if value.is_floating_point()}
    scales = {name: max(change.abs().max().item(), 1e-30) for name, change in changes.items()}
    return {"scales": scales, "changes": {name: (value / scales[name]).half() for name, value in changes.items()}}


def _save(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        torch.save(value, file)

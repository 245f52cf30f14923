"""Read the log of a training: its columns, its cost, and how it compares with a recipe's card.

A card is JSON. It holds a recipe's ``settings``, its cost, and for each of its ``columns`` of the log the ``steps``,
the ``mean`` of several runs there, and how far a run may be from it (``tolerance``). A loss is the mean over the
``every`` steps before a step; a score is that of the step itself. A card without columns has not been measured.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion.logger import lines_of, parse_csv_rows
from masked_diffusion.runs.config import RunConfig, read_config
from masked_diffusion.training.eval_config import METRICS

LOG_NAME = "progress.csv"
LOSSES = [f"{view}loss{quartile}" for view in ("", "m_") for quartile in ("", "_q0", "_q1", "_q2", "_q3")]
DEVIATIONS = 4.0  # of single runs from their mean that a card allows


@dataclass(frozen=True)
class RunLog:
    """A run's log. columns: name -> (rows,) float64, NaN where a row has no number."""

    folder: Path
    columns: dict[str, np.ndarray]

    @property
    def steps(self) -> np.ndarray:
        return self.columns["step"]

    @property
    def global_batch(self) -> float:
        return self.columns["samples"][-1] / self.steps[-1]

    def config(self) -> RunConfig:
        """Read the run's config.json. Raises FileNotFoundError when it is missing."""
        config = read_config(self.folder)
        if config is None:
            raise FileNotFoundError(f"{self.folder}: no config.json, so the run's model is not known")
        return config

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows (n,) that have a number in a column, and these numbers."""
        values = self.columns.get(name, np.full(len(self.steps), math.nan))
        rows = np.flatnonzero(np.isfinite(values))
        return rows, values[rows]

    def at(self, name: str, step: int, every: int) -> float:
        """Return a column's number at a step, as cards define it; NaN when there is none."""
        since = step - 1 if name in METRICS else step - every
        rows, values = self.points(name)
        chosen = values[(self.steps[rows] > since) & (self.steps[rows] <= step)]
        return float(chosen.mean()) if len(chosen) else math.nan

    def elapsed(self) -> np.ndarray:
        """Seconds spent in training up to each row (rows,), without evaluations."""
        images = np.diff(self.columns["samples"], prepend=0.0)
        rates = self.columns["images_per_second"]
        return np.divide(images, rates, out=np.zeros_like(images), where=rates > 0).cumsum()

    def seconds(self) -> float:
        """Seconds spent in training, without evaluations."""
        return float(self.elapsed()[-1])

    def tflops(self, per_image: float) -> np.ndarray:
        """Compute up to each row (rows,), a multiply-add counting as one. per_image: GFLOPs, for rows that do not say,
        those of 0.1.0."""
        reckoned = self.columns["samples"] * per_image / 1000
        return np.where(np.isnan(logged := self.columns.get("tflops", reckoned)), reckoned, logged)


def read_run_log(folder: Path) -> RunLog:
    """Read a run's folder. Raises FileNotFoundError, or ValueError for a log without rows."""
    path = folder / LOG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a training's output folder with csv in OPENAI_LOG_FORMAT")
    rows, _ = parse_csv_rows(lines_of(path))
    try:
        columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    except (IndexError, ValueError, TypeError):
        raise ValueError(f"{path}: not the log of a training, or still without a row") from None
    if not {"step", "samples", "images_per_second"} <= set(columns):
        raise ValueError(f"{path}: not the log of a training, it has no step, samples and images_per_second")
    return RunLog(folder, columns)


NORMALISED = ("channel_mean", "channel_std")


def recipe_settings(progress: RunLog) -> dict[str, Any]:
    """Return the settings that two runs of one recipe have in common."""
    config = progress.config()
    training = ("data_dir", "lr", "opt", "lr_anneal_steps", "ema_rate")
    sampling = ("eval_num_samples", "eval_sampler", "eval_sampling_steps", "eval_cfg_scale")
    return {
        "model": config.model.model,
        "image_size": config.model.image_size,
        **({"objective": "ddpm"} if config.objective.objective == "ddpm" else dataclasses.asdict(config.objective)),
        "policy": config.model.policy_name,
        "route": config.model.route,
        "mask_ratio": config.model.mask_ratio,
        "decode_layer": config.model.decode_layer,
        "global_batch": progress.global_batch,
        **{name: config.training.get(name) for name in training},
        # Losses of normalised latents are on another scale. Cards of others do not have these entries.
        **{name: value for name in NORMALISED if (value := config.first_stage.get(name)) is not None},
        **({name: config.training.get(name) for name in sampling} if "eval_fid" in progress.columns else {}),
    }


def make_columns(runs: Sequence[RunLog], every: int) -> dict[str, dict[str, list[float]]]:
    """Make the columns of a card from two or more runs that differ only in their seeds.

    The deviation of a single run is estimated relative to the mean and over all steps together, because three runs at
    one step say little.
    """
    last = int(min(run.steps[-1] for run in runs))
    columns = {}
    for name in [*LOSSES, *METRICS]:
        steps = [s for s in range(every, last + 1, every) if all(math.isfinite(r.at(name, s, every)) for r in runs)]
        if not steps:
            continue
        values = np.array([[run.at(name, step, every) for step in steps] for run in runs])  # (runs, steps)
        mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
        relative = math.sqrt(np.mean((spread / mean) ** 2))
        columns[name] = {
            "steps": steps,
            "mean": mean.tolist(),
            "spread": spread.tolist(),
            "tolerance": (DEVIATIONS * relative * np.abs(mean)).tolist(),
        }
    return columns


def read_card(path: Path) -> dict[str, Any]:
    """Read a card. Raises FileNotFoundError, or ValueError for no card or a card without measurements."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; docs/recipes/ has the cards")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        columns, recipe = card["columns"], card["recipe"]
        numbers = [
            len(column["steps"]) == len(column["mean"]) == len(column["tolerance"]) for column in columns.values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a recipe's card, see docs/recipes/README.md") from None
    if not columns or not all(numbers):
        raise ValueError(f"{path}: {recipe} has not been measured yet, so there is nothing to compare with")
    return card


@dataclass(frozen=True)
class Comparison:
    """One number of a run beside a card's."""

    name: str
    step: int
    value: float
    mean: float
    tolerance: float

    @property
    def inside(self) -> bool:
        return abs(self.value - self.mean) <= self.tolerance

    def __str__(self) -> str:
        side = "above" if self.value > self.mean else "below" if self.value < self.mean else "outside"
        low, high = self.mean - self.tolerance, self.mean + self.tolerance
        return f"step {self.step}: {self.name} {self.value:.4g} is {side} the band {low:.4g} … {high:.4g}"


def compare(run: RunLog, card: dict[str, Any]) -> list[Comparison]:
    """Compare all numbers that run and card share, by step. A loss that is not finite counts as outside."""
    found = []
    for name, column in card["columns"].items():
        for step, mean, tolerance in zip(column["steps"], column["mean"], column["tolerance"], strict=True):
            value = run.at(name, step, card["every"])
            if run.steps[-1] < step:
                continue
            if math.isfinite(value) or name not in METRICS:  # a loss that is not finite is outside
                found.append(Comparison(name, step, value, mean, tolerance))
    return sorted(found, key=lambda comparison: comparison.step)

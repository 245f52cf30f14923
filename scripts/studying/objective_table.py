"""A comparison of objectives from its trainings to its table."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import image_sample
import torch
from studying.course import take_folder
from studying.measure import MIDDLES, HeldOut, times_of
from studying.plan import Run, as_arguments
from studying.settings import Comparison
from studying.trainer import Trainer
from tqdm.auto import tqdm

from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.dist_util import choose_device
from masked_diffusion.files import write_json
from masked_diffusion.programs.read_digits import EMBEDDED, Classifier, predict, read_samples, train_classifier
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained

EMA_RATE = "0.99"
DIGITS = "digits"


def begin(
    comparison: Comparison, out: Path, objectives: Sequence[str], seeds: int, device_name: str
) -> Callable[[], int]:
    """Take the folder, and plan all trainings. Returns the work, which returns the exit status.

    Raises ValueError or OSError.
    """
    device = choose_device(device_name, 0)
    take_folder(out, comparison)
    torch.set_num_threads(1)
    runs = [Run(objective, seed) for seed in range(seeds) for objective in objectives]
    trainer = Trainer(out / "runs", launcher="", jobs=1, flags=["--device", device_name, "--num_workers", "0"])

    def work() -> int:
        held_out = HeldOut(comparison, device)
        results = {}
        for run in tqdm(runs, unit="run"):
            result = read_record(trainer.result_of(run))
            if result is None:
                cpu_seconds = train(comparison, run, trainer)
                if cpu_seconds is None:
                    sys.stdout.write(f"stopped in {run.name}; the same command goes on from here\n")
                    return trainer.status
                result = {"cpu_seconds": cpu_seconds, **measure(comparison, run, trainer, held_out, device)}
                write_json(trainer.result_of(run), result)
            results[run] = result
        sys.stdout.write("".join(f"{line}\n" for line in table(results)))
        return 0

    return work


def read_record(path: Path) -> dict[str, Any] | None:
    """What is recorded in a file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def training_flags(comparison: Comparison, run: Run) -> dict[str, Any]:
    """The flags of ``image_train.py``: those of ``bash run.sh``, of one process."""
    return {
        "data_dir": comparison.data_dir,
        "vae_path": comparison.vae_path,
        "image_size": comparison.image_size,
        "objective": run.arm,
        "model": "MDT_Ti_2",
        "mask_ratio": 0.30,
        "decode_layer": 2,
        "batch_size": 64,
        "lr": 2e-3,
        "lr_anneal_steps": comparison.steps,
        "ema_rate": EMA_RATE,
        "seed": run.seed,
        "preview_samples": 0,
        "log_interval": 50,
        "save_interval": comparison.steps,
    }


def train(comparison: Comparison, run: Run, trainer: Trainer) -> float | None:
    """Train a run unless it is trained. Returns the processor's seconds of it; None where it was stopped.

    A training that was stopped has saved a checkpoint, and its seconds count. One that was killed has none, and begins
    anew.
    """
    path = trainer.folder / f"{run.name}.cpu.json"
    record = read_record(path) or {"cpu_seconds": 0.0, "finished": False}
    if not record["finished"]:
        before = time.process_time()
        finished = bool(list(trainer.train({run: as_arguments(training_flags(comparison, run))})))
        spent = record["cpu_seconds"] + time.process_time() - before
        record = {"cpu_seconds": spent, "finished": finished}
        write_json(path, record)
    return record["cpu_seconds"] if record["finished"] else None


def measure(
    comparison: Comparison, run: Run, trainer: Trainer, held_out: HeldOut, device: torch.device
) -> dict[str, Any]:
    """The held-out error of the averaged weights, and for each length of sampling the share of samples read right."""
    weights = trainer.folder / run.name / f"ema_{EMA_RATE}_{comparison.steps:06d}.pt"
    errors = held_out.errors(open_trained(weights, Request(), device, lambda text: None), levels())
    right = {
        str(length): share_read(comparison, run, trainer, weights, length, device) for length in comparison.lengths
    }
    return {"error": statistics.fmean(errors), "bins": errors, "right": right}


def levels() -> list[float]:
    """Times of flow that are timesteps of the published process, near the middles of equal parts of [0, 1].

    So every objective is measured at the same levels, to rounding.
    """
    times = times_of(DiffusionConfig().build())
    return [float(times[abs(times - middle).argmin()]) for middle in MIDDLES]


def share_read(
    comparison: Comparison, run: Run, trainer: Trainer, weights: Path, length: int, device: torch.device
) -> float:
    """Draw a sample set with the objective's own sampler, unless it is there, and read it."""
    folder = trainer.folder / f"{run.name}-samples{length}"
    flags = {
        "model_path": weights,
        "out": folder,
        "cfg_cond": True,
        "cfg_scale": comparison.cfg_scale,
        "num_sampling_steps": length,
        "few_steps": True,  # their error is a part of what is compared
        "num_samples": comparison.num_samples,
        "batch_size": 60,
        "labels": "balanced",
    }
    if status := trainer.call(run, image_sample.main, [*as_arguments(flags), "--device", str(device)]):
        raise RuntimeError(f"{run.name}: its sampling ended with status {status}; see {trainer.output_of(run)}")
    side = comparison.image_size
    pixels, labels = read_samples(folder / f"samples_{comparison.num_samples}x{side}x{side}x3.npz", EMBEDDED[DIGITS])
    return float((predict(classifier(), pixels) == labels).float().mean())


@cache
def classifier() -> Classifier:
    return train_classifier(DIGITS)


def table(results: Mapping[Run, dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: for each objective the mean and the standard deviation over its seeds."""
    lengths = list(next(iter(results.values()))["right"])
    heads = ["objective", "seeds", "held-out error", *(f"read right, {n} steps" for n in lengths), "CPU seconds"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for objective in dict.fromkeys(run.arm for run in results):
        rows = [result for run, result in results.items() if run.arm == objective]
        cells = [f"`{objective}`", str(len(rows)), spread([row["error"] for row in rows], ".4f")]
        cells += [f"{spread([100 * row['right'][n] for row in rows], '.1f')} %" for n in lengths]
        yield f"| {' | '.join([*cells, spread([row['cpu_seconds'] for row in rows], '.0f')])} |"


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; of one value there is none."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form}}"

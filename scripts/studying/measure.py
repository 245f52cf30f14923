"""What a study measures of a run: the held-out error of its averaged weights, along the run, and samples."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from studying.judge import Judge, sampler_of
from studying.settings import Comparison, Study
from torch import Tensor

from masked_diffusion.data.data_statistics import pixel_statistics
from masked_diffusion.diffusion.objectives import DDPM, EDM, Objective
from masked_diffusion.first_stage import CachedPosterior, FirstStage, PixelSpace, load_first_stage
from masked_diffusion.gaussian_diffusion import GaussianDiffusion
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.randomness import numpy_generator
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.trained import Request, Trained, open_trained
from masked_diffusion.sampling.pictures import grid

BINS = 8
MIDDLES = [(number + 0.5) / BINS for number in range(BINS)]
BATCH = 64
SAMPLES = 20


class HeldOut:
    """Fixed latents, noise and levels: the middles of eight equal parts of [0, 1], each for every image.

    Raises ValueError or FileNotFoundError for data that cannot be opened, or has other classes than the training's.
    """

    def __init__(self, study: Study | Comparison, device: torch.device) -> None:
        dataset = open_dataset(study.held_out_dir, image_size=study.image_size)
        training = open_dataset(study.data_dir, image_size=study.image_size)
        if dataset.class_names != training.class_names:
            raise ValueError(
                f"--held_out_dir {study.held_out_dir}: its classes are not those of --data_dir {study.data_dir}; give "
                "data of the same classes"
            )
        first_stage: FirstStage = load_first_stage(study.vae_path, device, dataset.channels)
        if isinstance(first_stage, PixelSpace) and study.normalize == "channel":
            first_stage.normalise(pixel_statistics(training))
        if dataset.encoded_by is not None:
            first_stage = CachedPosterior(first_stage, *dataset.encoded_by)
        count = min(study.held_out_images, len(dataset))
        indices = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
        self.y = torch.from_numpy(dataset.labels[indices])  # (N,)
        side = study.image_size // first_stage.downsample
        self.latent_shape = (first_stage.latent_channels, side, side)
        latents, noise = [], []
        for index in indices:
            drawn = numpy_generator("study", index).standard_normal((BINS + 1, *self.latent_shape), dtype=np.float32)
            image = torch.from_numpy(dataset.load(index))[None].to(device)
            latents.append(first_stage.encode(image, torch.from_numpy(drawn[BINS:]).to(device)).cpu())
            noise.append(torch.from_numpy(drawn[:BINS]))
        self.latents, self.noise = torch.cat(latents), torch.stack(noise)  # (N, C, H, W), (N, BINS, C, H, W)

    @torch.no_grad()
    def errors(self, trained: Trained, times: Sequence[float] = MIDDLES) -> list[float]:
        """Mean squared error of flow's velocity, of all tokens, at each of these times of flow, one for each bin.

        Another objective is given the same images and noise where its own scales have the same ratio.
        """
        objective, device = trained.config.build_objective(), next(trained.model.parameters()).device
        means = []
        for number, time in enumerate(times):
            total = 0.0
            for start in range(0, len(self.latents), BATCH):
                part = slice(start, start + BATCH)
                x_0, noise = self.latents[part].to(device), self.noise[part, number].to(device)
                total += _squared_error(objective, trained, x_0, noise, time, self.y[part].to(device))
            means.append(total / self.latents.numel())
        return means


def _squared_error(objective: Objective, trained: Trained, x_0: Tensor, noise: Tensor, time: float, y: Tensor) -> float:
    """Summed over a batch. An estimate D of x_0 at time t means the velocity (x - D) / t: it errs by (D - x_0) / t."""
    predict = objective.predictor(trained.model, clip_denoised=False, model_kwargs={"y": y})
    level = torch.full((len(x_0),), level_at(objective, time), device=x_0.device)
    estimate = predict(objective.q_sample(x_0, level, noise), level).pred_xstart
    return float((((estimate - x_0) / time) ** 2).sum())


def level_at(objective: Objective, time: float) -> float | int:
    """The level of an objective where noise and data have the ratio of a time of flow; the nearest of timesteps."""
    if isinstance(objective, DDPM):
        times = times_of(objective.process)
        return int(np.abs(times - time).argmin())
    return time / (1 - time) if isinstance(objective, EDM) else time


def times_of(process: GaussianDiffusion) -> np.ndarray:
    """The times of flow where noise and data have the ratio of each timestep, (T,) float64."""
    alpha, sigma = np.sqrt(process.alphas_cumprod), np.sqrt(1 - process.alphas_cumprod)
    return sigma / (alpha + sigma)


def measure(folder: Path, held_out: HeldOut, judge: Judge | None, device: torch.device | str) -> dict[str, Any]:
    """The numbers of a finished run: its curve at each of its checkpoints, of which the last one decides.

    judge: of samples; None for none. Draws samples into ``samples.png``. Raises ValueError where the log has no row of
    the last checkpoint.
    """
    averages = sorted((int(match[2]), path) for path in folder.iterdir() if (match := ema_file(path)))
    log = {int(row["step"]): row for row in read_rows(folder)}
    curve = []
    for step, path in averages:
        if step not in log:  # saved where the study was stopped
            continue
        trained = open_trained(path, Request(), device, lambda text: None)
        bins = held_out.errors(trained)
        row = {name: float(log[step][name]) for name in ("tflops", "plain_samples", "seconds")}
        curve.append({"step": step, **row, "error": float(np.mean(bins)), "bins": bins})
    if not curve or curve[-1]["step"] != averages[-1][0]:
        raise ValueError(f"{folder}: its log has no row of step {averages[-1][0]}; remove the folder and start again")
    draw_samples(trained, device).save(folder / "samples.png")
    judged = {} if judge is None else judge.of(trained, device)
    return {**curve[-1], "curve": curve, **judged}


def ema_file(path: Path) -> Any:
    return checkpoint.EMA_FILE.fullmatch(path.name)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def draw_samples(trained: Trained, device: torch.device | str) -> Image.Image:
    """Samples of all classes in turn."""
    labels = [number % trained.config.model.num_classes for number in range(SAMPLES)]
    return grid(sampler_of(trained, device)(range(SAMPLES), labels), columns=SAMPLES // 2)

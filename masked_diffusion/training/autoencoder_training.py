"""Train a small autoencoder on one's own images: a first stage for pictures that no published autoencoder is made for.

The network is diffusers' ``AutoencoderKL`` (latent diffusion, 2112.10752) without attention. Its loss is the absolute
and the squared error of a reconstruction, and a little of the posterior's divergence from a standard normal.
"""

import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masked_diffusion.data.data_statistics import spread_images
from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.files import write_json
from masked_diffusion.image_datasets import Batch
from masked_diffusion.randomness import key_bytes, numpy_generator
from masked_diffusion.sampling.pictures import grid, save_picture, to_uint8
from masked_diffusion.training.autoencoder_config import AutoencoderConfig

RECORD_NAME, PICTURE_NAME = "training.json", "reconstructions.png"
WARM_UP = 0.025  # share of the steps until the learning rate is reached
MEASURED_IMAGES = 1000
SHOWN_IMAGES, PER_ROW = 20, 10


def learning_rate(config: AutoencoderConfig, step: int) -> float:
    """The rate of update ``step``, counted from 0: up in a line, then down to 0 along a cosine."""
    return (
        config.lr * min(1.0, (step + 1) / (WARM_UP * config.steps)) * (1 + math.cos(math.pi * step / config.steps)) / 2
    )


def random_squares(images: Tensor, side: int, seed: int, step: int) -> Tensor:
    """The same random square of all images of a step: (N, C, side, side) of (N, C, H, H)."""
    if side >= images.shape[-1]:
        return images
    top, left = numpy_generator(seed, "autoencoder crop", step).integers(images.shape[-1] - side + 1, size=2)
    return images[..., top : top + side, left : left + side]


def train_autoencoder(
    vae: Any,
    batches: Iterator[Batch],
    config: AutoencoderConfig,
    device: torch.device,
    tell: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> None:
    """Train ``vae``, on ``device``, in place.

    batches: of :func:`masked_diffusion.image_datasets.load_data`. tell: called with each step's number, from 1, and its
    losses. Raises FloatingPointError when the loss is not finite.
    """
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    noise = torch.Generator().manual_seed(int.from_bytes(key_bytes(config.seed, "autoencoder posterior")[:8], "big"))
    for step in range(config.steps):
        images = random_squares(next(batches)[0].to(device), config.crop, config.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        error = vae.decode(posterior.sample(generator=noise)).sample - images
        losses = {
            "l1": error.abs().mean(),
            "mse": error.square().mean(),
            "kl": posterior.kl().mean() / images[0].numel(),
        }
        loss = losses["l1"] + losses["mse"] + config.kl_weight * losses["kl"]
        if not loss.isfinite():
            raise FloatingPointError(f"step {step + 1}: the loss is not finite; use a smaller --lr than {config.lr}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        tell(step + 1, {name: value.item() for name, value in losses.items()})
    vae.eval()


@torch.no_grad()
def latent_statistics(vae: Any, images: Iterator[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the posterior's samples, (C,) float64 each.

    The variance of the samples is that of the means plus the mean of the variances.
    """
    moments = []
    for image in images:
        posterior = vae.encode(image.to(device)).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        moments.append(torch.stack([mean, mean.square() + variance]).mean(dim=(1, 3, 4)))  # (2, C)
    first, second = torch.stack(moments).mean(dim=0)
    return first, (second - first.square()).sqrt()


@torch.no_grad()
def standardise(vae: Any, mean: Tensor, deviation: Tensor) -> None:
    """Make the latents of an autoencoder have mean 0 and deviation 1 in each channel; images decode as before.

    mean, deviation: (C,), of its latents now. They go into the 1 x 1 convolutions behind encoder and before decoder.
    """
    channels, out, back = len(mean), vae.quant_conv, vae.post_quant_conv
    mean, deviation = mean.to(out.weight), deviation.to(out.weight)
    out.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) / deviation
    out.bias[channels:] -= 2 * deviation.log()  # of the logarithm of the variance
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation.view(1, -1, 1, 1)


@torch.no_grad()
def psnr(vae: Any, images: Iterator[Tensor], device: torch.device) -> float:
    """Peak signal-to-noise ratio of the reconstructions from the posteriors' means, in decibels."""
    errors = []
    for image in images:
        decoded = vae.decode(vae.encode(image.to(device)).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - image.to(device)).square().mean().item())
    return 10 * math.log10(4 / max(float(np.mean(errors)), 1e-9))


@torch.no_grad()
def reconstruction_picture(vae: Any, dataset: ImageDataset, device: torch.device) -> Image.Image:
    """Rows of images, each above the row of their reconstructions."""
    images = torch.cat(list(spread_images(dataset, SHOWN_IMAGES)))
    again = [vae.decode(vae.encode(image.to(device)).latent_dist.mean).sample.cpu() for image in images.split(1)]
    pairs = zip(images.split(PER_ROW), torch.cat(again).split(PER_ROW), strict=True)
    return grid(np.concatenate([to_uint8(row) for pair in pairs for row in pair]), min(PER_ROW, len(images)))


def training_of(folder: Path) -> dict[str, Any] | None:
    """The settings that a folder's autoencoder was trained with; None where they are not recorded."""
    try:
        found = json.loads((folder / RECORD_NAME).read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def save_autoencoder(vae: Any, folder: Path, record: dict[str, Any], picture: Image.Image) -> None:
    """Write a diffusers folder, whole or not at all, with a record of the training and a picture.

    Raises OSError when ``folder`` holds anything.
    """
    vae.register_to_config(scaling_factor=1.0)
    unfinished = folder.with_name(f".{folder.name}.{secrets.randbits(64)}.tmp")
    try:
        vae.to(memory_format=torch.contiguous_format).save_pretrained(unfinished)
        write_json(unfinished / RECORD_NAME, record)
        save_picture(picture, unfinished / PICTURE_NAME)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def settings_of(config: AutoencoderConfig, image_size: int, data_sha256: str, random_flip: bool) -> dict[str, Any]:
    """All that determines the weights."""
    return {**asdict(config), "image_size": image_size, "random_flip": random_flip, "data_sha256": data_sha256}

"""Train a small autoencoder, from checked flags."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from masked_diffusion import dist_util
from masked_diffusion.data.data_statistics import spread_images
from masked_diffusion.image_datasets import Batch, SourceDataset, load_data, open_dataset
from masked_diffusion.runs.config import library_versions
from masked_diffusion.script_util import choose_num_workers
from masked_diffusion.training.autoencoder_config import AutoencoderConfig
from masked_diffusion.training.autoencoder_training import (
    MEASURED_IMAGES,
    PICTURE_NAME,
    latent_statistics,
    psnr,
    reconstruction_picture,
    save_autoencoder,
    settings_of,
    standardise,
    train_autoencoder,
    training_of,
)


def prepare(args: argparse.Namespace, config: AutoencoderConfig, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    num_workers = choose_num_workers(args.num_workers)
    device = dist_util.choose_device(args.device, 0)
    dataset = open_dataset(args.data_dir, image_size=args.image_size, class_cond=False, random_flip=args.random_flip)
    if not isinstance(dataset, SourceDataset):
        raise ValueError(f"--data_dir {args.data_dir}: give colour images; these are grey, or latents already")
    data_sha256 = dataset.fingerprint(os.path.expanduser(args.data_dir))  # noqa: PTH111  (it may be a bucket)
    settings = settings_of(config, args.image_size, data_sha256, args.random_flip)
    out = Path(args.out).expanduser()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if training_of(out) != settings:
            raise ValueError(f"--out {out}: something else is there already; give a new folder")
        return lambda: announce(out, "this autoencoder is already complete")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: cannot write in {out.parent}")
    batches = load_data(
        data_dir=args.data_dir,
        dataset=dataset,
        batch_size=config.batch_size,
        image_size=args.image_size,
        seed=config.seed,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    stack.callback(batches.close)
    for line in (f"data: {dataset}", *dataset.notes):
        sys.stderr.write(f"{line}\n")
    return lambda: work(config, dataset, batches, settings, out, device)


def work(
    config: AutoencoderConfig,
    dataset: SourceDataset,
    batches: Iterator[Batch],
    settings: dict[str, Any],
    out: Path,
    device: torch.device,
) -> None:
    vae = config.build(dataset.image_size).to(device)
    with tqdm(total=config.steps, unit="step") as bar:

        def tell(step: int, losses: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.3g}" for name, value in losses.items()}, refresh=False)

        train_autoencoder(vae, batches, config, device, tell)
    statistics = latent_statistics(vae, spread_images(dataset, MEASURED_IMAGES), device)
    standardise(vae, *statistics)
    found = {"psnr": psnr(vae, spread_images(dataset, MEASURED_IMAGES), device)}
    record = {"settings": settings, "found": found, "versions": library_versions()}
    save_autoencoder(vae, out, record, reconstruction_picture(vae, dataset, device))
    announce(out, f"reconstructions: {found['psnr']:.1f} dB PSNR")


def announce(out: Path, message: str) -> None:
    sys.stderr.write(f"{message}; {out / PICTURE_NAME} shows images above their reconstructions\n")
    sys.stdout.write(f"{out.absolute()}\n")

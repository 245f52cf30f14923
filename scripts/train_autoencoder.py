"""Train a small autoencoder, in minutes on a CPU, as the first stage for images of up to about 128 pixels.

    python scripts/train_autoencoder.py --data_dir IMAGES --image_size 64 --out autoencoder
    python scripts/image_train.py --data_dir IMAGES --image_size 64 --vae_path autoencoder ...

Runs in one process. The folder is a diffusers AutoencoderKL whose latents have mean 0 and deviation 1.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from masked_diffusion import dist_util
from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.image_datasets import Batch, SourceDataset, load_data, open_dataset
from masked_diffusion.runs.config import ModelConfig, library_versions
from masked_diffusion.script_util import MACHINE_FLAGS, choose_num_workers, from_args, make_parser, run_script
from masked_diffusion.settings import Flag, flags_of
from masked_diffusion.training.autoencoder_training import (
    MEASURED_IMAGES,
    PICTURE_NAME,
    AutoencoderConfig,
    latent_statistics,
    psnr,
    reconstruction_picture,
    save_autoencoder,
    settings_of,
    spread_images,
    standardise,
    train_autoencoder,
    training_of,
)

FLAGS = {
    "data_dir": Flag("", "images of any form that a training reads, such as a folder or builtin:shapes", "data"),
    "out": Flag(
        "", "new folder for the autoencoder, which trainings and encode_latents.py take as --vae_path", "saving"
    ),
    "image_size": flags_of(ModelConfig)["image_size"]._replace(default=32),
    "random_flip": flags_of(DataConfig)["random_flip"],
    **flags_of(AutoencoderConfig),
    "num_workers": MACHINE_FLAGS["num_workers"],
    "device": MACHINE_FLAGS["device"],
}


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Train a small autoencoder on your own images.", FLAGS)


def main(argv: Sequence[str] | None = None) -> int:
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args, stack))


def prepare(args: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    config = from_args(AutoencoderConfig, args)
    if not args.out:
        raise ValueError("--out: give a new folder for the autoencoder")
    if args.image_size % config.downsample:
        raise ValueError(f"--image_size {args.image_size}: must be a multiple of --downsample {config.downsample}")
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


if __name__ == "__main__":
    sys.exit(main())

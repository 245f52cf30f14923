"""Train a small autoencoder, in minutes on a CPU, as the first stage for images of up to about 128 pixels.

    python scripts/train_autoencoder.py --data_dir IMAGES --image_size 64 --out autoencoder
    python scripts/image_train.py --data_dir IMAGES --image_size 64 --vae_path autoencoder ...

Runs in one process. The folder is a diffusers AutoencoderKL whose latents have mean 0 and deviation 1.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable

from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.runs.config import ModelConfig
from masked_diffusion.script_util import MACHINE_FLAGS, from_args, main_of, make_parser
from masked_diffusion.settings import Flag, flags_of
from masked_diffusion.training.autoencoder_config import AutoencoderConfig

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


def prepare(args: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    config = from_args(AutoencoderConfig, args)
    if not args.out:
        raise ValueError("--out: give a new folder for the autoencoder")
    if args.image_size % config.downsample:
        raise ValueError(f"--image_size {args.image_size}: must be a multiple of --downsample {config.downsample}")
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import train_autoencoder

    return train_autoencoder.prepare(args, config, stack)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

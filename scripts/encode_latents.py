"""Encode a folder of images once, so that trainings read their latents instead.

    python scripts/encode_latents.py --data_dir IMAGES --out latents_256 --image_size 256
    python scripts/image_train.py --data_dir latents_256 --image_size 256 ...

Runs alone or under any launcher; the same command goes on where it was interrupted.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from masked_diffusion.choices import AUTOENCODERS, DEFAULT_VAE, LATENT_DTYPES
from masked_diffusion.data.data_config import READING, DataConfig
from masked_diffusion.data.image_files import is_remote
from masked_diffusion.runs.config import ModelConfig
from masked_diffusion.script_util import (
    MACHINE_FLAGS,
    main_of,
    make_parser,
)
from masked_diffusion.settings import Flag, flags_of

PROGRAM = ".pt2"  # ending of what torch.export.save writes
DATA_FLAGS = flags_of(DataConfig)
FLAGS = {
    "data_dir": Flag("", "images of any form that a training reads", "data"),
    "out": Flag("", "folder for the latents, which scripts/image_train.py takes as --data_dir", "saving"),
    "image_size": flags_of(ModelConfig)["image_size"],
    "vae_path": Flag(
        DEFAULT_VAE.format("mse"),
        f"hub name or folder of an autoencoder of diffusers: {', '.join(AUTOENCODERS)}",
        "model",
    ),
    **{name: DATA_FLAGS[name] for name in READING[2:]},
    "class_cond": DATA_FLAGS["class_cond"]._replace(help="keep class labels"),
    "random_flip": DATA_FLAGS["random_flip"]._replace(
        help="encode the mirror images, too; a training with --random_flip True needs them"
    ),
    "dtype": Flag("fp32", "how the moments are stored: fp32, fp16 or bf16", "saving"),
    "normalize": Flag(
        "none",
        "channel: measure mean and deviation of each channel, which become 0 and 1; none: the autoencoder's scale",
        "model",
    ),
    "features": Flag(
        "",
        "keep features of each image beside its latents: a .pt2 file of torch.export that takes RGB in [-1, 1]",
        "model",
    ),
    "trust_features": Flag(
        False, "load the .pt2 in --features although it can run any code, because you trust who made it", "model"
    ),
    "shard_size": Flag(1024, "images per file; an interruption costs what is done of one file per process", "saving"),
    "batch_size": Flag(16, "images that are encoded at once, per process", "machine"),
    **MACHINE_FLAGS,
}


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Encode images once, so that trainings read their latents.", FLAGS, launched=True)


def prepare(args: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    for name in ("shard_size", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.dtype not in LATENT_DTYPES:
        raise ValueError(f"--dtype {args.dtype}: choose one of {', '.join(LATENT_DTYPES)}")
    if args.normalize not in ("none", "channel"):
        raise ValueError(f"--normalize {args.normalize}: choose none or channel")
    check_features(args.features, args.trust_features)
    if not args.out or is_remote(args.out):
        raise ValueError(f"--out {args.out}: give a local folder for the latents")
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import encode_latents

    return encode_latents.prepare(args, stack)


def check_features(path: str, trusted: bool) -> None:
    """Raise ValueError or FileNotFoundError for a network that must not or cannot be loaded, before it is."""
    if trusted and not path:
        raise ValueError("--trust_features True: has no effect without --features")
    if not path:
        return
    if not path.endswith(PROGRAM):
        raise ValueError(f"--features {path}: expected a file of torch.export, which ends in {PROGRAM}")
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"--features {path}: no such file")
    if not trusted:
        raise ValueError(
            f"--features {path}: a {PROGRAM} can run any code while it is loaded; add --trust_features True if you "
            "trust who made it"
        )


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

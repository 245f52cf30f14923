"""Encode a folder of images once, so that trainings read their latents instead.

    python scripts/encode_latents.py --data_dir IMAGES --out latents_256 --image_size 256
    python scripts/image_train.py --data_dir latents_256 --image_size 256 ...

Runs alone or under any launcher; the same command goes on where it was interrupted.
"""

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from masked_diffusion import dist_util
from masked_diffusion.choices import AUTOENCODERS, DEFAULT_VAE
from masked_diffusion.data.data_config import READING, DataConfig
from masked_diffusion.data.image_files import is_remote
from masked_diffusion.data.latent_cache import DTYPES, CacheRecord, ShardFiles, SourceIndex, extensions_in
from masked_diffusion.data.latent_encoding import encode_shards
from masked_diffusion.data.sources import absolute
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import Autoencoder, load_first_stage
from masked_diffusion.image_datasets import SourceDataset, open_dataset
from masked_diffusion.runs.config import ModelConfig
from masked_diffusion.script_util import (
    MACHINE_FLAGS,
    args_to_dict,
    choose_num_workers,
    make_parser,
    place_from_args,
    run_script,
)
from masked_diffusion.settings import Flag, flags_of

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
    "shard_size": Flag(1024, "images per file; an interruption costs what is done of one file per process", "saving"),
    "batch_size": Flag(16, "images that are encoded at once, per process", "machine"),
    **MACHINE_FLAGS,
}


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Encode images once, so that trainings read their latents.", FLAGS, launched=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args, stack))


def prepare(args: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    for name in ("shard_size", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype}: choose one of {', '.join(DTYPES)}")
    if args.normalize not in ("none", "channel"):
        raise ValueError(f"--normalize {args.normalize}: choose none or channel")
    if not args.out or is_remote(args.out):
        raise ValueError(f"--out {args.out}: give a local folder for the latents")
    num_workers = choose_num_workers(args.num_workers)
    place = place_from_args(args)
    device = dist_util.choose_device(args.device, place.local_rank)
    dist_util.allow_tf32(args.tf32)
    if args.tf32 and device.type != "cuda":
        warnings.warn("--tf32 is ignored on a CPU", stacklevel=2)
    dataset = open_dataset(
        args.data_dir,
        image_size=args.image_size,
        **args_to_dict(args, READING[1:]),
        extensions=extensions_in(Path(args.out).expanduser()),
    )
    if not isinstance(dataset, SourceDataset):
        raise ValueError(f"--data_dir {args.data_dir}: give a folder of images; this is not one to encode")
    autoencoder = load_first_stage(args.vae_path, device)
    if not isinstance(autoencoder, Autoencoder):
        raise ValueError(f"--vae_path {args.vae_path}: nothing to encode in pixel space; give an autoencoder")
    if args.image_size % autoencoder.downsample:
        raise ValueError(
            f"--image_size {args.image_size}: must be a multiple of {autoencoder.downsample}, the first stage's"
        )

    def claim() -> tuple[CacheRecord, bool]:
        """On rank 0: what will be in the folder, and whether it is not yet."""
        record, index = describe(args, dataset, autoencoder)
        try:
            return record, ShardFiles(Path(args.out).expanduser(), record).claim(index)
        except OSError as error:
            raise ValueError(f"--out {args.out}: cannot write there ({error.strerror})") from error

    # The processes meet once, before the work, and never again: none of them waits for a slow one.
    with dist_util.joined_ranks(place, device, args.dist_url) as ranks:
        if ranks.is_main:
            sys.stderr.write("".join(f"{line}\n" for line in (f"data: {dataset}", *dataset.notes)))
        record, needed = ranks.from_main_patiently(claim, f"looking at the files in {args.data_dir} and {args.out}")
    shards = ShardFiles(Path(args.out).expanduser(), record)
    encode = partial(
        encode_shards,
        dataset,
        autoencoder,
        shards,
        batch_size=args.batch_size,
        num_workers=num_workers,
        device=device,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return partial(work, shards, encode if needed else None, ranks)


def describe(
    args: argparse.Namespace, dataset: SourceDataset, autoencoder: Autoencoder
) -> tuple[CacheRecord, SourceIndex]:
    """The record of the latents to make, and the list of the images they are made of."""
    source = dataset.source
    index = SourceIndex(list(source.names), source.sizes(), dataset.labels)
    side = args.image_size // autoencoder.downsample
    record = CacheRecord(
        **autoencoder.description,
        vae_sha256=autoencoder.weights_sha256(),
        image_size=args.image_size,
        latent_shape=[autoencoder.latent_channels, side, side],
        dtype=args.dtype,
        mirrored=args.random_flip,
        shard_size=args.shard_size,
        num_images=len(dataset),
        class_names=dataset.class_names if args.class_cond else None,
        data_dir=absolute(source.data_dir),
        source_sha256=index.sha256(),
        columns={name: getattr(args, name) for name in ("image_column", "label_column") if getattr(args, name)},
        extensions=list(dataset.extensions),
        posterior=autoencoder.stochastic,
        normalize=args.normalize,
    )
    return record, index


def work(shards: ShardFiles, encode: Callable[[], None] | None, ranks: Ranks) -> None:
    if encode is not None:
        todo = sum(len(shards.indices(shard)) for shard in shards.missing(0, 1))
        start = time.monotonic()
        encode()
        if ranks.is_main:
            shards.finish()
            rate = todo / (time.monotonic() - start)
            largest, rms = shards.rounding()
            sys.stderr.write(
                f"encoded {todo} images, {rate:.2f} per second; storing as {shards.record.dtype} moved the numbers by "
                f"{rms:.2g} (root mean square), at most {largest:.2g}\n"
            )
    elif ranks.is_main:
        sys.stderr.write("these latents are already complete\n")
    if ranks.is_main:
        sys.stdout.write(f"{shards.parts_folder.absolute()}\n")


if __name__ == "__main__":
    sys.exit(main())

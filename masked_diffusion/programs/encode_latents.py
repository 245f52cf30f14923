"""Encode images once, from checked flags."""

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from masked_diffusion import dist_util
from masked_diffusion.data.data_config import READING
from masked_diffusion.data.exported_features import ExportedFeatures
from masked_diffusion.data.latent_cache import CacheRecord, ShardFiles, SourceIndex, extensions_in
from masked_diffusion.data.latent_encoding import encode_shards
from masked_diffusion.data.sources import absolute
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import Autoencoder, load_first_stage
from masked_diffusion.image_datasets import SourceDataset, open_dataset
from masked_diffusion.script_util import (
    args_to_dict,
    choose_num_workers,
    place_from_args,
)


def prepare(args: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
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

    sizes, path = batch_sizes(len(dataset), args.shard_size, args.batch_size), Path(args.features).expanduser()
    features = ExportedFeatures(path, device, args.image_size, sizes) if args.features else None
    settings = args_to_dict(args, ("dtype", "shard_size", "normalize")) | {
        "mirrored": args.random_flip,
        "class_names": dataset.class_names if args.class_cond else None,
        "columns": {name: value for name in ("image_column", "label_column") if (value := getattr(args, name))},
    }

    def claim() -> tuple[CacheRecord, bool]:
        """On rank 0: what will be in the folder, and whether it is not yet."""
        record, index = describe(dataset, autoencoder, features, settings)
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
        ranks,
        batch_size=args.batch_size,
        num_workers=num_workers,
        features=features,
    )
    return partial(work, shards, encode if needed else None, ranks)


def batch_sizes(num_images: int, shard_size: int, batch_size: int) -> set[int]:
    """The sizes of the batches that the files of latents are made of, for a network that may take some only."""
    files = {min(shard_size, num_images), num_images % shard_size} - {0}  # images in each
    return {size for number in files for size in (min(batch_size, number), number % batch_size)} - {0}


def describe(
    dataset: SourceDataset, autoencoder: Autoencoder, features: ExportedFeatures | None, settings: dict[str, Any]
) -> tuple[CacheRecord, SourceIndex]:
    """The record of the latents to make, and the list of the images they are made of. settings: of the record."""
    index = SourceIndex(dataset.source.names, dataset.source.sizes(), dataset.labels)
    side = dataset.image_size // autoencoder.downsample
    record = CacheRecord(
        **autoencoder.description,
        vae_sha256=autoencoder.weights_sha256(),
        image_size=dataset.image_size,
        latent_shape=[autoencoder.latent_channels, side, side],
        num_images=len(dataset),
        data_dir=absolute(dataset.source.data_dir),
        source_sha256=index.sha256(),
        extensions=list(dataset.extensions),
        posterior=autoencoder.stochastic,
        **(features.description() if features is not None else {}),
        **settings,
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

"""Encode all images of a data set into the shards of a latent cache: images -> autoencoder -> moments -> a file."""

import contextlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.data.exported_features import ExportedFeatures
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.data.latent_cache import ShardFiles
from masked_diffusion.dist_util import Ranks
from masked_diffusion.first_stage import Autoencoder
from masked_diffusion.processes.loader_processes import iterate
from masked_diffusion.processes.resumable_parts import make_parts


class _Images(Dataset[np.ndarray]):
    """Index -> image. An unreadable image is all NaN, which makes its moments NaN and no other's."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            return self.dataset.load(index)
        except UnreadableImageError:
            side = self.dataset.image_size
            return np.full((self.dataset.channels, side, side), np.nan, dtype=np.float32)


def encode_shards(
    dataset: ImageDataset,
    autoencoder: Autoencoder,
    shards: ShardFiles,
    ranks: Ranks,
    *,
    batch_size: int,
    num_workers: int,
    features: ExportedFeatures | None = None,
) -> None:
    """Write this rank's missing shards. Rank 0 then waits for the other ranks' shards.

    dataset: gives centre crops. batch_size: images encoded at once. features: makes what is kept beside the
    latents. Names unreadable images on stderr and marks them in the cache.
    """
    missing = shards.missing(ranks.rank, ranks.world_size)
    of_shard = {shard: _batches(shards.indices(shard), batch_size) for shard in missing}
    # One loader over all shards, so that it reads the next one's images while this one's are encoded.
    images_of_all = iterate(
        _Images(dataset),
        num_workers,
        batch_sampler=[batch for shard in missing for batch in of_shard[shard]],
        pin_memory=ranks.device.type == "cuda",
        name_of=dataset.name_of,
    )

    def encode_shard(shard: int, tell: Callable[[int], object]) -> None:
        made: dict[str, list[Tensor]] = {name: [] for name in shards.record.tensor_shapes}
        for indices in of_shard[shard]:
            images: Tensor = next(loaded)  # (n, 3, H, W)
            _name_unreadable(dataset, indices, images)
            images = images.to(ranks.device, non_blocking=True)
            views = [images, images.flip(-1)]  # as many as the record has names
            for name, view in zip(shards.record.moments_names, views, strict=False):
                made[name].append(autoencoder.moments(view).cpu())
            if features is not None:
                for name, view in zip(shards.record.features_names, views, strict=False):
                    made[name].append(features(view))
            tell(len(images))
        shards.write_part(shard, {name: torch.cat(parts) for name, parts in made.items()})

    with contextlib.closing(images_of_all) as loaded:
        make_parts(shards, encode_shard, ranks, missing)


def _batches(indices: range, batch_size: int) -> list[list[int]]:
    return [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]


def _name_unreadable(dataset: ImageDataset, indices: Sequence[int], images: Tensor) -> None:
    for row in images[:, 0, 0, 0].isnan().nonzero().flatten().tolist():
        try:
            dataset.load(indices[row])
        except UnreadableImageError as error:
            sys.stderr.write(f"left out: {error}\n")

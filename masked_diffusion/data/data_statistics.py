"""What is measured of data before a training: the deviation of its latents, and mean and deviation of its pixels."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from masked_diffusion.data.dataset import ImageDataset
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.first_stage import ChannelStatistics, FirstStage
from masked_diffusion.processes.reading_thread import read_watched
from masked_diffusion.randomness import numpy_generator

SIGMA_DATA_IMAGES = 1000
NORMALISING_IMAGES, NEIGHBOURS = 2000, 50  # neighbours often lie in one block of an archive, which is read once


def images_at(dataset: ImageDataset, indices: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
    """Those of these images that can be read, (1, C, H, W) each, with their indices. A training replaces the others,
    and says so."""
    for index in indices:
        with contextlib.suppress(UnreadableImageError):
            yield index, torch.from_numpy(read_watched(partial(dataset.load, index), dataset.name_of(index)))[None]


def spread_images(dataset: ImageDataset, most: int) -> Iterator[Tensor]:
    """At most so many images of a data set, spread over it, that can be read: (1, C, H, W) each."""
    places = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).round().astype(int).tolist()
    return (image for _, image in images_at(dataset, places))


def spread_groups(number: int, most: int, neighbours: int) -> list[int]:
    """Indices of at most so many of a number of images: groups of neighbours, spread evenly."""
    if number <= most:
        return list(range(number))
    starts = np.linspace(0, number - neighbours, most // neighbours).round().astype(int).tolist()
    return [index for start in starts for index in range(start, start + neighbours)]


def deviation_of_latents(dataset: ImageDataset, first_stage: FirstStage, device: torch.device) -> float:
    """Standard deviation of the latents of the first 1,000 images, to three digits; the same each time.

    Raises ValueError where it is 0.
    """
    count = total = squares = 0.0
    side = dataset.image_size // first_stage.downsample
    for index, image in images_at(dataset, range(min(len(dataset), SIGMA_DATA_IMAGES))):
        drawn = numpy_generator("sigma_data", index).standard_normal((1, first_stage.latent_channels, side, side))
        z = first_stage.encode(image.to(device), torch.from_numpy(drawn).float().to(device)).double()
        count, total, squares = count + z.numel(), total + z.sum().item(), squares + (z**2).sum().item()
    deviation = math.sqrt(max(0.0, squares / count - (total / count) ** 2)) if count else 0.0
    if not deviation > 0:
        raise ValueError("--objective edm: all latents are alike, so their deviation is 0; give it with --sigma_data")
    return float(f"{deviation:.3g}")


def pixel_statistics(dataset: ImageDataset) -> ChannelStatistics:
    """Mean and deviation of each channel over at most 2,000 images, in groups spread over the data, to six digits.

    A channel of one value has the deviation 1. Raises ValueError where none of the images can be read.
    """
    moments = [
        torch.stack([image.double().mean(dim=(0, 2, 3)), image.double().square().mean(dim=(0, 2, 3))])
        for _, image in images_at(dataset, spread_groups(len(dataset), NORMALISING_IMAGES, NEIGHBOURS))
    ]
    if not moments:
        raise ValueError("--normalize channel: none of the images that would be measured can be read")
    mean, square = torch.stack(moments).mean(dim=0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6, std, 1.0)
    rounded = (tuple(float(f"{number:.6g}") for number in numbers.tolist()) for numbers in (mean, std))
    return ChannelStatistics(*rounded)

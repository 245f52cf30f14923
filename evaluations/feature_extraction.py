"""From images to features and their statistics. What computes the features is a backend behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from fidelity_metrics import RunningMoments, Statistics
from sample_sets import ImageSet


class FeatureBackend(Protocol):
    """A network that turns images into the features of the suite."""

    sha256: str  # of the weights: features of another network are not comparable
    softmax_weight: np.ndarray  # (D, classes) float32, without bias

    def widths(self, height: int, width: int) -> tuple[int, int]:
        """Widths (D, D_s) of the pool and the spatial features of images of this size; raises ValueError."""
        ...

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, H, W, 3) -> pool features (n, D) and spatial features (n, D_s), float32."""
        ...


@dataclass(frozen=True)
class Features:
    """What a set of N images is reduced to.

    Pool features (N, D) float32 are kept, the manifolds need them; of the spatial features only the moments are.
    """

    pool: np.ndarray
    pool_statistics: Statistics
    spatial_statistics: Statistics


def extract_features(
    images: ImageSet, backend: FeatureBackend, batch_size: int, progress: Callable[[int, int], None]
) -> Features:
    """Run every image through the backend, once, in order.

    batch_size: images per call of the backend. progress(done, N) is called after each.
    Raises ValueError when the file is damaged or the backend returns features that are not finite.
    """
    if images.count is None or images.image_size is None:
        raise ValueError(f"{images.path}: no images to compute features of")
    pool_width, spatial_width = backend.widths(*images.image_size)
    pool = np.empty((images.count, pool_width), dtype=np.float32)
    pool_moments, spatial_moments = RunningMoments(pool_width), RunningMoments(spatial_width)
    done = 0
    for batch in images.batches(batch_size):
        pool_batch, spatial_batch = backend(batch)
        if not (np.isfinite(pool_batch).all() and np.isfinite(spatial_batch).all()):
            raise ValueError(f"{images.path}: the network gives NaN or infinite features for images from {done} on")
        pool[done : done + len(batch)] = pool_batch
        pool_moments.add(pool_batch)
        spatial_moments.add(spatial_batch)
        done += len(batch)
        progress(done, images.count)
    return Features(pool, pool_moments.statistics(), spatial_moments.statistics())

"""From images to features and their statistics. What computes the features is a backend behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from fidelity_metrics import RunningMoments, Statistics, manifold_radii
from process_share import ALONE, Share
from sample_sets import ImageSource


class FeatureBackend(Protocol):
    """A network that turns images into the features of the suite."""

    path: Path
    sha256: str  # of the weights
    identity: str  # of weights and the library that runs them: other features are not comparable to the last digit
    versions: dict[str, str]  # of that library, by its name
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

    Pool features (N, D) float32 are kept, the manifolds need them (None for a set known by its statistics only); of the
    spatial features only the moments are, unless asked for.
    """

    pool: np.ndarray | None
    pool_statistics: Statistics
    spatial_statistics: Statistics
    spatial: np.ndarray | None = None  # (N, D_s)
    radii: dict[str, np.ndarray] = field(default_factory=dict)  # known radii of the manifold, by type of the distances

    def manifold_radii(self, half: bool) -> np.ndarray:
        """Radii (N,) of the set's manifold, computed once."""
        kind = distance_type(half)
        if kind not in self.radii:
            assert self.pool is not None
            self.radii[kind] = manifold_radii(self.pool, half)
        return self.radii[kind]


def distance_type(half: bool) -> str:
    """Name of the type that distances are computed in."""
    return "float16" if half else "float32"


def features_of_batches(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    statistics: tuple[Statistics, Statistics] | None = None,
    keep_spatial: bool = False,
    keep_pool: bool = True,
    name: str = "images",
) -> Features:
    """Collect (pool (n, D), spatial (n, D_s)) features of consecutive batches.

    statistics: take these for the set's and compute none. keep_spatial, keep_pool: what to keep of each image.
    name: of the set, for messages.
    Raises ValueError when a feature is not finite, and for fewer than 2 images.
    """
    pools, spatials = list[np.ndarray](), list[np.ndarray]()
    moments = (RunningMoments(), RunningMoments())
    done = 0
    for pool, spatial in batches:
        if not (np.isfinite(pool).all() and np.isfinite(spatial).all()):
            raise ValueError(f"{name}: the network gives NaN or infinite features for images from {done} on")
        if keep_pool:
            pools.append(pool)
        if keep_spatial:
            spatials.append(spatial)
        if statistics is None:
            for running, batch in zip(moments, (pool, spatial), strict=True):
                running.add(batch)
        done += len(pool)
    pool_statistics, spatial_statistics = statistics or (moments[0].statistics(), moments[1].statistics())
    return Features(_joined(pools), pool_statistics, spatial_statistics, _joined(spatials))


def _joined(batches: list[np.ndarray]) -> np.ndarray | None:
    return np.concatenate(batches) if batches else None


def extract_features(
    images: ImageSource,
    backend: FeatureBackend,
    batch_size: int,
    progress: Callable[[int, int], None],
    share: Share = ALONE,
    keep_spatial: bool = False,
) -> Features | None:
    """Run every image of a set through the backend, once, in order. The set's own statistics replace computed ones.

    batch_size: images per call of the backend. progress(done, N) is called after each. share: this process's part of
    the batches; every process calls this, the first one returns the features and the others None. A batch holds the
    same images whatever the number of processes, and statistics add them up in their order, so that numbers agree.
    Raises ValueError when the file is damaged or the backend returns features that are not finite.
    """
    count = images.count
    if count is None:
        raise ValueError(f"{images.path}: no images to compute features of")
    total = -(-count // batch_size)

    def computed() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for batch in images.batches(batch_size, share.rank, share.size):
            yield backend(batch)

    def reported() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for index, features in enumerate(share.in_order(computed(), total)):
            yield features
            progress(min(count, (index + 1) * batch_size), count)

    if share.rank != 0:
        for _ in share.in_order(computed(), total):
            pass
        return None
    return features_of_batches(reported(), images.statistics, keep_spatial, name=str(images.path))

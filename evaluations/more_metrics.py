"""Numbers beside the suite's five: kernel distance, distances by class, confidence intervals, nearest neighbours.

As in fidelity_metrics.py, features go in and numbers come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from distances import slices, squared_distances
from feature_extraction import Features
from fidelity_metrics import RunningMoments, Statistics, drawn_within_splits, frechet_distance, inception_score

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
NORMAL_95 = 1.96  # standard deviations around the mean that hold 95 % of a normal distribution
_ROWS = 1000  # of a block of distances


def statistics_of(features: np.ndarray) -> Statistics:
    """Mean and covariance of (N, D) features, N >= 2."""
    moments = RunningMoments()
    moments.add(features)
    return moments.statistics()


def kernel_distance(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """KID: mean and standard deviation over subsets of the unbiased squared MMD with the kernel (x·y / D + 1)³.

    reference, samples: (N, D) and (M, D). Subsets are torch-fidelity's: 100 of 1,000 vectors each, of fewer where a set
    is smaller, drawn by its generator. The mean may be a little below 0. Source: 1801.01401, Sec. 4.
    """
    size = min(KID_SUBSET_SIZE, len(reference), len(samples))
    rng = np.random.RandomState(KID_SEED)
    distances = []
    for _ in range(KID_SUBSETS):
        x = samples[rng.choice(len(samples), size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        within = sum((_kernel(z, z).sum() - _kernel_diagonal(z).sum()) for z in (x, y)) / (size * (size - 1))
        distances.append(within - 2.0 * _kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _kernel_diagonal(x: np.ndarray) -> np.ndarray:
    return (np.square(x).sum(axis=1) / x.shape[1] + 1.0) ** 3


def distances_by_class(
    reference: np.ndarray, reference_labels: np.ndarray, samples: np.ndarray, sample_labels: np.ndarray
) -> dict[str, float]:
    """Fréchet distance of each class that has at least 2 vectors in both sets, by its label."""
    found = {}
    for label in shared_classes(reference_labels, sample_labels):
        both = reference[reference_labels == label], samples[sample_labels == label]
        found[str(label)] = frechet_distance(*(statistics_of(part) for part in both))
    return found


def shared_classes(reference_labels: np.ndarray, sample_labels: np.ndarray) -> list[int | str]:
    """Labels that at least 2 images have in both sets, sorted. Labels of both are integers, or names."""
    often = [set[int | str]() for _ in range(2)]
    for found, labels in zip(often, (reference_labels, sample_labels), strict=True):
        values, counts = np.unique(labels, return_counts=True)
        found.update(values[counts >= 2].tolist())
    return sorted(often[0] & often[1])


def confidence_intervals(
    metrics: dict[str, float | None],
    reference: Features,
    samples: Features,
    softmax_weight: np.ndarray,
    inside: tuple[np.ndarray, np.ndarray] | None,
    repeats: int,
    order: np.ndarray | None = None,
) -> dict[str, tuple[float, float]]:
    """95 % intervals of the suite's numbers: value ± 1.96 standard deviations over bootstrap samples.

    Samples are drawn again with replacement; of precision and recall, the images that are judged, the manifolds staying
    as they are; of the Inception Score, each split from itself. order: of the samples in those splits. The deviation is
    used and not the quantiles, because a distance of repeated samples is larger than that of the samples by as much as
    fewer samples would make it.
    """
    assert samples.pool is not None and samples.spatial is not None
    rng = np.random.default_rng(0)
    pool, spatial = samples.pool, samples.spatial
    draws: dict[str, list[float]] = {name: [] for name, value in metrics.items() if value is not None}
    for _ in range(repeats):
        drawn = rng.integers(0, len(pool), len(pool))
        positions = drawn_within_splits(drawn)  # a split of one class stays one
        in_order = positions if order is None else order[positions]
        draws["Inception Score"].append(inception_score(pool, softmax_weight, order=in_order))
        draws["FID"].append(frechet_distance(reference.pool_statistics, statistics_of(pool[drawn])))
        draws["sFID"].append(frechet_distance(reference.spatial_statistics, statistics_of(spatial[drawn])))
        if inside is not None:
            draws["Precision"].append(float(inside[0][drawn].mean()))
            draws["Recall"].append(float(rng.choice(inside[1], len(inside[1])).mean()))
    intervals = {}
    for name, values in draws.items():
        value, margin = metrics[name], NORMAL_95 * float(np.std(values, ddof=1))
        assert value is not None
        intervals[name] = (value - margin, value + margin)
    return intervals


def nearest_neighbours(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (M, k) into the reference of each sample's nearest vectors, nearest first, and distances (M, k)."""
    k = min(k, len(reference))
    indices = np.empty((len(samples), k), dtype=np.int64)
    squares = np.empty((len(samples), k), dtype=np.float32)
    for rows in slices(len(samples), _ROWS):
        block = squared_distances(samples[rows], reference, half=False)
        nearest = np.sort(np.argpartition(block, k - 1, axis=1)[:, :k], axis=1)  # of equal ones, the first is first
        distances = np.take_along_axis(block, nearest, axis=1)
        order = np.argsort(distances, axis=1, kind="stable")
        indices[rows] = np.take_along_axis(nearest, order, axis=1)
        squares[rows] = np.take_along_axis(distances, order, axis=1)
    return indices, np.sqrt(squares)


def pick_images(batches: Callable[[int], Iterable[np.ndarray]], indices: Iterable[int]) -> dict[int, np.ndarray]:
    """Some images (H, W, 3) of a set by their index. batches: of the set."""
    wanted, start, found = set(map(int, indices)), 0, dict[int, np.ndarray]()
    for batch in batches(256):
        found |= {index: batch[index - start] for index in wanted if start <= index < start + len(batch)}
        start += len(batch)
    return found

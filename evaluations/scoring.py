"""The five numbers of the suite, from features or straight from images: what a program calls that has its own images.

A training that scores its samples puts this folder on `sys.path` and calls `evaluate`; see README.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from feature_extraction import FeatureBackend, Features, features_of_batches
from fidelity_metrics import frechet_distance, inception_score, inside_manifolds


def evaluate(
    reference: Features, images: Iterable[np.ndarray], backend: FeatureBackend, half: bool = True
) -> dict[str, float | None]:
    """Score images that need not lie in a file.

    reference: features of the reference, such as `extract_features` returns; roots and radii that are computed on the
    way stay in it, so that the next call is faster. images: batches of uint8 (n, H, W, 3) in 0…255, at least 2 images
    together. backend: an InceptionGraph or a TorchInception. half: distances in float16, as published numbers are.
    Returns the numbers by their printed names; None for those that need reference images which are not there.
    Raises ValueError as `features_of_batches`.
    """
    samples = features_of_batches(backend(batch) for batch in images)
    return score(reference, samples, backend.softmax_weight, judge_manifolds(reference, samples, half))


def score(
    reference: Features,
    samples: Features,
    softmax_weight: np.ndarray,
    inside: tuple[np.ndarray, np.ndarray] | None,
    order: np.ndarray | None = None,
) -> dict[str, float | None]:
    """The numbers of the suite by their printed names, as `evaluate`.

    softmax_weight: (D, classes) of the network. inside: what `judge_manifolds` says of the sets. order: of the samples
    in the splits of the Inception Score (None: as they are).
    """
    assert samples.pool is not None
    metrics: dict[str, float | None] = {
        "Inception Score": inception_score(samples.pool, softmax_weight, order=order),
        "FID": frechet_distance(reference.pool_statistics, samples.pool_statistics),
        "sFID": frechet_distance(reference.spatial_statistics, samples.spatial_statistics),
        "Precision": None,
        "Recall": None,
    }
    if inside is not None:
        metrics["Precision"], metrics["Recall"] = (float(part.mean()) for part in inside)
    return metrics


def judge_manifolds(reference: Features, samples: Features, half: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Which samples (M,) lie in the reference's manifold and which of the reference (N,) in the samples'.

    None without features of both.
    """
    if reference.pool is None or samples.pool is None:
        return None
    return inside_manifolds(reference.pool, samples.pool, half, reference.manifold_radii(half))

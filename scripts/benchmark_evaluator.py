"""Compare the evaluator's arithmetic after the features with the ADM suite's, part by part, on the same features.

    OMP_NUM_THREADS=2 python scripts/benchmark_evaluator.py

The suite's: covariances by numpy.cov, scipy's square root of their product, distances in float16 blocks by TensorFlow,
partitions of whole rows. Features are made here: not negative, correlated, with a spectrum that falls over six orders
of magnitude. Prints one JSON object.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_info

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "evaluations"))

from feature_extraction import Features  # noqa: E402
from fidelity_metrics import (  # noqa: E402
    NEIGHBOURS,
    RunningMoments,
    Statistics,
    frechet_distance,
    inception_score,
    inside_manifolds,
)

POOL, SPATIAL, CLASSES, SPLIT = 2048, 2023, 1008, 5000
BATCH = 64  # vectors that arrive at a time
MEMORY = 3 * 2**30  # bytes


class Clock:
    """Seconds of the parts of one way to compute the numbers: on the wall, and of all threads' work."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.wall, self.work = dict[str, float](), dict[str, float]()

    def __call__(self, part: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        wall, work = time.perf_counter(), time.process_time()
        result = compute(*arguments)
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.work[part] = self.work.get(part, 0.0) + time.process_time() - work
        print(f"{self.name}: {part}: {self.wall[part]:.1f} s", file=sys.stderr, flush=True)
        return result


def make_features(count: int, width: int, seed: int, shift: float) -> np.ndarray:
    """(count, width) float32 features, of the same distribution for every seed but for the shift."""
    mixing = np.random.default_rng(width).standard_normal((width, width), np.float32) / np.float32(np.sqrt(width))
    spread = np.logspace(0, -3, width, dtype=np.float32)
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((count, width), np.float32) * spread) @ mixing
    return np.abs(features) + np.float32(0.3 + shift)


def score_as_the_suite(clock: Clock, sets: list[tuple[np.ndarray, np.ndarray]], weight: np.ndarray) -> dict[str, float]:
    """ADM's arithmetic. sets: pool and spatial features of the reference and of the samples."""
    (pool_reference, _), (pool_samples, _) = sets
    numbers = {"Inception Score": clock("Inception Score", suite_score, pool_samples, weight)}
    for name, place in (("FID", 0), ("sFID", 1)):
        moments = [clock("means and covariances", suite_moments, features[place]) for features in sets]
        (mu, sigma), (other_mu, other_sigma) = moments
        root = clock(f"{name}: sqrtm", suite_root, sigma, other_sigma)
        delta = mu - other_mu
        numbers[name] = float(delta @ delta + np.trace(sigma) + np.trace(other_sigma) - 2 * np.trace(root).real)
    radii = [clock("precision and recall: radii", suite_radii, pool) for pool in (pool_reference, pool_samples)]
    inside = clock("precision and recall: pairs", suite_pairs, pool_reference, pool_samples, *radii)
    return numbers | {"Precision": float(inside[0].mean()), "Recall": float(inside[1].mean())}


def suite_moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


def suite_root(sigma: np.ndarray, other: np.ndarray) -> np.ndarray:
    return scipy.linalg.sqrtm(sigma.dot(other))


def suite_pairs(
    reference: np.ndarray, samples: np.ndarray, reference_radii: np.ndarray, sample_radii: np.ndarray
) -> tuple[Any, Any]:
    distances = suite_distances(reference, samples)
    return (distances <= reference_radii[:, None]).any(axis=0), (distances <= sample_radii[None]).any(axis=1)


def suite_score(pool: np.ndarray, weight: np.ndarray) -> float:
    logits = pool @ weight
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(p), SPLIT):
        part = p[start : start + SPLIT]
        divergence = (part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))).sum(axis=1).mean()
        scores.append(np.exp(divergence))
    return float(np.mean(scores))


def suite_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One block of squared distances, in float16 unless an entry overflows."""
    import tensorflow as tf

    def block(u: Any, v: Any) -> Any:
        norm_u, norm_v = tf.reduce_sum(tf.square(u), 1)[:, None], tf.reduce_sum(tf.square(v), 1)[None]
        return tf.maximum(norm_u - 2 * tf.matmul(u, v, transpose_b=True) + norm_v, 0.0)

    half = block(tf.cast(u, tf.float16), tf.cast(v, tf.float16))
    if tf.reduce_all(tf.math.is_finite(half)):
        return tf.cast(half, tf.float32).numpy()
    return block(tf.constant(u), tf.constant(v)).numpy()


def suite_radii(features: np.ndarray) -> np.ndarray:
    nearest = np.partition(suite_distances(features, features), np.arange(NEIGHBOURS + 1), axis=1)
    return nearest[:, NEIGHBOURS]


def describe(clock: Clock, features: tuple[np.ndarray, np.ndarray]) -> Features:
    """Moments of pool and spatial features, that arrive in batches."""
    statistics = [clock("means and covariances", moments_of_batches, values) for values in features]
    return Features(features[0], *statistics)


def moments_of_batches(features: np.ndarray) -> Statistics:
    moments = RunningMoments()
    for start in range(0, len(features), BATCH):
        moments.add(features[start : start + BATCH])
    return moments.statistics()


def root(statistics: Statistics) -> np.ndarray:
    return statistics.root


def score_here(clock: Clock, reference: Features, samples: Features, weight: np.ndarray) -> dict[str, float]:
    """The evaluator's arithmetic. What is known of the reference is not computed again."""
    numbers = {"Inception Score": clock("Inception Score", inception_score, samples.pool, weight)}
    for name, a, b in (
        ("FID", reference.pool_statistics, samples.pool_statistics),
        ("sFID", reference.spatial_statistics, samples.spatial_statistics),
    ):
        clock(f"{name}: root of the reference", root, a)
        numbers[name] = clock(f"{name}: trace of the root", frechet_distance, a, b)
    radii = clock("precision and recall: radii of the reference", reference.manifold_radii, True)
    part = "precision and recall: the rest"
    inside = clock(part, inside_manifolds, reference.pool, samples.pool, True, radii)
    return numbers | {"Precision": float(inside[0].mean()), "Recall": float(inside[1].mean())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the evaluator's arithmetic beside the ADM suite's.")
    parser.add_argument("--count", type=int, default=10_000, help="feature vectors in each of the two sets")
    count = parser.parse_args(argv).count
    sets = [
        (make_features(count, POOL, seed, shift), make_features(count, SPATIAL, seed, shift))
        for seed, shift in ((0, 0.0), (1, 0.005))
    ]
    weight = np.random.default_rng(0).standard_normal((POOL, CLASSES), np.float32) / 8
    np.ones(MEMORY, np.uint8)  # a virtual machine's memory costs the one who touches it first
    first, cached, suite = Clock("evaluator"), Clock("evaluator, cached reference"), Clock("suite")
    reference = describe(first, sets[0])
    numbers = {
        "evaluator": score_here(first, reference, describe(first, sets[1]), weight),
        "evaluator, cached reference": score_here(cached, reference, describe(cached, sets[1]), weight),
        "suite": score_as_the_suite(suite, sets, weight),
    }
    clocks = (first, cached, suite)
    totals = {clock.name: sum(clock.wall.values()) for clock in clocks}
    work = {clock.name: sum(clock.work.values()) for clock in clocks}
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "kernels": [library["architecture"] for library in threadpool_info() if "architecture" in library],
        "count": count,
        "numbers": numbers,
        "seconds": {clock.name: clock.wall for clock in clocks},
        "processor_seconds": {clock.name: clock.work for clock in clocks},
        "total_seconds": totals,
        "times_faster": {name: totals["suite"] / total for name, total in totals.items()},
        "times_less_work": {name: work["suite"] / total for name, total in work.items()},
    }
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The metrics of the ADM suite as plain numpy: moments, Fréchet distance, Inception Score, precision and recall.

Nothing here knows files or networks: features go in, numbers come out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from distances import mutual_distances, slices, squared_distances

NEIGHBOURS = 3  # k of the manifolds' radii (ADM suite)
BLOCK = 10_000  # rows and columns of a distance block: ADM decides per such block whether float16 is enough
SPLIT_SIZE = 5_000  # samples in a split of the Inception Score
SPREAD_SEED = 2016  # of the order in which samples are spread over the splits
TOLERANCE = 1e-8  # of a Fréchet distance, relative to the covariances' traces
_TILE = 1_000  # samples of a split computed at once; bounds memory, changes no result


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of feature vectors: `mu` (D,), `sigma` (D, D), float64.

    known_root: a root of sigma that was computed earlier.
    """

    mu: np.ndarray
    sigma: np.ndarray
    known_root: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def root(self) -> np.ndarray:
        """F (D, r) with F Fᵀ = sigma, computed once."""
        return _factor(self.sigma) if self.known_root is None else self.known_root


class RunningMoments:
    """Mean and unbiased covariance of (n, D) batches, accumulated in float64 without keeping the batches.

    Deviations are taken from the mean of D consecutive vectors and then moved to the common one (Chan, Golub and
    LeVeque 1983): raw second moments would lose the digits of features whose mean is large beside their spread.
    Vectors are counted off in the order they come in, so the size of the batches changes nothing. Of D or fewer
    vectors the deviations themselves are the root of the covariance.
    """

    def __init__(self) -> None:
        self.count = 0  # of the vectors in mean and scatter
        self._chunk = np.empty((0, 0), dtype=np.float32)  # (D, D): room for vectors that wait
        self._waiting = 0
        self._mean: np.ndarray = np.zeros(0)
        self._scatter: np.ndarray = np.zeros((0, 0))

    def add(self, batch: np.ndarray) -> None:
        """Take in a batch of feature vectors, (n, D) with n >= 1."""
        width = batch.shape[1]
        if not len(self._chunk):
            self._chunk = np.empty((width, width), dtype=batch.dtype)
        taken = 0
        while taken < len(batch):
            if self._waiting == width:  # only now, so that D vectors wait for what comes
                self._merge(self._chunk)
                self._waiting = 0
            rows = batch[taken : taken + width - self._waiting]
            self._chunk[self._waiting : self._waiting + len(rows)] = rows
            self._waiting += len(rows)
            taken += len(rows)

    def _merge(self, chunk: np.ndarray) -> None:
        count, width = chunk.shape
        if not self.count:
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        mean = chunk.mean(axis=0, dtype=np.float64)
        delta = mean - self._mean
        total = self.count + count
        spread = np.empty((count + 1, width))
        np.subtract(chunk, mean, out=spread[:-1])
        spread[-1] = delta * np.sqrt(self.count * count / total)  # the shift of the mean counts as one more row
        self._scatter += spread.T @ spread
        self._mean += delta * (count / total)
        self.count = total

    def statistics(self) -> Statistics:
        """Mean and covariance (divisor count - 1). Raises ValueError when fewer than 2 vectors came in."""
        count, waiting = self.count + self._waiting, self._chunk[: self._waiting]
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, got {count}")
        if not self.count:
            rows = waiting.astype(np.float64)
            root = np.ascontiguousarray((rows - rows.mean(axis=0)).T) / np.sqrt(count - 1)  # (D, n)
            return Statistics(rows.mean(axis=0), root @ root.T, root)
        if len(waiting):
            self._merge(waiting)
            self._waiting = 0
        return Statistics(self._mean.copy(), self._scatter / (count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance between two Gaussians: |mu_a - mu_b|² + tr(A + B - 2 (Fᵀ B F)^½) with A = F Fᵀ.

    Everything in float64. `a.root` is kept: give the set that is compared more than once first.

    a, b: statistics of the same width D. Returns a float >= 0; exactly 0 for equal statistics.
    Raises ValueError when the widths differ. Source: FID, 1706.08500, Eq. 6.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"statistics of different widths: {len(a.mu)} and {len(b.mu)}")
    if np.array_equal(a.mu, b.mu) and np.array_equal(a.sigma, b.sigma):
        return 0.0
    delta = a.mu - b.mu
    traces = float(np.trace(a.sigma) + np.trace(b.sigma))
    distance = delta @ delta + traces - 2.0 * _trace_of_root(a, b, TOLERANCE * traces)
    return max(0.0, float(distance))


def _trace_of_root(a: Statistics, b: Statistics, tolerance: float) -> float:
    """tr (Fᵀ B F)^½ from the eigenvalues of that symmetric matrix, where they are exact enough for their roots.

    The root of an eigenvalue that is a rounding error is a large number beside it. When all of these errors may exceed
    the tolerance, the roots are computed themselves, as the singular values of Fᵀ G with B = G Gᵀ. That takes several
    times as long, except for the narrow roots of few samples.
    """
    if any(root is not None and root.shape[1] <= len(root) // 2 for root in (a.root, b.known_root)):
        return _overlap(a, b)
    product = a.root.T @ b.sigma @ a.root
    with _one_thread():
        values = np.linalg.eigvalsh(product)
    noise = np.sqrt(len(values)) * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    certain = values[values > noise]  # the others count as 0
    error = (noise / (2.0 * np.sqrt(certain))).sum() + (len(values) - len(certain)) * np.sqrt(noise)
    return float(np.sqrt(certain).sum()) if error <= tolerance else _overlap(a, b)


def _one_thread() -> AbstractContextManager[object]:
    """Linear algebra on one thread inside the block, where threadpoolctl is installed.

    Half of the work for eigenvalues is products of a matrix with a vector, and OpenBLAS's threads wait, busily, for
    each other at every one of them: where the machine has other work, two take five times as long as one.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # slower, the same numbers
        return nullcontext()
    return threadpool_limits(1, user_api="blas")


def _overlap(a: Statistics, b: Statistics) -> float:
    product = a.root.T @ b.root
    with _one_thread():
        return float(np.linalg.svd(product, compute_uv=False).sum())


def _factor(sigma: np.ndarray) -> np.ndarray:
    """F (D, r) with F Fᵀ = sigma: Cholesky's where there is one, else from the eigenvectors.

    Eigenvalues at or below zero are rounding errors of a null space: left out.
    """
    symmetric = (sigma + sigma.T) / 2.0
    try:
        return np.linalg.cholesky(symmetric)
    except np.linalg.LinAlgError:
        with _one_thread():
            values, vectors = np.linalg.eigh(symmetric)
        positive = values > 0.0
        return np.ascontiguousarray(vectors[:, positive] * np.sqrt(values[positive]))  # as it is read back from a file


def inception_score(
    pool: np.ndarray, weight: np.ndarray, split_size: int | None = None, order: np.ndarray | None = None
) -> float:
    """Mean over splits of exp(E[KL(p(y|x) || p(y))]), the class probabilities being softmax(pool @ weight).

    pool: (N, D) features in the order of the samples; weight: (D, classes). Splits are consecutive; the last one may
    be shorter, and fewer than `split_size` (5,000) samples make a single split. order: indices (M,) of the samples in
    the order in which splits are cut. Returns a float >= 1.
    Source: 1606.03498, Sec. 4; no bias is added to the logits (ADM suite).
    """
    scores = []
    for rows_of_split in slices(len(pool) if order is None else len(order), split_size or SPLIT_SIZE):
        split = pool[rows_of_split if order is None else order[rows_of_split]]
        negative_entropy, marginal = 0.0, np.zeros(weight.shape[1])
        for rows in slices(len(split), _TILE):
            logits = (split[rows] @ weight).astype(np.float64)  # (n, classes)
            logits -= logits.max(axis=1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))  # finite where p itself underflows
            p = np.exp(log_p)
            negative_entropy += float((p * log_p).sum())
            marginal += p.sum(axis=0)
        marginal /= len(split)
        seen = marginal[marginal > 0.0]  # a class nobody predicts adds 0 · log 0 = 0
        divergence = negative_entropy / len(split) - float((seen * np.log(seen)).sum())
        scores.append(np.exp(max(0.0, divergence)))
    return float(np.mean(scores))


def spread_order(count: int) -> np.ndarray:
    """Indices (count,) that spread samples over the splits of the Inception Score, the same ones each time."""
    return np.random.RandomState(SPREAD_SEED).permutation(count)  # a stream that numpy never changes


def drawn_within_splits(drawn: np.ndarray, split_size: int | None = None) -> np.ndarray:
    """Positions (N,) of a bootstrap whose every split is drawn from itself. drawn: (N,) random integers below N."""
    positions, size = np.arange(len(drawn)), split_size or SPLIT_SIZE
    starts = positions // size * size
    return starts + drawn % np.minimum(size, len(drawn) - starts)


def split_imbalance(classes: np.ndarray, split_size: int | None = None) -> float:
    """How much the class of a sample says of its split, in nats: 0 in a random order, log(splits) when sorted by class.

    classes: (N,) labels in the order of the samples. The mutual information of class and split, less what a random
    order would have on average, (classes - 1)(splits - 1) / 2N. The logarithm of the Inception Score is too small by
    about so much.
    """
    splits = np.arange(len(classes)) // (split_size or SPLIT_SIZE)
    _, numbers = np.unique(classes, return_inverse=True)
    table = np.zeros((numbers.max() + 1, splits[-1] + 1))
    np.add.at(table, (numbers, splits), 1.0 / len(classes))
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True)
    seen = table > 0.0
    information = float((table[seen] * np.log(table[seen] / expected[seen])).sum())
    return information - (table.shape[0] - 1) * (table.shape[1] - 1) / (2 * len(classes))


def predicted_classes(pool: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The likeliest class (N,) of each sample. pool: (N, D) features; weight: (D, classes)."""
    return np.concatenate([(pool[rows] @ weight).argmax(axis=1) for rows in slices(len(pool), _TILE)])


def inside_manifolds(
    reference: np.ndarray,
    samples: np.ndarray,
    half: bool = True,
    reference_radii: np.ndarray | None = None,
    block: int = BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Which samples (M,) lie in the reference's manifold, and which of the reference (N,) in the samples'.

    Their shares are the improved precision and recall. Source: 1904.06991, Eq. 1 and 2; block rule: ADM suite.
    A set's manifold is the union of balls around its vectors, each reaching to the vector's k-th nearest neighbour
    in the set (to the farthest one in a set of k or fewer).

    reference, samples: (N, D) and (M, D) float32 features. half: distances in float16, as published numbers were
    computed; a block in which any of them overflows is computed in float32. reference_radii: of an earlier call of
    `manifold_radii`. Memory is bounded by a few block² arrays.
    """
    if reference_radii is None:
        reference_radii = manifold_radii(reference, half, block=block)
    sample_radii = manifold_radii(samples, half, block=block)
    sample_inside = np.zeros(len(samples), dtype=bool)
    reference_inside = np.zeros(len(reference), dtype=bool)
    for rows in slices(len(reference), block):
        for columns in slices(len(samples), block):
            distances = squared_distances(reference[rows], samples[columns], half)
            sample_inside[columns] |= (distances <= reference_radii[rows, None]).any(axis=0)
            reference_inside[rows] |= (distances <= sample_radii[None, columns]).any(axis=1)
    return sample_inside, reference_inside


def manifold_radii(features: np.ndarray, half: bool = True, k: int = NEIGHBOURS, block: int = BLOCK) -> np.ndarray:
    """Squared distance of every vector to its k-th nearest neighbour in the set, itself not counted.

    features: (N, D) with N >= 2; k is lowered to N - 1 in smaller sets. Returns (N,) float32.
    """
    rank = min(k, len(features) - 1)  # the vector itself, at distance 0, is rank 0
    nearest = np.full((len(features), rank + 1), np.inf, dtype=np.float32)

    def take_in(rows: slice, distances: np.ndarray) -> None:
        last = min(rank, distances.shape[1] - 1)
        distances.partition(last, axis=1)  # in place: the block is ours, and large
        known = np.concatenate([nearest[rows], distances[:, : last + 1]], axis=1)
        nearest[rows] = np.sort(known, axis=1)[:, : rank + 1]

    blocks = list(slices(len(features), block))
    for index, rows in enumerate(blocks):
        own = features[rows]
        take_in(rows, squared_distances(own, own, half))
        for columns in blocks[index + 1 :]:
            there, back = mutual_distances(own, features[columns], half)
            take_in(rows, there)
            take_in(columns, back)
    return nearest[:, rank].copy()

"""The evaluator's arithmetic on small arrays whose answers are known; no TensorFlow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "evaluations"))

import distances  # noqa: E402
import fidelity_metrics as metrics  # noqa: E402
from fidelity_metrics import (  # noqa: E402
    RunningMoments,
    Statistics,
    drawn_within_splits,
    frechet_distance,
    inception_score,
    split_imbalance,
    spread_order,
)


def features(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def statistics(x: np.ndarray) -> Statistics:
    moments = RunningMoments()
    moments.add(x)
    return moments.statistics()


# --- moments


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_moments_of_batches_are_those_of_the_whole_even_far_from_zero(batch_size):
    x = features(50, 6) + np.float32(1e4)
    moments = RunningMoments()
    for start in range(0, 50, batch_size):
        moments.add(x[start : start + batch_size])
    got, wide = moments.statistics(), x.astype(np.float64)
    np.testing.assert_allclose(got.mu, wide.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(got.sigma, np.cov(wide, rowvar=False), rtol=1e-9, atol=1e-9)
    assert got.mu.dtype == got.sigma.dtype == np.float64


@pytest.mark.parametrize("count", [3, 20, 21, 40, 41, 97])
def test_moments_do_not_depend_on_batch_size_at_all_and_on_order_hardly(count):
    x = np.abs(features(count, 20)) * 100
    whole = statistics(x)
    for batch_size in (1, 7, 19, 20, 64):
        moments = RunningMoments()
        for start in range(0, count, batch_size):
            moments.add(x[start : start + batch_size])
        np.testing.assert_array_equal(moments.statistics().sigma, whole.sigma)
        np.testing.assert_array_equal(moments.statistics().mu, whole.mu)
    backwards = statistics(x[::-1])
    np.testing.assert_allclose(backwards.sigma, whole.sigma, rtol=1e-10, atol=1e-10 * np.trace(whole.sigma))
    other = statistics(features(60, 20, seed=1) * 90)
    assert frechet_distance(other, backwards) == pytest.approx(frechet_distance(other, whole), rel=1e-6)


def test_moments_keep_no_more_than_one_chunk_of_vectors():
    moments = RunningMoments()
    for _ in range(100):
        moments.add(features(7, 20))
        kept = [value for value in vars(moments).values() if isinstance(value, np.ndarray)]
        assert sum(value.size for value in kept) <= 2 * 20 * 20 + 20  # a chunk, the scatter and the mean


def test_one_vector_has_no_covariance():
    moments = RunningMoments()
    moments.add(features(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        moments.statistics()


# --- Fréchet distance


def test_distance_of_commuting_gaussians_has_its_closed_form():
    a = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    b = Statistics(np.array([2.0, 1.0]), np.diag([1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(4.0 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)


def test_distance_of_correlated_gaussians_agrees_with_the_root_of_the_product():
    a, b = statistics(features(500, 5)), statistics(features(400, 5, seed=1) @ features(5, 5, seed=2))
    roots = np.sqrt(np.linalg.eigvals(a.sigma @ b.sigma).real)  # well conditioned here, so also exact
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def exact_distance(a: Statistics, b: Statistics) -> float:
    """With both roots from eigenvectors and singular values, whatever the rank."""

    def root(sigma):
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(0))

    overlap = np.linalg.svd(root(a.sigma).T @ root(b.sigma), compute_uv=False).sum()
    return ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * overlap


@pytest.mark.parametrize("counts", [(10, 12), (10, 300), (300, 10), (41, 300), (300, 400)])
def test_roots_of_few_samples_of_eigenvalues_and_of_statistics_alone_give_the_same_distance(counts):
    spread = np.logspace(0, -4, 40, dtype=np.float32)
    a, b = (statistics(features(count, 40, seed=count) * spread) for count in counts)
    exact = pytest.approx(exact_distance(a, b), rel=1e-6)
    assert frechet_distance(a, b) == exact and frechet_distance(b, a) == exact
    assert frechet_distance(Statistics(a.mu, a.sigma), Statistics(b.mu, b.sigma)) == exact
    assert frechet_distance(Statistics(a.mu, a.sigma, a.root), b) == frechet_distance(a, b)
    assert a.root.shape == (40, min(counts[0], 40))


def test_eigenvalues_that_are_rounding_errors_are_not_trusted(monkeypatch):
    a, b = (statistics(features(300, 40, seed=seed) * np.float32([1] * 20 + [0] * 20)) for seed in (0, 1))
    assert frechet_distance(a, b) == pytest.approx(exact_distance(a, b), rel=1e-7)
    asked = []
    overlap = metrics._overlap
    monkeypatch.setattr(metrics, "_overlap", lambda *pair: asked.append(pair) or overlap(*pair))
    frechet_distance(*(Statistics(x.mu, x.sigma + 1e-17 * np.eye(40)) for x in (a, b)))
    assert asked
    frechet_distance(statistics(features(300, 40)), statistics(features(300, 40, seed=1)))
    assert len(asked) == 1


@pytest.mark.parametrize("count", [2, 20, 500])
def test_distance_is_zero_to_itself_and_never_negative_whatever_the_rank(count):
    x = features(count, 60) * 100
    a, reordered = statistics(x), statistics(x[::-1])
    assert frechet_distance(a, statistics(x.copy())) == 0.0
    assert 0.0 <= frechet_distance(a, reordered) < 1e-7  # of a trace of 6e5


def test_distance_of_constant_features_is_that_of_the_means():
    a, b = statistics(np.zeros((5, 3), np.float32)), statistics(np.full((4, 3), 2, np.float32))
    assert frechet_distance(a, b) == 12.0


def test_distance_refuses_other_widths():
    with pytest.raises(ValueError, match="3 and 4"):
        frechet_distance(statistics(features(5, 3)), statistics(features(5, 4)))


# --- Inception Score


def test_score_of_certain_and_balanced_classes_is_their_number():
    pool = np.tile(np.eye(4, dtype=np.float32), (5, 1))
    assert inception_score(pool, 1e4 * np.eye(4, dtype=np.float32)) == pytest.approx(4.0)  # p is exactly 0 or 1


def test_score_is_one_when_all_samples_look_alike_and_some_classes_never_occur():
    assert inception_score(np.ones((6, 2), np.float32), np.array([[1e4, 0, -1e4]] * 2, np.float32)) == 1.0


def test_score_is_the_mean_over_consecutive_splits_with_a_shorter_last_one():
    pool, weight = features(25, 3), features(3, 4, seed=1)
    parts = [inception_score(pool[start : start + 10], weight) for start in (0, 10, 20)]
    assert inception_score(pool, weight, split_size=10) == pytest.approx(np.mean(parts), rel=1e-12)
    assert inception_score(pool, weight) != pytest.approx(np.mean(parts), rel=1e-3)  # 25 samples: one split
    assert metrics.SPLIT_SIZE == 5000


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_imbalance_of_splits_is_0_in_a_random_order_and_that_of_sorted_classes_is_known(classes):
    labels = np.repeat(np.arange(classes), 20_000 // classes)
    mixed = np.random.default_rng(0).permutation(labels)
    assert abs(split_imbalance(mixed)) < 0.01
    assert split_imbalance(labels) == pytest.approx(np.log(4), abs=0.15)  # 4 splits
    assert split_imbalance(np.tile(np.arange(classes), 20_000 // classes)) < 0.0
    assert split_imbalance(mixed[:5_000]) == pytest.approx(0.0, abs=1e-9)  # one split


@pytest.mark.parametrize("count", [1, 9, 10, 11, 40])
def test_splits_are_drawn_again_from_themselves(count):
    drawn = np.random.default_rng(0).integers(0, count, count)
    positions = drawn_within_splits(drawn, split_size=10)
    np.testing.assert_array_equal(positions // 10, np.arange(count) // 10)
    assert positions.max() < count and (count > 10 or positions.tolist() == drawn.tolist())


def test_the_spread_order_is_a_permutation_and_never_changes():
    order = spread_order(20_000)
    np.testing.assert_array_equal(np.sort(order), np.arange(20_000))
    assert order[:5].tolist() == [710, 11917, 19106, 3761, 12837]
    assert abs(split_imbalance(np.repeat(np.arange(10), 2_000)[order])) < 0.01


def test_score_does_not_depend_on_how_a_split_is_cut_for_memory(monkeypatch):
    pool, weight = features(25, 3), features(3, 4, seed=1)
    whole = inception_score(pool, weight)
    monkeypatch.setattr(metrics, "_TILE", 4)
    assert inception_score(pool, weight) == pytest.approx(whole, rel=1e-6)


# --- precision and recall


def test_radius_is_the_distance_to_the_third_neighbour():
    line = np.array([[0], [1], [3], [7], [8]], np.float32)
    assert metrics.manifold_radii(line, half=False).tolist() == [49.0, 36.0, 16.0, 36.0, 49.0]


@pytest.mark.parametrize("count", [2, 3])
def test_radius_in_a_set_of_three_or_fewer_reaches_its_farthest_member(count):
    line = np.array([[0], [1], [4]], np.float32)[:count]
    assert metrics.manifold_radii(line).tolist() == [[1.0, 1.0], [16.0, 9.0, 16.0]][count - 2]


def precision_recall(*sets: np.ndarray, **settings) -> tuple[float, float]:
    samples, reference = metrics.inside_manifolds(*sets, **settings)
    return samples.mean(), reference.mean()


def test_precision_counts_samples_and_recall_counts_the_reference():
    reference = np.array([[0], [1], [2], [3], [100], [101], [102], [103]], np.float32)
    samples = np.array([[0.0], [1.5], [2.5], [3.2], [50.0]], np.float32)
    precision, recall = precision_recall(reference, samples, half=False)
    assert precision == 4 / 5  # no ball of the reference reaches 50
    assert recall == 4 / 8  # the ball around 50 ends at 98.5


def test_recall_misses_the_mode_that_no_sample_covers():
    near, far = features(20, 4), features(20, 4, seed=1) + 50
    assert precision_recall(np.concatenate([near, far]), near) == (1.0, 0.5)
    assert precision_recall(near, np.concatenate([near, far])) == (0.5, 1.0)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 16])
def test_blocks_and_tiles_do_not_change_precision_and_recall(half, block, monkeypatch):
    reference, samples = features(17, 5), features(16, 5, seed=1) * 1.2
    whole = precision_recall(reference, samples, half=half)
    assert 0 < whole[0] < 1 and 0 < whole[1] < 1
    monkeypatch.setattr(distances, "_ROWS_IN_CACHE", 2)
    assert precision_recall(reference, samples, half=half, block=block) == whole


def test_float16_distances_are_rounded_and_float32_ones_are_not():
    u, v = features(20, 8) * 10, features(30, 8, seed=1) * 10
    exact = ((u[:, None].astype(np.float64) - v[None]) ** 2).sum(axis=2)
    half, single = distances.squared_distances(u, v), distances.squared_distances(u, v, half=False)
    assert half.dtype == single.dtype == np.float32
    np.testing.assert_array_equal(half, half.astype(np.float16))
    assert (single != single.astype(np.float16)).any()
    np.testing.assert_allclose(single, exact, rtol=1e-4)
    assert 1e-4 < np.abs(half - exact).max() / exact.max() < 1e-2
    assert half.min() >= 0


@pytest.mark.parametrize("half", [True, False])
def test_distances_within_a_set_are_those_between_it_and_its_copy(half):
    u = features(70, 48) * 3
    np.testing.assert_allclose(
        distances.squared_distances(u, u, half), distances.squared_distances(u, u.copy(), half), rtol=2e-3, atol=1e-3
    )


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("scale", [1, 20, 42])
def test_distances_both_ways_of_one_product_are_those_of_two(half, scale):
    u, v = features(33, 16) * np.float32(scale), features(40, 16, seed=1) * np.float32(scale)
    there, back = distances.mutual_distances(u, v, half)
    np.testing.assert_array_equal(there, distances.squared_distances(u, v, half))
    # The same but for the order in which a product's sums are taken.
    np.testing.assert_allclose(back, distances.squared_distances(v, u, half), rtol=2e-3 if half else 1e-5)
    assert back.shape == (40, 33) and not np.shares_memory(there, back)
    if half and scale == 20:
        assert (there != back.T).any()  # rounding goes by the direction


def test_a_distance_that_overflows_one_way_only_is_computed_in_float32_there(monkeypatch):
    u, v = features(5, 4), features(6, 4, seed=1)
    finish, calls = distances._from_products, []
    monkeypatch.setattr(
        distances, "_from_products", lambda *x: calls.append(x) or (finish(*x) if len(calls) > 1 else None)
    )
    there, back = distances.mutual_distances(u, v)
    np.testing.assert_array_equal(there, distances.squared_distances(u, v, half=False))
    np.testing.assert_array_equal(back, back.astype(np.float16))


def test_every_pair_of_blocks_of_a_set_is_multiplied_once(monkeypatch):
    whole, asked = metrics.manifold_radii(features(17, 5)), []
    for name in ("squared_distances", "mutual_distances"):
        compute = getattr(distances, name)
        monkeypatch.setattr(
            metrics, name, lambda u, v, half, f=compute: asked.append((len(u), len(v))) or f(u, v, half)
        )
    np.testing.assert_array_equal(metrics.manifold_radii(features(17, 5), block=6), whole)
    assert asked == [(6, 6), (6, 6), (6, 5), (6, 6), (6, 5), (5, 5)]


@pytest.mark.parametrize("where", ["norm of u", "norm of v", "product", "distance"])
def test_one_overflow_puts_a_whole_block_into_float32(where):
    u, v = features(20, 8), features(30, 8, seed=1)
    if where == "norm of u":
        u[-1] *= 1000
    elif where == "norm of v":
        v[-1] *= 1000
    elif where == "product":  # norms and distance of 36,100 and 0 fit, twice the product does not
        u[-1], v[-1] = 0, 0
        u[-1, 0], v[-1, 0] = 190, 190
    else:  # norms of 22,500 fit, the distance of 90,000 does not
        u[-1], v[-1] = 0, 0
        u[-1, 0], v[-1, 0] = 150, -150
    np.testing.assert_array_equal(distances.squared_distances(u, v), distances.squared_distances(u, v, half=False))
    rest = distances.squared_distances(u[:-1], v[:-1])
    np.testing.assert_array_equal(rest, rest.astype(np.float16))


@pytest.mark.parametrize("scale", [0.01, 0.3, 1, 10])
@pytest.mark.parametrize("width", [1, 7, 8, 21, 32, 75, 1600, 1608, 2023, 2048, 3300])
def test_sums_of_squares_are_tensorflows_to_the_bit(tf, width, scale):
    x = (features(20, width) * np.float32(scale)).astype(np.float16)
    expected = tf.reduce_sum(tf.square(tf.constant(x)), 1).numpy()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(distances._half_norms(x.astype(np.float32)).astype(np.float16), expected)


@pytest.mark.parametrize("scale", [0.3, 1, 10, 12])
def test_distances_in_float16_are_tensorflows_but_for_the_order_of_its_products_sums(tf, scale):
    u, v = (features(count, 64, seed=count) * np.float32(scale) for count in (70, 90))
    half_u, half_v = (tf.cast(tf.constant(x), tf.float16) for x in (u, v))
    norm_u, norm_v = (tf.reduce_sum(tf.square(x), 1) for x in (half_u, half_v))
    inner = tf.matmul(half_u, half_v, transpose_b=True)
    expected = tf.maximum(norm_u[:, None] - 2 * inner + norm_v[None], 0).numpy()
    assert np.isfinite(expected).all()
    assert (distances.squared_distances(u, v) != expected).mean() < 2e-3


def test_rounding_is_to_even_and_stops_at_the_largest_half():
    rng = np.random.default_rng(0)
    ties = (rng.integers(1024, 2048, 500) + 0.5) * 2.0 ** rng.integers(-23, 6, 500)
    values = np.concatenate([ties, -ties, rng.standard_normal(500), [65519.0, -65519.0, 0.0]]).astype(np.float32)
    rounded = values.copy()
    distances._round_to_half(rounded)
    np.testing.assert_array_equal(rounded, values.astype(np.float16))
    beyond = np.float32([65520, -65520])
    distances._round_to_half(beyond)
    assert (np.abs(beyond) > distances._LARGEST_HALF).all()


def test_features_beyond_float32_are_refused():
    with pytest.raises(ValueError, match="overflow float32"):
        distances.squared_distances(np.full((2, 2), 1e30, np.float32), np.zeros((2, 2), np.float32))

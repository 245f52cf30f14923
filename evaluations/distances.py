"""Squared distances between feature vectors, in float32 or with TensorFlow's float16 arithmetic. Plain numpy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_ROWS_IN_CACHE = 8  # rows that are rounded while the processor's cache holds them
_DROPPED_BITS = 13  # float32 has 24 bits of precision, float16 has 11
_LARGEST_HALF = 65504.0
# Of Eigen's sums over float16: lanes of a vector register, registers that are filled in turn, values in a leaf of the
# tree of sums.
_LANES, _REGISTERS, _LEAF = 8, 4, 1600


def squared_distances(u: np.ndarray, v: np.ndarray, half: bool = True) -> np.ndarray:
    """Squared Euclidean distances |u|² - 2 u·v + |v|², at least 0, between the rows of u (n, D) and v (m, D).

    half: every step is rounded to float16, unless that makes any entry infinite: then all of the block is computed in
    float32. The same array for u and v takes half the work. Returns (n, m) float32, in the first case values of
    float16: comparing those is what takes long. Raises ValueError when float32 overflows, too.
    """
    [distances] = _distances(u, v, half, both_ways=False)
    return distances


def mutual_distances(u: np.ndarray, v: np.ndarray, half: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """squared_distances(u, v) (n, m) and squared_distances(v, u) (m, n), which rounding tells apart, of one product."""
    there, back = _distances(u, v, half, both_ways=True)
    return there, back


def _distances(u: np.ndarray, v: np.ndarray, half: bool, both_ways: bool) -> list[np.ndarray]:
    rounded = _half_distances(u, v, both_ways) if half else [None] * (1 + both_ways)
    if all(distances is not None for distances in rounded):
        return [distances for distances in rounded if distances is not None]
    exact = _single_distances(u, v, both_ways)
    return [single if distances is None else distances for distances, single in zip(rounded, exact, strict=True)]


def _single_distances(u: np.ndarray, v: np.ndarray, both_ways: bool) -> list[np.ndarray]:
    """The distances in float32, from u to v and, both ways, from v to u."""
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        norm_u, norm_v = (np.square(x).sum(axis=1, dtype=np.float32) for x in (u, v))
        found = []
        for distances, first, second in _directions(u @ v.T, norm_u, norm_v, both_ways):
            distances *= np.float32(-2)
            distances += first[:, None]
            distances += second
            found.append(distances)
    if not all(np.isfinite(distances).all() for distances in found):
        raise ValueError("squared distances between features overflow float32: the features are not usable")
    return [np.maximum(distances, 0, out=distances) for distances in found]


def _directions(
    product: np.ndarray, norm_u: np.ndarray, norm_v: np.ndarray, both_ways: bool
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Products (n, m), norms of the rows and of the columns: from u to v and, both ways, from v to u. All to be
    written to."""
    there = (product, norm_u, norm_v)
    return [there, (np.array(product.T, order="C"), norm_v, norm_u)] if both_ways else [there]


def _half_distances(u: np.ndarray, v: np.ndarray, both_ways: bool) -> list[np.ndarray | None]:
    """As _single_distances with every step rounded to float16; products are accumulated in float32.

    None where an entry overflows float16.
    """
    same = u is v  # numpy computes half of a product with its own transpose
    with np.errstate(over="ignore"):  # looked for below
        u = u.astype(np.float16).astype(np.float32)
        v = u if same else v.astype(np.float16).astype(np.float32)
        norm_u = _half_norms(u)
        norm_v = norm_u if same else _half_norms(v)
    if max(norm_u.max(), norm_v.max()) > _LARGEST_HALF:
        return [None] * (1 + both_ways)
    return [_from_products(*direction) for direction in _directions(u @ v.T, norm_u, norm_v, both_ways)]


def _from_products(distances: np.ndarray, norm_rows: np.ndarray, norm_columns: np.ndarray) -> np.ndarray | None:
    """Distances in float16 in the place of products (n, m); None as soon as an entry overflows.

    Only what is too large is looked for: norms are not negative, so that what is too small on the way is too large at
    the end.
    """
    for rows in slices(len(distances), _ROWS_IN_CACHE):
        tile = distances[rows]
        tile *= 2  # twice a product is rounded as the product is
        _round_to_half(tile)
        if tile.max() > _LARGEST_HALF:
            return None
        np.subtract(norm_rows[rows, None], tile, out=tile)
        _round_to_half(tile)
        tile += norm_columns
        _round_to_half(tile)
        if tile.max() > _LARGEST_HALF:
            return None
        np.maximum(tile, 0, out=tile)
    return distances


def _half_norms(features: np.ndarray) -> np.ndarray:
    """Sums of squares (n,) of float16 values (n, D) to the bit as TensorFlow computes them on a CPU.

    All arrays are float32. A result beyond float16 says that the sum overflows.
    """
    norms = np.empty(len(features), dtype=np.float32)
    for row in range(_LANES):  # where the rows from here on in steps of _LANES start is the same to a register
        squares = np.square(features[row::_LANES]).astype(np.float16).astype(np.float32)
        norms[row::_LANES] = _half_sums(squares, row * features.shape[1])
    return norms


def _half_sums(values: np.ndarray, first: int) -> np.ndarray:
    """Sums (n,) of the rows of (n, D) in the order of Eigen's reduction over the innermost axis, rounded at each step.

    Rows longer than a leaf are halved, at whole registers as counted from the array's start, `first` values before.
    In a leaf, four registers of eight lanes take in 32 values at a time and are added up; what fills one more register
    is added to the first, the rest one by one. Lanes are added in float32.
    """
    count = values.shape[1]
    if count > _LEAF:
        middle = -(-(first + (count + 1) // 2) // _LANES) * _LANES - first
        return _rounded(_half_sums(values[:, :middle], first) + _half_sums(values[:, middle:], first + middle))
    step, single = _LANES * _REGISTERS, count // _LANES * _LANES
    whole = count // step * step
    registers = np.zeros((len(values), step), dtype=np.float32)
    for start in range(0, whole, step):
        registers += values[:, start : start + step]
        _round_to_half(registers)
    sums = registers[:, :_LANES]
    for start in range(_LANES, step, _LANES):
        sums = _rounded(sums + registers[:, start : start + _LANES])
    for start in range(whole, single, _LANES):
        sums = _rounded(sums + values[:, start : start + _LANES])
    rest = np.zeros(len(values), dtype=np.float32)
    for column in range(single, count):
        rest = _rounded(rest + values[:, column])
    while sums.shape[1] > 1:
        middle = sums.shape[1] // 2
        sums = sums[:, :middle] + sums[:, middle:]
    return _rounded(rest + _rounded(sums[:, 0]))


def _rounded(values: np.ndarray) -> np.ndarray:
    """A new array, as float16 rounds its values."""
    values = np.array(values, order="C")
    _round_to_half(values)
    return values


def _round_to_half(values: np.ndarray) -> None:
    """Round contiguous float32 values to 11 bits in place, ties to even, as float16 is.

    The integer behind a float grows with its value, so that rounding it rounds the float. That is ten times as fast as
    numpy's own float16 arithmetic. Values below 2^-14, float16's smallest normal number, stay finer than there; where
    float16 overflows, values beyond its largest number come out.
    """
    bits = values.view(np.int32)
    odd = np.right_shift(bits, _DROPPED_BITS)
    odd &= 1
    odd += 2 ** (_DROPPED_BITS - 1) - 1
    bits += odd
    bits &= -(2**_DROPPED_BITS)


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices that cover range(length)."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))

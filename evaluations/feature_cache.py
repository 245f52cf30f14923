"""Features of a reference set, kept on disk by the hash of what they were computed from."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from atomic_file import atomic_file
from feature_extraction import Features
from fidelity_metrics import Statistics

FORMAT = 1  # raise when the features of the same images and graph change
_ENTRIES = ("pool", "mu", "sigma", "mu_s", "sigma_s")


def default_folders(reference: Path) -> list[Path]:
    """Where features go unless told otherwise: beside the reference, else in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [reference.parent / ".evaluator_cache", Path(user_cache).expanduser() / "masked_diffusion_evaluator"]


class FeatureCache:
    """Features by (hash of the image file, hash of the network) in the first of some folders that can be used."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    def load(self, images_sha256: str, network_sha256: str, count: int) -> Features | None:
        """The kept features of `count` images, None when there are none.

        Raises ValueError, naming the file, when there are some that cannot be used: compute them again.
        """
        for folder in self.folders:
            path = folder / _name(images_sha256, network_sha256)
            if not path.is_file():
                continue
            try:
                with np.load(path, allow_pickle=False) as archive:
                    key = str(archive["key"])
                    pool, mu, sigma, mu_s, sigma_s = (archive[entry] for entry in _ENTRIES)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read ({error})") from error
            features = Features(pool, Statistics(mu, sigma), Statistics(mu_s, sigma_s))
            if key != _key(images_sha256, network_sha256) or not _consistent(features, count):
                raise ValueError(f"{path}: holds something else than its name says")
            return features
        return None

    def save(self, images_sha256: str, network_sha256: str, features: Features) -> Path:
        """Keep features; returns the file written. Raises OSError when no folder can be written to."""
        entries = {
            "key": np.array(_key(images_sha256, network_sha256)),
            "pool": features.pool,
            "mu": features.pool_statistics.mu,
            "sigma": features.pool_statistics.sigma,
            "mu_s": features.spatial_statistics.mu,
            "sigma_s": features.spatial_statistics.sigma,
        }
        errors = []
        for folder in self.folders:
            path = folder / _name(images_sha256, network_sha256)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as file:
                    np.savez(file, **entries)  # type: ignore[arg-type]
                return path
            except OSError as error:
                errors.append(str(error))
        raise OSError("; ".join(errors))


def _name(images_sha256: str, network_sha256: str) -> str:
    return f"features_{images_sha256[:20]}_{network_sha256[:20]}.npz"


def _key(images_sha256: str, network_sha256: str) -> str:
    return f"format {FORMAT}, images {images_sha256}, network {network_sha256}"


def _consistent(features: Features, count: int) -> bool:
    arrays = [features.pool]
    widths = []
    for statistics in (features.pool_statistics, features.spatial_statistics):
        width = statistics.mu.size
        if statistics.mu.shape != (width,) or statistics.sigma.shape != (width, width):
            return False
        arrays += [statistics.mu, statistics.sigma]
        widths.append(width)
    if features.pool.shape != (count, widths[0]):
        return False
    return all(array.dtype.kind == "f" and bool(np.isfinite(array).all()) for array in arrays)

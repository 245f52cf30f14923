"""Features of a reference set, its roots and radii, kept on disk by the hash of what they were computed from."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from atomic_file import atomic_file
from feature_extraction import Features
from fidelity_metrics import Statistics

FORMAT = 3  # raise when the features of the same images and graph change, or their radii
_ENTRIES = ("pool", "mu", "sigma", "root", "mu_s", "sigma_s", "root_s")
_RADII = "radii_"


def default_folders(reference: Path) -> list[Path]:
    """Where features go unless told otherwise: beside the reference, else in the cache folder of the user, if any."""
    folders = [reference.parent / ".evaluator_cache"]
    try:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # the user has no home folder
        return folders
    return [*folders, user_cache / "masked_diffusion_evaluator"]


class FeatureCache:
    """Features by (hash of the image file, identity of the network) in the first of some folders that can be used."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    def load(self, images_sha256: str, network: str, count: int) -> Features | None:
        """The kept features of `count` images, None when there are none.

        Raises ValueError, naming the file, when there are some that cannot be used: compute them again.
        """
        for folder in self.folders:
            path = folder / _name(images_sha256, network)
            if not path.is_file():
                continue
            try:
                with np.load(path, allow_pickle=False) as archive:
                    key = str(archive["key"])
                    pool, *pool_statistics, mu_s, sigma_s, root_s = (archive[entry] for entry in _ENTRIES)
                    radii = {
                        name.removeprefix(_RADII): archive[name] for name in archive.files if name.startswith(_RADII)
                    }
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path}: cannot be read ({error})") from error
            spatial_statistics = Statistics(mu_s, sigma_s, root_s)
            features = Features(pool, Statistics(*pool_statistics), spatial_statistics, radii=radii)
            if key != _key(images_sha256, network) or not _consistent(features, count):
                raise ValueError(f"{path}: holds something else than its name says")
            return features
        return None

    def save(self, images_sha256: str, network: str, features: Features) -> Path:
        """Keep features; returns the file written. Raises OSError when no folder can be written to."""
        assert features.pool is not None
        pool, spatial = features.pool_statistics, features.spatial_statistics
        values = (features.pool, pool.mu, pool.sigma, pool.root, spatial.mu, spatial.sigma, spatial.root)
        entries = {
            "key": np.array(_key(images_sha256, network)),
            **dict(zip(_ENTRIES, values, strict=True)),
            **{f"{_RADII}{kind}": radii for kind, radii in features.radii.items()},
        }
        errors = []
        for folder in self.folders:
            path = folder / _name(images_sha256, network)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as file:
                    np.savez(file, **entries)  # type: ignore[arg-type]
                return path
            except OSError as error:
                errors.append(str(error))
        raise OSError("; ".join(errors))


def _name(images_sha256: str, network: str) -> str:
    return f"features_{images_sha256[:20]}_{hashlib.sha256(network.encode()).hexdigest()[:20]}.npz"


def _key(images_sha256: str, network: str) -> str:
    return f"format {FORMAT}, images {images_sha256}, network {network}"


def _consistent(features: Features, count: int) -> bool:
    arrays = [features.pool, *features.radii.values()]
    widths = []
    for statistics in (features.pool_statistics, features.spatial_statistics):
        width = statistics.mu.size
        if statistics.mu.shape != (width,) or statistics.sigma.shape != (width, width) or len(statistics.root) != width:
            return False
        arrays += [statistics.mu, statistics.sigma, statistics.root]
        widths.append(width)
    if features.pool is None or features.pool.shape != (count, widths[0]):
        return False
    if any(radii.shape != (count,) for radii in features.radii.values()):
        return False
    return all(array is not None and array.dtype.kind == "f" and bool(np.isfinite(array).all()) for array in arrays)

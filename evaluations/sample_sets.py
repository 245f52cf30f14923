"""Sets of images on disk: an `.npz` with `arr_0`, statistics that may lie in it, and the manifest of a sampler.

Arrays are read as a stream, batch by batch: 50,000 images of 256×256 are 9.8 GB. Pickles are never loaded.
Every error is a ValueError or FileNotFoundError whose message is one sentence that starts with the file's path.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from fidelity_metrics import Statistics
from image_folders import open_image_folder

IMAGES, LABELS = "arr_0", "arr_1"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
_READ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression method that zipfile does not know
    RuntimeError,  # an encrypted entry
    OSError,
)


@dataclass(frozen=True)
class ArrayHeader:
    """What the head of a `.npy` stream says about the array behind it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool


class ImageSource(Protocol):
    """A checked set of images. `statistics` are those of the pool and spatial features that it brings along, if any."""

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int:
        """Bytes on disk."""
        ...

    @property
    def count(self) -> int | None:
        """Number of images N, None for statistics only."""
        ...

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, None without images."""
        ...

    @property
    def statistics(self) -> tuple[Statistics, Statistics] | None: ...

    @property
    def is_sorted_by_name(self) -> bool:
        """Whether the order of the images is that of file names, and not the one they were made in."""
        ...

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield uint8 (n, H, W, 3) in order: batches first, first + step, … of n = batch_size but for the last."""
        ...

    def verify(self) -> None:
        """Read all images once, so that damage shows before hours of work and not after. Raises ValueError."""
        ...

    def sha256(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        ...

    def labels(self) -> np.ndarray:
        """The class of each image, (N,). Raises ValueError when the set says none."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """A checked `.npz`: `images` heads arr_0, (N, H, W, 3); None for a file with statistics only.

    `statistics` are those of the pool and of the spatial features that the file brings along, if it does.
    """

    path: Path
    size: int  # bytes
    images: ArrayHeader | None
    statistics: tuple[Statistics, Statistics] | None
    is_sorted_by_name = False  # rows of an array are in the order in which they were written

    @property
    def count(self) -> int | None:
        """Number of images N, None without images."""
        return None if self.images is None else self.images.shape[0]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, None without images."""
        return None if self.images is None else (self.images.shape[1], self.images.shape[2])

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield the images in order as uint8 (n, H, W, 3) in 0…255, n = batch_size but for the last batch.

        first, step: only batches first, first + step, …
        Raises ValueError when the data are damaged, end early or hold a value outside 0…255.
        """
        if self.images is None:
            raise ValueError(f"{self.path}: no {IMAGES}, so there are no images to read")
        with _reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            header = _read_header(stream, self.path, IMAGES)
            for index, batch in enumerate(_stream_rows(stream, header, batch_size, self.path)):
                if index % step == first:
                    yield _as_pixels(batch, self.path)

    def verify(self) -> None:
        """Read all images once, so that damage shows before hours of work and not after. Raises as `batches`."""
        height, width = self.image_size or (1, 1)
        for _ in self.batches(max(1, 2**24 // (3 * height * width))):
            pass

    def sha256(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        return sha256_of(self.path)

    def labels(self) -> np.ndarray:
        """The class of each image, (N,) integers: `arr_1`. Raises ValueError when it is not there or does not fit."""
        with _reading(self.path), zipfile.ZipFile(self.path) as archive:
            if f"{LABELS}.npy" not in archive.namelist():
                raise ValueError(f"{self.path}: no {LABELS} (labels), so there are no classes to compare")
            labels = _read_numbers(archive, LABELS, self.path)
        if labels.shape != (self.count,) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: {LABELS} is {labels.dtype} of shape {labels.shape}, expected an integer for each image"
            )
        return labels


def open_images(path: Path, needs_images: bool = True) -> ImageSource:
    """Check a set's heads, without reading its images: an `.npz` or a folder of PNG files.

    Raises as `open_image_set` and `image_folders.open_image_folder`.
    """
    return open_image_folder(path) if path.is_dir() else open_image_set(path, needs_images)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with _reading(path), open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def open_image_set(path: Path, needs_images: bool = True) -> ImageSet:
    """Check a file's heads and statistics, without reading its images.

    needs_images: False accepts a file that has `mu, sigma, mu_s, sigma_s` and no images.
    Raises FileNotFoundError or ValueError: no such file, no zip, a truncated zip, no arr_0, object arrays, no uint8
    images, wrong rank or channels, empty, fewer than 2 images, statistics that are not finite or incomplete.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with _reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        statistics = _read_statistics(archive, names, path)
        images = None
        if IMAGES in names:
            with archive.open(f"{IMAGES}.npy") as stream:
                images = _read_header(stream, path, IMAGES)
            _check_images(images, path)
        elif needs_images or statistics is None:
            found = f"it holds {', '.join(sorted(names))}" if names else "it holds no arrays"
            raise ValueError(f"{path}: no {IMAGES} (uint8 images, N×H×W×3); {found}")
    return ImageSet(path, path.stat().st_size, images, statistics)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what zipfile, its decompressors and the system raise into one sentence that names the file."""
    try:
        yield
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a zip archive, or a truncated or damaged one ({error})") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except _READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read ({str(error) or type(error).__name__})") from error


def _read_header(stream: IO[bytes], path: Path, name: str) -> ArrayHeader:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version} of the .npy format")
    except ValueError as error:
        raise ValueError(f"{path}: {name} is not a readable array ({error})") from error
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} is an array of Python objects, which are never loaded")
    return ArrayHeader(dtype, shape, fortran_order)


def _check_images(header: ArrayHeader, path: Path) -> None:
    shape = "×".join(str(size) for size in header.shape) or "a single number"
    if header.dtype.kind not in "ui":
        raise ValueError(f"{path}: {IMAGES} is {header.dtype}, expected uint8 images with values in 0…255")
    if len(header.shape) != 4:
        raise ValueError(f"{path}: {IMAGES} has rank {len(header.shape)} ({shape}), expected N×H×W×3")
    if header.shape[3] != 3:
        raise ValueError(f"{path}: {IMAGES} is {shape}, expected 3 channels in the last place (N×H×W×3)")
    if min(header.shape) < 1:
        raise ValueError(f"{path}: {IMAGES} is empty ({shape})")
    if header.shape[0] < 2:
        raise ValueError(f"{path}: {IMAGES} holds 1 image, at least 2 are needed for a covariance")


def _stream_rows(stream: IO[bytes], header: ArrayHeader, batch_size: int, path: Path) -> Iterator[np.ndarray]:
    """Yield consecutive (n, …) pieces of the array behind `header`."""
    count, row_shape = header.shape[0], header.shape[1:]
    row_bytes = header.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
    if header.fortran_order:  # the first axis varies fastest, so no part of the stream is a batch: read it whole
        data = _read_exactly(stream, count * row_bytes, path)
        whole = np.frombuffer(data, header.dtype).reshape(header.shape, order="F")
        for start in range(0, count, batch_size):
            yield np.ascontiguousarray(whole[start : start + batch_size])
        return
    for start in range(0, count, batch_size):
        rows = min(batch_size, count - start)
        data = _read_exactly(stream, rows * row_bytes, path)
        yield np.frombuffer(data, header.dtype).reshape(rows, *row_shape)
    if stream.read(1):  # and the checksum of an entry is compared only at its end
        raise ValueError(f"{path}: {IMAGES} goes on after the {count} images that its head announces")


def _read_exactly(stream: IO[bytes], size: int, path: Path) -> bytes:
    parts, missing = [], size
    while missing:
        part = stream.read(missing)
        if not part:
            raise ValueError(f"{path}: {IMAGES} ends early, {missing} bytes of a batch of {size} are missing")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _as_pixels(batch: np.ndarray, path: Path) -> np.ndarray:
    if batch.dtype == np.uint8:
        return batch
    low, high = batch.min(), batch.max()
    if low < 0 or high > 255:
        raise ValueError(f"{path}: {IMAGES} holds values from {low} to {high}, expected pixels in 0…255")
    return batch.astype(np.uint8)


def _read_statistics(archive: zipfile.ZipFile, names: set[str], path: Path) -> tuple[Statistics, Statistics] | None:
    present = [name for name in STATISTICS if name in names]
    if not present:
        return None
    absent = [name for name in STATISTICS if name not in names]
    if absent:
        raise ValueError(f"{path}: incomplete statistics, {', '.join(present)} without {', '.join(absent)}")
    mu, sigma, mu_s, sigma_s = (_read_floats(archive, name, path) for name in STATISTICS)
    return _checked_statistics(mu, sigma, "", path), _checked_statistics(mu_s, sigma_s, "_s", path)


def _read_floats(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    values = _read_numbers(archive, name, path).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: the statistics {name} hold NaN or infinite values")
    return values


def _read_numbers(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    with archive.open(f"{name}.npy") as stream:
        header = _read_header(stream, path, name)
    if header.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name} is {header.dtype}, expected real numbers")
    with archive.open(f"{name}.npy") as stream:
        try:
            return np.lib.format.read_array(stream, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: {name} is not a readable array ({error})") from error


def _checked_statistics(mu: np.ndarray, sigma: np.ndarray, suffix: str, path: Path) -> Statistics:
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise ValueError(
            f"{path}: the statistics mu{suffix} of shape {mu.shape} and sigma{suffix} of shape {sigma.shape} "
            "do not belong together, expected (D,) and (D, D)"
        )
    scale = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > 1e-3 * scale or sigma.diagonal().min() < 0.0:
        raise ValueError(f"{path}: sigma{suffix} is not a covariance (symmetric, diagonal at least 0)")
    return Statistics(mu, sigma)


def find_manifest(samples: Path) -> tuple[Path, dict[str, Any]] | None:
    """The manifest that a sampling run wrote beside its `.npz`: path and content, None when there is none.

    It is the `manifest.json` or `manifest_N.json` in the same folder whose "samples" entry is the file's name; of
    several (a copied one, say) the newest. Files that are no JSON objects are passed over.
    """
    found = []
    for path in samples.parent.glob("manifest*.json"):
        if not re.fullmatch(r"manifest(_\d+)?\.json", path.name):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            modified = path.stat().st_mtime
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(content, dict) and content.get("samples") == samples.name:
            found.append((modified, path, content))
    if not found:
        return None
    _, path, content = max(found, key=lambda entry: (entry[0], entry[1].name))
    return path, content

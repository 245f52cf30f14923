"""Open what ``--data_dir`` names: a source of images, or of the latents made of them.

A format is a subclass of ``Source`` and an entry of :data:`SOURCES`. Crops, flips and labels from names belong to
``image_datasets.py``.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masked_diffusion.data.array_images import Arrays
from masked_diffusion.data.arrow_images import Arrow
from masked_diffusion.data.image_files import (
    LABELS_NAME,
    UnreadableImageError,
    as_png,
    file_sizes,
    is_file,
    is_remote,
    join,
    list_folder,
    read_blocks,
    read_bytes,
)
from masked_diffusion.data.label_files import found_labels
from masked_diffusion.data.latent_cache import LatentCache, is_latent_cache
from masked_diffusion.data.parquet_images import Parquet
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.data.remote_tars import RemoteTar
from masked_diffusion.data.shapes import CLASSES as SHAPE_CLASSES
from masked_diffusion.data.shapes import draw_shape, label_of
from masked_diffusion.data.source import USUAL, Classes, ImageSource, Source, SourceOptions, narrow
from masked_diffusion.data.tar_images import Tar
from masked_diffusion.data.zip_images import Zip

BUILTIN = "builtin:"


class _Pictures(ImageSource):
    """What has no files: an image is made one when it is read. Raises ValueError for a name that is not in PARTS."""

    PARTS: Mapping[str, Any]

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        if data_dir not in self.PARTS:
            raise ValueError(
                f"--data_dir {data_dir}: unknown; choose one of {', '.join(BUILTIN_NAMES)}, or give a folder"
            )
        self.data_dir = data_dir

    def sizes(self) -> np.ndarray:
        return np.fromiter((len(self.read(index)) for index in range(len(self))), dtype=np.int64, count=len(self))


class Builtin(_Pictures):
    """scikit-learn's 1797 handwritten digits, 8x8 grey, classes "0" … "9".

    ``builtin:digits-test`` holds every fifth image of each digit, ``builtin:digits`` the other four fifths. images: (N,
    8, 8) uint8. Raises ValueError for another name, or when scikit-learn is not installed.
    """

    PARTS = {"builtin:digits": False, "builtin:digits-test": True}

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        super().__init__(data_dir)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError("--data_dir builtin:digits needs scikit-learn: pip install scikit-learn") from error
        digits = load_digits()
        target = digits.target.astype(np.int64)
        rank_in_class = np.zeros(len(target), dtype=np.int64)
        for digit in range(10):
            rank_in_class[target == digit] = np.arange(np.sum(target == digit))
        part = (rank_in_class % 5 == 4) == self.PARTS[data_dir]
        self.images = np.rint(digits.images[part] * 255 / 16).astype(np.uint8)  # from 0 … 16
        self.names = PathTable(f"{index:04d}.png" for index in range(len(self.images)))
        self._labels = target[part]

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        return data_dir.startswith(BUILTIN)

    def classes(self) -> Classes:
        return Classes([str(digit) for digit in range(10)], self._labels)

    def read(self, index: int) -> bytes:
        return as_png(Image.fromarray(self.images[index]))


class Shapes(_Pictures):
    """Pictures drawn by code, 32 x 32 RGB, of ten classes (``shapes.py``): boats, cats, houses, …

    ``builtin:shapes`` has 10,000 of them, ``builtin:shapes-test`` 2,000 others. Raises ValueError for another name.
    """

    PARTS = {"builtin:shapes": (0, 10_000), "builtin:shapes-test": (1, 2_000)}  # seed and number of pictures

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        super().__init__(data_dir)
        self.seed, count = self.PARTS[data_dir]
        self.names = PathTable(f"{index:06d}.png" for index in range(count))

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        return data_dir.startswith("builtin:shapes")

    def classes(self) -> Classes:
        return Classes(list(SHAPE_CLASSES), np.array([label_of(index) for index in range(len(self))], dtype=np.int64))

    def read(self, index: int) -> bytes:
        return as_png(draw_shape(self.seed, index))


BUILTIN_NAMES = (*Builtin.PARTS, *Shapes.PARTS)


class LatentFolder(Source):
    """Latents that ``scripts/encode_latents.py`` made. Raises what ``LatentCache`` does."""

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        self.data_dir = data_dir
        self.cache = LatentCache(data_dir)
        self.names = self.cache.names

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        return is_latent_cache(data_dir)

    def name_of(self, index: int) -> str:
        return self.cache.name_of(index)

    def sizes(self) -> np.ndarray:
        return self.cache.sizes

    def classes(self) -> Classes | None:
        names = self.cache.record.class_names
        return None if names is None else Classes(names, self.cache.labels)

    def images(self) -> ImageSource:
        """Open the images that the latents were made of. Raises what :func:`open_images` does."""
        options = dataclasses.replace(USUAL, **self.cache.record.columns)
        return open_images(self.cache.record.data_dir, options, self.cache.extensions)

    def check_source(self) -> None:
        """Compare the names and sizes of the images, if they are still there, with what was encoded. Reads no image.

        Raises ValueError where they differ. Images in a bucket are not looked at, because listing them takes minutes.
        """
        if is_remote(self.cache.record.data_dir):
            return
        try:
            images = self.images()
            sizes = images.sizes()
        except (OSError, ValueError):  # gone, or such as an empty folder where a disk is not mounted
            return
        self.cache.check_images(images.names, sizes)


class Folder(ImageSource):
    """Image files in a local or remote folder and below it. Raises what ``list_folder`` does."""

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        listing = list_folder(data_dir)
        self.data_dir, self.largest = data_dir, options.max_image_bytes
        self.names = listing.files
        self.notes = listing.notes

    def classes(self) -> Classes | None:
        path = join(self.data_dir, LABELS_NAME)
        if is_remote(path) or not is_file(path):
            return None
        return found_labels(partial(read_blocks, path), path, self)

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        return True  # the last one: what is wrong with any other path, it says

    def sizes(self) -> np.ndarray:
        return file_sizes(self.data_dir, self.names)

    def read(self, index: int) -> bytes:
        content = read_bytes(self.name_of(index), most=self.largest + 1)
        if len(content) > self.largest:
            raise UnreadableImageError(self.name_of(index), f"its file has more than {self.largest} bytes")
        return content


SOURCES: tuple[type[Source], ...] = (
    Shapes,
    Builtin,
    LatentFolder,
    Arrays,
    Zip,
    RemoteTar,
    Tar,
    Parquet,
    Arrow,
    Folder,
)  # the first that claims a path opens it


def open_source(data_dir: str, options: SourceOptions = USUAL) -> Source:
    """Open the source that ``--data_dir`` names. ``~`` is expanded.

    Raises FileNotFoundError or ValueError, one sentence naming --data_dir and the remedy, when there is none.
    """
    if not data_dir:
        raise ValueError("--data_dir: give the folder that holds the images, or builtin:digits")
    # Path.expanduser fails without a word about the folder when it knows no such user.
    data_dir = data_dir if is_remote(data_dir) else os.path.expanduser(data_dir)  # noqa: PTH111
    return next(source for source in SOURCES if source.claims(data_dir))(data_dir, options)


def open_images(data_dir: str, options: SourceOptions = USUAL, extensions: Sequence[str] | None = None) -> ImageSource:
    """Open the source of images that ``--data_dir`` names. extensions: see :func:`narrow`.

    Raises what :func:`open_source` does, ValueError for latents.
    """
    source = open_source(data_dir, options)
    if isinstance(source, LatentFolder):
        raise ValueError(
            f"--data_dir {data_dir}: holds latents; give the images they were made of ({source.cache.record.data_dir})"
        )
    assert isinstance(source, ImageSource)
    return narrow(source, extensions)


def absolute(data_dir: str) -> str:
    """Return a data_dir that means the same from any working directory."""
    return data_dir if is_remote(data_dir) or Builtin.claims(data_dir) else str(Path(data_dir).absolute())

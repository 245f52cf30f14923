"""Sets of images as folders of PNG files, such as samplers write, with or without a folder for each class."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fidelity_metrics import Statistics
from PIL import Image

_MODES = ("RGB", "L")  # pixels that mean the same to everybody: no palette, transparency or 16 bits


@dataclass(frozen=True)
class ImageFolder:
    """A checked folder of PNG files of one size, in the order of their names, numbers in them counted as numbers."""

    path: Path
    files: list[Path]
    size: int  # bytes of all files
    image_size: tuple[int, int]
    statistics: tuple[Statistics, Statistics] | None = None
    is_sorted_by_name = True  # so that classes may follow one another

    @property
    def count(self) -> int:
        """Number of images N."""
        return len(self.files)

    def batches(self, batch_size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield the images in order as uint8 (n, H, W, 3), batches first, first + step, …; grey images three times.

        Raises ValueError when a file is damaged or not as the others.
        """
        for start in range(first * batch_size, self.count, step * batch_size):
            yield np.stack([self._read(file) for file in self.files[start : start + batch_size]])

    def _read(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file, formats=["PNG"]) as image:
                mode, pixels = image.mode, np.asarray(image.convert("RGB"))
        except Exception as error:  # damaged files raise almost anything in Pillow's decoders
            raise ValueError(f"{file}: cannot be read as an image ({error}); remove it or replace it") from error
        if mode not in _MODES:
            raise ValueError(f"{file}: a PNG of mode {mode}, expected 8-bit RGB or grey without transparency")
        if pixels.shape[:2] != self.image_size:
            height, width = pixels.shape[:2]
            raise ValueError(
                f"{file}: an image of {height}×{width} among images of {self.image_size[0]}×{self.image_size[1]}; "
                "a set has one size"
            )
        return pixels

    def verify(self) -> None:
        """Read all images once, so that damage shows before hours of work and not after. Raises as `batches`."""
        for file in self.files:
            self._read(file)

    def sha256(self) -> str:
        """SHA-256 of the names and bytes of all files, in hexadecimal."""
        digest = hashlib.sha256()
        for file in self.files:
            content = file.read_bytes()
            name = os.fsencode(file.relative_to(self.path).as_posix())  # which need not be UTF-8
            digest.update(name + f"\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def labels(self) -> np.ndarray:
        """The class of each image, (N,): the name of its folder. Raises ValueError when the files lie in none."""
        if any(file.parent == self.path for file in self.files):
            raise ValueError(f"{self.path}: its images are not in folders, so there are no classes to compare")
        names = [file.relative_to(self.path).parts[0] for file in self.files]
        return np.array([unicodedata.normalize("NFC", name) for name in names])  # as others write them


def open_image_folder(path: Path) -> ImageFolder:
    """List a folder's PNG files, below it too, and check their number and the head of the first.

    Hidden files and folders are left out. Raises ValueError: no images, a folder without any below others that have
    some, fewer than 2 images, an unreadable first image.
    """
    visible = [
        entry for entry in path.rglob("*") if not any(part.startswith(".") for part in entry.relative_to(path).parts)
    ]
    files = [entry for entry in visible if entry.suffix.lower() == ".png" and entry.is_file()]
    if not files:
        raise ValueError(f"{path}: a folder without PNG images in it or below it")
    filled = {folder for file in files for folder in file.parents}
    for folder in sorted(entry for entry in visible if entry.is_dir()):
        if folder not in filled:
            raise ValueError(f"{folder}: a folder without PNG images below {path}; fill it or remove it")
    if len(files) < 2:
        raise ValueError(f"{path}: a folder with 1 image, at least 2 are needed for a covariance")
    files.sort(key=lambda file: _natural(file.relative_to(path).as_posix()))
    try:
        with Image.open(files[0], formats=["PNG"]) as image:
            width, height = image.size
    except OSError as error:
        raise ValueError(f"{files[0]}: cannot be read as an image ({error}); remove it or replace it") from error
    return ImageFolder(path, files, sum(file.stat().st_size for file in files), (height, width))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which image_2 comes before image_10."""
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
    return [*parts, (-1, name)]  # a1 and a01 are one number: their names decide, and not the folder's order

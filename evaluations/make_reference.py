"""Make a reference batch of real images, in the format of the ADM suite's.

usage: python evaluations/make_reference.py IMAGES REF.npz [--image_size N]

REF.npz holds `mu, sigma` (pool features) and `mu_s, sigma_s` (spatial features) of all images, and `arr_0`, up to
10,000 of them at even distances. Exit status 2 with one line on stderr means that an input cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from atomic_file import atomic_file
from command_line import (
    Parser,
    add_backend_options,
    check_backend_options,
    lasting_streams,
    load_backend,
    progress,
    say,
    say_error,
)
from feature_extraction import FeatureBackend, Features, features_of_batches
from sample_sets import ImageSource, open_images

if TYPE_CHECKING:
    from masked_diffusion.data.source import ImageSource as DataSource

LATENTS = ("latents.json", "latents_unfinished.json")  # by which a folder of scripts/encode_latents.py is known
CHECKED_TOGETHER = 64  # images


@dataclass(frozen=True)
class CroppedImages:
    """Images of any format and size, read and cropped to squares as for a training; needs the package.

    source: their ``masked_diffusion.data.source.ImageSource``.
    """

    path: Path
    source: DataSource
    side: int

    @property
    def count(self) -> int:
        """Number of images N."""
        return len(self.source)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of every crop."""
        return self.side, self.side

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield uint8 (n, side, side, 3) in order. Raises ValueError for a file that is no image."""
        with ThreadPoolExecutor() as readers:  # decoders do not hold Python's lock
            for start in range(0, self.count, batch_size):
                batch = range(start, min(start + batch_size, self.count))
                yield np.stack(list(readers.map(self._read, batch)))

    def _read(self, index: int) -> np.ndarray:
        from masked_diffusion.image_datasets import center_crop_arr

        return center_crop_arr(self.source.picture(index), self.side)

    def verify(self) -> None:
        """Read all images once, saying so now and then. Raises as `batches`."""
        show, done = progress(self.path, "checked"), 0
        for batch in self.batches(CHECKED_TOGETHER):
            done += len(batch)
            show(done, self.count)


def open_cropped(path: Path, side: int | None) -> CroppedImages:
    """List the images of a training's data folder, or those behind a folder of latents, whose size they know.

    Raises ValueError, FileNotFoundError or ImportError.
    """
    if side is not None and side < 1:
        raise ValueError(f"--image_size {side}: must be at least 1 pixel")
    if not path.is_dir():
        raise ValueError(f"{path}: --image_size crops the images of a folder; an .npz holds images of one size")
    try:
        from masked_diffusion.data.sources import open_images as open_source_of_images
    except ImportError as error:
        raise ImportError(
            f"{path}: its images are cropped as for a training, with the package masked_diffusion, which cannot be "
            f"imported ({error}); install it, or give a folder of PNG files of one size"
        ) from error
    if side is None:
        source, side = images_behind_latents(path)
    else:
        source = open_source_of_images(str(path))
    if len(source) < 2:
        raise ValueError(f"{path}: a folder with 1 image, at least 2 are needed for a covariance")
    return CroppedImages(path, source, side)


def images_behind_latents(path: Path) -> tuple[DataSource, int]:
    """The images that were encoded, in the order of their latents, and the side they were cropped to.

    Raises ValueError when the latents are unfinished or damaged, and when the images are gone or have changed.
    """
    from masked_diffusion.data.sources import LatentFolder

    latents = LatentFolder(str(path))
    record = latents.cache.record
    latents.check_source()
    try:
        return latents.images(), record.image_size
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: latents of the images in {record.data_dir}, which is not there; give the images themselves"
        ) from error


def open_source(path: Path, side: int | None) -> CroppedImages | ImageSource:
    """The images, listed and not yet read; side: crop them to squares of it. Raises ValueError, OSError or
    ImportError."""
    latents = any((path / name).is_file() for name in LATENTS)
    if latents and side is not None:
        raise ValueError(f"--image_size {side}: has no effect for the latents in {path}, which know their images' size")
    if latents or side is not None:
        return open_cropped(path, side)
    return open_images(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Raises ValueError for a wrong one."""
    parser = Parser(prog="make_reference.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "images", type=Path, metavar="IMAGES", help="folder of images or of latents, or an .npz with arr_0"
    )
    parser.add_argument("out", type=Path, metavar="REF.npz", help="the reference batch to write")
    parser.add_argument("--image_size", type=int, help="crop images of any size and format to this side")
    parser.add_argument("--num_images", type=int, default=10_000, help="images to put into arr_0 (default 10000)")
    add_backend_options(parser)
    options = parser.parse_args(argv)
    check_backend_options(options)
    if options.num_images < 2:
        raise ValueError(f"--num_images {options.num_images}: must be at least 2")
    if options.out.exists():
        raise ValueError(f"{options.out}: exists; choose another name or move it away")
    if options.out.suffix != ".npz" or not options.out.parent.is_dir():
        raise ValueError(f"{options.out}: expected the name of an .npz file in a folder that exists")
    return options


@lasting_streams()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 when an input cannot be used."""
    try:
        options = parse(argv)
        source = open_source(options.images, options.image_size)
        backend = load_backend(options, __file__)
        assert source.image_size is not None  # it has images
        backend.widths(*source.image_size)
        source.verify()
    except (ValueError, OSError, ImportError) as error:
        say_error("make_reference.py", error)
        return 2
    images, features = describe(source, backend, options.batch_size, options.num_images)
    pool, spatial = features.pool_statistics, features.spatial_statistics
    with atomic_file(options.out) as file:
        np.savez(file, arr_0=images, mu=pool.mu, sigma=pool.sigma, mu_s=spatial.mu, sigma_s=spatial.sigma)
    say(f"{options.out}: statistics of {source.count} images, and {len(images)} of them")
    return 0


def describe(
    source: CroppedImages | ImageSource, backend: FeatureBackend, batch_size: int, kept: int
) -> tuple[np.ndarray, Features]:
    """Some images (kept, H, W, 3) at even distances and the statistics of all, in one pass."""
    count = source.count
    assert count is not None
    chosen = np.linspace(0, count - 1, min(kept, count)).round().astype(np.int64)
    images, show, done = list[np.ndarray](), progress(source.path), 0

    def computed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal done
        for batch in source.batches(batch_size):
            images.append(batch[np.isin(np.arange(done, done + len(batch)), chosen)])
            yield backend(batch)
            done += len(batch)
            show(done, count)

    features = features_of_batches(computed(), keep_pool=False, name=str(source.path))
    return np.concatenate(images), features


if __name__ == "__main__":
    sys.exit(main())

"""Define the interface of a source of data: names, sizes, labels, and bytes of images. ``sources.py`` lists the
sources.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from masked_diffusion.data.image_files import EXTENSIONS, as_shown, join, read_with
from masked_diffusion.data.listing_cache import Listing
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.settings import setting


@dataclass(frozen=True)
class SourceOptions:
    """Settings of how a source is read. Each kind of source uses those that concern it."""

    image_column: str = setting("", "column of the images in parquet and arrow files; empty finds it", "data")
    label_column: str = setting("", "column of the labels in parquet and arrow files; empty looks for label", "data")
    # 1 GiB is more than an image of MAX_PIXELS has in any of the formats that are read: what claims more is a bomb.
    max_image_bytes: int = setting(2**30, "images of more bytes, as files or as RGB pixels, count as bad", "data")
    shuffle_window: int = setting(10_000, "images among which those of remote tar archives are shuffled", "data")

    def __post_init__(self) -> None:
        if self.max_image_bytes < 1:
            raise ValueError(f"--max_image_bytes {self.max_image_bytes}: must be at least 1")
        if self.shuffle_window < 1:
            raise ValueError(f"--shuffle_window {self.shuffle_window}: must be at least 1 image")


USUAL = SourceOptions()


class Classes(NamedTuple):
    """names: in label order. labels: (N,) int64, 0 ... len(names) - 1."""

    names: list[str]
    labels: np.ndarray


class Blocks(NamedTuple):
    """of: block of each image, places: of each image in its archive, both (N,) int64. window: images that are shuffled
    among each other. target_bytes: of a block."""

    of: np.ndarray
    places: np.ndarray
    window: int
    target_bytes: int


class Source:
    """A place where the items of a data set lie. It knows no crops, no flips, and no order but that of its names.

    data_dir: what the user gave. names: of the items, below data_dir, with forward slashes. They are sorted: an item's
    place among them is its identity. notes: what a user should know, such as what is left out, a line each.
    made_up_folders: why there are no classes where the folders in the names are archives, such as "3 of 9 images have
    no label"; else empty.
    """

    data_dir: str
    names: PathTable
    notes: Sequence[str] = ()
    made_up_folders: str = ""

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        """Open the data. Raises FileNotFoundError or ValueError, naming --data_dir and the remedy, for what cannot be
        used.
        """
        raise NotImplementedError

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        """Return whether data_dir is of this kind, complete or not. Looks at the data, and raises nothing."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def name_of(self, index: int) -> str:
        """Return the name of an item for messages and lists."""
        return join(self.data_dir, self.names[index])

    def sizes(self) -> np.ndarray:
        """Return the bytes of each item as :meth:`ImageSource.read` gives it, (N,) int64; -1 where an answer costs a
        request.
        """
        raise NotImplementedError

    def blocks(self) -> Blocks | None:
        """Which images are fetched together, where that is so costly that the order of a training follows it."""
        return None

    def classes(self) -> Classes | None:
        """Return the classes that the source itself knows; None where only the names can tell."""
        return None


class ImageSource(Source):
    """A source of image files. largest: bytes that an image may have, as a file and as RGB pixels."""

    largest: int = USUAL.max_image_bytes

    def read(self, index: int) -> bytes:
        """Read the content of an image file.

        Raises UnreadableImageError where there is no content, however often it is tried. Raises FileNotFoundError,
        IsADirectoryError or PermissionError for a file of its own, and another OSError when the storage fails.
        """
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        """Read an image as a viewer shows it, upright RGB. Raises what ``image_files.read_with`` does."""
        read = partial(self.read, index)
        return read_with(self.name_of(index), read, lambda content, image: as_shown(image), self.largest)


class Narrowed(ImageSource):
    """The images of another source, without some kinds of files, for a run that began when these were not read.

    left_out: extensions in lower case. Raises ValueError where no image is left.
    """

    def __init__(self, source: ImageSource, left_out: Collection[str]) -> None:
        kinds = [PurePosixPath(name).suffix.lower() for name in source.names]
        self._source, self.largest = source, source.largest
        self._kept = [index for index, kind in enumerate(kinds) if kind not in left_out]
        if not self._kept:
            raise ValueError(
                f"--data_dir {source.data_dir}: the run, or the latents, to go on with do not read its kinds of images "
                f"({' '.join(sorted(left_out))}); give the former images, or begin anew in another folder"
            )
        self.data_dir = source.data_dir
        self.made_up_folders = source.made_up_folders
        self.names = PathTable(source.names[index] for index in self._kept)
        since = Listing(skipped=Counter(kind for kind in kinds if kind in left_out)).notes
        self.notes = [*source.notes, *(f"{note}: kinds that were not read yet when this began" for note in since)]

    def name_of(self, index: int) -> str:
        return self._source.name_of(self._kept[index])

    def sizes(self) -> np.ndarray:
        return self._source.sizes()[self._kept]

    def blocks(self) -> Blocks | None:
        blocks = self._source.blocks()
        if blocks is None:
            return None
        of = np.unique(blocks.of[self._kept], return_inverse=True)[1].astype(np.int64)
        return blocks._replace(of=of, places=blocks.places[self._kept])

    def classes(self) -> Classes | None:
        known = self._source.classes()
        return None if known is None else Classes(known.names, known.labels[self._kept])

    def read(self, index: int) -> bytes:
        return self._source.read(self._kept[index])

    def picture(self, index: int) -> Image.Image:
        return self._source.picture(self._kept[index])


def narrow(source: ImageSource, extensions: Collection[str] | None) -> ImageSource:
    """Leave out the images of kinds that are read now and are not among ``extensions``. None leaves nothing out."""
    left_out = set() if extensions is None else set(EXTENSIONS) - set(extensions)
    if not any(name.lower().endswith(tuple(left_out)) for name in (source.names if left_out else ())):
        return source
    return Narrowed(source, left_out)

"""Interface of a data set, as the stream of batches uses it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from masked_diffusion.data.data_stream import DataOrder
from masked_diffusion.data.image_files import EXTENSIONS
from masked_diffusion.first_stage import ChannelStatistics


class EncodedBy(NamedTuple):
    """What ``CachedPosterior`` has to know of a cache's autoencoder, in the order of its arguments."""

    weights_sha256: str
    name: str
    scales: dict[str, float]
    statistics: ChannelStatistics | None


class ImageDataset:
    """A data set of images or latents with labels.

    image_size: side in pixels. channels: 3 (RGB) or 1 (grey). class_names: in label order, empty without classes.
    labels: (N,) int64. encoded_by: the autoencoder whose moments stand for the images, None for images. extensions: of
    the kinds of image files that were looked for. notes: what a user should know of the data beside their number and
    classes, a line each.
    """

    channels = 3
    encoded_by: EncodedBy | None = None
    extensions: Sequence[str] = EXTENSIONS
    notes: Sequence[str] = ()

    def __init__(self, image_size: int, class_names: list[str], labels: np.ndarray) -> None:
        if image_size < 1:
            raise ValueError(f"--image_size {image_size}: must be at least 1 pixel")
        self.image_size = image_size
        self.class_names = class_names
        self.labels = labels

    @property
    def num_classes(self) -> int:
        """K: labels are 0 … K - 1, the null label is K. Without classes K is 1 and all labels are null."""
        return max(1, len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, seed: int, deterministic: bool = False) -> DataOrder:
        """Which image comes when in a training of this seed. deterministic: every epoch in the order of the files."""
        return DataOrder(len(self), seed, deterministic)

    @property
    def order_record(self) -> dict[str, Any] | None:
        """What an order of its own depends on, for ``config.json``; None for the usual permutation of all images."""
        return None

    def load(self, index: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """(C, image_size, image_size) float32 in [-1, 1]; rng augments, None gives the plain centre of the image.

        Raises UnreadableImageError for a file that is no image, OSError when the storage fails.
        """
        raise NotImplementedError

    def extras(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What else an item of the stream has of this image, by its name there. rng: as :meth:`load` is given."""
        return {}

    def name_of(self, index: int) -> str:
        """Return the name of an image for messages."""
        return f"image {index}"

    def fingerprint(self, root: str = "") -> str:
        """SHA-256 of names, labels and classes, alike wherever the data lie. root: what names begin with here."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self.labels.tobytes())
        for index in range(len(self)):
            name = self.name_of(index).removeprefix(root).lstrip("/")
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def __str__(self) -> str:
        names = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
        classes = f"{len(self.class_names)} classes ({names})" if self.class_names else "without classes"
        return f"{len(self)} images, {classes}"

    def check_source(self) -> None:
        """Raise ValueError when the images behind the data have changed since. Called once per run."""

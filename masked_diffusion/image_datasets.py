"""Images and labels for training: crops, class names, data sets, and the endless stream of batches.

Where images lie, and which formats there are, is decided in ``data/sources.py``, which image comes when in
``data_stream.py``, how a file is decoded in ``image_files.py``. Every random number comes from a key
(``randomness.py``), so that batches do not depend on workers, ranks or restarts.
"""

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from masked_diffusion.data.class_names import sort_class_names
from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.data.data_stream import BlockOrder, DataOrder, Item, RankBatches, candidates
from masked_diffusion.data.dataset import EncodedBy, ImageDataset
from masked_diffusion.data.fast_decode import read_resized
from masked_diffusion.data.image_files import EXTENSIONS, UnreadableImageError
from masked_diffusion.data.label_files import read_label_file
from masked_diffusion.data.listing_cache import some
from masked_diffusion.data.source import ImageSource, Source, SourceOptions, narrow
from masked_diffusion.data.sources import Builtin, LatentFolder, open_images, open_source
from masked_diffusion.data.table_images import Table
from masked_diffusion.first_stage import ChannelStatistics
from masked_diffusion.processes.loader_processes import iterate
from masked_diffusion.processes.waiting import never
from masked_diffusion.randomness import DrawSpec, numpy_generator, training_draws

Batch = tuple[torch.Tensor, dict[str, torch.Tensor]]


# Crops


def resize_short_side(image: Image.Image, length: int) -> np.ndarray:
    """Short side to ``length``: halved with a box filter while twice as long, the rest bicubic. (H, W, 3) uint8."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * length:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = length / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _center_square(resized: Callable[[int], np.ndarray], image_size: int) -> np.ndarray:
    """resized: the image's pixels, (H, W, 3) uint8, by the length of their short side."""
    pixels = resized(image_size)
    top, left = (pixels.shape[0] - image_size) // 2, (pixels.shape[1] - image_size) // 2
    return pixels[top : top + image_size, left : left + image_size]


def _random_square(
    resized: Callable[[int], np.ndarray],
    image_size: int,
    rng: np.random.Generator,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
) -> np.ndarray:
    shortest, longest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    pixels = resized(int(rng.integers(shortest, longest, endpoint=True)))
    top = int(rng.integers(0, pixels.shape[0] - image_size, endpoint=True))
    left = int(rng.integers(0, pixels.shape[1] - image_size, endpoint=True))
    return pixels[top : top + image_size, left : left + image_size]


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The square in the middle, its side the image's short side scaled to ``image_size`` (ADM's preprocessing).

    Returns (image_size, image_size, 3) uint8.
    """
    return _center_square(partial(resize_short_side, pil_image), image_size)


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """A random square whose side is about min_crop_frac … max_crop_frac of the short side (ADM's augmentation).

    The short side is resized to a random integer between image_size / max_crop_frac and image_size / min_crop_frac,
    both rounded up, then a square of image_size is cut at a random place. rng: None draws an unrepeatable crop.
    Returns (image_size, image_size, 3) uint8. Raises ValueError unless 0 < min_crop_frac <= max_crop_frac <= 1.
    """
    if not 0 < min_crop_frac <= max_crop_frac <= 1:
        raise ValueError(f"crop fractions {min_crop_frac} and {max_crop_frac}: need 0 < min <= max <= 1")
    rng = np.random.default_rng() if rng is None else rng
    return _random_square(partial(resize_short_side, pil_image), image_size, rng, min_crop_frac, max_crop_frac)


def draw_flip(rng: np.random.Generator | None, random_flip: bool) -> bool:
    """Whether to mirror an image. Drawn always and first, so that it is the same with random crops and for latents."""
    return rng is not None and rng.random() < 0.5 and random_flip


def to_model_range(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 -> contiguous (C, H, W) float32 in [-1, 1]."""
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values /= np.float32(127.5)
    values -= np.float32(1)
    return values


# Classes


def _from_folder(path: str) -> str:
    return path.rpartition("/")[0]


def _from_filename(path: str) -> str:
    before, underscore, _ = path.rpartition("/")[2].partition("_")
    return before if underscore else ""


CLASS_SOURCES: dict[str, Callable[[str], str]] = {"folder": _from_folder, "filename": _from_filename}


def class_table(paths: Iterable[str], class_from: str = "auto") -> tuple[list[str], np.ndarray]:
    """Class names in label order, and the label of each image: (N,) int64.

    paths: below the data folder, with forward slashes; iterated more than once. class_from: ``folder``: the path of the
    image's folder; ``filename``: its base name up to the first underscore; ``auto``: the folder when the images lie in
    two or more. Raises ValueError for another class_from or when an image has no class.
    """
    if class_from == "auto":
        class_from = "folder" if len({_from_folder(path) for path in paths}) > 1 else "filename"
    if class_from not in CLASS_SOURCES:
        raise ValueError(f"--class_from {class_from}: unknown; choose one of auto, {', '.join(CLASS_SOURCES)}")
    number_of: dict[str, int] = {}  # in the order of their first images

    def number(path: str) -> int:
        if name := CLASS_SOURCES[class_from](path):
            return number_of.setdefault(name, len(number_of))
        reason = "lies in no folder below it" if class_from == "folder" else "has no underscore after a class"
        raise ValueError(
            f"no class to be had for image {path} of --data_dir: it {reason} (--class_from {class_from}). "
            "Sort the images into one folder per class (--class_from folder), or name them CLASS_….png "
            "(--class_from filename), or train without classes (--class_cond False)"
        )

    numbers = np.fromiter(map(number, paths), dtype=np.int64)  # one by one: ten million names are no list
    names = sort_class_names(number_of)
    label_of = np.empty(len(names), dtype=np.int64)
    label_of[[number_of[name] for name in names]] = np.arange(len(names))
    return names, label_of[numbers]


def no_classes(num_images: int) -> tuple[list[str], np.ndarray]:
    """What stands for :func:`class_table` without classes: no names, and for every image the null label, 1.

    A table without classes is one of a single, never used class (label 0) and the null class after it.
    """
    return [], np.ones(num_images, dtype=np.int64)


# Data sets

USUAL_DATA = DataConfig()


class SourceDataset(ImageDataset):
    """Images of a source, cropped to squares. Raises ValueError where the images have no classes to be had.

    source: an ``ImageSource``, or the data_dir of one. data: what is done to its images, and where classes come from.
    """

    def __init__(
        self,
        source: ImageSource | str,
        data: DataConfig = USUAL_DATA,
        *,
        image_size: int,
        extensions: Sequence[str] | None = None,
    ) -> None:
        self.data, self.channels = data, 1 if data.grey else 3
        self.source = narrow(open_images(source) if isinstance(source, str) else source, extensions)
        self.extensions = EXTENSIONS if extensions is None else extensions
        super().__init__(image_size, *self._classes(data.class_cond, data.class_from, data.labels_file))
        self.notes = [*self.source.notes]
        counts = np.bincount(self.labels, minlength=self.num_classes)
        if self.class_names and (bare := [self.class_names[label] for label in np.flatnonzero(counts == 0)]):
            self.notes.append(f"classes without images: {some(bare)}")

    def _classes(self, class_cond: bool, class_from: str, labels_file: str) -> tuple[list[str], np.ndarray]:
        if not class_cond:
            return no_classes(len(self.source))
        if labels_file:
            known, notes = read_label_file(labels_file).classes_and_notes(self.source.names)
            self.source.notes = [*self.source.notes, *notes]
            if known is None:
                raise ValueError(f"--labels_file {labels_file}: has no labels; leave it out, or fill it")
            return known
        known = self.source.classes() if class_from == "auto" else None
        if known is None and class_from != "filename" and (reason := self.source.made_up_folders):
            raise ValueError(
                f"--data_dir {self.source.data_dir}: no classes to be had: {reason}, and the folders in their names "
                "are the archives'. Train without classes (--class_cond False), or give the labels (--labels_file), "
                "or name the images CLASS_….png (--class_from filename)"
            )
        return class_table(self.source.names, class_from) if known is None else known

    def order(self, seed: int, deterministic: bool = False) -> DataOrder:
        blocks = self.source.blocks()
        if blocks is None:
            return super().order(seed, deterministic)
        return BlockOrder(blocks.of, blocks.places, blocks.window, seed, deterministic)

    @property
    def order_record(self) -> dict[str, Any] | None:
        blocks = self.source.blocks()
        if blocks is None:
            return None
        digest = hashlib.sha256(blocks.of.tobytes() + blocks.places.tobytes()).hexdigest()
        return {"shuffle_window": blocks.window, "block_bytes": blocks.target_bytes, "blocks_sha256": digest}

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)

    def picture(self, index: int) -> Image.Image:
        """The image as it is in its file, upright RGB. Raises what :meth:`load` does."""
        return self.source.picture(index)

    def load(self, index: int, rng: np.random.Generator | None = None) -> np.ndarray:
        if self.data.fast_decode:
            resized = partial(read_resized, self.source, index)
        else:
            resized = partial(resize_short_side, self.picture(index))
        flip = draw_flip(rng, self.data.random_flip)
        if rng is not None and self.data.random_crop:
            pixels = _random_square(resized, self.image_size, rng)
        else:
            pixels = _center_square(resized, self.image_size)
        if self.channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        return to_model_range(pixels[:, ::-1] if flip else pixels)


class LatentDataset(ImageDataset):
    """Latents that ``scripts/encode_latents.py`` made: for each image the moments of its posterior, (2C, h, w)
    float32, or the codes of a deterministic encoder, (C, h, w).

    features: whether items of the stream have the ``features`` of their images, float16, for losses that compare with
    them; reading them costs time that other trainings should not pay.
    Raises ValueError, naming --data_dir or the setting and the remedy, where the cache cannot serve what is asked for.
    """

    def __init__(self, source: LatentFolder, data: DataConfig, *, image_size: int, features: bool = False) -> None:
        self.source, self.cache = source, source.cache
        data_dir, record = source.data_dir, source.cache.record
        if data.random_crop:
            raise ValueError(
                f"--random_crop True: {data_dir} holds latents of centre crops; leave it out, or train on the images"
            )
        if data.random_flip and not record.mirrored:
            raise ValueError(
                f"--random_flip True: {data_dir} has no latents of mirror images; use --random_flip False, or encode "
                "again with --random_flip True"
            )
        if image_size != record.image_size:
            raise ValueError(
                f"--image_size {image_size}: {data_dir} holds latents of {record.image_size} pixels; give that, or "
                "encode again with this one"
            )
        if features:
            source.cache.check_features()
        classes = source.classes() if data.class_cond else no_classes(len(source))
        if classes is None:
            raise ValueError(
                f"--class_cond True: {data_dir} was encoded without classes; use --class_cond False, or encode again"
            )
        super().__init__(image_size, *classes)
        self.extensions = source.cache.extensions
        scales = {"scaling_factor": record.scaling_factor, "shift_factor": record.shift_factor}
        statistics = ChannelStatistics.recorded(dataclasses.asdict(record))
        self.encoded_by = EncodedBy(record.vae_sha256, record.vae_path, scales, statistics)
        self.random_flip, self.features = data.random_flip, features

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)

    def check_source(self) -> None:
        self.source.check_source()

    def load(self, index: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """The moments of the image or, as the images' own data set would mirror it, of its mirror image."""
        return self.cache.moments(index, mirrored=draw_flip(rng, self.random_flip))

    def extras(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """``features`` of the image or, where :meth:`load` gives that of its mirror image, of that."""
        if not self.features:
            return {}
        return {"features": self.cache.features(index, mirrored=draw_flip(rng, self.random_flip))}


class DigitsDataset(ImageDataset):
    """The digits that come with the code, grey, resized (bicubic) and never augmented: a mirrored digit is another
    sign."""

    channels = 1

    def __init__(self, source: Builtin, *, image_size: int, class_cond: bool = True) -> None:
        super().__init__(image_size, *(source.classes() if class_cond else no_classes(len(source))))
        self._images = source.images

    def load(self, index: int, rng: np.random.Generator | None = None) -> np.ndarray:
        image = Image.fromarray(self._images[index])
        side = (self.image_size, self.image_size)
        if image.size != side:
            image = image.resize(side, Image.Resampling.BICUBIC)
        return to_model_range(np.asarray(image)[:, :, None])


def _with_features(source: Source, asked: bool) -> Source:
    """The source as it is. Raises ValueError where features are asked for, and these are no latents."""
    if asked and not isinstance(source, LatentFolder):
        raise ValueError(
            f"--data_dir {source.data_dir}: has no features of its images; give latents that scripts/encode_latents.py "
            "--features made"
        )
    return source


def _warn_of_idle_options(source: Source, options: SourceOptions, why_no_labels: str) -> None:
    """Warn of options that mean nothing to a source. why_no_labels: what keeps its own labels from being used."""
    if not isinstance(source, Table):
        for name in ("image_column", "label_column"):
            if column := getattr(options, name):
                warnings.warn(
                    f"--{name} {column} is ignored: --data_dir {source.data_dir} has no columns", stacklevel=3
                )
    if options.shuffle_window != DataConfig.shuffle_window and source.blocks() is None:
        warnings.warn(f"--shuffle_window {options.shuffle_window} is ignored: all images are shuffled", stacklevel=3)
    if options.label_column and why_no_labels:
        warnings.warn(f"--label_column {options.label_column} is ignored with {why_no_labels}", stacklevel=3)


def open_dataset(
    data_dir: str,
    *,
    image_size: int,
    extensions: Sequence[str] | None = None,
    features: bool = False,
    **settings: Any,
) -> ImageDataset:
    """The data set that ``--data_dir`` names: images or latents of any source (``data/sources.py``).

    extensions: of the kinds of image files to read, for a run that began when fewer were read; None reads all.
    features: see :class:`LatentDataset`; ValueError for data that are no latents. settings: of :class:`DataConfig`.
    Warns of settings that have no effect on it. Raises FileNotFoundError or ValueError, one sentence naming
    --data_dir and the remedy, when there is none.
    """
    data = DataConfig(data_dir=data_dir, **settings)
    class_cond, class_from = data.class_cond, data.class_from
    for name, value in (("class_from", class_from), ("labels_file", data.labels_file)):
        if value not in ("auto", "") and not class_cond:
            warnings.warn(f"--{name} {value} is ignored with --class_cond False", stacklevel=2)
    source = _with_features(open_source(data_dir, data), features)
    chosen = ["--labels_file"] * bool(data.labels_file) + [f"--class_from {class_from}"] * (class_from != "auto")
    why_no_labels = "--class_cond False" if not class_cond else next(iter(chosen), "")
    _warn_of_idle_options(source, data, why_no_labels)
    if data.labels_file and isinstance(source, Builtin | LatentFolder):
        raise ValueError(f"--labels_file {data.labels_file}: {data_dir} has labels of its own; leave it out")
    if data.fast_decode and isinstance(source, Builtin | LatentFolder):
        warnings.warn(f"--fast_decode is ignored for --data_dir {data_dir}: there is nothing to decode", stacklevel=2)
    if isinstance(source, Builtin):
        if data.random_crop or (class_from != "auto" and class_cond):
            warnings.warn(f"--random_crop and --class_from are ignored for --data_dir {data_dir}", stacklevel=2)
        return DigitsDataset(source, image_size=image_size, class_cond=class_cond)
    if isinstance(source, LatentFolder):
        if class_from != "auto" and class_cond:
            warnings.warn(f"--class_from is ignored for the latents in {data_dir}", stacklevel=2)
        return LatentDataset(source, data, image_size=image_size, features=features)
    assert isinstance(source, ImageSource)
    return SourceDataset(source, data, image_size=image_size, extensions=extensions)


# Stream


class _Examples(Dataset[dict[str, Any]]):
    """(epoch, index) -> everything a step needs of that image, each number drawn from its own key.

    An unreadable image is replaced, picture and label; the item keeps its identity and with it all its draws.
    """

    def __init__(self, dataset: ImageDataset, seed: int, draws: DrawSpec | None) -> None:
        self.dataset, self.seed, self.draws = dataset, seed, draws

    def __getitem__(self, item: Item) -> dict[str, Any]:
        epoch, index = item
        used, image = self._first_readable(item)
        draws = {} if self.draws is None else training_draws(self.draws, self.seed, epoch, index)
        label = int(self.dataset.labels[used])
        extras = self.dataset.extras(used, numpy_generator(self.seed, "augment", *item))
        return {"image": image, "y": label, "index": index, "used": used, "epoch": epoch, **draws, **extras}

    def _first_readable(self, item: Item) -> tuple[int, np.ndarray]:
        """An item's image, or another in its place: the index and the pixels. Crop and flip remain the item's."""
        errors = []
        for candidate in candidates(item, len(self.dataset), self.seed):
            try:
                return candidate, self.dataset.load(candidate, numpy_generator(self.seed, "augment", *item))
            except UnreadableImageError as error:
                errors.append(error)
        raise ValueError(
            f"--data_dir: {len(errors)} images in a row cannot be read; check the disk, the mount and the codec before "
            f"the images; the first: {errors[0]}"
        )


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    fast_decode: bool = False,
    class_from: str = "auto",
    seed: int = 0,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    draws: DrawSpec | None = None,
    pin_memory: bool = False,
    dataset: ImageDataset | None = None,
    asked_to_stop: Callable[[], bool] = never,
) -> Generator[Batch, None, None]:
    """Endless iterator of this rank's batches (SPEC 6: randomness by identity).

    batch_size: per rank. deterministic: every epoch in the order of the files. position: images consumed by all ranks
    so far. draws: shapes of the random numbers to deliver with each image. dataset: an open data set, which then
    stands for data_dir and the settings of :func:`open_dataset`. asked_to_stop: asked now and then while a batch is
    waited for.

    Yields (images, extra): images (N, C, image_size, image_size) float32 contiguous in [-1, 1]; extra holds ``y``,
    ``epoch``, ``index`` and ``used``, (N,) int64, and the entries of ``randomness.training_draws`` and of
    ``ImageDataset.extras``, stacked. ``used``
    is the index of the image shown: another one where that of ``index`` cannot be read. With class_cond
    False ``y`` is the null label of every image (see :func:`no_classes`). Batches are the same for any num_workers,
    and those of all ranks side by side are the one batch of a single rank with world_size times the batch size.
    Nothing is drawn from torch's global generator. ``close()`` ends the workers.
    Raises FileNotFoundError or ValueError, at the call, for settings or data that cannot work; later LoaderError or
    StoppedWaitingError, see :func:`masked_diffusion.processes.loader_processes.iterate`.
    """
    if num_workers < 0:
        raise ValueError(f"--num_workers {num_workers}: must be 0 (load in the training process) or more")
    if dataset is None:
        dataset = open_dataset(
            data_dir,
            image_size=image_size,
            class_cond=class_cond,
            class_from=class_from,
            random_crop=random_crop,
            random_flip=random_flip,
            fast_decode=fast_decode,
        )
    elif dataset.image_size != image_size:
        raise ValueError(f"--image_size {image_size}: the data set was opened for {dataset.image_size}")
    order = dataset.order(seed, deterministic)
    batch_sampler = RankBatches(order, batch_size, position=position, rank=rank, world_size=world_size)
    begin = partial(iterate, _Examples(dataset, seed, draws), num_workers, asked_to_stop)
    settings = {"batch_sampler": batch_sampler, "pin_memory": pin_memory}
    return _batches(partial(begin, name_of=dataset.name_of, **settings))


def _batches(begin: Callable[[], Generator[dict[str, Any], None, None]]) -> Generator[Batch, None, None]:
    # What iterates lives in this frame alone: when the generator is closed or collected, so is that.
    for batch in begin():
        yield batch.pop("image"), batch

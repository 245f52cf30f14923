"""Keep an autoencoder's latents of each image and of its mirror image in a folder, so that no training encodes them
again.

=====================  =================================================================================
``latents.json``       a :class:`CacheRecord`; it is written last, so a folder without it is unfinished
``index.safetensors``  ``labels`` (N,) int64; ``sizes`` (N,) int64, bytes of each image file; ``paths``, their
                       paths below the source folder, UTF-8, separated by NUL
``00000.safetensors``  ``moments`` (n, 2C, h, w) of images 0 ... n - 1: the posterior's mean, then its log-variance, or
``00001.safetensors``  (n, C, h, w) codes of a deterministic encoder; ``mirrored``, the same of their mirror images; ...
                       With ``--features`` also ``features`` and ``mirrored_features``, (n, ...) float16
=====================  =================================================================================

safetensors: a file maps into memory, its header says where each row lies, bfloat16 is one of its types, and reading it
runs no code.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from masked_diffusion.data.class_names import same_names
from masked_diffusion.data.image_files import (
    EXTENSIONS,
    EXTENSIONS_OF_0_1_0,
    LATER_EXTENSIONS,
    UnreadableImageError,
    is_file,
    is_remote,
    join,
    local_copy,
    read_bytes,
)
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.files import atomic_write, cache_folder, remove_unfinished, write_json
from masked_diffusion.first_stage import ChannelStatistics
from masked_diffusion.processes.resumable_parts import Parts

RECORD_NAME = "latents.json"
UNFINISHED_NAME = "latents_unfinished.json"
INDEX_NAME = "index.safetensors"
ENCODE_AGAIN = "remove that file and run the same scripts/encode_latents.py command again"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CacheRecord:
    """What ``latents.json`` says.

    vae_path, vae_sha256, scaling_factor, shift_factor: the autoencoder, its name and the hash of its weights.
    image_size, preprocessing: how an image became its input. latent_shape: [C, h, w]. dtype: a key of DTYPES.
    mirrored: whether mirror images were encoded, too. shard_size: images per file. class_names: in label order, None
    without classes. data_dir, source_sha256: the images, and the hash of their paths, sizes and labels. columns: those
    of a table that the user named, by the names of the flags. extensions: of the kinds of images that were looked for;
    None where an earlier version did not record them. posterior: False for the codes of a deterministic encoder.
    normalize: ``channel``, where trainings give each channel mean 0 and deviation 1, or ``none``. channel_mean,
    channel_std: of the codes before any scale or shift, C each, known when all are encoded. features_path,
    features_sha256, features_shape, features_input: of the network whose features are kept beside the latents: its file
    and hash, the shape of an image's features, what it was given; None without one.
    """

    vae_path: str
    vae_sha256: str
    scaling_factor: float
    shift_factor: float
    image_size: int
    latent_shape: list[int]
    dtype: str
    mirrored: bool
    shard_size: int
    num_images: int
    class_names: list[str] | None
    data_dir: str
    source_sha256: str
    preprocessing: str = "center_crop_arr"
    format: int = 1
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    extensions: list[str] | None = None
    posterior: bool = True
    normalize: str = "none"
    channel_mean: list[float] | None = None
    channel_std: list[float] | None = None
    features_path: str | None = None
    features_sha256: str | None = None
    features_shape: list[int] | None = None
    features_input: str | None = None

    @property
    def moments_shape(self) -> list[int]:
        channels, *sides = self.latent_shape
        return [2 * channels if self.posterior else channels, *sides]

    @property
    def moments_names(self) -> list[str]:
        """Of the moments in each file."""
        return ["moments", "mirrored"] if self.mirrored else ["moments"]

    @property
    def features_names(self) -> list[str]:
        """Of the features in each file."""
        if self.features_sha256 is None:
            return []
        return ["features", "mirrored_features"] if self.mirrored else ["features"]

    @property
    def tensor_shapes(self) -> dict[str, list[int]]:
        """Of one image, by the names of all tensors in each file."""
        shapes = dict.fromkeys(self.moments_names, self.moments_shape)
        return shapes | dict.fromkeys(self.features_names, self.features_shape or [])

    @property
    def digest(self) -> str:
        """A short name of this cache's content."""
        fields = dataclasses.asdict(self)
        if self.extensions is None:  # an earlier version's
            del fields["extensions"]
        if self.features_sha256 is None:  # so that copies of latents without features keep their names
            fields = {name: value for name, value in fields.items() if not name.startswith("features_")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: "CacheRecord") -> str | None:
        """The first setting in which the latents of two records differ, in words; None when they are the same.

        Where networks and images lay, and which kinds of images were looked for, says nothing: their hashes do.
        Statistics follow from the rest.
        """
        silent = ("vae_path", "data_dir", "extensions", "channel_mean", "channel_std", "features_path")
        for name, value in dataclasses.asdict(self).items():
            if name == "class_names" and same_names(value, other.class_names, self.data_dir == other.data_dir):
                continue
            if name not in silent and value != getattr(other, name):
                return f"{name} {value} instead of {getattr(other, name)}"
        return None


@dataclass(frozen=True)
class SourceIndex:
    """The images behind a cache. paths: below the source folder; sizes: (N,) int64 bytes; labels: (N,) int64."""

    paths: PathTable
    sizes: np.ndarray
    labels: np.ndarray

    def as_bytes(self) -> bytes:
        paths = np.frombuffer(self.paths.packed(), dtype=np.uint8)
        arrays = {"labels": self.labels, "sizes": self.sizes, "paths": paths}
        return to_safetensors({name: torch.from_numpy(array) for name, array in arrays.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> "SourceIndex":
        arrays = {name: tensor.numpy() for name, tensor in from_safetensors(content).items()}
        return cls(PathTable.unpacked(arrays["paths"]), arrays["sizes"], arrays["labels"])

    def sha256(self) -> str:
        return hashlib.sha256(self.as_bytes()).hexdigest()


def is_latent_cache(data_dir: str) -> bool:
    """Whether a local or remote folder holds latents, be they complete or not."""
    return any(is_file(join(data_dir, name)) for name in (RECORD_NAME, UNFINISHED_NAME))


def read_record(data_dir: str) -> CacheRecord:
    """Raises ValueError, naming --data_dir and the remedy, for a cache that is unfinished, of another format, or of
    images that were prepared in another way.
    """
    path = join(data_dir, RECORD_NAME)
    if not is_file(path):
        raise ValueError(
            f"--data_dir {data_dir}: its latents are unfinished; run the same scripts/encode_latents.py command again, "
            "it goes on where it was"
        )
    record = _parse_record(path)
    if (record.preprocessing, record.format) != (CacheRecord.preprocessing, CacheRecord.format):
        raise ValueError(
            f"--data_dir {data_dir}: its latents have preprocessing {record.preprocessing} and format {record.format}, "
            f"not {CacheRecord.preprocessing} and {CacheRecord.format}; encode the images again into another folder"
        )
    return record


def extensions_in(folder: Path) -> list[str] | None:
    """Those of the kinds of images behind the latents in a local folder, be they complete or not; None where none are
    there. Raises ValueError for a damaged record."""
    record = next((path for name in (RECORD_NAME, UNFINISHED_NAME) if (path := folder / name).is_file()), None)
    index = folder / INDEX_NAME
    if record is None or not index.is_file():
        return None
    return _extensions(_parse_record(str(record)), SourceIndex.from_bytes(index.read_bytes()).paths)


def _extensions(record: CacheRecord, paths: PathTable) -> list[str]:
    """Those that were looked for. Where no image is of the later kinds, none was or they were left out."""
    if record.extensions is not None:
        return record.extensions
    return list(EXTENSIONS if any(path.lower().endswith(LATER_EXTENSIONS) for path in paths) else EXTENSIONS_OF_0_1_0)


def _parse_record(path: str) -> CacheRecord:
    try:
        return CacheRecord(**json.loads(read_bytes(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a record of latents that this version reads ({error}); encode again") from error


# Files


def shard_name(number: int) -> str:
    return f"{number:05d}.safetensors"


class ShardFiles(Parts):
    """The files of a cache in a local folder, each a part of the work of encoding."""

    def __init__(self, folder: Path, record: CacheRecord) -> None:
        super().__init__(record.num_images, record.shard_size, folder)
        self.record = record

    def claim(self, index: SourceIndex) -> bool:
        """Make the folder ready, on one rank, or find it so. Returns whether there is anything to do.

        Raises ValueError when it holds latents that differ.
        """
        complete, unfinished = self.parts_folder / RECORD_NAME, self.parts_folder / UNFINISHED_NAME
        for path in (complete, unfinished):
            if path.is_file() and (difference := _parse_record(str(path)).difference(self.record)):
                raise ValueError(
                    f"--out {self.parts_folder}: it holds latents with {difference}; give another folder, or the "
                    "settings and images of before to go on"
                )
        if complete.is_file() and not self.missing(0, 1):
            return False
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        write_json(unfinished, dataclasses.asdict(self.record))
        complete.unlink(missing_ok=True)
        self.forget_failures()
        remove_unfinished(self.parts_folder, lambda name: name.endswith((".safetensors", ".json")))
        with atomic_write(self.parts_folder / INDEX_NAME) as file:
            file.write(index.as_bytes())
        return True

    def finish(self) -> None:
        """All parts are there: declare the cache complete."""
        record = self.record
        if record.normalize == "channel":
            mean, std = self.channel_statistics()
            record = dataclasses.replace(record, channel_mean=list(mean), channel_std=list(std))
        write_json(self.parts_folder / RECORD_NAME, dataclasses.asdict(record))
        (self.parts_folder / UNFINISHED_NAME).unlink()

    def path(self, batch: int) -> Path:
        return self.parts_folder / shard_name(batch)

    def has_part(self, batch: int) -> bool:
        number = len(self.indices(batch))
        shapes = {name: [number, *shape] for name, shape in self.record.tensor_shapes.items()}
        try:
            # Opening compares the header with the file's length.
            with safetensors.safe_open(self.path(batch), framework="pt") as file:
                return all(file.get_slice(name).get_shape() == shape for name, shape in shapes.items())
        except (OSError, safetensors.SafetensorError):
            return False

    def write_part(self, batch: int, tensors: dict[str, Tensor]) -> None:
        """tensors: ``moments`` and, if wanted, ``mirrored``, each (n, 2C, h, w) float32, and the features of both,
        (n, ...) float16."""
        names = self.record.moments_names
        stored = {name: tensors[name].to(DTYPES[self.record.dtype]).contiguous() for name in names}
        error = torch.cat([stored[name].float() - tensors[name] for name in names]).nan_to_num()
        rounding = [error.abs().max().item(), error.square().mean().item()]
        stored |= {name: tensors[name].contiguous() for name in self.record.features_names}
        with atomic_write(self.path(batch)) as file:
            file.write(to_safetensors(stored, metadata={"rounding": json.dumps(rounding)}))

    def rounding(self) -> tuple[float, float]:
        """How far storing moved a number of the moments: at most, and as root mean square over the parts."""
        errors = []
        for batch in range(self.num_batches):
            with safetensors.safe_open(self.path(batch), framework="pt") as file:
                errors.append(json.loads(file.metadata()["rounding"]))
        largest, mean_square = zip(*errors, strict=True)
        return max(largest), float(np.sqrt(np.mean(mean_square)))

    def channel_statistics(self) -> ChannelStatistics:
        """Mean and deviation of each channel over all parts, mirror images included, in float64.

        Of a posterior they are those of its samples: the variance is that of the means plus the mean of the variances.
        Images with numbers that are not finite are left out. A channel that is the same everywhere has deviation 1.
        """
        channels, count = self.record.latent_shape[0], 0
        sums = torch.zeros(2, channels, dtype=torch.float64)
        for batch in range(self.num_batches):
            with safetensors.safe_open(self.path(batch), framework="pt") as file:
                for name in self.record.moments_names:
                    first, second = _first_and_second(file.get_tensor(name).double(), channels)
                    readable = second.isfinite().flatten(1).all(dim=1)  # unreadable images are NaN
                    sums += torch.stack([first[readable].sum(dim=(0, 2, 3)), second[readable].sum(dim=(0, 2, 3))])
                    count += int(readable.sum()) * first[0, 0].numel()
        mean = sums[0] / max(count, 1)
        std = (sums[1] / max(count, 1) - mean.square()).clamp(min=0).sqrt()
        return ChannelStatistics(tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist()))


def _first_and_second(moments: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Expectations of the codes and of their squares, (n, C, h, w) each, from moments or codes."""
    mean, logvar = moments[:, :channels], moments[:, channels:]
    return mean, mean.square() + (logvar.exp() if logvar.shape[1] else 0.0)


class LatentCache:
    """A complete cache, read image by image. From a bucket, each file is fetched once, when it is first needed.

    record: see :class:`CacheRecord`. labels: (N,) int64. names: of the images. sizes: their bytes, (N,) int64.
    extensions: of the kinds of images that were looked for.
    Raises ValueError, naming --data_dir and the remedy, for a cache that is unfinished or damaged.
    """

    def __init__(self, data_dir: str) -> None:
        self.data_dir = data_dir
        self.record = read_record(data_dir)
        index = self._read_index()
        self.names, self.labels, self.sizes = index.paths, index.labels, index.sizes
        self.extensions = _extensions(self.record, index.paths)
        self._opened: dict[int, Any] = {}
        self._check_files()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # maps do not travel to workers; each opens its own

    def _local(self, name: str) -> Path:
        """A file of the cache on this machine."""
        if not is_remote(self.data_dir):
            return Path(self.data_dir) / name
        cache = cache_folder()
        if cache is None:
            raise ValueError(
                f"--data_dir {self.data_dir}: its files are fetched to this machine, and you have no home folder; set "
                "XDG_CACHE_HOME to a folder for them"
            )
        return local_copy(join(self.data_dir, name), cache / "latents" / self.record.digest)

    def _read_index(self) -> SourceIndex:
        content = self._local(INDEX_NAME).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.record.source_sha256:
            raise ValueError(
                f"--data_dir {self.data_dir}: {INDEX_NAME} is damaged; copy it again, or encode into another folder"
            )
        return SourceIndex.from_bytes(content)

    def _check_files(self) -> None:
        """See that no file is missing or cut off. Remote ones show it when they are read."""
        if is_remote(self.data_dir):
            return
        shards = ShardFiles(Path(self.data_dir), self.record)
        if damaged := shards.missing(0, 1):
            raise ValueError(
                f"--data_dir {self.data_dir}: {shard_name(damaged[0])} is missing or damaged (so are {len(damaged)} of "
                f"{shards.num_batches} files); copy it again, or run the same scripts/encode_latents.py command again"
            )

    def name_of(self, index: int) -> str:
        """Path of the image itself."""
        return join(self.record.data_dir, self.names[index])

    def moments(self, index: int, mirrored: bool) -> np.ndarray:
        """(2C, h, w) float32: mean, then log-variance of an image or of its mirror image; of codes (C, h, w).

        Raises UnreadableImageError for an image that could not be read when it was its turn to be encoded.
        """
        moments = self._row("mirrored" if mirrored else "moments", index).float().numpy()
        if np.isnan(moments[0, 0, 0]):
            raise UnreadableImageError(self.name_of(index), self._left_out)
        return moments

    def features(self, index: int, mirrored: bool) -> np.ndarray:
        """Features of an image or of its mirror image, float16 of the shape ``record.features_shape``.

        Of an image that could not be read they mean nothing. Raises ValueError for a cache without features.
        """
        self.check_features()
        return self._row("mirrored_features" if mirrored else "features", index).numpy()

    def check_features(self) -> None:
        """Raise ValueError for a cache without features."""
        if self.record.features_sha256 is None:
            raise ValueError(
                f"--data_dir {self.data_dir}: its latents have no features; encode the images again into another "
                "folder, with scripts/encode_latents.py --features"
            )

    def _row(self, name: str, index: int) -> Tensor:
        """What a tensor of the files has of an image."""
        number, row = divmod(index, self.record.shard_size)
        if number not in self._opened:
            self._opened[number] = safetensors.safe_open(self._local(shard_name(number)), framework="pt")
        row_of_it: Tensor = self._opened[number].get_slice(name)[row]
        return row_of_it

    @property
    def _left_out(self) -> str:
        return f"or could not when the latents in {self.data_dir} were encoded"

    @property
    def num_shards(self) -> int:
        return -(-self.record.num_images // self.record.shard_size)

    def problems(self, number: int) -> dict[str, str]:
        """All that no training can use of a file, which is read as a whole: names of images, or its own, and why."""
        path, first = join(self.data_dir, shard_name(number)), number * self.record.shard_size
        try:
            with safetensors.safe_open(self._local(shard_name(number)), framework="pt") as file:
                tensors = {name: file.get_tensor(name).float() for name in self.record.tensor_shapes}
        except (OSError, safetensors.SafetensorError) as error:
            return {path: f"{' '.join(str(error).split())}; {ENCODE_AGAIN}"}
        found = {}
        nothing = tensors["moments"].flatten(1).isnan().all(dim=1)
        for name, numbers in tensors.items():  # (n, ...)
            for row in (~numbers.reshape(len(numbers), -1).isfinite().all(dim=1)).nonzero().flatten().tolist():
                reason = self._left_out if nothing[row] else f"{name} in {path} are not all finite; {ENCODE_AGAIN}"
                found[self.name_of(first + row)] = reason
        return found

    def check_images(self, names: PathTable, sizes: np.ndarray) -> None:
        """Compare names and sizes of the images as they are now with those that were encoded.

        names: sorted. sizes: (N,) int64 bytes. Raises ValueError where they differ.
        """
        if names == self.names and np.array_equal(sizes, self.sizes):
            return
        found = dict(zip(names, sizes.tolist(), strict=True))
        former = dict(zip(self.names, self.sizes.tolist(), strict=True))
        differing = {
            "new": found.keys() - former.keys(),
            "gone": former.keys() - found.keys(),
            "of another size": {path for path in former.keys() & found.keys() if former[path] != found[path]},
        }
        assert any(differing.values()), "both lists are sorted"
        counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in differing.items() if paths)
        example = min(min(paths) for paths in differing.values() if paths)
        raise ValueError(
            f"--data_dir {self.data_dir}: its images in {self.record.data_dir} have changed since they were encoded "
            f"({counts}, such as {example}); encode them again into another folder"
        )

"""Batches by sample index -> part files -> one ``.npz``.

Batch k holds samples k B ... (k + 1) B - 1 and belongs to rank k mod W. A rank never holds more than a batch, and no
rank waits for another one but rank 0, which puts the parts together.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion.dist_util import Ranks
from masked_diffusion.files import atomic_write, move_aside, remove_unfinished, write_json
from masked_diffusion.processes.resumable_parts import Parts, make_parts
from masked_diffusion.randomness import STREAM, STREAMS, stream_entry
from masked_diffusion.sampling.pictures import grid, save_picture

MANIFEST_NAME = "manifest.json"
GRID_IMAGES = 64
# Images (N, H, W, 3) uint8 of sample numbers and labels: an ImageSampler.
MakeImages = Callable[[Sequence[int], Sequence[int]], np.ndarray]


class SampleSet(Parts):
    """The files of one sampling run in a folder: ``samples_NxHxWx3.npz``, its grid, ``manifest.json``, and the parts.

    settings: everything that determines the images. Runs of equal settings continue each other; a set of other
    settings is moved aside, never overwritten.
    """

    def __init__(self, folder: Path, num_samples: int, image_size: int, batch_size: int, settings: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        super().__init__(num_samples, batch_size, folder / f"parts_{digest[:16]}")
        self.folder = folder
        self.num_samples = num_samples
        self.image_shape = (image_size, image_size, 3)
        self.settings = settings
        self.path = folder / f"samples_{num_samples}x{image_size}x{image_size}x3.npz"

    def is_complete(self) -> bool:
        """Whether the ``.npz`` exists and was made with these settings."""
        return self.path.is_file() and self._recorded_settings() == self.settings

    def _recorded_settings(self) -> Any:
        return (_read_json(self.folder / MANIFEST_NAME) or {}).get("settings")

    def restore(self) -> bool:
        """Bring back a complete set of these settings that was moved aside, moving aside what is in its place.

        Returns whether there was one.
        """
        for manifest in sorted(self.folder.glob("manifest_*.json")):
            record = _read_json(manifest) or {}
            samples = self.folder / Path(str(record.get("samples"))).name
            if record.get("settings") == self.settings and samples.suffix == ".npz" and samples.is_file():
                self._move_aside()
                if samples.with_suffix(".png").is_file():
                    samples.with_suffix(".png").rename(self.path.with_suffix(".png"))
                write_json(self.folder / MANIFEST_NAME, {**record, "samples": self.path.name})
                samples.rename(self.path)  # a kill before this leaves the numbered manifest, to be restored again
                manifest.unlink()
                return True
        return False

    def _move_aside(self) -> list[Path]:
        """Move the set that the manifest speaks of, and whatever has this one's names, to numbered names."""
        manifest = self.folder / MANIFEST_NAME
        old = (_read_json(manifest) or {}).get("samples")
        named = isinstance(old, str) and old.endswith(".npz")
        old_path = self.folder / Path(str(old)).name if named else self.path
        moved = move_aside(old_path, manifest, old_path.with_suffix(".png"))
        _rename_in_manifest(moved)
        return moved + move_aside(self.path, self.path.with_suffix(".png"))

    def open(self, circumstances: dict[str, Any]) -> list[Path]:
        """Make the folder ready, on one rank: move a set of other settings aside and write the manifest.

        circumstances: what else the manifest records (devices, versions). Returns the files that were moved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        moved = [] if self._recorded_settings() == self.settings else self._move_aside()
        record = {"samples": self.path.name, "settings": self.settings, **circumstances}
        write_json(self.folder / MANIFEST_NAME, record)
        self.parts_folder.mkdir(exist_ok=True)
        remove_unfinished(self.parts_folder, lambda name: True)
        remove_unfinished(self.folder, lambda name: name == self.path.name)
        self.forget_failures()
        return moved

    def write_part(self, batch: int, images: np.ndarray) -> None:
        """Keep a batch's images, (n, H, W, 3) uint8. Raises ValueError for others."""
        expected = (len(self.indices(batch)), *self.image_shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"batch {batch}: expected uint8 images {expected}, got {images.dtype} {images.shape}")
        with atomic_write(self._part(batch)) as file:
            np.save(file, images)

    def make_part(self, batch: int, make: MakeImages, labels: np.ndarray) -> None:
        """Make a batch's images and keep them. labels: those of all samples, (num_samples,)."""
        indices = self.indices(batch)
        self.write_part(batch, make(indices, labels[indices.start : indices.stop].tolist()))

    def has_part(self, batch: int) -> bool:
        """Whether a batch is there, from this run or one before."""
        path = self._part(batch)
        if not path.is_file():
            return False
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError):  # EOFError: an empty file
            return False
        return part.shape == (len(self.indices(batch)), *self.image_shape) and part.dtype == np.uint8

    def _part(self, batch: int) -> Path:
        return self.parts_folder / f"{batch:06d}.npy"

    def images(self) -> Iterator[np.ndarray]:
        """The parts in order, each (n, H, W, 3) uint8, one in memory at a time."""
        for batch in range(self.num_batches):
            yield np.load(self._part(batch), allow_pickle=False)

    def assemble(self, labels: np.ndarray | None) -> None:
        """Draw a preview grid, and put the parts into one ``.npz`` beside it, streaming; then remove the parts.

        labels: (num_samples,) int64, written as ``arr_1``; None for none.
        """
        first: list[np.ndarray] = []
        for images in self.images():
            first.append(images)
            if sum(map(len, first)) >= GRID_IMAGES:
                break
        save_picture(grid(np.concatenate(first)[:GRID_IMAGES]), self.path.with_suffix(".png"))
        with atomic_write(self.path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            # A fixed date: equal images make equal bytes.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                shape = (self.num_samples, *self.image_shape)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for images in self.images():
                    member.write(images.tobytes())
            if labels is not None:
                with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                    np.lib.format.write_array(member, labels, allow_pickle=False)
        self.remove_parts()

    def remove_parts(self) -> None:
        """Remove the parts, which a complete set needs no more."""
        shutil.rmtree(self.parts_folder, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _rename_in_manifest(moved: Sequence[Path]) -> None:
    """A manifest that was moved aside goes on naming its own samples, that of an interrupted run none."""
    samples = [path for path in moved if path.suffix == ".npz"]
    manifests = [path for path in moved if path.suffix == ".json"]
    if manifests and (content := _read_json(manifests[0])) is not None:
        write_json(manifests[0], {**content, "samples": samples[0].name if samples else None})


def begun_stream(folder: Path, settings: dict[str, Any]) -> int:
    """The stream of random numbers that a set of these settings was begun under here; the present one for a new set.

    settings: without an entry of the stream. A set that was moved aside counts: its parts are still there.
    """
    manifests = [folder / MANIFEST_NAME, *sorted(folder.glob("manifest_*.json"))]
    records = [(_read_json(manifest) or {}).get("settings") for manifest in manifests]
    begun = (stream for record in records for stream in STREAMS if record == {**settings, **stream_entry(stream)})
    return next(begun, STREAM)


def generate(samples: SampleSet, make: MakeImages, labels: np.ndarray, ranks: Ranks) -> None:
    """Make this rank's batches and, on rank 0, wait until the others' are there too; see :func:`parts.make_parts`.

    make: an :class:`ImageSampler`. labels: (num_samples,), the null label where there are no classes.
    """

    def make_part(batch: int, tell: Callable[[int], object]) -> None:
        samples.make_part(batch, make, labels)
        tell(len(samples.indices(batch)))

    make_parts(samples, make_part, ranks)

"""Images in an array: ``.npy``, or the ``.npz`` that samplers write, ``arr_0`` the images and ``arr_1`` the labels."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from masked_diffusion.data.image_files import as_png, is_remote
from masked_diffusion.data.label_files import classes_of
from masked_diffusion.data.listing_cache import some
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.data.source import USUAL, Classes, ImageSource, SourceOptions

_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
# Bytes of a compressed array, which is unpacked into memory at the start, and again in each loader process.
MAX_UNPACKED_BYTES = 2**34
IMAGES, LABELS = "arr_0", "arr_1"
_READ = {f"{IMAGES}.npy", f"{LABELS}.npy"}


class Arrays(ImageSource):
    """uint8 images (N, H, W, 3), (N, H, W, 1) or (N, H, W), and labels (N,), if there are any.

    An array that lies in its file as it is, is mapped into memory; a compressed one is read as a whole.
    Raises ValueError, naming --data_dir and the remedy, for anything else.
    """

    def __init__(self, data_dir: str, options: SourceOptions = USUAL) -> None:
        self.data_dir, self.largest = data_dir, options.max_image_bytes
        if (size := _bytes_to_unpack(data_dir)) > MAX_UNPACKED_BYTES:
            raise ValueError(
                f"--data_dir {data_dir}: an array in it is {size} bytes when unpacked, more than {MAX_UNPACKED_BYTES}; "
                "save the arrays without compression (numpy.savez)"
            )
        labels = None
        with _named(data_dir):
            shape = _declared_shape(data_dir)
        if (rgb := 3 * math.prod(shape[1:3])) > self.largest:
            raise ValueError(
                f"--data_dir {data_dir}: {IMAGES} is {shape}, and {rgb} bytes of RGB an image are "
                f"more than --max_image_bytes {self.largest}; raise it if the array is one of yours"
            )
        with _named(data_dir):
            if _is_npy(data_dir):
                self._images = np.load(data_dir, mmap_mode="r", allow_pickle=False)
            else:
                with zipfile.ZipFile(data_dir) as archive:
                    members = {member.filename: member for member in archive.infolist()}
                    others = sorted(name.removesuffix(".npy") for name in members.keys() - _READ)
                    self.notes = [f"left out: arrays {some(others)}"] if others else []
                    self._images = _member(data_dir, archive, members[f"{IMAGES}.npy"])
                    if f"{LABELS}.npy" in members:
                        labels = _member(data_dir, archive, members[f"{LABELS}.npy"])
        if (
            self._images.dtype != np.uint8
            or len(shape) not in (3, 4)
            or shape[3:] not in ((), (1,), (3,))
            or not len(self._images)
        ):
            raise ValueError(
                f"--data_dir {data_dir}: {IMAGES} is {self._images.dtype} {shape}; give images as uint8 (N, H, W, 3)"
            )
        if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind not in "iu"):
            raise ValueError(
                f"--data_dir {data_dir}: {LABELS} is {labels.dtype} {labels.shape}; give an integer for each of the "
                f"{len(self._images)} images"
            )
        self.names = PathTable(f"{index:08d}.png" for index in range(len(self._images)))
        self._labels = labels

    @classmethod
    def claims(cls, data_dir: str) -> bool:
        if is_remote(data_dir) or not Path(data_dir).is_file():
            return False
        with Path(data_dir).open("rb") as file:
            head = file.read(64)
        return head.startswith(_NPY) or (head.startswith(_ZIP) and head[30:].partition(b".npy")[1] != b"")

    def __reduce__(self) -> tuple[Any, ...]:
        return Arrays, (
            self.data_dir,
            SourceOptions(max_image_bytes=self.largest),
        )  # to a worker goes the place of the images, not the images

    def sizes(self) -> np.ndarray:
        return np.full(len(self), self._images[0].nbytes, dtype=np.int64)

    def classes(self) -> Classes | None:
        if self._labels is None:
            return None
        return classes_of(self._labels.tolist(), f"{LABELS} of --data_dir {self.data_dir}")

    def read(self, index: int) -> bytes:
        return as_png(self._picture(index), compress_level=1)

    def picture(self, index: int) -> Image.Image:
        return self._picture(index).convert("RGB")

    def _picture(self, index: int) -> Image.Image:
        pixels = np.ascontiguousarray(self._images[index])
        return Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


@contextlib.contextmanager
def _named(data_dir: str) -> Iterator[None]:
    """Raises ValueError, naming the file, for what is wrong with it."""
    try:
        yield
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"--data_dir {data_dir}: its arrays cannot be read ({error}); copy the file again") from error


def _declared_shape(path: str) -> tuple[int, ...]:
    """The shape of the images by the header of their array, of which nothing else is read."""
    with contextlib.ExitStack() as stack:
        if _is_npy(path):
            stream: IO[bytes] = stack.enter_context(Path(path).open("rb"))
        else:
            stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(f"{IMAGES}.npy"))
        return _read_header(stream)[0]


def _is_npy(path: str) -> bool:
    return Path(path).suffix == ".npy" or not zipfile.is_zipfile(path)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of the array that begins here."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _bytes_to_unpack(path: str) -> int:
    """Bytes of the largest compressed array of a file. Its directory says it, and zipfile unpacks no more than that."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        read = [m for m in archive.infolist() if m.filename in _READ]
        return max((m.file_size for m in read if m.compress_type != zipfile.ZIP_STORED), default=0)
    return 0


def _member(path: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an archive, mapped into memory where it lies there as it is."""
    with archive.open(member) as stream:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(stream, allow_pickle=False)
        shape, is_fortran, dtype = _read_header(stream)
        header = stream.tell()
    if dtype.hasobject:
        raise zipfile.BadZipFile(f"{member.filename} holds objects")
    with Path(path).open("rb") as file:
        file.seek(member.header_offset + 26)
        lengths = np.frombuffer(file.read(4), dtype="<u2")
    start = member.header_offset + 30 + int(lengths.sum()) + header
    return np.memmap(path, dtype, "r", start, shape, "F" if is_fortran else "C")

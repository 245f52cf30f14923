"""Find image files in a folder or bucket, and read one as a viewer shows it. Knows no classes and no batches."""

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image

from masked_diffusion.data.listing_cache import Listing, keep_listing, kept_listing
from masked_diffusion.data.path_table import PathList, PathTable
from masked_diffusion.data.text_blocks import BLOCK_BYTES
from masked_diffusion.files import atomic_write

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
LATER_EXTENSIONS = (".jfif", ".tif", ".tiff")
EXTENSIONS_OF_0_1_0 = tuple(extension for extension in EXTENSIONS if extension not in LATER_EXTENSIONS)
# 1 GiB / 4 / 3, from where on Pillow suspects a decompression bomb; it warns there and refuses at twice as many.
MAX_PIXELS = 2**30 // 12
# The short side is what is scaled to the image size: a line of pixels would become a huge picture.
MAX_ASPECT = 100
# Seconds before storage that failed is asked again.
RETRY_WAITS = (1.0, 5.0)
# Files whose sizes one thread asks for, and how many threads do.
FILES_AT_ONCE, ASKED_AT_A_TIME = 1000, 16
EXIF_ORIENTATION = 0x0112
# Archives of images that are read in place of a folder, for messages.
ARCHIVES = ".zip, .tar, .parquet, .npz or .npy"
LABELS_NAME = "dataset.json"  # edm2's list of labels, in the folder or archive itself
TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Picture = TypeVar("Picture")
Content = TypeVar("Content")


def is_remote(path: str) -> bool:
    """Return whether a path (gs://, az://, https://) is read through blobfile and not from the local file system."""
    return "://" in path


def join(folder: str, relative: str) -> str:
    """Join a local or remote folder and a path below it. ``relative`` has forward slashes."""
    return f"{folder.rstrip('/')}/{relative}" if relative else folder


def list_image_files(data_dir: str) -> list[str]:
    """List the paths of all images below ``data_dir``, sorted. Raises what :func:`list_folder` does."""
    return list(list_folder(data_dir).files)


def list_folder(data_dir: str) -> Listing:
    """List the images of a folder and what is left out. The images are sorted; image indices refer to this order.

    Extensions count in any case. Hidden files and folders are left out. Links are followed, but not one that leads back
    to a folder around it. A folder is listed once, however many links lead to it: under its own name if it lies in
    ``data_dir`` itself. A link to a file is a file of its own, because people make subsets as folders of links.

    Raises FileNotFoundError for a missing folder, ValueError for a file, and for a folder that has no images or cannot
    be read.
    """
    if is_remote(data_dir):
        listing = _list_remote(data_dir)
    elif Path(data_dir).is_file():
        raise ValueError(
            f"--data_dir {data_dir}: is a file; give the folder that holds the images, or a {ARCHIVES} that does"
        )
    elif not Path(data_dir).is_dir():
        raise FileNotFoundError(
            f"--data_dir {data_dir}: no such folder{looked_in(data_dir)}; give the folder that holds the images"
        )
    else:
        listing = kept_listing(Path(data_dir)) or _list_anew(data_dir)
    if not len(listing.files):
        kinds = " ".join(extension[1:] for extension in EXTENSIONS)
        raise ValueError(f"--data_dir {data_dir}: no images in it or below it; give a folder with files of {kinds}")
    return listing


def looked_in(path: str) -> str:
    """Say for a message where a relative path was looked for. Empty for an absolute path."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def file_sizes(folder: str, paths: Sequence[str] | PathTable) -> np.ndarray:
    """Return the bytes of the files below a folder, (N,) int64.

    Remote files count as -1, because each answer would cost a request.
    """
    if is_remote(folder):
        return np.full(len(paths), -1, dtype=np.int64)

    def sizes(start: int) -> list[int]:
        some = range(start, min(start + FILES_AT_ONCE, len(paths)))
        return [os.stat(f"{folder}/{paths[index]}").st_size for index in some]  # noqa: PTH116

    # Several are asked at a time: a network disk takes a while for each answer.
    with ThreadPoolExecutor(ASKED_AT_A_TIME) as pool:
        answers = pool.map(sizes, range(0, len(paths), FILES_AT_ONCE))
        return np.fromiter(chain.from_iterable(answers), dtype=np.int64, count=len(paths))


def take_file(listing: Listing, path: str) -> bool:
    """Add a file to the images, or by its extension to what is left out. Returns whether it is an image."""
    extension = os.path.splitext(path)[1].lower()  # noqa: PTH122  (a million of them)
    if extension in EXTENSIONS:
        listing.found.append(path)
        return True
    if path != LABELS_NAME:
        listing.skipped[extension or "no extension"] += 1
    return False


def _finish(listing: Listing, folders: Iterable[str]) -> Listing:
    """Sort a new list and find the folders without images. folders: all that were met, below the root."""
    found = listing.found.table()
    listing.files = found.take(found.order()[0])
    listing.found = PathList()
    filled = {""}
    for path in listing.files:
        while (path := path.rpartition("/")[0]) not in filled:
            filled.add(path)
    bare = set(folders) - filled
    listing.empty = sorted(folder for folder in bare if folder.rpartition("/")[0] not in bare)
    return listing


def _list_anew(data_dir: str) -> Listing:
    try:
        listing, folders, met_links = _list_local(data_dir)
    except OSError as error:
        raise ValueError(
            f"--data_dir {data_dir}: cannot list {error.filename} ({error.strerror}); make it readable or move it"
        ) from error
    if not met_links:
        keep_listing(Path(data_dir), folders, listing)
    return listing


def _list_local(root: str) -> tuple[Listing, dict[str, int], bool]:
    """Return the files, the folders that hold them with their numbers of entries, and whether there were links."""
    listing = Listing()
    entries_of: dict[str, int] = {}
    met_links = False
    listed: set[tuple[int, int]] = set()
    folders, links = [""], list[str]()
    while folders or links:
        # Links wait until every real folder is listed, so that an image's class is its own folder's and not a link's.
        if not folders:
            links.sort(reverse=True)
            link = links.pop()
            if not _leads_back(root, link):
                folders.append(link)
            continue
        folder = folders.pop()
        status = Path(join(root, folder)).stat()
        if (status.st_dev, status.st_ino) in listed:
            continue
        listed.add((status.st_dev, status.st_ino))
        entries_of[folder] = 0
        with os.scandir(join(root, folder)) as entries:
            for entry in entries:
                entries_of[folder] += 1
                if entry.name.startswith("."):
                    continue
                relative = f"{folder}/{entry.name}" if folder else entry.name
                # Path, not entry, for links: a link to itself is an OSError there and plainly absent here.
                if entry.is_symlink():
                    met_links = True
                    if Path(entry.path).is_dir():
                        links.append(relative)
                    elif Path(entry.path).is_file():
                        take_file(listing, relative)
                elif entry.is_dir():
                    folders.append(relative)
                elif entry.is_file():
                    take_file(listing, relative)
    return _finish(listing, entries_of), entries_of, met_links


def _leads_back(root: str, link: str) -> bool:
    """Return whether a link points to the data folder, to a folder around it, or to a folder around the link."""
    path = Path(join(root, link))
    target = path.resolve()
    return Path(root).resolve().is_relative_to(target) or path.parent.resolve().is_relative_to(target)


def _blobfile(path: str) -> Any:
    try:
        import blobfile
    except ImportError as error:
        raise ValueError(f"{path}: remote files are read with blobfile; install it: pip install blobfile") from error
    return blobfile


def is_file(path: str) -> bool:
    """Return whether a local or remote file of this name exists. False, too, where a bucket gives no answer."""
    if not is_remote(path):
        return Path(path).is_file()
    try:
        return _blobfile(path).exists(path)
    except Exception:  # whoever then lists or reads the folder says what is wrong with it
        return False


def open_remote(path: str, buffer_size: int) -> IO[bytes]:
    """Open a remote file for reading in requests of so many bytes."""
    return _blobfile(path).BlobFile(path, "rb", buffer_size=buffer_size)


def remote_state(path: str) -> list[Any]:
    """What changes when a remote file does: its size, time and version. Raises FileNotFoundError, of the path alone,
    for a missing one, ValueError where the bucket gives no answer."""
    try:
        status = _blobfile(path).stat(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(path) from error
    except Exception as error:  # network, credentials, an unknown scheme: blobfile's errors have no common base
        raise ValueError(f"--data_dir: {path} cannot be read ({error}); check the path and the credentials") from error
    return [status.size, status.mtime, status.version]


def local_copy(path: str, folder: Path) -> Path:
    """Fetch a remote file into a local folder, unless it is there. Returns its path."""
    target = folder / path.rpartition("/")[2]
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            file.write(read_bytes(path))
    return target


def _list_remote(root: str) -> Listing:
    blobfile = _blobfile(root)
    listing = Listing()
    try:
        if not blobfile.isdir(root):
            raise FileNotFoundError(f"--data_dir {root}: no such remote folder; give the folder that holds the images")
        folders, met = [""], list[str]()
        while folders:
            folder = folders.pop()
            for entry in blobfile.scandir(join(root, folder)):
                if entry.name.startswith("."):
                    continue
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir:
                    folders.append(relative)
                    met.append(relative)
                else:
                    take_file(listing, relative)
    except FileNotFoundError:
        raise
    except Exception as error:  # network, credentials, an unknown scheme: blobfile's errors have no common base
        raise ValueError(
            f"--data_dir {root}: cannot be listed ({error}); check the path and the credentials"
        ) from error
    return _finish(listing, met)


# Of the extensions. Pillow knows others, and some can be more than pictures: EPS is a program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


class UnreadableImageError(ValueError):
    """A file that is no image to train on, however often it is read. reason: why, in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        self.reason = " ".join(reason.split())
        super().__init__(f"{path}: cannot be read as an image ({self.reason}); remove it or replace it")


def read_image(path: str) -> Image.Image:
    """Read an image as a viewer shows it: upright, RGB, its first frame, on white where it is transparent.

    RGB pixels stay as they are. 16-bit grey is scaled to 8 bits, not clipped.

    Raises UnreadableImageError, with the file and what to do, for a file that is damaged, missing, not permitted, or of
    an absurd size. Raises OSError when the storage fails, also after a few tries; that says nothing about the image.
    """
    return read_with(path, partial(read_bytes, path), lambda content, image: as_shown(image))


def read_with(
    path: str,
    read: Callable[[], bytes],
    decode: Callable[[bytes, Image.Image], Picture],
    largest: int | None = None,
) -> Picture:
    """Open a file's content with Pillow, check its size, and return what ``decode`` makes of both.

    ``decode`` is called before any pixel is decoded. read: returns the content. largest: bytes of the RGB pixels
    that its header may declare. Raises as :func:`read_image` does, naming ``path``; whatever ``decode`` raises becomes
    such an error.
    """
    try:
        content = read()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UnreadableImageError(path, error.strerror or str(error)) from error
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(*image.size, largest)  # before anything of this size is allocated
        return decode(content, image)
    except MemoryError:  # of this machine, not of the file: its size is bounded
        raise
    # Damaged files raise almost anything in Pillow's decoders: OSError, SyntaxError, struct.error, IndexError, …
    except Exception as error:
        raise UnreadableImageError(path, str(error) or type(error).__name__) from error


def as_png(image: Image.Image, **options: Any) -> bytes:
    """The file of an image. options: Pillow's, of the format."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def as_shown(image: Image.Image) -> Image.Image:
    """Decode an opened image as a viewer shows it."""
    image.load()
    return _to_rgb(_upright(image))


def _check_size(width: int, height: int, largest: int | None) -> None:
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height} pixels are none")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}, perhaps a decompression bomb")
    if largest is not None and 3 * width * height > largest:
        raise ValueError(f"{width} x {height} pixels are {3 * width * height} bytes of RGB, more than {largest}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def read_bytes(path: str, waits: Sequence[float] = RETRY_WAITS, most: int = -1) -> bytes:
    """Read a local or remote file, or its first ``most`` bytes. Where the storage fails for a moment, ask again after
    each of ``waits`` (seconds).

    Raises OSError: FileNotFoundError, IsADirectoryError and PermissionError at once, others after the last try.
    """
    open_file = _blobfile(path).BlobFile if is_remote(path) else open

    def read() -> bytes:
        with open_file(path, "rb") as file:
            return file.read(most)

    return patiently(path, read, waits)


def read_blocks(path: str) -> Iterator[bytes]:
    """Read a local file, a block at a time. Raises as :func:`read_bytes`."""

    def read(start: int) -> bytes:
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read(BLOCK_BYTES)

    start = 0
    while block := patiently(path, partial(read, start)):
        yield block
        start += len(block)


def patiently(path: str, read: Callable[[], Content], waits: Sequence[float] = RETRY_WAITS) -> Content:
    """Return what ``read`` returns. Ask again where the storage of ``path`` fails. Raises as :func:`read_bytes`."""
    try:
        return read()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # blobfile's errors have no common base
        if waits:
            time.sleep(waits[0])
            return patiently(path, read, waits[1:])
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{path}: the storage failed {len(RETRY_WAITS) + 1} times ({reason}); check disk, network and credentials, "
            "or replace the file if it is the only one"
        ) from error


def orientation(image: Image.Image) -> int:
    """Return how an image is turned, by its EXIF tag: a key of TO_UPRIGHT, or another number if it is upright."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata: viewers show the pixels as stored
        return 1


def _upright(image: Image.Image) -> Image.Image:
    turned = orientation(image)
    return image.transpose(TO_UPRIGHT[turned]) if turned in TO_UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bit_grey(image)
    if image.mode == "F":
        raise ValueError("pixels in floating point, of which nobody says what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (mode "I" in older Pillow) to L, or to LA where one grey value is marked as transparent."""
    values = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey

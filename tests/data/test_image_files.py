"""Which files count as images, and what a decoded one looks like."""

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from masked_diffusion.data import image_files
from masked_diffusion.data.image_files import (
    MAX_ASPECT,
    MAX_PIXELS,
    PathTable,
    UnreadableImageError,
    file_sizes,
    list_folder,
    list_image_files,
    read_image,
)

WHITE = (255, 255, 255)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture(params=["local", "blobfile"])
def listing(request, monkeypatch):
    """The listing function, on the fast local path and, on the same folders, through blobfile."""
    if request.param == "blobfile":
        monkeypatch.setattr(image_files, "is_remote", lambda path: True)
    return lambda folder: list_image_files(str(folder))


def test_extensions_count_in_any_case_and_each_file_once(tmp_path, listing):
    names = ["a.jpg", "b.JPG", "c.JPEG", "d.Png", "e.gif", "f.webp", "g.bmp", "deep/er/h.jpeg", "l.TIF", "m.tiff"]
    names.append("n.jfif")
    touch(tmp_path, *names, "i.txt", "j.heic", "jpg", "k.jpg.part", "deep/npg")
    assert listing(tmp_path) == sorted(names)


def test_what_is_left_out_is_said(tmp_path, listing):
    assert listing is not None  # local and remote
    touch(tmp_path, "a/1.png", "a/2.heic", "a/3.HEIC", "b/4.txt", "b/deep/5.heic", "README", "c/d/6.png")
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    [note] = list_folder(str(tmp_path)).notes
    assert note == "left out: 5 files (.heic 3, .txt 1, no extension 1); folders without images: b, empty"
    (tmp_path / "many").mkdir()
    for number in range(9):
        (tmp_path / "many" / str(number)).mkdir()
        touch(tmp_path, f"c/{number}.png", f"c/x.kind{number}")
    [note] = list_folder(str(tmp_path)).notes
    assert ", ... (12 in all)" in note and note.endswith("folders without images: b, empty, many")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, listing):
    touch(tmp_path, "a/1.png", ".hidden", "a/.DS_Store")
    assert list_folder(str(tmp_path)).notes == []


def test_a_relative_folder_that_is_missing_is_refused_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"--data_dir images: no such folder in {tmp_path};"):
        list_image_files("images")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_files_stand_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    for name in ("a.tif", "a.png"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    pictures = [np.asarray(read_image(str(tmp_path / name))) for name in ("a.tif", "a.png")]
    assert np.array_equal(*pictures)


def test_tiff_files_of_16_bits_are_scaled_and_of_floating_point_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)).save(tmp_path / "deep.tif")
    assert np.all(np.asarray(read_image(str(tmp_path / "deep.tif"))) == 100)
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match="float.tif: .*floating point"):
        read_image(str(tmp_path / "float.tif"))


def test_hidden_files_and_folders_are_left_out(tmp_path, listing):
    touch(tmp_path, "a.png", "._a.png", ".png", ".thumbnails/b.png", "c/.git/d.png")
    assert listing(tmp_path) == ["a.png"]


def test_hidden_data_folder_itself_is_listed(tmp_path, listing):
    touch(tmp_path / ".cache", "a.png")
    assert listing(tmp_path / ".cache") == ["a.png"]


def test_folder_with_an_image_name_is_a_folder(tmp_path, listing):
    touch(tmp_path, "set.png/a.png")
    assert listing(f"{tmp_path}/") == ["set.png/a.png"]


def test_order_is_that_of_the_paths_not_of_the_file_system(tmp_path, monkeypatch):
    names = [f"{folder}/{number}.png" for folder in "ba" for number in range(12)]
    touch(tmp_path, *names)
    assert list_image_files(str(tmp_path)) == sorted(names)


@pytest.mark.parametrize("prepare", ["empty", "no_images"])
def test_folder_without_images_is_refused(tmp_path, listing, prepare):
    if prepare == "no_images":
        touch(tmp_path, "sub/readme.txt", ".hidden.png")
    with pytest.raises(ValueError, match=f"--data_dir {tmp_path}: no images.*jpg jpeg jfif png gif webp bmp tif tiff"):
        listing(tmp_path)


def test_missing_folder_is_refused(tmp_path, listing):
    with pytest.raises(FileNotFoundError, match="--data_dir .*nothing: no such .*folder"):
        listing(tmp_path / "nothing")


def test_file_instead_of_a_folder_is_refused(tmp_path):
    touch(tmp_path, "a.png")
    with pytest.raises(ValueError, match="a.png: is a file; give the folder"):
        list_image_files(str(tmp_path / "a.png"))


def test_failure_of_the_remote_store_names_the_path():
    with pytest.raises(ValueError, match="--data_dir nowhere://bucket"):
        list_image_files("nowhere://bucket/images")


def test_unlistable_folder_is_refused(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")

    def scandir(path, real=os.scandir):
        if path.endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match="--data_dir .*cannot list .*locked .*Permission denied"):
        list_image_files(str(tmp_path))


# Links


def test_folders_linked_in_a_circle_are_listed_once(tmp_path):
    touch(tmp_path, "data/a/x.png", "data/b/y.png", "outside.png")
    for link, target in {"a/loop": "..", "a/self": ".", "a/other": "../b", "b/other": "../a", "up": "../.."}.items():
        (tmp_path / "data" / link).symlink_to(target, target_is_directory=True)
    assert list_image_files(str(tmp_path / "data")) == ["a/x.png", "b/y.png"]


def test_links_outside_are_followed_and_their_circles_are_not(tmp_path):
    touch(tmp_path, "data/x.png", "store/train/y.png", "store/z.png")
    (tmp_path / "data/linked").symlink_to(tmp_path / "store/train")
    (tmp_path / "store/train/back").symlink_to(tmp_path / "store")
    (tmp_path / "store/train/home").symlink_to(tmp_path / "data")
    assert list_image_files(str(tmp_path / "data")) == ["linked/y.png", "x.png"]


def test_link_from_outside_to_a_folder_around_the_data_is_not_followed(tmp_path):
    touch(tmp_path, "home/data/x.png", "home/other.png", "store/y.png")
    (tmp_path / "home/data/linked").symlink_to(tmp_path / "store")
    (tmp_path / "store/home").symlink_to(tmp_path / "home")
    assert list_image_files(str(tmp_path / "home/data")) == ["linked/y.png", "x.png"]


def test_folder_keeps_its_own_name_beside_a_link_to_it(tmp_path):
    touch(tmp_path, "cat/x.png", "dog/y.png")
    (tmp_path / "a_link").symlink_to("cat")
    (tmp_path / "z_link").symlink_to("cat")
    assert list_image_files(str(tmp_path)) == ["cat/x.png", "dog/y.png"]


def test_two_links_to_one_folder_list_it_once_under_the_first_name(tmp_path):
    touch(tmp_path, "store/x.png")
    for name in "ba":
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to("../store")
    assert list_image_files(str(tmp_path / "data")) == ["a/x.png"]


def test_data_folder_may_be_a_link(tmp_path):
    touch(tmp_path, "store/x.png")
    (tmp_path / "data").symlink_to("store")
    assert list_image_files(str(tmp_path / "data")) == ["x.png"]


def test_linked_files_count_and_dead_links_do_not(tmp_path):
    touch(tmp_path, "store/x.png", "data/y.png")
    (tmp_path / "data/x.png").symlink_to("../store/x.png")
    (tmp_path / "data/dead.png").symlink_to("nowhere.png")
    (tmp_path / "data/self.png").symlink_to("self.png")
    assert list_image_files(str(tmp_path / "data")) == ["x.png", "y.png"]


# Paths in memory


@given(st.lists(st.text(max_size=8)))
def test_path_table_is_the_list(paths):
    table = PathTable(paths)
    assert [table[index] for index in range(len(table))] == paths
    with pytest.raises(IndexError):
        table[len(paths)]


def test_path_table_keeps_names_that_are_not_text():
    name = os.fsdecode(b"caf\xe9.png")
    assert pickle.loads(pickle.dumps(PathTable(["a", name])))[1] == name


def test_tables_are_equal_when_their_paths_are():
    assert PathTable(["ab", "c"]) == PathTable(["ab", "c"])
    assert PathTable(["ab", "c"]) != PathTable(["a", "bc"]) != PathTable(["a", "bd"])
    assert PathTable(["ab", "c"]) != ["ab", "c"]


class _Growth:
    """As a data set: how much memory of its own a loader process takes when it reads all names, in bytes."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return 1

    def __getitem__(self, _):
        before = self._own_memory()
        assert sum(len(self.names[i]) for i in range(len(self.names)))
        return self._own_memory() - before

    def _own_memory(self):
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is counted as Linux does")
def test_loader_processes_share_the_list_of_files_with_the_training():
    """Strings are copied when a forked process only looks at them, because it counts who refers to them."""
    paths = [f"n{i // 100:08d}/n{i // 100:08d}_{i}.JPEG" for i in range(100_000)]

    def growth(names):
        [grown] = DataLoader(_Growth(names), num_workers=1, multiprocessing_context="fork", generator=torch.Generator())
        return int(grown)

    assert growth(paths) > 5e6
    assert growth(PathTable(paths)) < 1e6
    # Where processes are not forked, it is sent to them.
    assert len(pickle.dumps(PathTable(paths))) < 1.01 * (sum(map(len, paths)) + 8 * len(paths))


def test_the_sizes_of_many_files_come_in_the_order_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "FILES_AT_ONCE", 3)
    names = [f"{i}.png" for i in range(10)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(i))
    assert file_sizes(str(tmp_path), names).tolist() == list(range(10))
    assert file_sizes(str(tmp_path), []).shape == (0,)
    with pytest.raises(FileNotFoundError):
        file_sizes(str(tmp_path), [*names, "gone.png"])


# Decoding


def pixels(path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def corner(path) -> tuple[int, ...]:
    return tuple(pixels(path)[0, 0])


def noise(*shape, seed=0, high=256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8 if high == 256 else np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.PNG"])
def test_rgb_is_lossless(tmp_path, name):
    want = noise(5, 7, 3)
    Image.fromarray(want).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), want)


def test_rgb_through_blobfile_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "is_remote", lambda path: True)
    want = noise(5, 7, 3)
    Image.fromarray(want).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), want)
    with pytest.raises(ValueError, match="none.png"):
        read_image(str(tmp_path / "none.png"))


def test_cmyk_is_not_inverted(tmp_path):
    """No ink is white, all black ink is black, cyan is cyan."""
    for inks, colour in {(0, 0, 0, 0): WHITE, (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): (0, 255, 255)}.items():
        Image.new("CMYK", (16, 16), inks).save(tmp_path / "a.jpg", quality=100)
        with Image.open(tmp_path / "a.jpg") as image:
            assert image.mode == "CMYK"
        assert np.abs(pixels(tmp_path / "a.jpg") - colour).max() <= 3


def test_grey_of_16_bits_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]


def test_transparent_value_of_16_bit_grey_is_white(tmp_path):
    values = np.array([[0, 1000, 1001]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [0, 255, 4]


def test_grey_and_bilevel_become_grey_rgb(tmp_path):
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bit.png")
    assert corner(tmp_path / "grey.png") == (77, 77, 77)
    assert corner(tmp_path / "bit.png") == WHITE


def test_palette_becomes_its_colours(tmp_path):
    colours = noise(4, 4, 3) // 128 * 200
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
    assert np.array_equal(pixels(tmp_path / "a.png"), colours)


def test_hidden_colour_of_transparent_pixels_is_white(tmp_path):
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0] = [(200, 10, 30, 0), (200, 10, 30, 255), (200, 10, 30, 128)]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    hidden, opaque, half = pixels(tmp_path / "a.png")[0]
    assert tuple(hidden) == WHITE and tuple(opaque) == (200, 10, 30)
    assert np.abs(half - (227, 132, 142)).max() <= 1


def test_opaque_colours_with_an_alpha_channel_are_lossless(tmp_path):
    rgba = noise(40, 40, 4)
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), rgba[..., :3])


def test_grey_with_alpha_is_on_white(tmp_path):
    Image.new("LA", (2, 2), (10, 0)).save(tmp_path / "a.png")
    Image.new("LA", (2, 2), (10, 255)).save(tmp_path / "b.png")
    assert corner(tmp_path / "a.png") == WHITE and corner(tmp_path / "b.png") == (10, 10, 10)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_transparent_palette_entry_is_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 200, 10, 30])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparency)
    assert pixels(tmp_path / "a.png")[0].tolist() == [[9, 8, 7], list(WHITE)]


@pytest.mark.parametrize("mode, colour", [("RGB", (200, 10, 30)), ("L", 200)])
def test_transparent_colour_key_is_white(tmp_path, mode, colour):
    Image.new(mode, (2, 2), colour).save(tmp_path / "a.png", transparency=colour)
    assert corner(tmp_path / "a.png") == WHITE


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animated_image_shows_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
    assert corner(tmp_path / name) == (255, 0, 0)


# How a file of each EXIF orientation stores an upright image: what its row 0 and its column 0 show.
UPRIGHT = noise(4, 6, 3, seed=1)
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.swapaxes(0, 1),  # left, top
    6: UPRIGHT[:, ::-1].swapaxes(0, 1),  # right, top
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: UPRIGHT[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(tmp_path / name, exif=exif, lossless=True)
    assert np.array_equal(pixels(tmp_path / name), UPRIGHT)


def test_photo_turned_by_exif_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.jpg")).size == (10, 20)


def test_transparency_survives_turning(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2), (1, 2, 3)).save(tmp_path / "a.png", exif=exif, transparency=(1, 2, 3))
    assert pixels(tmp_path / "a.png").shape == (4, 2, 3) and corner(tmp_path / "a.png") == WHITE


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("exif", [b"", b"garbage!!!", b"II*\0\x08", b"II*\0\xff\xff\xff\xff"])
def test_damaged_exif_leaves_the_pixels_as_stored(tmp_path, name, exif):
    Image.new("RGB", (20, 10), (9, 9, 9)).save(tmp_path / name, exif=b"Exif\0\0" + exif)
    assert read_image(str(tmp_path / name)).size == (20, 10)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp"])
def test_truncated_image_is_an_error_that_names_it(tmp_path, name):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "whole", format=Image.registered_extensions()[name[1:]])
    whole = (tmp_path / "whole").read_bytes()
    for length in (0, 10, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{name}: cannot be read .*; remove it or replace it"):
            read_image(str(tmp_path / name))


def test_text_named_as_an_image_and_missing_file_are_errors(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    for name in ("a.jpg", "missing.jpg"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            read_image(str(tmp_path / name))


def test_decompression_bomb_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: cannot be read .*decompression bomb"):
        read_image(str(tmp_path / "a.png"))


def png_header(width, height) -> bytes:
    """A PNG that announces a size and ends."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"")
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(60000, 60000), (10000, 10000), (MAX_PIXELS // 100 + 1, 100), (2_000_000_000, 1)])
@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, monkeypatch, size, pillows_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / "a.png").write_bytes(png_header(*size))
    with pytest.raises(UnreadableImageError, match=r"a.png: cannot be read as an image \(.*; remove it or replace it"):
        read_image(str(tmp_path / "a.png"))
    assert pillows_limit == Image.MAX_IMAGE_PIXELS


def test_a_line_of_pixels_is_refused_and_a_long_strip_is_not(tmp_path):
    for width in (MAX_ASPECT, MAX_ASPECT + 1):
        Image.new("RGB", (width, 1)).save(tmp_path / f"{width}.png")
    assert read_image(str(tmp_path / f"{MAX_ASPECT}.png")).size == (MAX_ASPECT, 1)
    with pytest.raises(UnreadableImageError, match="101 x 1 pixels: one side is more than 100 times the other"):
        read_image(str(tmp_path / f"{MAX_ASPECT + 1}.png"))


class FailingStorage:
    """Opens a file of a bucket after a number of failures."""

    def __init__(self, failures, error=None):
        self.failures, self.calls = failures, 0
        self.error = error or TimeoutError("the network is down")

    def BlobFile(self, path, mode):
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        buffer = io.BytesIO()
        Image.new("RGB", (3, 2)).save(buffer, "PNG")
        return io.BytesIO(buffer.getvalue())


def test_storage_that_fails_for_a_moment_is_asked_again(monkeypatch):
    waits, storage = [], FailingStorage(2)
    monkeypatch.setattr(image_files.time, "sleep", waits.append)
    monkeypatch.setattr(image_files, "_blobfile", lambda path: storage)
    assert read_image("gs://bucket/a.png").size == (3, 2) and waits == [1, 5]


def test_storage_that_goes_on_failing_is_no_unreadable_image(monkeypatch):
    storage = FailingStorage(9)
    monkeypatch.setattr(image_files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(image_files, "_blobfile", lambda path: storage)
    with pytest.raises(OSError, match="gs://bucket/a.png: the storage failed 3 times .the network is down") as caught:
        read_image("gs://bucket/a.png")
    assert not isinstance(caught.value, UnreadableImageError)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")])
def test_a_file_that_is_missing_or_forbidden_is_unreadable_at_once(monkeypatch, error):
    storage = FailingStorage(9, error)
    monkeypatch.setattr(image_files, "_blobfile", lambda path: storage)
    with pytest.raises(UnreadableImageError, match=error.strerror):
        read_image("gs://bucket/a.png")
    assert storage.calls == 1


def test_a_program_called_a_picture_is_refused_and_not_run(tmp_path):
    """Pillow would hand an EPS to Ghostscript, whatever its name."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        read_image(str(path))

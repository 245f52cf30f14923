"""--fast_decode: other code for the same crops, up to small differences in the pixels."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn
from PIL import Image

from masked_diffusion.data import fast_decode
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.randomness import numpy_generator

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
PHOTOS = [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]


def levels(pixels):
    """What the model gets, (C, H, W) in [-1, 1], as grey levels."""
    return np.rint((pixels + 1) * 127.5)


def differences(folder, image_size, **settings):
    """Mean and largest difference, in grey levels, between the two ways to crop each image of a folder."""
    exact, fast = (
        open_dataset(str(folder), image_size=image_size, class_cond=False, fast_decode=fast, **settings)
        for fast in (False, True)
    )
    for index in range(len(exact)):
        pair = [levels(data.load(index, numpy_generator(0, "augment", 0, index))) for data in (exact, fast)]
        assert pair[0].shape == pair[1].shape == (3, image_size, image_size)
        difference = np.abs(pair[0] - pair[1])
        yield difference.mean(), difference.max()


def photos_in(folder, *sizes, **saving):
    """Both photographs, cut to sizes (width, height)."""
    for path in PHOTOS:
        for width, height in sizes:
            Image.open(path).crop((0, 0, width, height)).save(folder / f"{path.stem}{width}x{height}.jpg", **saving)


@pytest.mark.parametrize("random_crop", [False, True])
@pytest.mark.parametrize("image_size", [215, 256, 427, 500])
def test_photographs_of_less_than_twice_the_size_differ_by_rounding(tmp_path, image_size, random_crop):
    photos_in(tmp_path, (640, 427), (427, 640), quality=95)
    for mean, largest in differences(tmp_path, image_size, random_crop=random_crop):
        assert mean < 0.02 and largest <= 3


@pytest.mark.parametrize("image_size", [32, 52, 64, 104, 128, 200])
def test_photographs_that_are_decoded_smaller_stay_within_about_a_grey_level_on_average(tmp_path, image_size):
    photos_in(tmp_path, (640, 416), (416, 416))
    measured = list(differences(tmp_path, image_size))
    assert all(mean < (1 if image_size >= 64 else 1.1) for mean, _ in measured)
    assert all(largest <= 32 for _, largest in measured)
    # A decoder that was not asked would differ by rounding alone.
    assert min(mean for mean, _ in measured) > 0.1


@pytest.mark.parametrize("image_size", [64, 200])
def test_photographs_of_odd_sides_are_halved_as_they_always_were(tmp_path, image_size):
    photos_in(tmp_path, (639, 427))
    assert all(mean < 0.02 and largest <= 3 for mean, largest in differences(tmp_path, image_size))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_size", [300, 64])
def test_photographs_stand_upright(tmp_path, orientation, image_size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(PHOTOS[0]).crop((0, 0, 640, 416)).save(tmp_path / "turned.jpg", exif=exif)
    assert all(mean < 1 for mean, _ in differences(tmp_path, image_size))


@pytest.mark.parametrize("image_size", [24, 40, 70])
@pytest.mark.parametrize(
    "mode, kind", [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "gif"), ("LA", "png"), ("RGB", "bmp")]
)
def test_other_kinds_of_images_look_as_they_do_elsewhere(tmp_path, mode, kind, image_size):
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 4)).astype(np.uint8)
    smooth = Image.fromarray(noise, "RGBA").resize((66, 51))
    (smooth if mode in ("RGBA", "LA") else smooth.convert("RGB")).convert(mode).save(tmp_path / f"image.{kind}")
    [(mean, largest)] = differences(tmp_path, image_size)
    assert mean < 0.25 and largest <= 4


# JPEG files of less than twice the size are decoded by torchvision, everything else by Pillow


@pytest.fixture
def decoded(monkeypatch):
    """What torchvision was asked for, and whether it did it."""
    answers = []
    decode = fast_decode._decode_jpeg

    def spy(content):
        pixels = decode(content)
        answers.append(pixels is not None)
        return pixels

    monkeypatch.setattr(fast_decode, "_decode_jpeg", spy)
    return answers


def jpeg(image, **saving):
    file = io.BytesIO()
    image.save(file, "JPEG", **saving)
    return file.getvalue()


def turned_by(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


SMALL_PHOTO = Image.open(PHOTOS[0]).resize((96, 64))
JPEGS = {
    "plain": jpeg(SMALL_PHOTO),
    "progressive": jpeg(SMALL_PHOTO, progressive=True),
    "fine colours": jpeg(SMALL_PHOTO, quality=95, subsampling=0),
    "grey": jpeg(SMALL_PHOTO.convert("L")),
    "upright": jpeg(SMALL_PHOTO, exif=turned_by(1)),
    "turned": jpeg(SMALL_PHOTO, exif=turned_by(6)),
    "CMYK": jpeg(SMALL_PHOTO.convert("CMYK")),
}


def load(folder, content, image_size=48):
    """By --fast_decode, the picture of a file, None where it cannot be read."""
    (folder / "image.jpg").write_bytes(content)
    try:
        return open_dataset(str(folder), image_size=image_size, class_cond=False, fast_decode=True).load(0)
    except UnreadableImageError:
        return None


@pytest.mark.parametrize(("kind", "content"), JPEGS.items())
def test_torchvision_and_pillow_decode_the_same_pixels(tmp_path, monkeypatch, decoded, kind, content):
    fast = load(tmp_path, content)
    assert decoded == ([] if kind in ("turned", "CMYK") else [True])
    monkeypatch.setattr(fast_decode, "_decode_jpeg", lambda content: None)
    np.testing.assert_array_equal(fast, load(tmp_path, content))


@pytest.mark.parametrize("image_size", [32, 33])
def test_from_twice_the_size_on_pillow_decodes_fewer_pixels(tmp_path, decoded, image_size):
    load(tmp_path, JPEGS["plain"], image_size)
    assert decoded == ([] if image_size == 32 else [True])


def test_without_torchvisions_decoder_pillow_decodes(tmp_path, monkeypatch, decoded):
    expected = load(tmp_path, JPEGS["plain"])
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    np.testing.assert_array_equal(load(tmp_path, JPEGS["plain"]), expected)
    assert decoded == [True, False]


def damaged(rng):
    """A JPEG file cut off, with some wrong bytes, or with a block of wrong ones."""
    content = bytearray(JPEGS[rng.choice(["plain", "progressive", "fine colours", "grey"])])
    at = int(rng.integers(len(content)))
    match rng.integers(3):
        case 0:
            del content[at:]
        case 1:
            for place in rng.integers(len(content), size=3):
                content[place] = rng.integers(256)
        case _:
            content[at : at + 50] = rng.bytes(len(content[at : at + 50]))
    return bytes(content)


def test_damaged_files_are_read_or_left_out_as_pillow_would(tmp_path, monkeypatch, decoded):
    rng = np.random.default_rng(0)
    contents = [damaged(rng) for _ in range(150)]
    with monkeypatch.context() as patch:
        patch.setattr(fast_decode, "_decode_jpeg", lambda content: None)
        expected = [load(tmp_path, content) for content in contents]
    for content, picture in zip(contents, expected, strict=True):
        found = load(tmp_path, content)
        assert (found is None) == (picture is None)
        if found is not None:
            np.testing.assert_array_equal(found, picture)
    assert {True, False} == set(decoded) and 30 < sum(picture is None for picture in expected) < 120


@pytest.mark.parametrize("size", [(30_000, 30_000), (20_000, 100)])
def test_absurd_sizes_are_refused_before_anything_is_decoded(tmp_path, decoded, size):
    content = bytearray(JPEGS["plain"])
    frame = content.index(b"\xff\xc0")  # marker, length, depth, height, width
    content[frame + 5 : frame + 9] = size[1].to_bytes(2, "big") + size[0].to_bytes(2, "big")
    assert load(tmp_path, bytes(content), 10_000) is None
    assert not decoded


@pytest.mark.parametrize("content", [b"", b"no image", PHOTOS[0].read_bytes()[:3000]])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    for fast in (False, True):
        with pytest.raises(UnreadableImageError, match=r"bad.jpg: cannot be read as an image"):
            open_dataset(str(tmp_path), image_size=64, class_cond=False, fast_decode=fast).load(0)


def test_it_is_said_to_be_ignored_where_nothing_is_decoded():
    with pytest.warns(UserWarning, match="--fast_decode is ignored for --data_dir builtin:digits"):
        open_dataset("builtin:digits", image_size=8, fast_decode=True)

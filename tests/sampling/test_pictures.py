import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from masked_diffusion.sampling.pictures import (
    check_picture_path,
    encode_animation,
    grid,
    heat_map,
    save_picture,
    table,
    to_uint8,
)


def pixel(value):
    return int(to_uint8(torch.full((1, 3, 1, 1), value))[0, 0, 0, 0])


@pytest.mark.parametrize(
    "value, expected",
    [(-1.0, 0), (1.0, 255), (0.0, 127), (-2.0, 0), (7.0, 255), (float("inf"), 255), (-float("inf"), 0)]
    + [(0.003921, 127), (0.00393, 128), (0.9999, 254), (-0.9922, 0), (-0.9921, 1)],
)
def test_pixels_are_truncated_after_clamping(value, expected):
    assert pixel(value) == expected


@given(st.floats(-1.5, 1.5, width=32))
def test_a_pixel_is_the_integer_part_of_127_5_times_x_plus_1(value):
    exact = (np.clip(np.float32(value), np.float32(-1), np.float32(1)) + np.float32(1)) * np.float32(127.5)
    assert pixel(value) == int(exact)


@pytest.mark.parametrize("level", range(256))
def test_levels_of_training_images_come_back_at_most_one_darker(level):
    assert pixel(level / 127.5 - 1) in (level, level - 1)


def test_channels_come_last_in_their_order():
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 60 - 1
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    expected = ((images + 1) * 127.5).to(torch.uint8)
    assert all(
        pixels[n, h, w, c] == expected[n, c, h, w] for n in (0, 1) for c in (0, 1, 2) for h, w in ((0, 0), (3, 2))
    )


def test_grey_becomes_rgb():
    images = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 2, 2, 3)
    assert np.array_equal(pixels, to_uint8(images.expand(-1, 3, -1, -1)))
    assert len(np.unique(pixels)) == 8


def test_half_precision_images_are_converted_in_float32():
    values = torch.linspace(-1, 1, 300).to(torch.bfloat16)
    assert np.array_equal(
        to_uint8(values.view(1, 1, 1, -1)), to_uint8(values.float().view(1, 1, 1, -1))
    )  # (x + 1) * 127.5 in bfloat16 has steps of a whole level


# -- grids -------------------------------------------------------------------------------------------------------------


def flat_images(count, height, width=None):
    """Images of one grey level each: 0, 10, 20, ..."""
    levels = (np.arange(count) * 10).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width or height, 3)).copy()


@pytest.mark.parametrize("side", [1, 8, 28, 63])
def test_small_images_are_enlarged_until_they_can_be_read(side):
    picture = grid(flat_images(1, side))
    assert min(picture.size) >= 64 + 8


@pytest.mark.parametrize("side", [64, 100])
def test_images_that_can_be_read_keep_their_pixels(side):
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    picture = np.asarray(grid(image))
    assert picture.shape == (side + 8, side + 8, 3)
    assert np.array_equal(picture[4:-4, 4:-4], image[0])


@pytest.mark.parametrize("count, columns, shape", [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (2, 3))])
@pytest.mark.parametrize("side", [16, 64])
def test_without_columns_a_grid_is_about_a_square(count, columns, shape, side):
    assert grid(flat_images(count, side), columns).size == (shape[1] * 68 + 4, shape[0] * 68 + 4)


@pytest.mark.parametrize("count, columns", [(1, 3), (3, 3), (7, 3), (6, 1), (2, 5)])
def test_images_stand_row_by_row_on_white(count, columns):
    picture = np.asarray(grid(flat_images(count, 64), columns))
    rows = -(-count // columns)
    assert picture.shape == (rows * 68 + 4, columns * 68 + 4, 3)
    for place in range(rows * columns):
        top, left = 4 + place // columns * 68, 4 + place % columns * 68
        tile = picture[top : top + 64, left : left + 64]
        assert np.all(tile == (place * 10 if place < count else 255))
    assert np.all(picture[:4] == 255) and np.all(picture[:, -4:] == 255) and np.all(picture[:, 68:72] == 255)


def test_oblong_images_keep_their_shape():
    assert grid(flat_images(2, 32, 96), columns=1).size == (2 * 96 + 8, 2 * 68 + 4)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.PNG", "PNG")])
def test_the_suffix_chooses_the_format(tmp_path, name, kind):
    check_picture_path(tmp_path / name)
    save_picture(grid(flat_images(4, 64)), tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and picture.size == (140, 140)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_png_keeps_every_pixel(tmp_path):
    picture = grid(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8))
    save_picture(picture, tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))


@pytest.mark.parametrize("name", ["sample", "sample.gif", "sample.jpg.txt"])
def test_a_bad_suffix_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: pictures are written as .png or .jpg"):
        check_picture_path(tmp_path / name)


def test_a_missing_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        check_picture_path(tmp_path / "missing" / "sample.jpg")


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="no permission"):
        check_picture_path(tmp_path / "sample.jpg")


def test_a_bare_name_lies_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_picture_path(Path("sample.jpg"))
    save_picture(grid(flat_images(1, 64)), Path("sample.jpg"))
    assert (tmp_path / "sample.jpg").is_file()


# -- tables, heat maps, animations -------------------------------------------------------------------------------------


def test_a_table_is_a_grid_with_names_before_its_rows_and_above_its_columns():
    images = flat_images(6, 64).reshape(2, 3, 64, 64, 3)
    picture = np.asarray(table(images, ["first", "a much longer name"], ["a", "b", "c"]))
    tiles = np.asarray(grid(images.reshape(6, 64, 64, 3), columns=3))
    assert np.array_equal(picture[-tiles.shape[0] :, -tiles.shape[1] :], tiles)
    names = picture[:, : -tiles.shape[1]]
    assert (names[-tiles.shape[0] :][:68] < 128).any() and (names[-68:] < 128).any()
    assert (names[:, 0] == 255).all()  # no name is cut off
    assert (picture[: -tiles.shape[0], -tiles.shape[1] :] < 128).any()
    assert table(images, ["", ""]).height == tiles.shape[0]


def test_a_heat_map_is_white_at_zero_red_above_and_blue_below():
    colours = heat_map(np.array([[0.0, 2.0, -2.0, 1.0, 5.0]]), limit=2.0)
    assert colours.dtype == np.uint8
    assert colours[0].tolist() == [[255, 255, 255], [178, 24, 43], [33, 102, 172], [216, 140, 149], [178, 24, 43]]


def test_an_animation_has_every_frame_and_rests_on_the_last(tmp_path):
    frames = [grid(flat_images(i + 1, 64), columns=3) for i in (3, 4, 5)]
    (tmp_path / "a.gif").write_bytes(encode_animation(frames))
    durations = []
    with Image.open(tmp_path / "a.gif") as picture:
        for frame in range(picture.n_frames):
            picture.seek(frame)
            durations.append(picture.info["duration"])
    assert durations == [120, 120, 2000]


def test_a_gif_is_refused_where_there_is_no_animation(tmp_path):
    check_picture_path(tmp_path / "a.gif", animation=True)
    with pytest.raises(ValueError, match="a.bmp: pictures are written as .png or .jpg or .gif"):
        check_picture_path(tmp_path / "a.bmp", animation=True)

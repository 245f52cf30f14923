import numpy as np
import pytest

from masked_diffusion.data.shapes import CLASSES, SIDE, draw_shape, label_of
from masked_diffusion.data.sources import Shapes, open_source
from masked_diffusion.image_datasets import open_dataset


def test_a_picture_depends_on_seed_and_index_alone():
    first = [np.asarray(draw_shape(0, index)) for index in range(30)]
    again = [np.asarray(draw_shape(0, index)) for index in reversed(range(30))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(picture, draw_shape(1, index)) for index, picture in enumerate(first))
    assert len({picture.tobytes() for picture in first}) == 30
    assert all(picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8 for picture in first)


def test_every_class_stays_inside_of_its_picture():
    """The border has the background's colours: what is cut off could not be learned as a whole thing."""
    for index in range(200):
        picture = np.asarray(draw_shape(3, index)).astype(int)
        corners = picture[[0, 0], [0, -1]]  # a background is constant along a row
        changed = np.abs(picture[0] - corners[0]).max(axis=1) > 12
        assert changed.mean() < 0.5, (index, list(CLASSES)[label_of(index)])


def test_the_data_set_is_like_a_folder_of_colour_images():
    dataset = open_dataset("builtin:shapes", image_size=32)
    assert len(dataset) == 10_000 and dataset.class_names == sorted(CLASSES) and dataset.channels == 3
    assert np.bincount(dataset.labels).tolist() == [1000] * 10
    image = dataset.load(23)
    expected = np.asarray(draw_shape(0, 23)).transpose(2, 0, 1) / 127.5 - 1
    assert dataset.labels[23] == 3 and np.abs(image - expected).max() < 1e-6


def test_the_test_part_has_other_pictures():
    train, test = (open_source(name) for name in Shapes.PARTS)
    assert len(test) == 2000 and not {train.read(i) for i in range(100)} & {test.read(i) for i in range(100)}


@pytest.mark.parametrize("name", ["builtin:shapes-best", "builtin:shape"])
def test_an_unknown_name_is_refused_with_all_names(name):
    with pytest.raises(ValueError, match="choose one of builtin:digits, .*builtin:shapes-test"):
        open_source(name)

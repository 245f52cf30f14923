"""Where the bytes of a data set are read: each source offers names, sizes, labels and the content of its images."""

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from masked_diffusion.data import sources
from masked_diffusion.data.image_files import EXTENSIONS, EXTENSIONS_OF_0_1_0
from masked_diffusion.data.path_table import PathTable
from masked_diffusion.data.source import Classes, ImageSource
from masked_diffusion.data.sources import Builtin, Folder, LatentFolder, open_images, open_source
from masked_diffusion.image_datasets import open_dataset


def test_the_first_source_that_claims_a_path_opens_it(colour_folder, tmp_path):
    (tmp_path / "latents_unfinished.json").touch()
    opened = [
        next(source for source in sources.SOURCES if source.claims(str(path)))
        for path in ("builtin:digits", tmp_path, colour_folder, tmp_path / "nowhere")
    ]
    assert opened == [Builtin, LatentFolder, Folder, Folder]


@pytest.mark.parametrize("name", ["folder", "builtin:digits-test"])
def test_a_source_gives_names_in_order_and_files_of_the_sizes_it_says(colour_folder, name):
    source = open_images(str(colour_folder) if name == "folder" else name)
    names = list(source.names)
    assert names == sorted(names) and len(source) == len(names) == len(set(names))
    assert source.sizes().tolist() == [len(source.read(index)) for index in range(len(source))]
    assert source.name_of(0).endswith(names[0])


def test_the_builtin_digits_are_files_of_their_pixels():
    source = open_images("builtin:digits-test")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(source.read(7)))), source.images[7])
    assert source.classes().names == [str(digit) for digit in range(10)]


class Squares(ImageSource):
    """Four grey squares with labels of their own."""

    def __init__(self, data_dir, options):
        self.data_dir = data_dir
        self.names = PathTable(f"{index}.png" for index in range(4))

    @classmethod
    def claims(cls, data_dir):
        return data_dir == "squares"

    def classes(self):
        return Classes(["dark", "light"], np.array([0, 0, 1, 1]))

    def read(self, index):
        file = io.BytesIO()
        Image.new("RGB", (9, 9), (60 * index,) * 3).save(file, "PNG")
        return file.getvalue()


def test_a_format_of_ones_own_is_a_source_and_an_entry(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", (Squares, *sources.SOURCES))
    dataset = open_dataset("squares", image_size=8)
    assert dataset.class_names == ["dark", "light"] and dataset.labels.tolist() == [0, 0, 1, 1]
    assert dataset.name_of(2) == "squares/2.png"
    for fast in (False, True):
        picture = open_dataset("squares", image_size=8, fast_decode=fast).load(2)
        assert picture.shape == (3, 8, 8) and np.allclose(picture, 120 / 127.5 - 1)


def test_latents_are_no_source_of_images(colour_folder, monkeypatch):
    class Record:
        data_dir = "pictures"

    latents = LatentFolder.__new__(LatentFolder)
    latents.cache = type("Cache", (), {"record": Record})
    monkeypatch.setattr(sources, "open_source", lambda data_dir, options: latents)
    with pytest.raises(ValueError, match=r"--data_dir lat: holds latents; give the images .* \(pictures\)"):
        open_images("lat")


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="--data_dir: give the folder that holds the images, or builtin:digits"):
        open_source("")


def test_a_narrowed_source_has_the_images_of_the_kinds_that_were_read_once(colour_folder, tmp_path):
    images = shutil.copytree(colour_folder, tmp_path / "images")
    for name in ("green/0", "red/7"):
        (images / name).with_suffix(".png").rename((images / name).with_suffix(".TiFF"))
    (images / "dataset.json").write_text(
        json.dumps({"labels": [[name, len(name) % 2] for name in open_images(str(images)).names]})
    )
    whole, former = open_images(str(images)), open_images(str(images), extensions=EXTENSIONS_OF_0_1_0)
    kept = [index for index, name in enumerate(whole.names) if name.endswith(".png")]
    assert len(former) == len(kept) == 22 and list(former.names) == [whole.names[index] for index in kept]
    for here, there in enumerate(kept):
        assert former.name_of(here) == whole.name_of(there) and former.read(here) == whole.read(there)
        assert former.picture(here) == whole.picture(there)
    assert np.array_equal(former.sizes(), whole.sizes()[kept])
    assert former.classes().names == whole.classes().names
    assert np.array_equal(former.classes().labels, whole.classes().labels[kept])
    assert former.notes[-1] == "left out: 2 files (.tiff 2): kinds that were not read yet when this began"
    assert open_images(str(images), extensions=EXTENSIONS).notes == whole.notes
    with pytest.raises(ValueError, match=r"do not read its kinds of images \(.*\.png.*\); give the former images"):
        open_images(str(colour_folder), extensions=[".jpg"])

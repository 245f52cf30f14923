"""Sources other than folders: zip archives and arrays give what a folder of the same images gives, to the bit."""

import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import threading
import zipfile
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from support import script

from masked_diffusion.data import archive_files, array_images, image_files, parquet_images, tar_images, zip_images
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.data.source import SourceOptions
from masked_diffusion.data.sources import Arrays, Arrow, Folder, Parquet, Tar, Zip, open_source
from masked_diffusion.image_datasets import load_data, open_dataset

COUNT, SIDE = 30, 16


def png(seed, side=SIDE):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


IMAGES = {f"{index % 3}/{index // 3:08d}.png": png(index) for index in range(COUNT)}
IN_ORDER = sorted(IMAGES)
LABELS = [int(name[0]) for name in IN_ORDER]


def write_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def labels_json(labels=LABELS):
    return json.dumps({"labels": [[name, label] for name, label in zip(IN_ORDER, labels, strict=True)]})


def make_folder(root, images=IMAGES):
    for name, content in images.items():
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(content)
    return root / "folder"


def make_one_hot(root):
    one_hot = [[int(label == other) for other in range(3)] for label in LABELS]
    return write_zip(root / "hot.zip", {**IMAGES, "dataset.json": labels_json(one_hot)})


def make_npz(root, save=np.savez, images=IMAGES):
    pixels = [np.asarray(Image.open(io.BytesIO(images[name]))) for name in sorted(images)]
    save(root / "images.npz", arr_0=np.stack(pixels), arr_1=np.array([int(name[0]) for name in sorted(images)]))
    return root / "images.npz"


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def make_tar(root, shards=1, label=".cls", place="{}", images=IMAGES):
    """webdataset's form, the images in any order, in so many archives."""
    for shard in range(shards):
        members = []
        for name in list(images)[shard::shards]:
            number = name[0]
            value = json.dumps({"label": int(number)}) if label == ".json" else number
            members += [(name, images[name]), (name.replace(".png", label), value.encode())]
        (root / f"s-{shard + 8:02d}.tar").write_bytes(tar_of(members))
    return root / place


def make_list(root):
    make_tar(root, 3)
    (root / "list.txt").write_text("s-08.tar\ns-{09..10}.tar\n")
    return root / "list.txt"


def make_parquet(root, place="train-00000-of-00002.parquet", label_column="label", images=IMAGES):
    """Two files as datasets writes them, the images in any order, and a split that is not to be read."""
    (root / place).parent.mkdir(exist_ok=True)
    features = {"label": {"names": ["0", "1", "2"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for number, names in enumerate((list(images)[::2], list(images)[1::2], list(images)[:1])):
        column = pyarrow.array([{"bytes": images[name], "path": name} for name in names], kind)
        table = pyarrow.table({"image": column, label_column: [int(name[0]) for name in names]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        name = (
            place.replace("00000-of", "00001-of")
            if number == 1
            else place.replace("train", "test")
            if number
            else place
        )
        parquet.write_table(table, root / name, row_group_size=4)
    return root


def make_saved(root, images=IMAGES):
    """A folder as datasets.save_to_disk writes a DatasetDict: splits, each with files of Arrow streams."""
    make_parquet(root, images=images)
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (root / split).mkdir()
        names = []
        for path in sorted(root.glob(f"{split}-*.parquet")):
            names.append(f"data-{len(names):05d}-of-00002.arrow")
            table = parquet.read_table(path)
            with pyarrow.ipc.new_stream(root / split / names[-1], table.schema) as stream:
                stream.write_table(table, max_chunksize=4)
            path.unlink()
        state = {"_data_files": [{"filename": name} for name in names], "_format_type": None, "_split": None}
        (root / split / "state.json").write_text(json.dumps(state))
        (root / split / "dataset_info.json").write_text("{}")
    return root


def make_joined(root):
    """Three tar archives in one file, each with its end, as cat joins them."""
    make_tar(root, 3)
    parts = sorted(root.glob("*.tar"))
    (root / "joined").write_bytes(b"".join(path.read_bytes() for path in parts))
    return root / "joined"


FORMS = {
    "joined tars": make_joined,
    "saved": make_saved,
    "parquet": make_parquet,
    "tar": lambda root: make_tar(root, place="s-08.tar"),
    "tars": lambda root: make_tar(root, 3, place="s-{08..10}.tar"),
    "folder of tars": lambda root: make_tar(root, 3, ".json", "."),
    "list of tars": make_list,
    "folder": make_folder,
    "zip": lambda root: write_zip(root / "a.zip", dict(reversed(IMAGES.items()))),
    "deflated": lambda root: write_zip(root / "a.zip", IMAGES, zipfile.ZIP_DEFLATED),
    "edm2": lambda root: write_zip(root / "a.zip", {"dataset.json": labels_json(), **IMAGES}),
    "one-hot": make_one_hot,
    "npz": make_npz,
    "compressed npz": lambda root: make_npz(root, np.savez_compressed),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "archive_lists"))


@pytest.fixture(scope="module")
def paths(module_folder):
    return {form: str(make(module_folder(form.replace(" ", "_")))) for form, make in FORMS.items()}


def three_epochs(path, ranks=1, batch_size=6, **settings):
    """What 3 epochs give to so many ranks, put together again: images, labels and identities in their order."""
    streams = [
        load_data(
            data_dir=path, batch_size=batch_size // ranks, image_size=12, class_cond=True, random_crop=True, seed=4,
            rank=rank, world_size=ranks, **settings,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    number = 3 * len(open_source(path)) // batch_size
    dealt = [list(islice(stream, number)) for stream in streams]
    for stream in streams:
        stream.close()
    batches = [batch for step in zip(*dealt, strict=True) for batch in step]
    together = {name: torch.cat([extra[name] for _, extra in batches]) for name in batches[0][1]}
    return {"images": torch.cat([images for images, _ in batches]), **together}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def expected(paths):
    return three_epochs(paths["folder"])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(paths, expected, form):
    assert len(expected["images"]) == 3 * COUNT
    assert_same(three_epochs(paths[form], ranks=2), expected)


MANY = {f"{index % 7}/{index // 7:08d}.png": png(index, 13) for index in range(500)}
FIVE = {
    "folder": make_folder,
    "zip": lambda root, images: write_zip(root / "a.zip", images),
    "tar": partial(make_tar, shards=3, place="."),
    "parquet": make_parquet,
    "npz": make_npz,
}


@pytest.fixture(scope="module")
def many(module_folder):
    """500 images in five forms, and what three epochs of the folder give to one process."""
    paths = {form: str(make(module_folder(f"many_{form}"), images=MANY)) for form, make in FIVE.items()}
    return paths, three_epochs(paths["folder"], batch_size=50)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("form", FIVE)
def test_five_hundred_images_give_the_same_batches_in_each_form_on_any_processes(many, form, ranks, num_workers):
    paths, expected = many
    assert len(expected["images"]) == 3 * 500 and len(expected["y"].unique()) == 7
    assert_same(three_epochs(paths[form], ranks, batch_size=50, num_workers=num_workers), expected)


@pytest.mark.parametrize("form", FORMS)
def test_sources_travel_to_workers_and_know_their_images(paths, form):
    source = open_source(paths[form])
    assert type(source) is {
        "folder": Folder,
        "npz": Arrays,
        "compressed npz": Arrays,
        "parquet": Parquet,
        "saved": Arrow,
    }.get(form, Tar if "tar" in form else Zip)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.names == source.names and len(pickle.dumps(source)) < 20_000
    assert np.array_equal(np.asarray(copy.picture(3)), np.asarray(source.picture(3)))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(copy.read(3)))), np.asarray(source.picture(3)))
    assert source.name_of(0).startswith(paths[form]) and len(source.sizes()) == COUNT


def test_an_archive_is_known_by_what_it_is_and_not_by_its_name(tmp_path, paths):
    for form, name in (("zip", "a.data"), ("npz", "b.zip")):
        (tmp_path / name).write_bytes(Path(paths[form]).read_bytes())
    assert isinstance(open_source(str(tmp_path / "a.data")), Zip)
    assert isinstance(open_source(str(tmp_path / "b.zip")), Arrays)
    (tmp_path / "c.zip").write_text("no archive")
    with pytest.raises(ValueError, match="c.zip: is a file; give the folder that holds the images, or a .zip"):
        open_source(str(tmp_path / "c.zip"))


# Labels


def with_a_label_too_many(form, root):
    """A source of two images in which something has no place. Returns the path and the flags."""
    flags = {}
    if form == "tar":
        (root / "a.tar").write_bytes(tar_of([("0.png", png(0)), ("0.cls", b"1"), ("1.cls", b"0")]))
        (root / "README.md").touch()
    elif form == "parquet":
        write_table(root / "a.parquet", image=[png(0)], label=[1])
        (root / "README.md").touch()
    elif form == "npz":
        np.savez(root / "a.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8), arr_1=[1], mu=np.zeros(3))
        return root / "a.npz", flags
    elif form == "labels_file":
        (root / "0.png").write_bytes(png(0))
        (root.parent / "labels.json").write_text('{"labels": [["0.png", 1], ["gone.png", 0]]}')
        flags = {"labels_file": str(root.parent / "labels.json")}
    else:
        members = {"0.png": png(0), "dataset.json": '{"labels": [["0.png", 1], ["gone.png", 0]]}'}
        if form == "zip":
            return write_zip(root / "a.zip", members), flags
        (root / "0.png").write_bytes(png(0))
        (root / "dataset.json").write_text(members["dataset.json"])
    return root, flags


@pytest.mark.parametrize(
    "form, notes",
    [
        ("folder", ["1 labels of .*dataset.json without an image"]),
        ("zip", ["1 labels of dataset.json of --data_dir .* without an image"]),
        ("labels_file", ["1 labels of --labels_file .*labels.json without an image"]),
        ("tar", [r"left out: 1 files \(.md 1\)", "a.tar: 1 labels without an image"]),
        ("parquet", [r"left out: 1 files \(.md 1\)"]),
        ("npz", ["left out: arrays mu"]),
    ],
)
def test_each_form_says_what_it_leaves_out_and_which_classes_have_no_images(tmp_path, form, notes):
    (tmp_path / "data").mkdir()
    path, flags = with_a_label_too_many(form, tmp_path / "data")
    said = open_dataset(str(path), image_size=8, **flags).notes
    assert said[-1] == "classes without images: 0" and len(said) == len(notes) + 1
    assert all(re.search(note, line) for note, line in zip(notes, said, strict=False))


def test_labels_that_are_numbers_stay_what_they_are(tmp_path):
    write_zip(
        tmp_path / "a.zip",
        {"b.png": png(0), "c.png": png(1), "dataset.json": '{"labels": [["b.png", 5], ["c.png", 2]]}'},
    )
    dataset = open_dataset(str(tmp_path / "a.zip"), image_size=8)
    assert dataset.labels.tolist() == [5, 2] and dataset.class_names == ["0", "1", "2", "3", "4", "5"]
    assert "classes without images: 0, 1, 3, 4" in dataset.notes


def test_a_folder_with_edm2s_list_has_its_labels_and_names_where_there_are_none(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "dataset.json").write_text(labels_json([2 - label for label in LABELS]))
    dataset = open_dataset(str(folder), image_size=8)
    assert dataset.labels.tolist() == [2 - label for label in LABELS] and not dataset.notes
    assert open_dataset(str(folder), image_size=8, class_from="folder").labels.tolist() == LABELS
    (folder / "dataset.json").write_text('{"labels": null}')
    assert open_dataset(str(folder), image_size=8).labels.tolist() == LABELS


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize(
    "content",
    [
        '{"name": "flowers"}',
        "[1, 2]",
        '{"labels": ["ab", "cd"]}',
        '{"labels": {"0": "cat"}}',
        '{"a": 1}\n{"a": 2}\n',
        "3",
    ],
)
def test_a_file_of_edm2s_name_with_other_json_in_it_is_a_note(tmp_path, form, content):
    if form == "folder":
        (make_folder(tmp_path) / "dataset.json").write_text(content)
    else:
        write_zip(tmp_path / "zip", {**IMAGES, "dataset.json": content})
    dataset = open_dataset(str(tmp_path / form), image_size=8)
    assert dataset.labels.tolist() == LABELS and dataset.class_names == ["0", "1", "2"]
    [note] = dataset.notes
    assert "dataset.json" in note and note.startswith("labels are not used: ") and note.endswith("but other JSON")
    dataset.source.classes()
    assert len(dataset.source.notes) == 1


@pytest.mark.parametrize(
    "content, sentence",
    [
        (labels_json()[:-9], "not a list of labels"),
        (labels_json([1.5] * COUNT), r"not a list of labels \(1.5 is no label"),
        ('{"labels": [["0/00000000.png", 0], "x"]}', "not a list of labels"),
        ('{"labels": [["0/00000000.png", 0]]}', "no label for 29 of 30 images"),
    ],
)
def test_a_damaged_list_of_edm2_is_refused(tmp_path, content, sentence):
    (make_folder(tmp_path) / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=f"dataset.json: {sentence}"):
        open_dataset(str(tmp_path / "folder"), image_size=8)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_list_in_an_archive_is_unpacked_block_by_block(tmp_path, monkeypatch, method):
    monkeypatch.setattr(zip_images, "BLOCK_BYTES", 11)
    members = {**IMAGES, "dataset.json": labels_json([2 - label for label in LABELS])}
    source = Zip(str(write_zip(tmp_path / "a.zip", members, method)))
    assert source.classes().labels.tolist() == [2 - label for label in LABELS]
    blocks = list(source._blocks(source._labels))
    assert b"".join(blocks).decode() == members["dataset.json"] and max(map(len, blocks)) <= 11


@pytest.mark.parametrize(
    "at, mark, value, reason",
    [
        (0, b'"labels"', b'"label5"', "damaged in the archive: size or checksum"),
        (0, b"PK\x03\x04\x14\0\0\0\0\0", b"PK\x03\x07", "there is no member where"),
        (24, b"PK\x01\x02", struct.pack("<L", 5), "damaged in the archive"),  # its size, smaller than it is
        (24, b"PK\x01\x02", struct.pack("<L", 2**31), "2147483648 bytes are more than"),
        (10, b"PK\x01\x02", struct.pack("<H", 12), "compression method 12"),
    ],
)
def test_a_damaged_list_in_an_archive_is_refused_when_it_is_opened(tmp_path, at, mark, value, reason):
    content = bytearray(write_zip(tmp_path / "a.zip", {"dataset.json": labels_json(), **IMAGES}).read_bytes())
    start = content.index(mark) + at
    content[start : start + len(value)] = value
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=f"a.zip/dataset.json: cannot be read .*{reason}"):
        Zip(str(tmp_path / "a.zip"))


CSV = "file,label\n" + "".join(f'{name},"kind, {name[0]}"\n' for name in IN_ORDER)
LINES = "".join(json.dumps({"file": name, "label": f"kind, {name[0]}", "id": 3}) + "\n" for name in IN_ORDER)


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("content", [CSV, "\ufeff" + CSV, LINES], ids=["csv", "bom", "lines"])
def test_a_file_of_labels_replaces_those_of_names(tmp_path, paths, form, content):
    (tmp_path / "labels").write_text(content)
    dataset = open_dataset(paths[form], image_size=8, labels_file=str(tmp_path / "labels"))
    assert dataset.class_names == ["kind, 0", "kind, 1", "kind, 2"] and dataset.labels.tolist() == LABELS


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("a,b\n1,2\n", "--labels_file .*: not a list of labels .* give a CSV with the columns file and label"),
        (b"\xff\xfe\x00", "not a list of labels"),
        ('{"labels": [["0/00000000.png", 1.5]]}', "1.5 is no label"),
        ('{"labels": [["0/00000000.png", [1, 1]]]}', "is not one-hot"),
        ('{"labels": [["0/00000000.png", -1]]}', "no label for 29 of 30 images, such as 0/00000001.png"),
        (labels_json([-1] * COUNT), "labels are -1 ... -1, they should begin at 0"),
        ("file,label\n", "has no labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, paths, content, sentence):
    (tmp_path / "labels").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        open_dataset(paths["zip"], image_size=8, labels_file=str(tmp_path / "labels"))


def test_a_missing_file_of_labels_is_named(paths):
    with pytest.raises(FileNotFoundError, match="--labels_file nowhere.csv: No such file"):
        open_dataset(paths["zip"], image_size=8, labels_file="nowhere.csv")


def test_labels_may_come_through_a_pipe(tmp_path, paths):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(CSV,))
    writer.start()
    assert open_dataset(paths["zip"], image_size=8, labels_file=str(tmp_path / "pipe")).labels.tolist() == LABELS
    writer.join()


def unlabelled_tars(root, texts):
    for shard in range(2):
        members = [(f"{n}.png", png(10 * shard + n)) for n in range(2)]
        members += [(f"{n}.txt", text.encode()) for n, text in enumerate(texts[2 * shard : 2 * shard + 2]) if text]
        (root / f"{shard}.tar").write_bytes(tar_of(members))
    return str(root)


def unlabelled_parquet(root, labels):
    columns = {"image": [png(0), png(1)], **({"label": labels} if labels else {})}
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        write_table(root / name, **columns)
    return str(root)


@pytest.mark.parametrize(
    "make, labels, reason",
    [
        (unlabelled_tars, ["", "", "", ""], "4 of 4 images have no label"),
        (unlabelled_tars, ["a", "a", "", "b"], "1 of 4 images have no label"),
        (unlabelled_tars, ["a", "b", "c", "d"], "labels are not used: each image has another one"),
        (unlabelled_parquet, None, "4 of 4 images have no label"),
        (unlabelled_parquet, ["a", None], "2 of 4 images have no label"),
    ],
)
def test_names_of_archives_do_not_become_classes(tmp_path, make, labels, reason):
    path = make(tmp_path, labels)
    for class_from in ("auto", "folder"):
        with pytest.raises(ValueError, match=f"--data_dir {path}: no classes to be had: {reason}.*--class_cond False"):
            open_dataset(path, image_size=8, class_from=class_from)
    assert open_dataset(path, image_size=8, class_cond=False).class_names == []
    dataset = open_dataset(path, image_size=8, class_cond=False)
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{name},cat\n" for name in dataset.source.names))
    assert open_dataset(path, image_size=8, labels_file=str(tmp_path / "labels.csv")).class_names == ["cat"]


def test_classes_of_file_names_and_folders_of_their_own_are_taken_from_archives_without_labels(tmp_path):
    for shard in range(2):
        (tmp_path / f"{shard}.tar").write_bytes(tar_of([(f"{kind}_1.png", png(1)) for kind in ("cat", "dog")]))
    dataset = open_dataset(str(tmp_path), image_size=8, class_from="filename")
    assert dataset.class_names == ["cat", "dog"] and len(dataset) == 4
    for shard, kind in enumerate(("cat", "dog")):
        (tmp_path / f"{shard}.tar").write_bytes(tar_of([(f"{kind}/1.png", png(1))]))
    assert open_dataset(str(tmp_path), image_size=8).class_names == ["cat", "dog"]


def test_labels_may_lie_in_a_bucket(tmp_path, paths, monkeypatch):
    (tmp_path / "labels.csv").write_text(CSV)

    class Bucket:
        @staticmethod
        def BlobFile(path, mode):  # noqa: N802
            return Path(path.replace("gs://bucket", str(tmp_path))).open(mode)

    monkeypatch.setattr(image_files, "_blobfile", lambda path: Bucket)
    dataset = open_dataset(paths["zip"], image_size=8, labels_file="gs://bucket/labels.csv")
    assert dataset.class_names == ["kind, 0", "kind, 1", "kind, 2"] and dataset.labels.tolist() == LABELS
    with pytest.raises(FileNotFoundError, match="--labels_file gs://bucket/none.csv: "):
        open_dataset(paths["zip"], image_size=8, labels_file="gs://bucket/none.csv")


# What may be wrong with an archive


def test_what_an_archive_leaves_out_is_said_and_nothing_is_written_outside(tmp_path):
    path = tmp_path / "in" / "a.zip"
    path.parent.mkdir()
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../out.png", "/root.png", "a/1.png", "a/2.heic", "__MACOSX/a/._1.png", "b/3.txt", "a\\..\\w.png"):
            archive.writestr(name, png(1))
        archive.writestr(link, "/etc/passwd")
    source = open_source(str(path))
    assert list(source.names) == ["a/1.png"] and source.read(0) == png(1)
    assert source.notes == [
        "left out: 2 files (.heic 1, .txt 1)",
        "left out: 3 members with names that point out of it, such as ../out.png",
        "left out: 1 members that are links",
    ]
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "a.zip"}


def test_of_members_of_one_name_the_last_counts(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for seed in range(3):
            archive.writestr("x.png", png(seed))
    source = open_source(str(tmp_path / "a.zip"))
    assert len(source) == 1 and source.read(0) == png(2) and "2 members" in source.notes[0]


def test_a_damaged_member_is_named_and_the_others_are_read(tmp_path):
    path = write_zip(tmp_path / "a.zip", {f"{name}.png": png(name) for name in range(5)})
    content = bytearray(path.read_bytes())
    content[content.index(png(2)) + 100] ^= 1
    path.write_bytes(content)
    source = open_source(str(path))
    assert [source.read(index) for index in (0, 1, 3, 4)] == [png(index) for index in (0, 1, 3, 4)]
    with pytest.raises(UnreadableImageError, match=r"a.zip/2.png: .*damaged in the archive"):
        source.picture(2)
    out = tmp_path / "bad.txt"
    check = script("scripts/check_data.py").main
    flags = ["--data_dir", str(path), "--image_size", "8", "--class_cond", "False", "--num_workers", "0"]
    assert check([*flags, "--out", str(out)]) == 1
    assert out.read_text().startswith(f"{path}/2.png\tdamaged")


@pytest.mark.parametrize("keep", [0.5, 0.97, -1])
def test_a_cut_off_archive_is_refused(tmp_path, paths, keep):
    content = Path(paths["zip"]).read_bytes()
    (tmp_path / "a.zip").write_bytes(content[: int(keep * len(content))] if keep > 0 else content[:-1])
    with pytest.raises(ValueError, match="--data_dir .*a.zip: its directory, .* is cut off or damaged .*copy"):
        open_source(str(tmp_path / "a.zip"))


def test_bombs_are_refused_whether_they_say_their_size_or_not(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"a.png": bytes(10**6), "b.png": png(0)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UnreadableImageError, match="1000000 bytes are more than 100000, perhaps a decompression bomb"):
        open_source(str(path), SourceOptions(max_image_bytes=10**5)).read(0)
    content = path.read_bytes().replace(struct.pack("<L", 10**6), struct.pack("<L", 100))
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match="size or checksum"):
        open_source(str(path)).read(0)


def test_a_directory_that_promises_more_than_there_is_is_refused(tmp_path, paths):
    content = bytearray(Path(paths["zip"]).read_bytes())
    struct.pack_into("<L", content, content.rindex(b"PK\x05\x06") + 12, 2**31)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(ValueError, match="its directory, .* is cut off or damaged"):
        open_source(str(tmp_path / "a.zip"))


def test_archives_of_64_bits_and_behind_other_bytes_are_read(tmp_path, paths):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, archive.open("a.png", "w", force_zip64=True) as file:
        file.write(png(3))
    content = (tmp_path / "a.zip").read_bytes()
    end = content.index(b"PK\x05\x06")
    count, total, size, offset = struct.unpack_from("<HHLL", content, end + 8)
    record = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, total, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    last = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "b.zip").write_bytes(content[:end] + record + locator + last)
    for name in "ab":
        assert open_source(str(tmp_path / f"{name}.zip")).read(0) == png(3)
    # Sizes and place of a member beyond 4 GiB stand in an extra field of the directory.
    at = content.index(b"PK\x01\x02")
    sizes = struct.unpack_from("<LL", content, at + 20)
    extra = struct.pack("<HHQQQ", 1, 24, sizes[1], sizes[0], 0)
    entry = bytearray(content[at : at + 46]) + b"a.png" + extra
    struct.pack_into("<LL", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<HH", entry, 28, 5, len(extra))
    struct.pack_into("<L", entry, 42, 0xFFFFFFFF)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), at, 0)
    (tmp_path / "d.zip").write_bytes(content[:at] + entry + tail)
    assert open_source(str(tmp_path / "d.zip")).read(0) == png(3)
    shifted = Path(paths["zip"]).read_bytes()
    (tmp_path / "c.zip").write_bytes(b"PK\x03\x04 a program" + shifted)
    assert open_source(str(tmp_path / "c.zip")).read(4) == IMAGES[IN_ORDER[4]]


@pytest.mark.parametrize(
    "arrays, sentence",
    [
        ({"arr_0": np.zeros((4, 8, 8, 3))}, r"arr_0 is float64 \(4, 8, 8, 3\); give images as uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.zeros((4, 8, 8, 2), np.uint8)}, "give images as uint8"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, "give an integer for each of the 4"),
        ({"arr_0": np.array([None] * 4, dtype=object)}, "its arrays cannot be read"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, sentence):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        open_source(str(tmp_path / "a.npz"))


def test_a_compressed_array_is_refused_before_it_is_unpacked_where_it_is_huge(tmp_path, monkeypatch):
    images = np.zeros((10, 100, 100, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", arr_0=images)
    np.savez(tmp_path / "b.npz", arr_0=images)
    monkeypatch.setattr(array_images, "MAX_UNPACKED_BYTES", images.nbytes)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "read_array", None)
        with pytest.raises(ValueError, match="a.npz: an array in it is 300128 bytes when unpacked, more than 300000"):
            open_source(str(tmp_path / "a.npz"))
    assert len(open_source(str(tmp_path / "b.npz"))) == 10
    monkeypatch.setattr(array_images, "MAX_UNPACKED_BYTES", 300128)
    assert len(open_source(str(tmp_path / "a.npz"))) == 10


@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (5, 6, 7, 1), (5, 6, 7)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_any_layout_are_images(tmp_path, shape, order):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "a.npy", np.asarray(pixels, order=order))
    np.savez(tmp_path / "a.npz", arr_0=np.asarray(pixels, order=order))
    for name in ("a.npy", "a.npz"):
        shown = np.asarray(open_source(str(tmp_path / name)).picture(2))
        assert np.array_equal(shown, np.broadcast_to(pixels[2].reshape(6, 7, -1), (6, 7, 3)))


def test_a_set_of_images_behind_latents_may_be_an_archive(paths, tiny_vae, tmp_path):
    encode = script("scripts/encode_latents.py").main
    flags = ["--vae_path", tiny_vae, "--image_size", 16, "--num_workers", 0, "--device", "cpu"]
    for form in ("folder", "zip"):
        assert encode([str(flag) for flag in ("--data_dir", paths[form], "--out", tmp_path / form, *flags)]) == 0
    assert (tmp_path / "zip" / "00000.safetensors").read_bytes() == (
        tmp_path / "folder" / "00000.safetensors"
    ).read_bytes()
    latents = open_dataset(str(tmp_path / "zip"), image_size=16)
    assert latents.labels.tolist() == LABELS
    latents.check_source()


# Tar archives


def kept_lists(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache" / "masked_diffusion" / "archives").glob("*"))


def test_an_archive_is_listed_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    kept = kept_lists(tmp_path, monkeypatch)
    path = make_tar(tmp_path, place="s-08.tar")
    before = open_source(str(path))
    assert len(kept()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(tar_images, "list_shard", None)
        again = open_source(str(path))
    assert again.names == before.names and again.read(7) == before.read(7)
    assert np.array_equal(again.classes().labels, before.classes().labels)
    content = path.read_bytes()
    path.write_bytes(tar_of([("a.png", png(1))]).ljust(len(content), b"\0"))
    assert list(open_source(str(path)).names) == ["a.png"]
    for damaged in (b"", b"{}\n", b"[]\nx", kept()[0].read_bytes()[:-9]):
        kept()[0].write_bytes(damaged)
        assert open_source(str(path)).read(0) == png(1)


def test_shards_that_count_from_0_each_are_told_apart(tmp_path):
    for shard in range(2):
        (tmp_path / f"{shard}.tar").write_bytes(tar_of([(f"{n}.png", png(10 * shard + n)) for n in range(2)]))
    source = open_source(str(tmp_path))
    assert list(source.names) == ["0.tar/0.png", "0.tar/1.png", "1.tar/0.png", "1.tar/1.png"]
    assert [source.read(index) for index in range(4)] == [png(0), png(1), png(10), png(11)]


def test_shards_of_one_name_in_several_folders_are_told_apart(tmp_path):
    for number, folder in enumerate(("x/a", "x/b", "y")):
        (tmp_path / "shards" / folder).mkdir(parents=True)
        (tmp_path / "shards" / folder / "0.tar").write_bytes(tar_of([("0.png", png(number))]))
    (tmp_path / "list.txt").write_text("shards/x/a/0.tar\nshards/x/../x/b/0.tar\nshards/y/0.tar\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert list(source.names) == ["x/a/0.tar/0.png", "x/b/0.tar/0.png", "y/0.tar/0.png"] and not source.notes
    assert [source.read(index) for index in range(3)] == [png(index) for index in range(3)]


def test_more_archives_are_read_than_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_files, "_OPEN", 2)
    source = open_source(str(make_tar(tmp_path, 5, place=".")))
    assert [source.read(index) for index in range(COUNT)] == [IMAGES[name] for name in IN_ORDER]
    assert len(source._files._opened) == 2


def test_members_are_grouped_as_webdataset_does(tmp_path):
    members = [
        ("./b.x/k.png", png(1)),
        ("b.x/k.seg.png", png(2)),
        ("b.x/k.txt", b" sea otter "),
        ("b.x/k.json", b"[3]"),
    ]
    members += [
        ("b.x/l.JPG", png(3)),
        ("b.x/l.txt", b"cat"),
        ("b.x/m.png", png(4)),
        ("b.x/m.txt", b"cat"),
        (".h.png", b""),
    ]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    source = open_source(str(tmp_path / "a.tar"))
    assert list(source.names) == ["b.x/k.png", "b.x/l.JPG", "b.x/m.png"]
    assert source.classes().names == ["cat", "sea otter"] and source.classes().labels.tolist() == [1, 0, 0]
    assert source.notes == ["left out: 1 files (.seg.png 1)"]


@pytest.mark.parametrize(
    "texts, note",
    [
        (["a", "b", "c"], "each image has another one, so they may be captions"),
        (["a", "a", ""], "1 of 3 images have none"),
    ],
)
def test_labels_that_are_none_are_said(tmp_path, texts, note):
    members = [pair for n, text in enumerate(texts) for pair in ((f"d/{n}.png", png(n)), (f"d/{n}.txt", text.encode()))]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    source = open_source(str(tmp_path / "a.tar"))
    assert source.classes() is None and note in source.notes[0]


def test_a_cut_off_archive_gives_what_is_whole_and_names_itself_and_the_place(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([(f"{n}.png", png(n)) for n in range(4)])[: 2 * 1536 + 700])
    source = open_source(str(tmp_path / "a.tar"))
    assert source.read(0) == png(0) and source.read(1) == png(1)
    with pytest.raises(UnreadableImageError, match="a.tar/2.png: .*a.tar is cut off after 3772 bytes"):
        source.picture(2)
    [note] = source.notes
    assert (
        note.startswith(f"{tmp_path}/a.tar is cut off or damaged before byte ") and "what follows is not read" in note
    )


@pytest.mark.parametrize("damage", ["header", "cut in a header", "cut before a header", "no end"])
def test_an_archive_with_a_damaged_header_names_itself_and_the_place_also_from_the_kept_list(tmp_path, damage):
    content = bytearray(tar_of([(f"{n}.png", png(n)) for n in range(4)]))
    at = 2 * 1536  # a header and the two blocks of an image each
    if damage == "header":
        content[at : at + 512] = b"x" * 512
    else:
        content = content[: {"cut in a header": at + 100, "cut before a header": at, "no end": 2 * at}[damage]]
    (tmp_path / "a.tar").write_bytes(content)
    where = 2 * at if damage == "no end" else at
    for _ in range(2):
        source = open_source(str(tmp_path / "a.tar"))
        assert len(source) == where // 1536 and source.read(1) == png(1)
        [note] = source.notes
        assert note.startswith(f"{tmp_path}/a.tar is cut off or damaged before byte {where} (")


def test_a_whole_archive_has_no_note(paths):
    for form in ("tar", "joined tars"):
        assert not open_source(paths[form]).notes


def test_what_follows_an_archive_and_is_none_is_said(tmp_path):
    first = tar_of([("0.png", png(0))])
    (tmp_path / "a.tar").write_bytes(first + bytes(1 << 20) + tar_of([("1.png", png(1))]) + b"text" * 128)
    source = open_source(str(tmp_path / "a.tar"))
    assert [source.read(index) for index in range(2)] == [png(0), png(1)]
    [note] = source.notes
    assert f"damaged before byte {2 * len(first) + (1 << 20)} (" in note


def test_members_that_point_out_of_an_archive_or_are_links_are_left_out(tmp_path):
    content = tar_of([("../x.png", png(0)), ("/y.png", png(0)), ("a.png", png(1))])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        with tarfile.open(fileobj=io.BytesIO(content)) as others:
            for member in others:
                archive.addfile(member, others.extractfile(member))
    source = open_source(str(tmp_path / "a.tar"))
    assert list(source.names) == ["a.png"]
    assert sorted(note.split(": ")[1] for note in source.notes) == [
        "2 members that are links or devices",
        "2 members with names that point out of it",
    ]


def test_an_archive_of_a_pattern_that_is_missing_is_named(tmp_path):
    make_tar(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match=r"no such archive: .*s-10.tar; give the archives that there are"):
        open_source(str(tmp_path / "s-{08..10}.tar"))


def test_archives_without_images_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of([("a.txt", b"x")]))
    with pytest.raises(ValueError, match="a.tar: no images in these archives"):
        open_source(str(tmp_path / "a.tar"))


def test_tars_among_images_do_not_make_a_folder_one_of_archives(tmp_path):
    make_tar(tmp_path)
    (tmp_path / "x.png").write_bytes(png(0))
    assert isinstance(open_source(str(tmp_path)), Folder)


# Tables: parquet files, and what datasets.save_to_disk writes


TWO_OF_EACH = {
    "thumb": [png(8), png(9)],
    "image": [png(0), png(1)],
    "label": [0, 1],
    "kind": pyarrow.array([1, 0], pyarrow.uint8()),
    "word": ["dog", "cat"],
    "part": [0.5, 1.5],
    "gap": ["a", None],
}


def write_saved(folder, columns):
    """What datasets.save_to_disk leaves of a Dataset, as of its version 5."""
    folder.mkdir()
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_format_columns": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"citation": "", "features": {}}')
    return str(folder)


@pytest.fixture(params=["parquet", "saved"])
def two_of_each(request, tmp_path):
    if request.param == "saved":
        return write_saved(tmp_path / "saved", TWO_OF_EACH)
    return write_table(tmp_path / "a.parquet", **TWO_OF_EACH)


def test_columns_are_found_or_named(two_of_each):
    found = open_dataset(two_of_each, image_size=8)
    assert found.source.read(1) == png(1) and found.labels.tolist() == [0, 1]
    for column, labels, names in (("kind", [1, 0], ["0", "1"]), ("word", [1, 0], ["cat", "dog"])):
        named = open_dataset(two_of_each, image_size=8, image_column="thumb", label_column=column)
        assert named.source.read(1) == png(9) and named.labels.tolist() == labels and named.class_names == names


@pytest.mark.parametrize(
    "columns, sentence",
    [
        (["word"], "--image_column word: no column of .* those that may have images are thumb, image$"),
        (["none"], "--image_column none: no column"),
        (
            ["", "none"],
            "--label_column none: .* has no such column; there are thumb, image, label, kind, word, part, gap",
        ),
        (["", "part"], "--label_column part: holds double in .*; labels are integers or names of classes"),
        (["", "gap"], "--label_column gap: 1 of 2 rows of .* have no label; fill it, or train without"),
    ],
)
def test_columns_that_are_none_are_refused(two_of_each, columns, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_source(two_of_each, SourceOptions(*columns))


def test_columns_are_flags_and_said_where_they_mean_nothing(two_of_each, paths, tmp_path, capsys):
    check = script("scripts/check_data.py").main
    flags = ["--image_size", "8", "--num_workers", "0"]
    named = [*flags, "--image_column", "thumb", "--label_column", "word", "--max_image_bytes", str(len(png(9)))]
    assert check(["--data_dir", two_of_each, *named]) == (0 if len(png(8)) <= len(png(9)) else 1)
    assert "2 images, 2 classes (cat, dog)" in capsys.readouterr().out
    assert check(["--data_dir", two_of_each, *flags, "--max_image_bytes", "100"]) == 1
    assert "bytes are more than 100" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="--label_column word is ignored: --data_dir .* has no columns"):
        assert check(["--data_dir", paths["zip"], *flags, "--label_column", "word", "--max_image_bytes", "9"]) == 1
    assert f"{COUNT} of {COUNT} cannot be read" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="--label_column word is ignored with --class_from folder"):
        check(["--data_dir", two_of_each, *flags, "--label_column", "word", "--class_from", "folder"])
    with pytest.raises(ValueError, match="--max_image_bytes 0: must be at least 1"):
        SourceOptions(max_image_bytes=0)


@pytest.mark.parametrize("form", ["folder", "zip", "parquet"])
@pytest.mark.parametrize("fast_decode", [False, True])
def test_an_image_of_too_many_bytes_in_its_file_or_of_pixels_is_bad_in_every_form(tmp_path, form, fast_decode):
    flat = io.BytesIO()
    Image.new("RGB", (64, 64)).save(flat, "PNG")
    images = {"0/00000000.png": png(0), "0/00000001.png": png(1, 40), "1/00000002.png": flat.getvalue()}
    path, limit = str(FIVE[form](tmp_path, images=images)), 64 * 64
    assert len(flat.getvalue()) < limit < len(png(1, 40))
    dataset = open_dataset(path, image_size=16, max_image_bytes=limit, fast_decode=fast_decode)
    dataset.load(0)
    with pytest.raises(UnreadableImageError, match=rf"(\d bytes are|its file has) more than {limit}"):
        dataset.load(1)
    with pytest.raises(UnreadableImageError, match=f"64 x 64 pixels are {3 * limit} bytes of RGB, more than {limit}"):
        dataset.load(2)
    assert open_dataset(path, image_size=16, fast_decode=fast_decode).load(2).max() == -1


@pytest.mark.parametrize(
    "save", [np.savez, np.savez_compressed, lambda path, arr_0: np.save(path.with_suffix(""), arr_0)]
)
@pytest.mark.parametrize("shape", [(2, 16, 20, 3), (2, 16, 20, 1), (2, 16, 20)])
def test_an_array_of_images_of_too_many_bytes_is_refused_before_it_is_read(tmp_path, monkeypatch, save, shape):
    path = tmp_path / "a.npy"
    save(path, arr_0=np.zeros(shape, np.uint8))
    path = str(next(tmp_path.iterdir()))
    source = open_source(path, SourceOptions(max_image_bytes=960))
    assert pickle.loads(pickle.dumps(source)).largest == 960
    monkeypatch.setattr(array_images, "_member", None)
    with pytest.raises(
        ValueError, match=rf"--data_dir {path}: arr_0 is \(2, 16, 20.*960 bytes .* --max_image_bytes 959;"
    ):
        open_source(path, SourceOptions(max_image_bytes=959))


def test_a_huge_file_of_a_folder_is_not_read_to_its_end(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, images={"0/0.png": png(0), "1/1.png": png(1)})
    with (folder / "1/1.png").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(UnreadableImageError, match="its file has more than 5000 bytes"):
        open_source(str(folder), SourceOptions(max_image_bytes=5000)).read(1)


def test_latents_of_a_named_column_are_checked_against_it(two_of_each, tiny_vae, tmp_path):
    encode = script("scripts/encode_latents.py").main
    flags = [
        "--vae_path",
        tiny_vae,
        "--image_size",
        16,
        "--num_workers",
        0,
        "--device",
        "cpu",
        "--label_column",
        "word",
    ]
    assert encode([str(flag) for flag in ("--data_dir", two_of_each, "--out", tmp_path / "out", *flags)]) == 0
    latents = open_dataset(str(tmp_path / "out"), image_size=16)
    assert latents.class_names == ["cat", "dog"] and latents.cache.record.columns == {"label_column": "word"}
    latents.check_source()


@pytest.mark.parametrize(
    "state, sentence",
    [
        ("{", "not, or not wholly, what datasets.save_to_disk writes"),
        ("[]", "not, or not wholly, what datasets.save_to_disk writes"),
        ('{"_data_files": [{"filename": "../../x.arrow"}]}', "it names ../../x.arrow, which is outside"),
        ('{"_data_files": [], "_indices_data_files": [{}]}', "save it again after flatten_indices"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "its arrow files are damaged"),
    ],
)
def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path, state, sentence):
    path = Path(write_saved(tmp_path / "a", TWO_OF_EACH))
    (path / "state.json").write_text(state)
    with pytest.raises(ValueError, match=f"--data_dir {path}: .*{sentence}"):
        open_source(str(path))


def test_a_cut_off_arrow_file_is_refused(tmp_path):
    path = Path(write_saved(tmp_path / "a", TWO_OF_EACH))
    [file] = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="its arrow files are damaged, or not alike"):
        open_source(str(path))


def test_pickles_in_tables_are_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    marks = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Harm())}
    fields = [pyarrow.field("image", pyarrow.binary(), metadata=marks), pyarrow.field("label", pyarrow.int64())]
    table = pyarrow.Table.from_arrays([pyarrow.array([png(0)]), pyarrow.array([0])], schema=pyarrow.schema(fields))
    parquet.write_table(table, tmp_path / "a.parquet")
    open_source(str(tmp_path / "a.parquet")).read(0)
    open_source(write_saved(tmp_path / "saved", table)).read(0)
    assert not (tmp_path / "harm").exists()


def test_one_split_is_read_and_the_others_are_said(paths):
    source = open_source(paths["parquet"])
    assert source.notes == ["left out: files of other splits: test"] and len(source) == COUNT
    assert source.classes().names == ["0", "1", "2"]
    test = open_source(f"{paths['parquet']}/test-00000-of-00002.parquet")
    assert len(test) == 1 and not test.notes


def test_a_snapshot_of_the_hub_has_its_files_in_a_folder_data(tmp_path):
    source = open_source(str(make_parquet(tmp_path, "data/train-00000-of-00002.parquet")))
    assert isinstance(source, Parquet) and len(source) == COUNT


@pytest.mark.parametrize("damaged", [False, True])
def test_a_table_about_images_does_not_make_a_folder_of_images_one_of_parquet_files(tmp_path, damaged):
    folder = make_folder(tmp_path)
    write_table(folder / "metadata.parquet", file_name=["0/00000000.png"], split=["train"])
    if damaged:
        (folder / "metadata.parquet").write_bytes(b"PAR1")
    source = open_source(str(folder))
    assert isinstance(source, Folder) and list(source.names) == IN_ORDER
    assert source.notes == ["left out: 1 files (.parquet 1)"]


def test_pictures_in_folders_beside_tables_of_images_are_not_what_is_read(tmp_path):
    make_parquet(tmp_path, "data/train-00000-of-00002.parquet")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "logo.png").write_bytes(png(0))
    assert isinstance(open_source(str(tmp_path)), Parquet)


def write_table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_rows_without_names_of_their_own_are_called_by_file_and_row(tmp_path):
    path = write_table(tmp_path / "a.parquet", img=[png(0), png(1)], cls=["b", "a"])
    source = open_source(path)
    assert list(source.names) == ["a.parquet/00000000", "a.parquet/00000001"] and source.read(1) == png(1)
    assert source.classes().names == ["a", "b"] and source.classes().labels.tolist() == [1, 0]


def test_a_row_without_bytes_is_a_bad_image_and_no_other_is(tmp_path):
    path = write_table(
        tmp_path / "a.parquet", image=[{"bytes": png(0), "path": "x.png"}, {"bytes": None, "path": "y.png"}]
    )
    source = open_source(path)
    assert source.read(0) == png(0) and source.classes() is None
    with pytest.raises(UnreadableImageError, match="a.parquet/y.png: .*the row has no bytes"):
        source.picture(1)


def test_a_damaged_row_group_is_bad_and_the_others_are_read(tmp_path):
    table = pyarrow.table({"image": [png(n, 32) for n in range(4)]})
    how = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1, **how)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    at = content.index(png(2, 32)[100:140])
    content[at : at + 4] = bytes(4)
    (tmp_path / "a.parquet").write_bytes(content)
    source = open_source(str(tmp_path / "a.parquet"))
    assert source.read(1) == png(1, 32) and source.read(3) == png(3, 32)
    with pytest.raises(UnreadableImageError, match="its row group is damaged"):
        source.read(2)


def test_a_huge_row_group_is_refused_before_it_is_read_and_other_columns_do_not_count(tmp_path, monkeypatch):
    table = pyarrow.table({"image": [png(n, 32) for n in range(8)], "text": ["x" * 100_000] * 8})
    for name, size in (("a", 8), ("b", 2)):
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=size, compression="none")
    monkeypatch.setattr(parquet_images, "MAX_GROUP_BYTES", 20_000)
    assert len(open_source(str(tmp_path / "b.parquet"))) == 8
    monkeypatch.setattr(parquet.ParquetFile, "read", None)
    with pytest.raises(ValueError, match=r"row group 0 of .*a.parquet has \d{5} bytes of images, more than 20000 that"):
        open_source(str(tmp_path / "a.parquet"))


def test_decoded_row_groups_are_kept_up_to_a_number_of_bytes(tmp_path, monkeypatch):
    table = pyarrow.table({"image": [png(n, 32) for n in range(20)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source.read(n) for n in range(20)] == [png(n, 32) for n in range(20)] and len(source._kept) == 20
    monkeypatch.setattr(Parquet, "kept_bytes", 4 * len(png(0, 32)))
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source.read(n) for n in range(20)] == [png(n, 32) for n in range(20)] and 2 <= len(source._kept) <= 4
    monkeypatch.setattr(Parquet, "kept_bytes", 0)
    source = open_source(str(tmp_path / "a.parquet"))
    assert [source.read(n) for n in (1, 3)] == [png(n, 32) for n in (1, 3)]
    assert source.read(3) == png(3, 32) and len(source._kept) == 1


@pytest.mark.parametrize(
    "columns, sentence",
    [
        ({"text": ["a"]}, "which column has the images. There are text;"),
        ({"a": [b"1"], "b": [b"2"]}, "which column has the images. There are a, b;"),
        ({"image": pyarrow.array([], pyarrow.binary())}, "have no rows"),
        ({"image": [b"x", b"y"], "label": [0, -1]}, "labels are -1 ... 0, they should begin at 0"),
    ],
)
def test_tables_without_images_are_refused(tmp_path, columns, sentence):
    with pytest.raises(ValueError, match=f"--data_dir .*a.parquet: .*{sentence}|{sentence}"):
        open_source(write_table(tmp_path / "a.parquet", **columns))


def test_a_cut_off_parquet_file_is_refused(tmp_path):
    path = Path(write_table(tmp_path / "a.parquet", image=[png(0)]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="its parquet files are damaged"):
        open_source(str(path))


def test_without_pyarrow_parquet_is_refused_with_what_to_install(paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"install it: pip install 'masked-diffusion\[parquet\]'"):
        open_source(paths["parquet"])

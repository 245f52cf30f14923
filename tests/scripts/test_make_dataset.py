"""Writing a data set in another form: the same batches come of it, whatever happened on the way."""

import io
import json
import tarfile
import zipfile
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import make_colour_folder, run, script, truncate

from masked_diffusion.data import conversion, image_writers
from masked_diffusion.data.sources import open_source
from masked_diffusion.image_datasets import load_data, open_dataset

DESTS = ["out.zip", "out.tar", "shards/t-{00..03}.tar", "out"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "archive_lists"))


def make(*arguments):
    return script("scripts/make_dataset.py").main([*map(str, arguments), "--num_workers", "0"])


@pytest.fixture(scope="module")
def colours(module_folder):
    folder = make_colour_folder(module_folder("made") / "colours", per_class=5, size=20)
    (folder / "red" / "0.png").rename(folder / "red" / "0.JPG")  # names stay, whatever is in the files
    return folder


def batches(path, image_size=16, **settings):
    stream = load_data(data_dir=str(path), batch_size=5, image_size=image_size, class_cond=True, **settings)
    found = list(islice(stream, 6))
    stream.close()
    return found


def assert_same_batches(path, other, **settings):
    for (images, extra), (others, other_extra) in zip(
        batches(path, **settings), batches(other, **settings), strict=True
    ):
        assert torch.equal(images, others) and all(torch.equal(extra[name], other_extra[name]) for name in extra)


@pytest.mark.parametrize("dest, back", [*pairwise([*DESTS, DESTS[0]])])
def test_a_round_trip_keeps_names_bytes_labels_and_class_names(tmp_path, colours, dest, back, capsys):
    assert make(colours, tmp_path / dest) == 0
    assert capsys.readouterr().out == f"{tmp_path / dest}: 15 images\n"
    assert make(tmp_path / dest, tmp_path / "back" / back) == 0
    original = open_source(str(colours))
    for path in (tmp_path / dest, tmp_path / "back" / back):
        source, dataset = open_source(str(path)), open_dataset(str(path), image_size=16)
        assert source.names == original.names and not dataset.notes
        assert [source.read(index) for index in range(15)] == [original.read(index) for index in range(15)]
        assert source.classes().names == ["blue", "green", "red"]  # its own, not the folders'
        assert dataset.labels.tolist() == 5 * [0] + 5 * [1] + 5 * [2]
        assert_same_batches(path, colours, random_crop=True)
    assert not list(tmp_path.rglob(".*"))


def test_archives_have_the_forms_that_others_read(tmp_path, colours):
    for dest in DESTS[:3]:
        assert make(colours, tmp_path / dest) == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 16
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        labels = json.loads(archive.read("dataset.json"))["labels"]  # as edm2 has them
    assert labels[0] == ["blue/0.png", 0] and labels[-1] == ["red/4.png", 2] and len(labels) == 15
    sizes = []
    for path in sorted((tmp_path / "shards").iterdir()):
        with tarfile.open(path) as archive:
            names = archive.getnames()
            sizes.append(len(names) // 3)
            assert [name.partition(".")[0] for name in names[::3]] == [name.partition(".")[0] for name in names[1::3]]
            assert int(archive.extractfile(names[1]).read()) in (0, 1, 2)
    assert sizes == [4, 4, 4, 3]


def test_numbers_for_classes_need_no_names(tmp_path):
    np.savez(
        tmp_path / "a.npz", arr_0=np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3), np.uint8), arr_1=[4, 0, 2] * 2
    )
    for dest in DESTS:
        assert make(tmp_path / "a.npz", tmp_path / dest) == 0
        assert open_source(str(tmp_path / dest)).classes().names == ["0", "1", "2", "3", "4"]
        assert_same_batches(tmp_path / dest, tmp_path / "a.npz")
    with tarfile.open(tmp_path / "out.tar") as archive:
        assert archive.getnames()[:2] == ["00000000.png", "00000000.cls"]


def test_images_without_classes_have_no_labels(tmp_path, colours):
    for dest in DESTS:
        assert make(colours, tmp_path / dest, "--class_cond", "False") == 0
        assert open_source(str(tmp_path / dest)).classes() is None
        assert open_source(str(tmp_path / dest)).names == open_source(str(colours)).names


@pytest.mark.parametrize("crop", [True, False])
def test_resized_images_give_the_batches_that_the_training_would_have_made(tmp_path, colours, crop):
    assert make(colours, tmp_path / "out.zip", "--image_size", 12, "--crop", crop) == 0
    source = open_source(str(tmp_path / "out.zip"))
    assert Image.open(io.BytesIO(source.read(0))).size == ((12, 12) if crop else (17, 12))
    assert list(source.names)[10] == "red/0.png"
    assert_same_batches(tmp_path / "out.zip", colours, image_size=12)


class StoppedError(Exception):
    """What ends a process in the middle."""


@pytest.mark.parametrize("dest", DESTS)
@pytest.mark.parametrize("after, torn", [(0, 0), (6, 500), (7, 1000), (14, 2500), (15, 1)])
def test_an_interrupted_command_goes_on_and_gives_the_same_bytes(tmp_path, colours, monkeypatch, dest, after, torn):
    whole, half = tmp_path / "whole" / dest, tmp_path / "half" / dest
    assert make(colours, whole) == 0
    target = image_writers.target_of(str(half))
    left = [after]

    def stop_after(method):
        def call(self, *arguments):
            if not left[0]:
                raise StoppedError
            left[0] -= 1
            return method(self, *arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("add", "finish"):
            patch.setattr(type(target), name, stop_after(getattr(type(target), name)))
        with pytest.raises(StoppedError):
            make(colours, half)
    complete = [path for path in half.parent.glob("[!.]*") if path.is_file()]
    assert not half.exists() and all(path.read_bytes() == (whole.parent / path.name).read_bytes() for path in complete)
    for path in half.parent.glob(".*.unfinished"):  # a killed process may have written half an image
        if path.is_dir():
            (path / "red").mkdir(exist_ok=True)
            (path / "red" / ".4.png.tmp").touch()
        elif torn:
            path.write_bytes(path.read_bytes()[:-torn])
    read = []
    monkeypatch.setattr(
        conversion._Contents, "_content", lambda self, index: read.append(index) or self.dataset.source.read(index)
    )
    assert make(colours, half) == 0
    assert len(read) <= 15 - after + 2
    files = {path.relative_to(whole.parent): path for path in whole.parent.rglob("*") if path.is_file()}
    assert files.keys() == {path.relative_to(half.parent) for path in half.parent.rglob("*") if path.is_file()}
    assert all((half.parent / name).read_bytes() == path.read_bytes() for name, path in files.items())


def test_only_the_command_that_began_goes_on(tmp_path, colours, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(image_writers.ZipTarget, "finish", None)
        with pytest.raises(TypeError):
            make(colours, tmp_path / "a.zip")
    assert make(colours, tmp_path / "a.zip", "--image_size", 8) == 2
    assert "was begun from other images or with other settings" in capsys.readouterr().err
    assert make(colours, tmp_path / "a.zip") == 0
    assert make(colours, tmp_path / "a.zip") == 2
    assert f"DEST {tmp_path}/a.zip: {tmp_path}/a.zip is there already; remove it" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, capsys):
    folder = make_colour_folder(tmp_path / "colours", per_class=2, size=20)
    [bad] = truncate(folder, "green/0.png")
    for dest in DESTS:
        assert make(folder, tmp_path / dest, "--image_size", 8) == 1
        out, err = capsys.readouterr()
        assert f"left out: {bad}\t" in err and out == f"{tmp_path / dest}: 5 images\n"
        assert list(open_source(str(tmp_path / dest)).names) == [
            "blue/0.png",
            "blue/1.png",
            "green/1.png",
            "red/0.png",
            "red/1.png",
        ]
        assert open_source(str(tmp_path / dest)).classes().labels.tolist() == [0, 0, 1, 2, 2]


def test_names_that_a_form_cannot_keep_become_numbers_in_the_same_order(tmp_path, colours, capsys):
    folder = tmp_path / "odd"
    for name, origin in (("a.1.png", "red/0.JPG"), ("a.2.png", "blue/0.png"), ("b.gif", "green/1.png")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes((colours / origin).read_bytes())
    (tmp_path / "labels.csv").write_text("file,label\na.1.png,x\na.2.png,y\nb.gif,x\n")
    for dest, names in (
        ("out.zip", ["a.1.png", "a.2.png", "b.gif"]),
        ("out.tar", [f"0000000{n}.png" for n in range(3)]),
    ):
        assert make(folder, tmp_path / dest, "--labels_file", tmp_path / "labels.csv") == 0
        assert ("images are numbered" in capsys.readouterr().err) == (dest == "out.tar")
        source = open_source(str(tmp_path / dest))
        assert list(source.names) == names and source.classes().labels.tolist() == [0, 1, 0]
        assert source.read(1) == (folder / "a.2.png").read_bytes()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere", "a.zip"], "SOURCE nowhere: no such folder"),
        (["builtin:letters", "a.zip"], "SOURCE builtin:letters: unknown"),
        (
            ["{colours}", "a.tar.gz"],
            "DEST a.tar.gz: .gz is not written; give a .zip, a .tar, a pattern of tars or a folder",
        ),
        (["{colours}", "gs://bucket/a.zip"], "DEST gs://bucket/a.zip: give a local path"),
        (["{colours}", "{colours}/out"], "lies in SOURCE"),
        (["{colours}", "{colours}/v1.0"], "lies in SOURCE"),
        (["{colours}", "{colours}"], "is there already"),
        (["{colours}", "a.zip", "--image_size", "0"], "--image_size 0: must be at least 1 pixel"),
        (["{colours}", "a.zip", "--class_from", "filename"], "no class to be had for image"),
        (["{colours}", "a.zip", "--num_workers", "-2"], "--num_workers -2"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    tmp_path, colours, monkeypatch, capsys, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    before = sorted(colours.rglob("*"))
    assert script("scripts/make_dataset.py").main([text.format(colours=colours) for text in arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert sorted(colours.rglob("*")) == before


def test_loader_processes_change_nothing_and_ignored_flags_are_said(tmp_path, colours):
    main = script("scripts/make_dataset.py").main
    with pytest.warns(UserWarning, match="--crop False is ignored without --image_size"):
        assert main([str(colours), str(tmp_path / "a.zip"), "--num_workers", "0", "--crop", "False"]) == 0
    assert main([str(colours), str(tmp_path / "b.zip"), "--num_workers", "2"]) == 0
    assert Path(tmp_path / "a.zip").read_bytes() == Path(tmp_path / "b.zip").read_bytes()


@pytest.mark.e2e
def test_the_real_command_has_help(tmp_path):
    done = run("scripts/make_dataset.py", tmp_path, "--help")
    assert "SOURCE" in done.stdout and "shard-{000..007}.tar" in done.stdout


def test_a_missing_destination_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        make("nowhere")
    assert caught.value.code == 2 and "the following arguments are required: DEST" in capsys.readouterr().err

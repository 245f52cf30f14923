"""Tar archives in a bucket, which a local folder stands in for: fetched in blocks, in an order that follows them."""

import io
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import TINY_DIGITS, call, script

from masked_diffusion.data import image_files, remote_tars
from masked_diffusion.data.data_stream import BlockOrder
from masked_diffusion.data.image_files import UnreadableImageError
from masked_diffusion.data.source import SourceOptions
from masked_diffusion.data.sources import RemoteTar, open_source
from masked_diffusion.image_datasets import load_data, open_dataset
from masked_diffusion.runs.config import read_config

COUNT, SHARDS = 60, 3
PATH = "gs://bucket/s-{0..2}.tar"


def png(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Bucket:
    """A stand-in for blobfile, on a local folder. requests: a line in a file for each, of all processes."""

    def __init__(self, folder, log):
        self.folder, self.log = folder, log
        self.failures = 0

    def local(self, path):
        return self.folder / path.removeprefix("gs://bucket/")

    def BlobFile(self, path, mode, buffer_size=None):  # noqa: N802
        assert mode == "rb"
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the network is down")
        with self.log.open("a") as log:
            log.write(f"{Path(path).name}\n")
        return self.local(path).open(mode)

    def stat(self, path):
        status = self.local(path).stat()
        return SimpleNamespace(size=status.st_size, mtime=status.st_mtime, version=None)

    @property
    def requests(self):
        return Counter(self.log.read_text().split()) if self.log.exists() else Counter()


def write_shards(folder, kinds=None):
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as archive:
            for number in range(shard, COUNT, SHARDS):
                kind = (kinds or {}).get(number, "png")
                for name, content in (
                    (f"{number:03d}.{kind}", png(number)),
                    (f"{number:03d}.cls", b"%d" % (number % 2)),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """60 images in three archives, whose blocks hold five images each."""
    bucket = Bucket(write_shards(tmp_path / "bucket"), tmp_path / "log")
    monkeypatch.setattr(image_files, "_blobfile", lambda path: bucket)
    monkeypatch.setattr(remote_tars, "BLOCK_BYTES", 9 * 1024)
    monkeypatch.setattr(remote_tars, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(image_files.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return bucket


def batches(number, batch_size=6, window=15, **settings):
    dataset = open_dataset(PATH, image_size=8, shuffle_window=window)
    stream = load_data(
        data_dir=PATH, dataset=dataset, batch_size=batch_size, image_size=8, class_cond=True, seed=3, **settings
    )
    found = list(islice(stream, number))
    stream.close()
    return found


def joined(batches):
    together = {name: torch.cat([extra[name] for _, extra in batches]) for name in batches[0][1]}
    return {"images": torch.cat([images for images, _ in batches]), **together}


def assert_same(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_remote_archives_have_the_images_and_labels_of_local_ones(bucket):
    remote, local = open_source(PATH), open_source(str(bucket.folder))
    assert isinstance(remote, RemoteTar) and remote.names == local.names and not remote.notes
    assert [remote.read(index) for index in range(COUNT)] == [local.read(index) for index in range(COUNT)]
    assert np.array_equal(remote.classes().labels, local.classes().labels)
    (bucket.folder / "list.txt").write_text("s-{0..1}.tar\ngs://bucket/s-2.tar\n")
    assert open_source("gs://bucket/list.txt").names == remote.names


def test_an_archive_is_listed_once_and_again_when_it_has_changed(bucket):
    for _ in range(2):
        open_source(PATH)
        assert bucket.requests == {f"s-{shard}.tar": 1 for shard in range(SHARDS)}
    path = bucket.folder / "s-1.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    open_source(PATH)
    assert bucket.requests == {"s-0.tar": 1, "s-1.tar": 2, "s-2.tar": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_block_is_fetched_once_an_epoch_by_all_processes_together(bucket, tmp_path, num_workers):
    source = open_source(PATH, SourceOptions(shuffle_window=5))
    blocks = len(source._starts)
    assert blocks >= 10 and source._kept_blocks < blocks
    listed = bucket.requests.total()
    streams = [batches(COUNT // 6, 3, window=5, rank=rank, world_size=2, num_workers=num_workers) for rank in range(2)]
    assert sorted(joined(streams[0])["index"].tolist() + joined(streams[1])["index"].tolist()) == list(range(COUNT))
    fetched = bucket.requests.total() - listed
    assert fetched <= 2 * blocks + 4  # the ranks were read one after the other
    kept = list((tmp_path / "cache" / "masked_diffusion" / "blocks").glob("*/[0-9]*"))
    assert len(kept) <= source._kept_blocks


def test_a_single_process_fetches_each_block_once(bucket):
    blocks, listed = len(open_source(PATH)._starts), bucket.requests.total()
    batches(COUNT // 6)
    assert bucket.requests.total() - listed == blocks


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stream_is_resumed_to_the_item_on_any_number_of_processes(bucket, num_workers):
    whole = joined(batches(30))
    part = [batches(10, 3, rank=rank, world_size=2, position=21, num_workers=num_workers) for rank in range(2)]
    ours = joined([batch for step in zip(*part, strict=True) for batch in step])
    assert_same(ours, {name: values[21:81] for name, values in whole.items()})
    assert_same(joined(batches(9, 1, position=64)), {name: values[64:73] for name, values in whole.items()})


@pytest.mark.parametrize("window, blocks_at_a_time", [(1, 1), (15, 5), (60, 12)])
def test_an_epoch_is_a_permutation_whose_windows_lie_in_few_blocks(window, blocks_at_a_time):
    of, places = np.arange(60) // 5, np.arange(60)[::-1]
    order = BlockOrder(of, places, window, seed=0)
    seen = [order.permutation(epoch) for epoch in range(3)]
    assert len({tuple(items) for items in seen}) == 3
    for items in seen:
        assert sorted(items) == list(range(60))
        starts = range(0, 60, window)
        assert max(len(set(of[items[start : start + window]])) for start in starts) <= blocks_at_a_time
    if window == 1:
        assert seen[0][:5].tolist() == sorted(seen[0][:5], reverse=True)  # as they lie in the archive
    else:
        assert seen[0][:5].tolist() != sorted(seen[0][:5], reverse=True)
    assert BlockOrder(of, places, window, seed=1).permutation(0).tolist() != seen[0].tolist()
    assert BlockOrder(of, places, window, 0, deterministic=True).permutation(2).tolist() == list(range(60))


def test_the_order_of_remote_archives_is_what_it_was():
    assert BlockOrder(np.arange(8) // 3, np.arange(8), 4, seed=0).permutation(0).tolist() == [3, 1, 0, 2, 5, 6, 4, 7]


def test_a_run_that_leaves_kinds_out_has_the_blocks_of_the_others(bucket):
    write_shards(bucket.folder, kinds={1: "tif", 7: "tif"})
    dataset = open_dataset(PATH, image_size=8, extensions=[".png"])
    order = dataset.order(0)
    assert len(dataset) == COUNT - 2 and sorted(order.permutation(0)) == list(range(COUNT - 2))
    assert dataset.source.read(1) == png(2)


def test_storage_that_fails_is_asked_again_and_then_stops_the_run(bucket):
    bucket.failures = 2
    source = open_source(PATH)
    bucket.failures = 2
    assert source.read(0) == png(0)
    source = open_source(PATH, SourceOptions(max_image_bytes=2000))
    bucket.failures = 3
    with pytest.raises(OSError, match="s-.*tar: the storage failed 3 times .the network is down"):
        source.read(0)


def test_images_that_cannot_be_had_are_bad_and_others_are_read(bucket):
    source = open_source(PATH)
    path = bucket.folder / "s-2.tar"
    last = int(np.argmax(np.where(source._shards == 2, source._offsets, -1)))
    content = path.read_bytes()
    path.write_bytes(content[: source._offsets[last] + 100])
    cut = open_source(PATH)
    assert any("s-2.tar is cut off or damaged" in note for note in cut.notes)
    assert cut.read(0) == png(0)
    with pytest.raises(UnreadableImageError, match=r"s-2.tar is cut off before byte"):
        cut.read(last)
    with pytest.raises(UnreadableImageError, match="bytes are more than 100"):
        open_source(PATH, SourceOptions(max_image_bytes=100)).read(0)


@pytest.mark.parametrize(
    "path, sentence",
    [
        ("gs://bucket/s-{0..3}.tar", "no such archive: gs://bucket/s-3.tar; give the archives that there are"),
        ("gs://bucket/none.txt", "no such archive: gs://bucket/none.txt; give"),
    ],
)
def test_archives_that_are_missing_are_named(bucket, path, sentence):
    with pytest.raises(FileNotFoundError, match=sentence):
        open_source(path)


@pytest.mark.usefixtures("no_home")
def test_without_a_folder_for_blocks_remote_archives_are_refused(bucket, monkeypatch):
    monkeypatch.setattr(remote_tars, "cache_folder", lambda: None)
    with pytest.raises(ValueError, match="remote archives need a local folder for their blocks; set XDG_CACHE_HOME"):
        open_source(PATH)


def test_a_window_that_is_none_or_means_nothing_is_said(bucket):
    with pytest.raises(ValueError, match="--shuffle_window 0: must be at least 1 image"):
        open_dataset(PATH, image_size=8, shuffle_window=0)
    with pytest.warns(UserWarning, match="--shuffle_window 5 is ignored: all images are shuffled"):
        open_dataset(str(bucket.folder), image_size=8, shuffle_window=5)


def test_a_training_records_its_order_and_goes_on_in_no_other(bucket, tmp_path, monkeypatch, capsys):
    flags = [*TINY_DIGITS, "--data_dir", PATH, "--random_flip", "True"]
    run, train = tmp_path / "run", "scripts/image_train.py"
    assert call(monkeypatch, train, run, *flags, "--shuffle_window", 20, "--max_steps", 1) == 0
    order = read_config(run).training["data_order"]
    assert order["shuffle_window"] == 20 and order["block_bytes"] == 9 * 1024 and len(order["blocks_sha256"]) == 64
    assert call(monkeypatch, train, run, *flags, "--shuffle_window", 30, "--max_steps", 2) == 2
    sentence = "another order of images (--shuffle_window 20 of remote archives; now: --shuffle_window 30 of remote"
    assert sentence in capsys.readouterr().err
    with pytest.warns(UserWarning, match="--shuffle_window 20 is ignored"):
        local = [*flags, "--data_dir", bucket.folder, "--shuffle_window", 20]
        assert call(monkeypatch, train, run, *local, "--max_steps", 2) == 2
    assert "now: all images shuffled)" in capsys.readouterr().err
    assert call(monkeypatch, train, run, *flags, "--shuffle_window", 20, "--max_steps", 2) == 0


def test_remote_archives_are_checked_and_converted(bucket, tmp_path):
    flags = ["--data_dir", PATH, "--image_size", "8", "--num_workers", "0"]
    assert script("scripts/check_data.py").main(flags) == 0
    assert script("scripts/make_dataset.py").main([PATH, str(tmp_path / "a.zip"), "--num_workers", "0"]) == 0
    assert open_source(str(tmp_path / "a.zip")).read(7) == png(7)

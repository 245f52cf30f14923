"""Lists of files that are kept between runs are those that listing anew would give."""

import itertools
import os
import time

import pytest

from masked_diffusion.data import image_files, listing_cache
from masked_diffusion.data.image_files import list_folder, list_image_files
from masked_diffusion.files import cache_folder

hours_ago = itertools.count(1000, -1)


@pytest.fixture(autouse=True)
def _small_folders_count_as_large(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(listing_cache, "FEWEST_FILES", 2)


def rest(folder):
    """Let the last change lie in the past, and after the one before."""
    changed = time.time() - 3600 * next(hours_ago)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        os.utime(path, (changed, changed))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name in ("b/1.png", "a/2.jpg", "a/deep/3.png", "a/ü\udce9.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    rest(root)
    return root


def kept():
    return list((cache_folder() / "listings").glob("*"))


def test_a_folder_at_rest_is_listed_once(folder, monkeypatch):
    listed = list_image_files(str(folder))
    assert len(listed) == 4 and len(kept()) == 1
    monkeypatch.setattr(image_files, "_list_local", None)
    assert list_image_files(str(folder)) == listed
    monkeypatch.chdir(folder.parent)
    assert list_image_files("images") == listed


@pytest.mark.usefixtures("no_home")
def test_without_a_home_a_folder_is_listed_each_time(folder):
    assert cache_folder() is None
    assert list_image_files(str(folder)) == list_image_files(str(folder))
    assert len(list_image_files(str(folder))) == 4


def add(folder):
    (folder / "a" / "deep" / "new.png").touch()


def remove(folder):
    (folder / "b" / "1.png").unlink()


def rename(folder):
    (folder / "b" / "1.png").rename(folder / "b" / "9.png")


def add_folder(folder):
    (folder / "c").mkdir()
    (folder / "c" / "new.png").touch()


def remove_folder(folder):
    (folder / "b" / "1.png").unlink()
    (folder / "b").rmdir()


def replace_folder(folder):
    remove_folder(folder)
    (folder / "b").mkdir()
    rest(folder)


@pytest.mark.parametrize("change", [add, remove, rename, add_folder, remove_folder, replace_folder])
def test_every_change_is_seen(folder, change):
    before = list_image_files(str(folder))
    change(folder)
    after = list_image_files(str(folder))
    anew, _, _ = image_files._list_local(str(folder))
    assert after == list(anew.files) != before
    rest(folder)
    assert list_image_files(str(folder)) == after


def test_the_list_of_a_folder_that_was_changed_just_now_is_not_kept(folder):
    add(folder)
    list_image_files(str(folder))
    assert not kept()


def test_the_list_of_a_folder_with_links_is_not_kept(folder):
    (folder / "b" / "link.png").symlink_to(folder / "a" / "2.jpg")
    rest(folder)
    assert "b/link.png" in list_image_files(str(folder))
    assert not kept()


def test_small_folders_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(listing_cache, "FEWEST_FILES", 5)
    list_image_files(str(folder))
    assert not kept()


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b'{"a": 1}\nx', b"\xff\n"])
def test_a_damaged_list_is_made_again(folder, content):
    listed = list_image_files(str(folder))
    kept()[0].write_bytes(content)
    assert list_image_files(str(folder)) == listed


@pytest.mark.parametrize("harm", [lambda kept: kept[:-2], lambda kept: kept[:-2] + b"\0\0"])
def test_a_kept_list_that_was_cut_off_is_made_again(folder, harm):
    listed = list_image_files(str(folder))
    path = kept()[0]
    path.write_bytes(harm(path.read_bytes()))
    assert list_image_files(str(folder)) == listed


def test_a_list_that_cannot_be_kept_is_no_loss(folder, tmp_path):
    (tmp_path / "kept").write_text("a file where the folder would be")
    assert len(list_image_files(str(folder))) == 4


def at_times(folder, times):
    """Give every folder the modification times of before, as copies that keep times do."""
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in (folder, *(p for p in folder.rglob("*") if p.is_dir()))}


@pytest.mark.parametrize("change", [add, remove, rename])
def test_changes_that_keep_the_times_of_folders_are_seen(folder, change):
    before, times = list_image_files(str(folder)), times_of(folder)
    change(folder)
    at_times(folder, times)
    assert list_image_files(str(folder)) != before


def test_a_sample_of_the_folders_is_counted_where_no_time_tells(folder, monkeypatch):
    monkeypatch.setattr(listing_cache, "_state", lambda folder: [1, 2, 3, 4, 5])
    monkeypatch.setattr(listing_cache, "_times_stand_still", lambda times: False)
    before = list_image_files(str(folder))
    assert len(kept()) == 1 and list_image_files(str(folder)) == before
    add(folder)
    assert len(list_image_files(str(folder))) == len(before) + 1


@pytest.mark.parametrize("times", [[0, 5], [7, 7]])
def test_no_list_is_kept_where_times_stand_still(folder, monkeypatch, times):
    monkeypatch.setattr(listing_cache, "_state", lambda folder: [*times, 3, 4, 5])
    list_image_files(str(folder))
    assert not kept()


def test_a_kept_list_is_said_with_how_to_make_it_anew(folder):
    (folder / "a" / "x.heic").touch()
    rest(folder)
    first, second = list_folder(str(folder)), list_folder(str(folder))
    assert first.notes == ["left out: 1 files (.heic 1)"]
    assert second.files == first.files and second.notes[0] == first.notes[0]
    assert second.notes[1:] == [f"the list of files is the one of the last start; remove {kept()[0]} to list them anew"]

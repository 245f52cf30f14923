import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masked_diffusion.files import (
    atomic_write,
    move_aside,
    numbered,
    remove_unfinished,
    sha256_of,
    write_beside_former,
    write_json,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_content_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert contents(tmp_path) == {"file.bin": b"new"}


def test_two_that_write_a_file_at_once_do_not_mix_even_with_one_process_number(tmp_path, monkeypatch):
    """As two machines do that share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 12)
    path = tmp_path / "file.bin"
    with atomic_write(path) as slow:
        slow.write(b"half and ")
        slow.flush()
        with atomic_write(path) as fast:
            fast.write(b"all at once")
        assert path.read_bytes() == b"all at once"
        slow.write(b"half")
    assert contents(tmp_path) == {"file.bin": b"half and half"}


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"half of the new")
        raise error
    assert contents(tmp_path) == {"file.bin": b"old"}


def test_a_new_file_moves_others_of_its_name_aside_and_leaves_an_equal_one_alone(tmp_path):
    path = tmp_path / "a.png"
    moved = [write_beside_former(path, content) for content in (b"1", b"1", b"2", b"3")]
    assert moved == [[], [], [tmp_path / "a_1.png"], [tmp_path / "a_2.png"]]
    assert contents(tmp_path) == {"a.png": b"3", "a_1.png": b"1", "a_2.png": b"2"}


def test_a_failed_first_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError), atomic_write(tmp_path / "file.bin") as file:
        file.write(b"half")
        raise OSError("disk full")
    assert contents(tmp_path) == {}


def test_a_failed_rename_leaves_the_old_content_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(self, target):
        raise OSError("no rename today")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no rename today"), atomic_write(path) as file:
        file.write(b"new")
    assert contents(tmp_path) == {"file.bin": b"old"}


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def recording_fsync(descriptor):
        events.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        fsync(descriptor)

    def recording_replace(self, target):
        events.append("rename")
        assert self.parent == target.parent  # a rename is atomic only inside one file system
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    with atomic_write(tmp_path / "file.bin") as file:
        file.write(b"new")
    assert events == ["fsync file", "rename", "fsync folder"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@given(value=JSON_VALUES)
def test_json_reads_back_as_written(value):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(contents(tmp_path)) == 1


@pytest.mark.parametrize(
    "name, expected", [("samples.npz", "samples_2.npz"), ("run", "run_2"), ("progress.v1.csv", "progress.v1_2.csv")]
)
def test_the_number_stands_before_the_suffix(name, expected):
    assert numbered(Path("folder") / name, 2) == Path("folder") / expected


def test_files_that_belong_together_move_to_one_number_that_is_free_for_all(tmp_path):
    for name in ("a.npz", "a.png", "a_1.npz", "a_2.png"):
        (tmp_path / name).write_text(name)
    moved = move_aside(tmp_path / "a.npz", tmp_path / "a.png")
    assert moved == [tmp_path / "a_3.npz", tmp_path / "a_3.png"]
    assert contents(tmp_path) == {
        "a_1.npz": b"a_1.npz",
        "a_2.png": b"a_2.png",
        "a_3.npz": b"a.npz",
        "a_3.png": b"a.png",
    }


def test_a_number_counts_as_taken_although_the_file_that_needs_it_does_not_exist(tmp_path):
    for name in ("a.npz", "a_1.png"):
        (tmp_path / name).write_text(name)
    assert move_aside(tmp_path / "a.npz", tmp_path / "a.png") == [tmp_path / "a_2.npz"]


def test_moving_aside_nothing_moves_nothing(tmp_path):
    assert move_aside(tmp_path / "a.npz", tmp_path / "a.png") == []
    assert contents(tmp_path) == {}


@given(rounds=st.lists(st.sets(st.sampled_from(["a.npz", "a.png", "m.json"])), max_size=6))
def test_nothing_is_ever_lost_by_moving_aside(rounds):
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name), []
        for number, names in enumerate(rounds):
            for file in names:
                (folder / file).write_text(f"{number} {file}")
                written.append(f"{number} {file}".encode())
            moved = move_aside(*(folder / file for file in ("a.npz", "a.png", "m.json")))
            assert len({path.stem.rsplit("_", 1)[1] for path in moved}) <= 1
        assert sorted(contents(folder).values()) == sorted(written)


def test_folders_move_aside_with_what_is_in_them(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("log")
    assert move_aside(tmp_path / "run") == [tmp_path / "run_1"]
    assert (tmp_path / "run_1" / "log.txt").read_text() == "log"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 7])
def test_sha256_is_that_of_the_whole_content(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# -- what killed writers leave -----------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_leaves_a_file_that_is_removed_later(tmp_path):
    writing = atomic_write(tmp_path / "model.pt")
    writing.__enter__()  # and never left
    [partial] = tmp_path.iterdir()
    remove_unfinished(tmp_path, lambda name: name == "model.pt")
    assert not partial.exists()


def test_only_unfinished_files_that_are_ones_own_are_removed(tmp_path):
    kept = ["a.pt", ".a.pt", ".b.pt.12.tmp", ".a.pt.tmp", ".a.pt.12.tmp.txt", "a.pt.12.tmp"]
    for name in [*kept, ".a.pt.12.tmp", ".a.pt.3456.tmp"]:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, lambda name: name == "a.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    remove_unfinished(tmp_path / "missing", lambda name: True)

"""Reading sets of images as a stream, and finding the manifest of the run that made them; no TensorFlow."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "evaluations"))

import sample_sets  # noqa: E402
from atomic_file import atomic_file  # noqa: E402
from feature_extraction import extract_features  # noqa: E402
from sample_sets import find_manifest, open_image_set  # noqa: E402


def images(count: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_batches_are_the_images_in_order(save, batch_size, tmp_path):
    save(tmp_path / "a.npz", arr_0=images(10), arr_1=np.arange(10))
    opened = open_image_set(tmp_path / "a.npz")
    batches = list(opened.batches(batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate(batches), images(10))
    assert (opened.count, opened.image_size) == (10, (4, 6))


def test_column_major_images_are_read_in_the_right_order(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(images(10)))
    opened = open_image_set(tmp_path / "a.npz")
    assert opened.images.fortran_order
    np.testing.assert_array_equal(np.concatenate(list(opened.batches(3))), images(10))


def test_no_more_than_a_batch_is_read_ahead(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", arr_0=images(1000))
    sizes = []
    read = sample_sets._read_exactly
    monkeypatch.setattr(
        sample_sets, "_read_exactly", lambda stream, size, path: (sizes.append(size), read(stream, size, path))[1]
    )
    next(open_image_set(tmp_path / "a.npz").batches(5))
    assert sizes == [5 * 4 * 6 * 3]


def test_hash_is_that_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sample_sets.sha256_of(tmp_path / "a") == digest


def manifest(folder: Path, name: str, samples: str, age: float = 0.0, **entries) -> Path:
    path = folder / name
    path.write_text(json.dumps({"samples": samples, **entries}))
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_manifest_is_the_one_that_names_the_file(tmp_path):
    manifest(tmp_path, "manifest.json", "samples.npz", which="new")
    moved = manifest(tmp_path, "manifest_2.json", "samples_2.npz", which="old")
    manifest(tmp_path, "manifest_old.json", "samples_2.npz")  # not a name that sampling gives
    assert find_manifest(tmp_path / "samples_2.npz") == (moved, {"samples": "samples_2.npz", "which": "old"})
    assert find_manifest(tmp_path / "samples.npz")[1]["which"] == "new"
    assert find_manifest(tmp_path / "samples_3.npz") is None


def test_of_several_manifests_the_newest_counts(tmp_path):
    manifest(tmp_path, "manifest_2.json", "a.npz", age=9)
    newest = manifest(tmp_path, "manifest_1.json", "a.npz", age=1)
    manifest(tmp_path, "manifest.json", "a.npz", age=5)
    assert find_manifest(tmp_path / "a.npz")[0] == newest


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b'{"samples": 3}', b"[" * 100_000])
def test_files_that_are_no_manifest_are_passed_over(content, tmp_path):
    (tmp_path / "manifest.json").write_bytes(content)
    good = manifest(tmp_path, "manifest_1.json", "a.npz")
    assert find_manifest(tmp_path / "a.npz")[0] == good


def test_an_atomic_file_replaces_on_success_only(tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_features_that_are_not_finite_are_an_error_that_names_the_set(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images(5))

    class Broken:
        sha256, softmax_weight = "", np.zeros((2, 2))

        def widths(self, height, width):
            return 2, 2

        def __call__(self, batch):
            return np.full((len(batch), 2), np.nan), np.zeros((len(batch), 2))

    with pytest.raises(ValueError, match=r"a\.npz.*NaN"):
        extract_features(open_image_set(tmp_path / "a.npz"), Broken(), 2, lambda done, total: None)

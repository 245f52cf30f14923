"""Sample sets as folders of PNG files, and reference batches made of real images; a stand-in computes the features."""

from __future__ import annotations

import json
import re
import shutil
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "evaluations"))

import evaluator  # noqa: E402
import fidelity_metrics  # noqa: E402
import make_reference  # noqa: E402
from image_folders import open_image_folder  # noqa: E402
from sample_sets import open_image_set  # noqa: E402
from support import make_colour_folder, script, truncate  # noqa: E402


class MeanColours:
    """A backend without a network: means of quarters and single pixels of the image."""

    path, sha256, identity, versions = Path("none.pb"), "0" * 64, "means", {"none": "0"}
    softmax_weight = np.eye(12, 5, dtype=np.float32)

    def widths(self, height, width):
        return 12, 12

    def __call__(self, images):
        n, height, width, _ = images.shape
        parts = images.astype(np.float32).reshape(n, 2, height // 2, 2, width // 2, 3)
        return parts.mean(axis=(2, 4)).reshape(n, -1), parts[:, :, 0, :, 0].reshape(n, -1)


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    for module in (evaluator, make_reference):
        monkeypatch.setattr(module, "load_backend", lambda options, script: MeanColours())


def images(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"sample_{index}.png")
    return folder


def run(capsys, module, *arguments) -> tuple[int, str, str]:
    status = module.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


# --- folders of PNG


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_a_folder_is_its_images_in_the_order_of_the_numbers_in_their_names(batch_size, tmp_path):
    pixels = images(12)
    folder = open_image_folder(write_folder(tmp_path / "set", pixels))
    np.testing.assert_array_equal(np.concatenate(list(folder.batches(batch_size))), pixels)
    odd = list(folder.batches(batch_size, first=1, step=2))
    expected = [pixels[start : start + batch_size] for start in range(batch_size, 12, 2 * batch_size)]
    assert all(np.array_equal(*pair) for pair in zip(odd, expected, strict=True))
    assert (folder.count, folder.image_size) == (12, (8, 8))


def sorted_by_class(counts=(30, 30, 30, 30), side=8) -> tuple[np.ndarray, np.ndarray]:
    """Images of classes that the stand-in tells apart, class after class, and their labels."""
    labels, pixels = np.repeat(np.arange(len(counts)), counts), images(sum(counts), side) // 16
    for label, (row, channel) in enumerate(((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))[: len(counts)]):
        pixels[labels == label, : side // 2, row * side // 2 : (row + 1) * side // 2, channel] = 255
    return pixels, labels


@pytest.fixture
def splits_of_30(monkeypatch):
    for module in (fidelity_metrics, evaluator):
        monkeypatch.setattr(module, "SPLIT_SIZE", 30)


def scored(capsys, tmp_path, *arguments) -> tuple[float, dict, str]:
    """Inception Score, report and stderr."""
    out = tmp_path / "report.json"
    status, _, stderr = run(capsys, evaluator, *arguments, "--no_cache", "--out", out)
    assert status == 0, stderr
    report = json.loads(out.read_text())
    return report["metrics"]["Inception Score"], report, stderr


@pytest.mark.usefixtures("splits_of_30")
def test_images_in_folders_by_class_are_spread_over_the_splits_of_the_inception_score(tmp_path, capsys):
    pixels, labels = sorted_by_class()
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    for label in range(4):
        write_folder(tmp_path / "set" / f"class {label}", pixels[labels == label])
    value, report, stderr = scored(capsys, tmp_path, tmp_path / "ref.npz", tmp_path / "set")
    assert value > 3.5 and report["inception_score_order"] == "spread" and "class by class" not in stderr
    assert scored(capsys, tmp_path, tmp_path / "ref.npz", tmp_path / "set")[0] == value
    np.savez(tmp_path / "set.npz", arr_0=pixels, arr_1=labels)
    assert scored(capsys, tmp_path, tmp_path / "ref.npz", tmp_path / "set.npz", "--shuffle")[0] == value


@pytest.mark.usefixtures("splits_of_30")
@pytest.mark.parametrize("with_labels", [True, False])
def test_an_npz_stored_class_by_class_keeps_its_order_and_is_warned_about(with_labels, tmp_path, capsys):
    pixels, labels = sorted_by_class()
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    np.savez(tmp_path / "set.npz", arr_0=pixels, **({"arr_1": labels} if with_labels else {}))
    value, report, stderr = scored(capsys, tmp_path, tmp_path / "ref.npz", tmp_path / "set.npz", "--ci", 3)
    assert value < 1.1 and report["inception_score_order"] == "stored"
    low, high = report["intervals"]["Inception Score"]
    assert high - low < 0.05  # splits are drawn from themselves: of all samples, their scores would scatter
    assert any(
        "--ci 3: so few repeats say little: the intervals' widths are uncertain by 50%" in w for w in report["warnings"]
    )
    source = "labels" if with_labels else "predicted classes"
    [warning] = [text for text in report["warnings"] if "class by class" in text]
    assert f"set.npz: stored class by class, as its {source} show" in warning and "--shuffle" in warning
    assert stderr.count("class by class") == 1


@pytest.mark.usefixtures("splits_of_30")
def test_samples_in_a_random_order_and_few_samples_are_not_warned_about(tmp_path, capsys):
    pixels, labels = sorted_by_class()
    order = np.random.default_rng(3).permutation(120)
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    for name, rows in (("mixed", order), ("few", np.arange(30))):
        np.savez(tmp_path / f"{name}.npz", arr_0=pixels[rows], arr_1=labels[rows])
        assert "splits" not in scored(capsys, tmp_path, tmp_path / "ref.npz", tmp_path / f"{name}.npz")[2]


@pytest.mark.usefixtures("splits_of_30")
def test_a_short_last_split_is_warned_about(tmp_path, capsys):
    pixels, _ = sorted_by_class((20, 11))
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    np.savez(tmp_path / "set.npz", arr_0=pixels)
    _, report, _ = scored(capsys, tmp_path, tmp_path / "ref.npz", tmp_path / "set.npz", "--shuffle")
    assert any("the last split of the Inception Score has 1 samples of 30" in text for text in report["warnings"])


def test_shuffle_is_refused_for_a_folder(tmp_path, capsys):
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    folder = write_folder(tmp_path / "set", images(9))
    status, _, err = run(capsys, evaluator, tmp_path / "ref.npz", folder, "--shuffle")
    assert status == 2 and re.search(r"--shuffle: has no effect for .*set, a folder", err)


def test_names_with_equal_numbers_have_an_order_and_any_character_is_a_name(tmp_path):
    pixels = images(5)
    names = ["a01", "a1", "a2", "\u00b210", b"\xff3".decode(errors="surrogateescape")]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    orders = []
    for listed in (sorted(tmp_path.iterdir()), sorted(tmp_path.iterdir(), reverse=True)):
        folder = type("Listed", (type(tmp_path),), {"rglob": lambda self, pattern, listed=listed: iter(listed)})
        orders.append([path.stem for path in open_image_folder(folder(tmp_path)).files])
    assert orders[0] == orders[1] == names
    assert re.fullmatch("[0-9a-f]{64}", open_image_folder(tmp_path).sha256())


def test_names_of_classes_are_composed_as_others_write_them(tmp_path):
    write_folder(tmp_path / unicodedata.normalize("NFD", "caf\u00e9"), images(2))
    assert open_image_folder(tmp_path).labels().tolist() == ["caf\u00e9"] * 2


def test_a_folder_scores_as_the_npz_of_its_images(tmp_path, capsys):
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    np.savez(tmp_path / "gen.npz", arr_0=images(11, seed=1))
    folder = write_folder(tmp_path / "gen", images(11, seed=1))
    outputs = [
        run(capsys, evaluator, tmp_path / "ref.npz", path, "--no_cache") for path in (tmp_path / "gen.npz", folder)
    ]
    assert outputs[0][:2] == outputs[1][:2] and outputs[0][0] == 0
    assert outputs[1][1].startswith("Inception Score: ")


def test_the_hash_of_a_folder_is_that_of_its_names_and_files(tmp_path):
    folders = [write_folder(tmp_path / name, images(3)) for name in "ab"]
    first, second = (open_image_folder(folder) for folder in folders)
    assert first.sha256() == second.sha256()
    (folders[1] / "sample_2.png").rename(folders[1] / "sample_3.png")
    assert open_image_folder(folders[1]).sha256() != first.sha256()


def test_classes_are_the_folders_of_the_first_level(tmp_path):
    write_folder(tmp_path / "cat", images(2))
    write_folder(tmp_path / "dog" / "small", images(2))
    (tmp_path / ".hidden").mkdir()
    assert open_image_folder(tmp_path).labels().tolist() == ["cat", "cat", "dog", "dog"]
    write_folder(tmp_path, images(1))
    with pytest.raises(ValueError, match="not in folders"):
        open_image_folder(tmp_path).labels()


def save_one(folder: Path, image: Image.Image) -> None:
    image.save(folder / "sample_7.png")


def empty_class(folder: Path) -> None:
    write_folder(folder / "cat", images(2))
    (folder / "dog" / "small").mkdir(parents=True)


BAD_FOLDERS = {
    "empty": (lambda folder: None, "a folder without PNG images in it or below it"),
    "other files": (lambda folder: (folder / "notes.txt").write_text("x"), "without PNG images in it"),
    "nested and empty": (lambda folder: (folder / "dog").mkdir(), "without PNG images in it or below it"),
    "one class empty": (empty_class, r"dog: a folder without PNG images below .*set; fill it or remove it"),
    "one image": (lambda folder: write_folder(folder, images(1)), "a folder with 1 image, at least 2"),
    "mixed sizes": (
        lambda folder: save_one(write_folder(folder, images(3)), Image.new("RGB", (9, 8))),
        r"sample_7\.png: an image of 8×9 among images of 8×8; a set has one size",
    ),
    "transparent": (
        lambda folder: save_one(write_folder(folder, images(3)), Image.new("RGBA", (8, 8))),
        r"sample_7\.png: a PNG of mode RGBA",
    ),
    "16 bits": (
        lambda folder: save_one(write_folder(folder, images(3)), Image.new("I;16", (8, 8))),
        r"sample_7\.png: a PNG of mode I",
    ),
    "damaged": (
        lambda folder: (write_folder(folder, images(3)) / "sample_2.png").write_bytes(b"\x89PNG broken"),
        r"sample_2\.png: cannot be read as an image",
    ),
    "damaged first": (
        lambda folder: (write_folder(folder, images(3)) / "sample_0.png").write_bytes(b""),
        r"sample_0\.png: cannot be read as an image",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line_that_names_it(kind, tmp_path, capsys):
    make, message = BAD_FOLDERS[kind]
    (tmp_path / "set").mkdir()
    make(tmp_path / "set")
    np.savez(tmp_path / "ref.npz", arr_0=images(20))
    status, out, err = run(capsys, evaluator, tmp_path / "ref.npz", tmp_path / "set", "--no_cache")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err


# --- reference batches


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_reference_has_the_statistics_of_all_images_and_some_of_them(kind, tmp_path, capsys):
    pixels = images(21)
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    source = tmp_path / "real.npz" if kind == "npz" else write_folder(tmp_path / "real", pixels)
    out = tmp_path / "ref.npz"
    status, _, err = run(capsys, make_reference, source, out, "--num_images", 6, "--batch_size", 4)
    assert status == 0, err
    made = read(out)
    assert sorted(made) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
    np.testing.assert_array_equal(made["arr_0"], pixels[[0, 4, 8, 12, 16, 20]])
    pool, spatial = (features.astype(np.float64) for features in MeanColours()(pixels))
    for values, suffix in ((pool, ""), (spatial, "_s")):
        np.testing.assert_allclose(made[f"mu{suffix}"], values.mean(axis=0))
        np.testing.assert_allclose(made[f"sigma{suffix}"], np.cov(values, rowvar=False), rtol=1e-9, atol=1e-9)
    assert open_image_set(out).statistics is not None  # the evaluator reads it


def test_scores_against_a_reference_batch_are_those_against_its_images(tmp_path, capsys):
    np.savez(tmp_path / "real.npz", arr_0=images(30))
    np.savez(tmp_path / "gen.npz", arr_0=images(30, seed=1))
    assert run(capsys, make_reference, tmp_path / "real.npz", tmp_path / "ref.npz")[0] == 0
    scores = [
        run(capsys, evaluator, tmp_path / name, tmp_path / "gen.npz", "--no_cache")[1].split()
        for name in ("real.npz", "ref.npz")
    ]
    numbers = [[float(word) for word in words if word[0].isdigit()] for words in scores]
    assert len(numbers[0]) == 5 and numbers[0] == pytest.approx(numbers[1], rel=1e-9)


def test_images_of_any_size_are_cropped_as_for_a_training(tmp_path, capsys):
    folder = make_colour_folder(tmp_path / "colours", per_class=3)
    status, _, err = run(capsys, make_reference, folder, tmp_path / "ref.npz", "--image_size", 16)
    assert status == 0, err
    assert read(tmp_path / "ref.npz")["arr_0"].shape == (9, 16, 16, 3)


def test_latents_stand_for_the_images_they_were_made_of(colour_folder, tiny_vae, tmp_path, capsys):
    source, latents = shutil.copytree(colour_folder, tmp_path / "colours"), tmp_path / "latents"
    flags = ["--image_size", 16, "--num_workers", 0, "--device", "cpu", "--vae_path", tiny_vae]
    encode = script("scripts/encode_latents.py").main
    assert encode([str(part) for part in ("--data_dir", source, "--out", latents, *flags)]) == 0
    for images_or_latents, out, options in ((source, "a.npz", ["--image_size", 16]), (latents, "b.npz", [])):
        status, _, err = run(capsys, make_reference, images_or_latents, tmp_path / out, *options)
        assert status == 0, err
    of_images, of_latents = read(tmp_path / "a.npz"), read(tmp_path / "b.npz")
    assert of_images.keys() == of_latents.keys()
    assert all(np.array_equal(of_images[name], of_latents[name]) for name in of_images)

    def refusal(*options):
        status, out, err = run(capsys, make_reference, latents, tmp_path / "c.npz", *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        return err

    assert "--image_size 8: has no effect for the latents in" in refusal("--image_size", 8)
    next(source.rglob("*.png")).unlink()
    assert "have changed since they were encoded (1 gone" in refusal()
    shutil.rmtree(source)
    assert f"latents of the images in {source}, which is not there" in refusal()
    (latents / "latents.json").rename(latents / "latents_unfinished.json")
    assert "its latents are unfinished" in refusal()


@pytest.mark.parametrize("kind", ["images of any size", "folder of one size", "npz"])
def test_an_image_that_cannot_be_read_is_found_before_the_features(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MeanColours, "__call__", lambda self, batch: pytest.fail("features are computed"))
    options = []
    if kind == "images of any size":
        source, options = make_colour_folder(tmp_path / "colours", per_class=3), ["--image_size", 16]
        [bad] = truncate(source, "red/2.png")
    elif kind == "folder of one size":
        source = write_folder(tmp_path / "real", images(9))
        [bad] = truncate(source, "sample_5.png")
    else:
        source = bad = tmp_path / "real.npz"
        np.savez(source, arr_0=images(9))
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 1
        source.write_bytes(content)
    status, out, err = run(capsys, make_reference, source, tmp_path / "ref.npz", *options)
    assert (status, out, err.count("\n")) == (2, "", 1) and f"make_reference.py: error: {bad}: " in err, err
    assert "cannot be read" in err or "damaged" in err
    assert not (tmp_path / "ref.npz").exists()


def as_adm_reads_it(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Plain numpy and zipfile, as the suite's own evaluator uses them: statistics by name, arr_0 as a stream."""
    with np.load(path) as file:
        assert "mu" in file  # which is how it finds out whether a file brings statistics along
        statistics = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        assert not fortran_order and dtype == np.uint8
        pixels = np.frombuffer(stream.read(), dtype).reshape(shape)
    return statistics, pixels


def test_a_reference_can_be_read_by_the_suites_own_evaluator(tmp_path, capsys):
    pixels = images(40)
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    assert run(capsys, make_reference, tmp_path / "real.npz", tmp_path / "ref.npz")[0] == 0
    statistics, read_back = as_adm_reads_it(tmp_path / "ref.npz")
    np.testing.assert_array_equal(read_back, pixels)
    pool, spatial = MeanColours()(pixels)
    for suffix, values in (("", pool), ("_s", spatial)):  # its own statistics: mean and np.cov, in float64
        mu, sigma = statistics[f"mu{suffix}"], statistics[f"sigma{suffix}"]
        assert mu.shape == (12,) and sigma.shape == (12, 12) and mu.dtype == sigma.dtype == np.float64
        np.testing.assert_allclose(mu, np.mean(values, axis=0), rtol=1e-5)
        np.testing.assert_allclose(sigma, np.cov(values, rowvar=False), rtol=1e-5, atol=1e-4)


def test_what_cannot_become_a_reference_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "real.npz", arr_0=images(5))
    single = write_folder(tmp_path / "single", images(1))
    for arguments, message in (
        ([tmp_path / "real.npz", tmp_path / "real.npz"], "real.npz: exists; choose another name"),
        ([tmp_path / "real.npz", tmp_path / "ref.txt"], "ref.txt: expected the name of an .npz file"),
        ([tmp_path / "real.npz", tmp_path / "ref.npz", "--image_size", 8], "--image_size crops the images of a folder"),
        ([single, tmp_path / "ref.npz", "--image_size", 8], "single: a folder with 1 image"),
        ([single, tmp_path / "ref.npz", "--image_size", 0], "--image_size 0: must be at least 1"),
        ([tmp_path / "real.npz", tmp_path / "ref.npz", "--num_images", 1], "--num_images 1: must be at least 2"),
        ([tmp_path / "none", tmp_path / "ref.npz"], "none: no such file"),
    ):
        status, out, err = run(capsys, make_reference, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err, err

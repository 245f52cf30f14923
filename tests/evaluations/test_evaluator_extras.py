"""Numbers beside the suite's five, pictures and the page."""

from __future__ import annotations

import json
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluator_folders import MeanColours, images, run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "evaluations"))

import evaluator  # noqa: E402
import more_metrics  # noqa: E402
from extras import some_samples  # noqa: E402
from feature_extraction import features_of_batches  # noqa: E402
from fidelity_metrics import frechet_distance, inside_manifolds  # noqa: E402
from scoring import evaluate, judge_manifolds, score  # noqa: E402

pytestmark = pytest.mark.usefixtures("mean_colours")


def full():
    return open("/dev/full", "w")  # noqa: SIM115


@pytest.mark.parametrize("stream", [full, lambda: None], ids=["full", "closed"])
def test_numbers_that_cannot_be_written_on_stdout_are_on_stderr_and_in_the_report(
    stream, pair, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdout", stream())
    assert evaluator.main([*map(str, pair), "--no_cache"]) == 0
    assert re.search(r"^FID: \d", capsys.readouterr().err, re.MULTILINE)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream())
    assert evaluator.main([*map(str, pair), "--no_cache"]) == 1  # nobody has them
    out = tmp_path / "report.json"
    assert evaluator.main([*map(str, pair), "--no_cache", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["metrics"]["FID"] > 0


def features(count: int, width: int, seed: int) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32))


@pytest.mark.parametrize("counts", [(1500, 1200), (300, 200)])
def test_kernel_distance_is_that_of_torch_fidelity(counts, monkeypatch):
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    monkeypatch.setattr(more_metrics, "KID_SUBSETS", 5)
    reference, samples = features(counts[0], 16, 0), features(counts[1], 16, 1) * np.float32(1.1)
    expected = kid.kid_features_to_metric(
        torch.from_numpy(samples).double(), torch.from_numpy(reference).double(),
        kid_subsets=5, kid_subset_size=min(1000, *counts), verbose=False,
    )  # fmt: skip
    mean, deviation = more_metrics.kernel_distance(reference, samples)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)


def test_distances_by_class_compare_equal_labels_only():
    reference, samples = features(60, 4, 0), features(40, 4, 1)
    labels = np.arange(60) % 3, np.where(np.arange(40) == 0, 7, np.arange(40) % 3)
    found = more_metrics.distances_by_class(reference, labels[0], samples, labels[1])
    assert list(found) == ["0", "1", "2"]  # the single sample of class 7 has no covariance
    both = (more_metrics.statistics_of(x[label == 2]) for x, label in zip((reference, samples), labels, strict=True))
    assert found["2"] == frechet_distance(*both)


def test_intervals_shrink_with_the_number_of_samples_and_hold_the_number():
    widths = []
    for count in (50, 800):
        batches = [(features(count, 6, seed), features(count, 5, seed)) for seed in (0, 1)]
        reference, samples = (features_of_batches([batch], keep_spatial=True) for batch in batches)
        weight = features(6, 4, 2)
        inside = judge_manifolds(reference, samples, half=True)
        metrics = score(reference, samples, weight, inside)
        intervals = more_metrics.confidence_intervals(metrics, reference, samples, weight, inside, 40)
        assert list(intervals) == list(metrics)
        assert all(low < metrics[name] < high for name, (low, high) in intervals.items())
        widths.append({name: high - low for name, (low, high) in intervals.items()})
    assert all(widths[1][name] < 0.7 * widths[0][name] for name in widths[0])
    share = metrics["Precision"]
    assert widths[1]["Precision"] == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 800), rel=0.4)


def test_nearest_neighbours_are_found_in_blocks(monkeypatch):
    monkeypatch.setattr(more_metrics, "_ROWS", 3)
    reference = np.float32([[0], [10], [11], [30]])
    indices, distances = more_metrics.nearest_neighbours(reference, np.float32([[1], [29], [10], [12]]), 2)
    assert indices.tolist() == [[0, 1], [3, 2], [1, 2], [2, 1]]
    assert distances.tolist() == [[1, 9], [1, 18], [0, 1], [1, 2]]
    far, near = features(40, 6, 0), features(9, 6, 1)
    exact = ((near[:, None].astype(np.float64) - far[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(more_metrics.nearest_neighbours(far, near, 5)[0], np.argsort(exact)[:, :5])
    twins = np.repeat(np.float32([[3], [1]]), 2, axis=0)
    assert more_metrics.nearest_neighbours(twins, np.float32([[0]]), 9)[0].tolist() == [[2, 3, 0, 1]]


def test_a_program_scores_its_own_images_as_the_evaluator_does(pair, capsys):
    backend = MeanColours()
    reference = features_of_batches([backend(images(60))])
    _, out, _ = run(capsys, evaluator, *pair, "--no_cache")
    gen = images(40, seed=1)
    scores = evaluate(reference, (gen[start : start + 7] for start in range(0, 40, 7)), backend)
    assert [f"{name}: {value}" for name, value in scores.items()] == out.splitlines()


@pytest.mark.parametrize("half", [True, False])
def test_no_score_depends_on_the_size_of_the_batches_or_the_order_of_the_images(half):
    backend, gen = MeanColours(), images(90, seed=1)
    reference = features_of_batches([backend(images(100))])
    whole = evaluate(reference, [gen], backend, half)
    assert 0 < whole["Precision"] < 1 and 0 < whole["Recall"] < 1 and whole["FID"] > 0
    for batch_size in (1, 7, 64):
        parts = (gen[start : start + batch_size] for start in range(0, 90, batch_size))
        assert evaluate(reference, parts, backend, half) == whole
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(90)
        shuffled_reference = features_of_batches([backend(images(100)[np.random.default_rng(seed).permutation(100)])])
        assert evaluate(shuffled_reference, [gen[order]], backend, half) == pytest.approx(whole, rel=1e-6)


def peak_memory(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_images_but_for_what_manifolds_need():
    def stream(batches):
        return ((features(50, 40, seed), features(50, 40, seed)) for seed in range(batches))

    statistics_only = [peak_memory(lambda n=n: features_of_batches(stream(n), keep_pool=False)) for n in (10, 200)]
    assert statistics_only[1] < statistics_only[0] + 50_000  # the features of one kind are 1.6 MB
    with_pool = peak_memory(lambda: features_of_batches(stream(200)))
    needed = 200 * 50 * 40 * 4  # bytes of the pool features, of which no spatial ones are kept
    assert with_pool < statistics_only[0] + 2.2 * needed


def test_precision_and_recall_take_a_few_blocks_of_memory():
    reference, samples = features(3000, 8, 0), features(2500, 8, 1)
    peak = peak_memory(lambda: inside_manifolds(reference, samples, block=200))
    assert peak < 8 * 200 * 200 * 4 + 30 * 3000 * 4  # all distances at once are 30 MB


class Means(torch.nn.Module):
    def forward(self, pixels):
        return pixels.double().mean(dim=(2, 3))


def export(path: Path, network: torch.nn.Module) -> Path:
    example, batch = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.export.Dim("batch", min=1, max=4096)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), path)
    return path


def test_everything_at_once_is_printed_after_the_five_and_reported(pair, tmp_path, capsys):
    exported = export(tmp_path / "means.pt2", Means())
    out, page, picture = tmp_path / "report.json", tmp_path / "report.html", tmp_path / "nearest.png"
    options = ["--no_cache", "--kid", "--features", exported, "--trust_features", "True", "--ci", 5, "--per_class"]
    status, stdout, stderr = run(capsys, evaluator, *pair, *options, "--out", out, "--html", page, "--nearest", picture)
    assert status == 0, stderr
    names = [line.split(": ")[0] for line in stdout.splitlines()]
    assert names == ["Inception Score", "FID", "sFID", "Precision", "Recall", "KID", "FD (means)", "KID (means)"]
    report = json.loads(out.read_text())
    assert list(report["metrics"]) == names and list(report["FID_by_class"]) == ["0", "1", "2"]
    assert report["intervals"]["FID"][0] < report["metrics"]["FID"] < report["intervals"]["FID"][1]
    assert "FID: 95 % interval" in stderr
    both = [images(count, seed=seed).astype(np.float64).mean(axis=(1, 2)) for count, seed in ((60, 0), (40, 1))]
    distance = frechet_distance(*(more_metrics.statistics_of(part) for part in both))
    assert report["metrics"]["FD (means)"] == pytest.approx(distance, rel=1e-5)
    with Image.open(picture) as image:
        assert image.size == (6 * 66 - 2, 8 * 66 - 2)  # 8 samples with 5 neighbours each, 8 pixels enlarged to 64
    html = page.read_text()
    assert html.count("<img src='data:image/png;base64,") == 2 and "Manifest of the samples" in html
    assert f"{report['metrics']['sFID']:.4f}" in html and "fewer than 2048" in html
    assert html.count("src=") == 2 and "href=" not in html and "url(" not in html  # nothing outside the page


def test_copies_of_real_images_head_the_picture_of_neighbours(tmp_path, capsys):
    real, made = images(30), images(20, seed=1)
    made[13] = real[5]
    np.savez(tmp_path / "ref.npz", arr_0=real)
    np.savez(tmp_path / "gen.npz", arr_0=made)
    picture = tmp_path / "nearest.png"
    run(capsys, evaluator, tmp_path / "ref.npz", tmp_path / "gen.npz", "--no_cache", "--nearest", picture)
    with Image.open(picture) as image:
        pixels = np.asarray(image)
    for left in (0, 66):
        np.testing.assert_array_equal(pixels[:64:8, left : left + 64 : 8], real[5])


def labelled_pair(tmp_path, of_reference, of_samples):
    for name, labels, seed in (("ref", of_reference, 0), ("gen", of_samples, 1)):
        pixels = images(len(labels), seed=seed)
        if isinstance(labels[0], str):
            for index, (label, image) in enumerate(zip(labels, pixels, strict=True)):
                (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(tmp_path / name / label / f"{index}.png")
        else:
            np.savez(tmp_path / f"{name}.npz", arr_0=pixels, arr_1=np.array(labels))
    return [tmp_path / (name if (tmp_path / name).is_dir() else f"{name}.npz") for name in ("ref", "gen")]


def test_folders_called_by_numbers_are_the_classes_of_these_numbers(tmp_path, capsys):
    pair = labelled_pair(tmp_path, ["0"] * 5 + ["10"] * 5 + ["2"] * 5, [0] * 4 + [10] * 4 + [3] * 2)
    out = tmp_path / "report.json"
    assert run(capsys, evaluator, *pair, "--per_class", "--out", out, "--no_cache")[0] == 0
    report = json.loads(out.read_text())
    assert list(report["FID_by_class"]) == ["0", "10"]
    assert "--per_class: 2 classes have fewer than 2 images in one of the sets: 2, 3" in report["warnings"]


def test_labels_that_share_no_class_are_refused_with_both_sides_named(tmp_path, capsys):
    pair = labelled_pair(tmp_path, ["cat"] * 3 + ["dog"] * 3, [0] * 3 + [1] * 3)
    status, _, err = run(capsys, evaluator, *pair, "--per_class", "--out", tmp_path / "report.json", "--no_cache")
    assert status == 2
    assert re.search(r"--per_class: no class has 2 images in both sets: .*ref has cat, dog, .*gen.npz has 0, 1;", err)


def test_the_pages_samples_are_of_all_classes_where_classes_follow_one_another():
    class Sorted:
        count = 640

        def batches(self, batch_size):
            for start in range(0, self.count, batch_size):
                rows = np.arange(start, min(start + batch_size, self.count))
                yield np.broadcast_to((rows // 64)[:, None, None, None], (len(rows), 4, 4, 3)).astype(np.uint8)

    assert set(np.unique(np.asarray(some_samples(Sorted())))) == {*range(10), 255}


def test_what_cannot_be_computed_is_refused_before_the_work(pair, tmp_path, capsys):
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(b"no program")
    np.savez(tmp_path / "plain.npz", arr_0=images(9))
    np.savez(tmp_path / "onehot.npz", arr_0=images(9), arr_1=np.zeros((9, 3)))
    (tmp_path / "taken.html").write_text("precious")
    statistics = {"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": np.zeros(12), "sigma_s": np.eye(12)}
    np.savez(tmp_path / "statistics.npz", **statistics)
    out = ["--out", tmp_path / "report.json"]
    for arguments, message in (
        ([tmp_path / "statistics.npz", pair[1], "--kid"], "statistics.npz: no images, which --kid needs"),
        ([*pair, "--ci", 1], "--ci 1: must be 0"),
        ([*pair, "--per_class"], "--per_class: its distances go into the report"),
        ([pair[0], tmp_path / "plain.npz", "--per_class", *out], r"plain.npz: no arr_1 \(labels\)"),
        ([pair[0], tmp_path / "onehot.npz", "--per_class", *out], r"onehot.npz: arr_1 is float64 of shape \(9, 3\)"),
        ([*pair, "--nearest", tmp_path / "a.jpg"], r"--nearest .*a.jpg: expected the name of a .png file"),
        ([*pair, "--html", tmp_path / "none" / "a.html"], "--html .*a.html: expected the name"),
        ([*pair, "--html", tmp_path / "taken.html"], "--html .*taken.html: exists; choose another name"),
        ([*pair, "--features", tmp_path / "none.pt2"], "--features .*none.pt2: no such file"),
        ([*pair, "--features", tmp_path / "taken.html"], r"taken.html: expected a file that ends in .pt2 .* or .pb"),
        ([*pair, "--features", bad, "--features_node", "x"], "--features_node x: has no effect without a graph"),
        ([*pair, "--features_input", "x"], "--features_input x: has no effect without a graph"),
        ([*pair, "--features", bad, "--trust_features", "True"],
         "--features .*bad.pt2: not a program that torch.export.save wrote"),
    ):  # fmt: skip
        status, stdout, err = run(capsys, evaluator, *arguments, "--no_cache")
        assert (status, stdout) == (2, "") and re.search(message, err.splitlines()[-1]), err
    assert (tmp_path / "taken.html").read_text() == "precious"

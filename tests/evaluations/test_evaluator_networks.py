"""Features of other networks than Inception: exported programs and nodes of frozen graphs."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluator_extras import Means, export
from test_evaluator_folders import images, run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "evaluations"))

import evaluator  # noqa: E402
import more_metrics  # noqa: E402
from feature_networks import ExportedProgram, FeatureNetwork, GraphFeatures  # noqa: E402
from fidelity_metrics import frechet_distance  # noqa: E402
from inception_graph import InceptionGraph  # noqa: E402
from support import environment, run_command  # noqa: E402
from torch_runtime import full_precision_inference  # noqa: E402

pytestmark = pytest.mark.usefixtures("mean_colours")


@pytest.fixture(scope="session")
def graph(tf, tmp_path_factory):
    """A graph of mean colours, of several shapes and under several conditions on what goes in."""
    tf1, path = tf.compat.v1, tmp_path_factory.mktemp("graph") / "means.pb"
    with tf1.Graph().as_default() as graph:
        one = tf1.placeholder(tf.float32, [1, None, None, 3], name="pixels")
        bytes_ = tf1.placeholder(tf.uint8, [None, 8, 8, 3], name="bytes")
        tf1.placeholder(tf.string, [], name="jpeg")
        tf1.placeholder(tf.float32, [None, 3, 8, 8], name="channels_first")
        pooled = tf.reduce_mean(one, axis=[1, 2], keepdims=True, name="pool")
        tf.reduce_mean(one, axis=[1, 2], name="means")
        tf.reduce_mean(tf.cast(bytes_, tf.float32), axis=[1, 2], name="means_of_bytes")
        tf.reshape(pooled, [1, 3], name="one_at_a_time")
        tf.reshape(one, [tf.shape(one)[0], -1], name="all_pixels")
        tf.math.log(pooled - 300.0, name="not_finite")
        tf.group(pooled, name="nothing")
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


def refusal(capsys, pair, *options) -> str:
    status, out, err = run(capsys, evaluator, *pair, "--no_cache", *options)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    return err


@pytest.mark.parametrize(
    "node, input_node", [("pool", "pixels"), ("means:0", "pixels:0"), ("means_of_bytes", "bytes")]
)  # fmt: skip
def test_a_node_of_a_graph_gives_distances_of_its_features(node, input_node, graph, pair, tmp_path, capsys):
    out = tmp_path / "report.json"
    options = ["--features", graph, "--features_node", node, "--features_input", input_node, "--batch_size", 7]
    status, stdout, stderr = run(capsys, evaluator, *pair, "--no_cache", "--out", out, *options)
    assert status == 0, stderr
    both = [images(count, seed=seed).astype(np.float64).mean(axis=(1, 2)) for count, seed in ((60, 0), (40, 1))]
    report = json.loads(out.read_text())
    distance = frechet_distance(*(more_metrics.statistics_of(part) for part in both))
    assert report["metrics"]["FD (means)"] == pytest.approx(distance, rel=1e-5)
    assert report["metrics"]["KID (means)"] == pytest.approx(more_metrics.kernel_distance(*both)[0], rel=1e-4)
    assert stdout.splitlines()[-2].startswith("FD (means): ") and stdout.splitlines()[-1].startswith("KID (means): ")
    used = {"node": f"{node.removesuffix(':0')}:0", "input": f"{input_node.removesuffix(':0')}:0"}
    assert report["features"].items() >= used.items() and re.fullmatch("[0-9a-f]{64}", report["features"]["sha256"])


def test_the_only_placeholder_takes_the_images(tf, pair, tmp_path, capsys):
    with tf.compat.v1.Graph().as_default() as graph:
        pixels = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3])
        tf.reduce_max(pixels, axis=[1, 2], name="largest")
    path = tmp_path / "largest.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    status, stdout, _ = run(capsys, evaluator, *pair, "--no_cache", "--features", path, "--features_node", "largest")
    assert status == 0 and "FD (largest): " in stdout
    np.testing.assert_array_equal(GraphFeatures(path, "largest")(images(5)), images(5).max(axis=(1, 2)))


@pytest.mark.parametrize(
    "options, message",
    [
        ([], r"--features .*means.pb: name the node of this graph that holds the features by --features_node"),
        (["--features_node", "pool"], "has the placeholders pixels, bytes, jpeg, channels_first; name the node"),
        (["--features_node", "none", "--features_input", "pixels"],
         "--features_node none: .*means.pb has no such node; its last ones are .*nothing"),
        (["--features_node", "pool:1", "--features_input", "pixels"], "--features_node pool:1: cannot be read from"),
        (["--features_node", "nothing", "--features_input", "pixels"], "--features_node nothing: cannot be read from"),
        (["--features_node", "pool", "--features_input", "none"], "--features_input none: .*means.pb has no such node"),
        (["--features_node", "pool", "--features_input", "jpeg"], r"_input jpeg:0: takes string of shape \(\)"),
        (["--features_node", "pool", "--features_input", "channels_first"],
         r"takes float32 of shape \(None, 3, 8, 8\).*, expected uint8 or float images \(n, H, W, 3\)"),
        (["--features_node", "means_of_bytes", "--features_input", "pixels"],
         r"--features .*means.pb: cannot take uint8 images \(.*, 8, 8, 3\) \(.*bytes"),
        (["--features_node", "one_at_a_time", "--features_input", "pixels"], "cannot take uint8 images .*reshape"),
        (["--features_node", "pixels", "--features_input", "bytes"], "cannot take uint8 images"),
        (["--features_node", "bytes", "--features_input", "bytes"], "cannot take uint8 images"),
    ],
)  # fmt: skip
def test_a_graph_that_gives_no_features_is_refused(options, message, graph, pair, capsys):
    assert re.search(message, refusal(capsys, pair, "--features", graph, *options), re.IGNORECASE)


def test_maps_of_features_are_refused_with_their_shape(tf, pair, tmp_path, capsys):
    with tf.compat.v1.Graph().as_default() as graph:
        pixels = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3], name="pixels")
        tf.multiply(pixels, 2.0, name="map")
        tf.reduce_mean(pixels, name="one_number")
    path = tmp_path / "map.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    for node, shape in (("map", r"\(\d+, 8, 8, 3\)"), ("one_number", r"\(\)")):
        line = refusal(capsys, pair, "--features", path, "--features_node", node)
        assert re.search(rf"map.pb: returns {shape} for \d+ images, expected \(n, D\) features", line), line


def test_files_that_are_no_graph_and_missing_tensorflow_are_one_sentence(graph, pair, tmp_path, capsys, monkeypatch):
    bad = tmp_path / "bad.pb"
    bad.write_bytes(b"<html>")
    options = ["--features_node", "pool", "--features_input", "pixels"]
    assert "bad.pb: not a frozen TensorFlow graph" in refusal(capsys, pair, "--features", bad, *options)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    line = refusal(capsys, pair, "--features", graph, *options)
    assert "pip install -r evaluations/requirements.txt, or give a program of torch.export to --features" in line


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_program_that_runs_code_when_it_is_loaded_is_not_loaded_without_the_users_word(pair, tmp_path, capsys):
    crafted, made = tmp_path / "crafted.pt2", tmp_path / "made"
    pickled = io.BytesIO()
    torch.save(Touch(made), pickled)
    with zipfile.ZipFile(export(tmp_path / "means.pt2", Means())) as program, zipfile.ZipFile(crafted, "w") as archive:
        for name in program.namelist():
            archive.writestr(name, pickled.getvalue() if "sample_inputs" in name else program.read(name))
    line = refusal(capsys, pair, "--features", crafted)
    assert "crafted.pt2: a .pt2 can run any code while it is loaded; add --trust_features True if you trust" in line
    refusal(capsys, pair, "--features", crafted, "--trust_features", "False")
    assert not made.exists()
    run(capsys, evaluator, *pair, "--no_cache", "--features", crafted, "--trust_features", "True")
    assert made.exists(), "the crafted file does nothing, so this test proves nothing"


def test_what_a_program_makes_for_itself_goes_to_the_device_with_its_weights(tmp_path):
    class Ramp(torch.nn.Module):
        def forward(self, pixels):  # exported on a CPU, the ramp is made there for ever
            return pixels.float().flatten(1) * torch.arange(192.0, device=pixels.device)

    network = ExportedProgram(export(tmp_path / "ramp.pt2", Ramp()), "meta")
    assert network._module(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta")).device.type == "meta"


def test_trust_where_nothing_needs_it_is_refused(graph, pair, capsys):
    message = "--trust_features True: has no effect without a program (.pt2) in --features"
    assert message in refusal(capsys, pair, "--trust_features", "True")
    assert message in refusal(capsys, pair, "--features", graph, "--features_node", "pool", "--trust_features", "True")
    assert "expected True or False, got 'perhaps'" in refusal(capsys, pair, "--trust_features", "perhaps")


def graph_that_touches(tf, path: Path, how: str) -> Path:
    """A graph of mean colours that would write or read a file while it computes them."""
    tf1, target = tf.compat.v1, str(path.with_suffix(".made"))
    with tf1.Graph().as_default() as graph:
        pixels = tf1.placeholder(tf.float32, [None, None, None, 3], name="pixels")
        if how == "write":
            with tf.control_dependencies([tf.io.write_file(target, "x")]):
                tf.reduce_mean(pixels, axis=[1, 2], name="means")
        elif how == "read":
            length = tf.cast(tf.strings.length(tf.io.read_file(target)), tf.float32)
            tf.add(tf.reduce_mean(pixels, axis=[1, 2]), length, name="means")
        elif how == "debug":
            copy = tf.raw_ops.DebugIdentity(input=pixels, debug_urls=[f"file://{target}"])
            tf.reduce_mean(copy, axis=[1, 2], name="means")
        elif how == "function":

            @tf.function
            def means(images):
                tf.io.write_file(target, "x")
                return tf.reduce_mean(images, axis=[1, 2])

            tf.identity(means(pixels), name="means")
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


@pytest.mark.parametrize(
    "how, operation",
    [("write", "WriteFile"), ("read", "ReadFile"), ("debug", "DebugIdentity"), ("function", "WriteFile")],
)
def test_a_graph_that_would_touch_files_is_refused_before_it_is_run(how, operation, tf, pair, tmp_path, capsys):
    path = graph_that_touches(tf, tmp_path / "graph.pb", how)
    line = refusal(capsys, pair, "--features", path, "--features_node", "means", "--features_input", "pixels")
    assert re.search(rf"graph.pb: refused, because its node .* \({operation}\) could read or write files", line), line
    assert not path.with_suffix(".made").exists()
    with pytest.raises(ValueError, match=f"{operation}.* could read or write files or run code"):
        InceptionGraph(path, "0" * 64)  # the suite's own graph is one of the user's, too


def test_images_of_another_size_in_the_reference_are_found_before_the_work(graph, pair, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.npz"
    np.savez(other, arr_0=images(30, side=12))
    options = ["--features", graph, "--features_input", "pixels", "--features_node"]
    assert "gives features of widths [192, 432] for images of two sizes" in refusal(
        capsys, (other, pair[1]), *options, "all_pixels"
    )
    monkeypatch.setattr(evaluator, "compute_features", lambda job: None)
    assert run(capsys, evaluator, other, pair[1], "--no_cache", *options, "means")[0] == 0


def test_a_network_is_tried_on_the_batch_that_is_left_over_at_the_end(pair):
    class NoSingles(FeatureNetwork):
        path = Path("pairs.pt2")

        def _run(self, pixels):
            if len(pixels) == 1:
                raise RuntimeError("one is none")
            return pixels.mean(axis=(1, 2))

    sets = [evaluator.open_images(path) for path in pair]  # 60 and 40 images
    NoSingles().check(sets, 20)
    with pytest.raises(ValueError, match=r"pairs.pt2: cannot take uint8 images \(1, 8, 8, 3\) \(one is none\)"):
        NoSingles().check(sets, 13)


def test_features_that_are_not_finite_are_an_error_that_names_the_network(graph, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images(5))
    network = GraphFeatures(graph, "not_finite", "pixels")
    with pytest.raises(ValueError, match=r"means.pb: gives NaN or infinite features for images of .*a.npz"):
        network.of_set(evaluator.open_images(tmp_path / "a.npz"), 2)


def test_what_another_network_spoils_costs_no_number_that_was_there(graph, pair, tmp_path, capsys):
    out = tmp_path / "report.json"
    options = ["--features", graph, "--features_node", "not_finite", "--features_input", "pixels"]
    with pytest.raises(ValueError, match="gives NaN or infinite features"):
        run(capsys, evaluator, *pair, "--no_cache", "--out", out, *options)
    five = json.loads(out.read_text())["metrics"]
    assert list(five) == ["Inception Score", "FID", "sFID", "Precision", "Recall"] and all(five.values())
    assert f"FID: {five['FID']}" in capsys.readouterr().out


def test_what_the_calling_program_allows_does_not_reach_a_network(tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(192, 256)

        def forward(self, pixels):
            return self.layer(pixels.float().flatten(1))

    network = ExportedProgram(export(tmp_path / "wide.pt2", Wide()), "cpu")
    expected = network(images(64))
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16, where the processor has it
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(network(images(64)), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


def test_inference_is_in_full_precision_and_leaves_the_settings_as_they_were(monkeypatch):
    def settings():
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, torch.get_float32_matmul_precision()

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # TF32
        before = settings()
        with full_precision_inference("cpu"):
            assert settings() == (True, False, True, "highest") and not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert settings() == before == (True, True, False, "high")
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.e2e
def test_inception_through_torch_and_another_network_through_tensorflow_in_one_process(tf, graph, pair, tmp_path):
    from inception_2015 import write_inception_2015

    command = [sys.executable, ROOT / "evaluations" / "evaluator.py", *pair, "--backend", "torch", "--device", "cpu"]
    command += ["--graph", write_inception_2015(tf, tmp_path / "inception.pb"), "--no_cache", "--features", graph]
    command += ["--features_node", "means", "--features_input", "pixels"]
    done = run_command([str(part) for part in command], environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[0] for line in done.stdout.splitlines()][-2:] == ["FD (means)", "KID (means)"]

"""The evaluator from its command line: published numbers, every input it refuses, warnings, report and cache."""

from __future__ import annotations

import json
import re
import runpy
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "evaluations"))

import evaluator  # noqa: E402
import feature_extraction  # noqa: E402
import fidelity_metrics  # noqa: E402
import inception_graph  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens" / "evaluator"
NAMES = ("Inception Score", "FID", "sFID", "Precision", "Recall")
WIDTH = 16  # pool features of the tiny graph


@pytest.fixture(scope="session")
def stub_graph(tf, tmp_path_factory):
    """stub_graph(scale): the golden numbers' graph, written by the script that comes with them."""

    def write(scale: int) -> Path:
        path = tmp_path_factory.mktemp("graph") / f"stub{scale}.pb"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["stub_graph.py", str(path), "0", str(scale)])
            runpy.run_path(str(GOLDENS / "stub_graph.py"), run_name="__main__")
        return path

    return write


def write_tiny_graph(tf, path: Path, scale: float = 1.0, offset: float = 0.0, skip: str = "") -> Path:
    """A graph of the 2015 kind: images of any size, GraphDef version 8, its batch norm, a batch size of 1 at the end.

    The pool features are multiplied by scale and moved by offset; the node named `skip` gets another name.
    """
    tf1, rng = tf.compat.v1, np.random.default_rng(0)

    def constant(*shape):
        return tf.constant(rng.standard_normal(shape).astype(np.float32))

    def name(node):
        return node if node != skip else "elsewhere"

    with tf1.Graph().as_default() as graph:
        image = tf1.placeholder(tf.float32, [None, None, 3], name="DecodeJpeg")
        x = tf.expand_dims(image, 0, name=name("ExpandDims")) / 128.0 - 1.0
        x = tf.nn.conv2d(x, constant(3, 3, 3, 12), strides=2, padding="SAME", name="convolved")
        tf.ones(12, name="mean"), tf.ones(12, name="variance"), tf.zeros(12, name="beta"), tf.ones(12, name="gamma")
        x = tf.nn.relu(tf.identity(x, name="normalised"), name=name("mixed_6/conv"))
        x = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
        x = tf.nn.relu(tf.nn.conv2d(x, constant(1, 1, 12, WIDTH), strides=1, padding="VALID"))
        x = tf.add(scale * x, offset, name=name("pool_3"))
        tf.matmul(tf.reshape(x, [1, WIDTH]), constant(WIDTH, 10), name=name("softmax/logits/MatMul"))
    definition = graph.as_graph_def()
    for node in definition.node:
        if node.name == "normalised":  # TensorFlow no longer lets Python make this one
            node.op = "BatchNormWithGlobalNormalization"
            node.input[:] = ["convolved", "mean", "variance", "beta", "gamma"]
            node.attr["variance_epsilon"].f = 0.001
            node.attr["scale_after_normalization"].b = False
    definition.versions.producer = 8
    path.write_bytes(definition.SerializeToString())
    return path


@pytest.fixture(scope="session")
def tiny_graph(tf, tmp_path_factory):
    return write_tiny_graph(tf, tmp_path_factory.mktemp("graph") / "tiny.pb")


def images(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    brightness = rng.uniform(0.2, 1.0, (count, 1, 1, 3))
    return (rng.uniform(0, 256, (count, size, size, 3)) * brightness).astype(np.uint8)


def save(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def statistics(pool: int = WIDTH, spatial: int = 4 * 4 * 7, shift: float = 0.0) -> dict[str, np.ndarray]:
    return {"mu": np.full(pool, shift), "sigma": np.eye(pool), "mu_s": np.zeros(spatial), "sigma_s": np.eye(spatial)}


@pytest.fixture
def pair(tmp_path):
    """A reference and a sample set of 8×8 images."""
    return save(tmp_path / "ref.npz", arr_0=images(30)), save(tmp_path / "gen.npz", arr_0=images(24, seed=1))


def numbers(stdout: str) -> dict[str, float]:
    rows = [line.split(": ") for line in stdout.splitlines()]
    return {name: float(value) for name, value in rows}


def run(capsys, *arguments) -> tuple[dict[str, float], str]:
    """Run in this process, expect success; the numbers printed and the text on stderr."""
    status = evaluator.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return numbers(out), err


def refusal(capsys, *arguments) -> str:
    """Run in this process, expect status 2 with nothing on stdout; the only line on stderr."""
    status = evaluator.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def expected(name: str) -> dict[str, float]:
    return json.loads((GOLDENS / name).read_text())


# --- published numbers


def test_a_real_run_prints_the_five_golden_lines_and_nothing_else(stub_graph, tmp_path):
    command = [sys.executable, "evaluations/evaluator.py", GOLDENS / "ref.npz", GOLDENS / "samples.npz"]
    options = ["--graph", stub_graph(20), "--cache_dir", tmp_path, "--out", tmp_path / "report.json"]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == list(NAMES)
    assert all(re.fullmatch(r"[A-Za-z ]+: \d+\.\d+(e[-+]\d+)?", line) for line in done.stdout.splitlines())
    got, golden = numbers(done.stdout), expected("metrics.json")
    for name in NAMES:
        assert got[name] == pytest.approx(golden[name], rel=1e-4), name
    for name in ("FID", "sFID"):
        assert got[name] == pytest.approx(golden[f"{name}_eigh"], rel=1e-5), name
    assert not re.search("oneDNN|absl|cuda|Traceback|Warning:", done.stderr), done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["metrics"] == got


@pytest.mark.parametrize("distances", ["float16", "float32"])
def test_features_that_fit_float16_give_the_golden_numbers(stub_graph, tmp_path_factory, capsys, distances):
    cache = tmp_path_factory.getbasetemp() / "scale1_cache"
    options = ["--graph", stub_graph(1), "--cache_dir", cache, "--distances", distances]
    got, _ = run(capsys, GOLDENS / "ref.npz", GOLDENS / "samples.npz", *options)
    golden = expected("metrics_scale1.json")
    for name in ("Inception Score", "FID", "sFID"):
        assert got[name] == pytest.approx(golden[name], rel=1e-4), name
    assert got["Precision"] == pytest.approx(golden["Precision"], abs=2 / 140)
    assert got["Recall"] == pytest.approx(golden["Recall"], abs=2 / 160)


# --- sets, statistics, graphs


def test_a_set_against_itself_is_at_distance_zero(tiny_graph, pair, tmp_path, capsys):
    got, _ = run(capsys, pair[0], pair[0], "--graph", tiny_graph, "--no_cache")
    assert (got["FID"], got["sFID"], got["Precision"], got["Recall"]) == (0.0, 0.0, 1.0, 1.0)
    shuffled = save(tmp_path / "shuffled.npz", arr_0=images(30)[::-1])
    got, _ = run(capsys, pair[0], shuffled, "--graph", tiny_graph, "--no_cache")
    assert 0.0 <= got["FID"] < 1e-6 and 0.0 <= got["sFID"] < 1e-6


def test_statistics_in_both_files_replace_computed_ones(tiny_graph, tmp_path, capsys):
    reference = save(tmp_path / "ref.npz", arr_0=images(30), **statistics())
    samples = save(tmp_path / "gen.npz", arr_0=images(30, seed=1), **statistics(shift=3.0))
    got, _ = run(capsys, reference, samples, "--graph", tiny_graph, "--no_cache")
    assert got["FID"] == pytest.approx(9.0 * WIDTH)  # |mu - mu'|², equal covariances
    assert got["sFID"] == 0.0
    assert set(got) == set(NAMES)


def test_a_reference_of_statistics_only_gives_fid_and_sfid_and_says_what_is_missing(tiny_graph, tmp_path, capsys):
    reference = save(tmp_path / "ref.npz", **statistics())
    samples = save(tmp_path / "gen.npz", arr_0=images(24))
    out = tmp_path / "report.json"
    got, err = run(capsys, reference, samples, "--graph", tiny_graph, "--out", out)
    assert list(got) == ["Inception Score", "FID", "sFID"]
    assert re.search(r"ref\.npz: no arr_0.*Precision and Recall", err)
    report = json.loads(out.read_text())
    assert report["metrics"]["Precision"] is None and report["reference"]["N"] is None
    assert not (tmp_path / ".evaluator_cache").exists()


def test_batch_size_changes_the_batches_and_not_the_numbers(tiny_graph, pair, capsys, monkeypatch):
    sizes = []
    run_graph = inception_graph.InceptionGraph.__call__
    monkeypatch.setattr(
        inception_graph.InceptionGraph, "__call__", lambda self, x: (sizes.append(len(x)), run_graph(self, x))[1]
    )
    by_default, _ = run(capsys, *pair, "--graph", tiny_graph, "--no_cache")
    assert sizes == [30, 24]
    by_seven, _ = run(capsys, *pair, "--graph", tiny_graph, "--no_cache", "--batch_size", 7)
    assert sizes[2:] == [7, 7, 7, 7, 2, 7, 7, 7, 3]
    assert by_seven == pytest.approx(by_default, rel=1e-4)


def test_float16_distances_are_coarser_than_float32_ones(tf, pair, tmp_path, capsys):
    graph = write_tiny_graph(tf, tmp_path / "far.pb", scale=0.3, offset=40.0)  # |x|² near 25,600: float16 steps of 16
    coarse, _ = run(capsys, *pair, "--graph", graph)
    fine, _ = run(capsys, *pair, "--graph", graph, "--distances", "float32")
    assert coarse["Precision"] == 1.0 and coarse["Precision"] > fine["Precision"]
    assert coarse["FID"] == fine["FID"]


def test_wider_integers_within_the_range_are_images(tiny_graph, pair, tmp_path, capsys):
    wide = save(tmp_path / "wide.npz", arr_0=np.load(pair[1])["arr_0"].astype(">i8"))
    assert run(capsys, pair[0], wide, "--graph", tiny_graph)[0] == run(capsys, *pair, "--graph", tiny_graph)[0]


# --- refusals


def truncated(path: Path) -> Path:
    whole = save(path, arr_0=images(30)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def damaged(path: Path) -> Path:
    """One byte of the pixels is wrong, everything else is in place."""
    content = bytearray(save(path, arr_0=images(30)).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def resized(path: Path, surplus: int) -> Path:
    """The stream has some bytes more (or fewer) than its header announces."""
    save(path, arr_0=images(30))
    with zipfile.ZipFile(path) as archive:
        data = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", data[:surplus] if surplus < 0 else data + bytes(surplus))
    return path


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_folder(path: Path) -> Path:
    path.mkdir()
    return path


def with_statistics(path: Path, without: str = "", **changes) -> Path:
    entries = {**statistics(), **changes}
    return save(path, arr_0=images(30), **{name: value for name, value in entries.items() if name != without})


def single_nan(width: int) -> np.ndarray:
    values = np.zeros(width)
    values[-1] = np.nan
    return values


BAD_SETS = {
    "missing file": (lambda p: p, "no such file"),
    "empty folder": (with_folder, "a folder without PNG images"),
    "no arr_0": (lambda p: save(p, arr_1=np.arange(3)), "no arr_0.*arr_1"),
    "no arrays": (lambda p: save(p), "no arr_0"),
    "float images": (lambda p: save(p, arr_0=images(3) / 255.0), "float64.*uint8"),
    "boolean images": (lambda p: save(p, arr_0=images(3) > 9), "bool.*uint8"),
    "values above 255": (lambda p: save(p, arr_0=images(3).astype(np.int32) + 99), "values from .* to 3.*0…255"),
    "values below 0": (lambda p: save(p, arr_0=images(3).astype(np.int16) - 9), "values from -9.*0…255"),
    "rank 3": (lambda p: save(p, arr_0=images(3)[0]), "rank 3"),
    "rank 0": (lambda p: save(p, arr_0=np.uint8(1)), "rank 0"),
    "4 channels": (lambda p: save(p, arr_0=np.zeros((3, 8, 8, 4), np.uint8)), "3×8×8×4.*3 channels"),
    "channels first": (lambda p: save(p, arr_0=np.zeros((3, 3, 8, 8), np.uint8)), "3×3×8×8.*3 channels"),
    "no images": (lambda p: save(p, arr_0=images(0)), "empty"),
    "images without rows": (lambda p: save(p, arr_0=np.zeros((3, 0, 8, 3), np.uint8)), "empty"),
    "1 image": (lambda p: save(p, arr_0=images(1)), "1 image.*at least 2"),
    "objects": (lambda p: save(p, arr_0=np.array([None, {}], dtype=object)), "Python objects"),
    "no zip": (lambda p: with_bytes(p, b"not an archive"), "not a zip"),
    "empty file": (lambda p: with_bytes(p, b""), "not a zip"),
    "a bare array": (lambda p: with_bytes(p, b"\x93NUMPY\x01\x00v\x00{}"), "not a zip"),
    "truncated": (truncated, "truncated"),
    "damaged": (damaged, "damaged"),
    "too short": (lambda p: resized(p, -100), "ends early"),
    "too long": (lambda p: resized(p, 8 * 8 * 3), "goes on after the 30 images"),
    "NaN mean": (lambda p: with_statistics(p, mu=single_nan(WIDTH)), "mu hold NaN"),
    "infinite covariance": (
        lambda p: with_statistics(p, sigma_s=np.full((112, 112), np.inf)),
        "sigma_s hold NaN or inf",
    ),
    "no sigma": (lambda p: with_statistics(p, without="sigma"), "incomplete.*without sigma$"),
    "pool statistics only": (lambda p: save(p, mu=np.zeros(4), sigma=np.eye(4)), "incomplete.*without mu_s, sigma_s"),
    "sigma of another width": (lambda p: with_statistics(p, sigma=np.eye(WIDTH + 1)), "do not belong together"),
    "sigma as a vector": (lambda p: with_statistics(p, sigma=np.ones(WIDTH)), "do not belong together"),
    "no covariance": (lambda p: with_statistics(p, sigma=-np.eye(WIDTH)), "sigma is not a covariance"),
    "object statistics": (lambda p: with_statistics(p, mu=np.array([None] * WIDTH)), "mu.*Python objects"),
    "textual statistics": (lambda p: with_statistics(p, mu=np.array(["1"] * WIDTH)), "mu.*real numbers"),
    "other pool width": (
        lambda p: save(p, arr_0=images(30), **statistics(pool=WIDTH + 1)),
        r"\(17, 112\).*\(16, 112\)",
    ),
    "other spatial width": (lambda p: save(p, arr_0=images(30), **statistics(spatial=9)), r"\(16, 9\).*\(16, 112\)"),
}


@pytest.mark.parametrize("kind", BAD_SETS)
def test_a_set_that_cannot_be_used_is_refused_in_one_line_that_names_it(kind, tiny_graph, pair, tmp_path, capsys):
    make, message = BAD_SETS[kind]
    bad = make(tmp_path / "bad.npz")
    for sets in ((bad, pair[1]), (pair[0], bad)):
        line = refusal(capsys, *sets, "--graph", tiny_graph, "--no_cache")
        assert str(bad) in line and re.search(message, line.rstrip()), line


def test_samples_of_statistics_only_are_refused(tiny_graph, pair, tmp_path, capsys):
    bad = save(tmp_path / "bad.npz", **statistics())
    assert re.search(r"bad\.npz: no arr_0", refusal(capsys, pair[0], bad, "--graph", tiny_graph))


def test_images_whose_spatial_features_differ_in_width_are_refused(tiny_graph, pair, tmp_path, capsys):
    other = save(tmp_path / "other.npz", arr_0=images(30, size=12))
    assert re.search(r"other\.npz.*\(16, 252\).*\(16, 112\)", refusal(capsys, other, pair[1], "--graph", tiny_graph))


def test_bad_input_in_a_real_run_from_inside_the_folder_is_one_line(pair, tmp_path):
    bad = truncated(tmp_path / "bad.npz")
    command = [sys.executable, "evaluator.py", pair[0], bad]
    done = subprocess.run(command, cwd=ROOT / "evaluations", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(bad) in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ref.npz"], "SAMPLES"),
        (["ref.npz", "gen.npz", "--unknown"], "--unknown"),
        (["ref.npz", "gen.npz", "--batch_size", "0"], "--batch_size 0"),
        (["ref.npz", "gen.npz", "--distances", "float8"], "float8"),
        (["ref.npz", "gen.npz", "--graph_sha256", "abc"], "--graph_sha256 abc.*64"),
        (["ref.npz", "gen.npz", "--no_cache", "--cache_dir", "x"], "not allowed with"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, message, capsys):
    assert re.search(message, refusal(capsys, *arguments))


def test_a_missing_given_graph_is_refused(pair, tmp_path, capsys):
    line = refusal(capsys, *pair, "--graph", tmp_path / "none.pb")
    assert f"{tmp_path / 'none.pb'}: no such graph" in line


@pytest.mark.parametrize("node", ["ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul"])
def test_a_graph_without_one_of_the_nodes_is_refused(node, tf, pair, tmp_path, capsys):
    graph = write_tiny_graph(tf, tmp_path / "bad.pb", skip=node)
    assert re.search(rf"bad\.pb: .*no node {node}", refusal(capsys, *pair, "--graph", graph))


def test_a_pool_that_does_not_fit_the_softmax_is_refused(tf, pair, tmp_path, capsys):
    graph = write_tiny_graph(tf, tmp_path / "bad.pb", skip="pool_3")
    definition = tf.compat.v1.GraphDef.FromString(graph.read_bytes())
    next(node for node in definition.node if node.name == "convolved").name = "pool_3"
    for node in definition.node:
        node.input[:] = ["pool_3" if name == "convolved" else name for name in node.input]
    graph.write_bytes(definition.SerializeToString())
    sentence = (
        r"bad\.pb: pool_3:0 is \(1, 4, 4, 12\) for an image of 8×8, expected \(1, 1, 1, 16\).*not made for images"
    )
    assert re.search(sentence, refusal(capsys, *pair, "--graph", graph))


def test_a_graph_that_fails_on_this_size_is_refused_without_a_stack_trace(tf, pair, tmp_path, capsys):
    with tf.Graph().as_default() as graph:
        pixels = tf.compat.v1.placeholder(tf.float32, [None, None, None, 3], name="ExpandDims")
        tf.identity(pixels, name="mixed_6/conv")
        pool = tf.reshape(pixels, [-1, 12 * 12 * 3], name="pool_3")
        tf.matmul(pool, tf.ones([12 * 12 * 3, 10]), name="softmax/logits/MatMul")
    path = with_bytes(tmp_path / "other_size.pb", graph.as_graph_def().SerializeToString())
    line = refusal(capsys, *pair, "--graph", path)
    assert "other_size.pb: cannot take images of 8×8 (" in line and "[[" not in line, line


@pytest.mark.parametrize("content", [b"<html>Please log in</html>", b""])
def test_a_file_that_is_no_graph_is_refused(content, tf, pair, tmp_path, capsys):
    graph = with_bytes(tmp_path / "bad.pb", content)
    assert str(graph) in refusal(capsys, *pair, "--graph", graph)


def test_the_hash_of_the_graph_is_printed_and_checked(tiny_graph, pair, capsys):
    _, err = run(capsys, *pair, "--graph", tiny_graph)
    digest = re.search(r"SHA-256 ([0-9a-f]{64})", err).group(1)
    run(capsys, *pair, "--graph", tiny_graph, "--graph_sha256", digest.upper())
    line = refusal(capsys, *pair, "--graph", tiny_graph, "--graph_sha256", "0" * 64)
    assert str(tiny_graph) in line and digest in line


def test_missing_tensorflow_is_one_sentence_with_the_remedy(tiny_graph, pair, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "pip install -r evaluations/requirements.txt" in refusal(capsys, *pair, "--graph", tiny_graph)


def test_without_a_graph_the_message_says_where_to_put_it(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluator, "__file__", str(tmp_path / "script" / "evaluator.py"))

    def unreachable(url):
        raise OSError("no route")

    monkeypatch.setattr(inception_graph, "download", unreachable)
    line = refusal(capsys, *pair)
    for part in ("classify_image_graph_def.pb", str(tmp_path), str(tmp_path / "script"), "https://", "--graph"):
        assert part in line


def test_a_server_that_never_answers_does_not_hold_the_download_for_long():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/graph.pb"
        with pytest.raises(OSError, match="no answer|timed out"):
            inception_graph.download(url, connect_seconds=0.3)


def test_a_downloaded_graph_is_kept_and_anything_else_is_not(tiny_graph, tmp_path, monkeypatch):
    monkeypatch.setattr(inception_graph, "download", lambda url: b"<html>Please log in</html>")
    with pytest.raises(FileNotFoundError, match="not the graph"):
        inception_graph.find_graph(None, [tmp_path])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(inception_graph, "download", lambda url: tiny_graph.read_bytes())
    path = inception_graph.find_graph(None, [tmp_path])
    assert path == tmp_path / "classify_image_graph_def.pb" and path.read_bytes() == tiny_graph.read_bytes()
    monkeypatch.setattr(inception_graph, "download", lambda url: pytest.fail("downloaded again"))
    assert inception_graph.find_graph(None, [tmp_path]) == path


# --- warnings, manifest, report, cache


def test_few_samples_other_counts_and_other_sizes_are_warned_about(stub_graph, tmp_path, capsys, monkeypatch):
    reference = save(tmp_path / "ref.npz", arr_0=images(6, size=8))
    samples = save(tmp_path / "gen.npz", arr_0=images(5, size=12))
    monkeypatch.setattr(evaluator, "compute_features", lambda job: None)  # the warnings come first
    _, err = run(capsys, reference, samples, "--graph", stub_graph(1))
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 4
    assert re.search(r"ref\.npz: 6 images, fewer than 2048", warnings[0])
    assert re.search(r"gen\.npz: 5 images, fewer than 2048", warnings[1])
    assert re.search(r"gen\.npz: 5 images.*ref\.npz has 6", warnings[2])
    assert re.search(r"gen\.npz: images of 12×12.*ref\.npz has 8×8", warnings[3])


def test_2048_samples_of_the_same_count_and_size_are_not_warned_about(tiny_graph, tmp_path, capsys, monkeypatch):
    reference = save(tmp_path / "ref.npz", arr_0=images(2048))
    samples = save(tmp_path / "gen.npz", arr_0=images(2048, seed=1))
    monkeypatch.setattr(evaluator, "compute_features", lambda job: None)
    assert "warning" not in run(capsys, reference, samples, "--graph", tiny_graph)[1]


def test_the_report_holds_manifest_and_hashes(tiny_graph, pair, tmp_path, capsys):
    settings = {"weights": {"file": "ema.pt", "step": 3}, "seed": 0, "guidance": {"cfg_scale": 3.8}, "labels": None}
    manifest = {"samples": "gen.npz", "settings": settings, "device": "cpu"}
    (tmp_path / "manifest_1.json").write_text(json.dumps(manifest))
    (tmp_path / "manifest.json").write_text(json.dumps({"samples": "another.npz"}))
    out = tmp_path / "report.json"
    got, err = run(capsys, *pair, "--graph", tiny_graph, "--out", out)
    said = err.split("says how the samples were made:\n")[1].splitlines()[:4]
    assert said == [
        "  samples gen.npz, device cpu", "  settings: seed 0, labels None", "  weights: file ema.pt, step 3",
        "  guidance: cfg_scale 3.8",
    ]  # fmt: skip
    assert "another" not in err
    report = json.loads(out.read_text())
    assert report["metrics"] == got
    assert report["manifest"] == manifest
    reference = report["reference"]
    assert (reference["path"], reference["N"]) == (str(pair[0]), 30)
    assert reference["size"] == pair[0].stat().st_size and re.fullmatch("[0-9a-f]{64}", reference["sha256"])
    assert reference["sha256"] != report["sample"]["sha256"] and len(report["warnings"]) == 3
    run(capsys, *pair, "--graph", tiny_graph, "--out", out, "--distances", "float32")  # a report may be replaced
    assert json.loads(out.read_text())["distances"] == "float32"


def test_without_a_manifest_the_report_says_null(tiny_graph, pair, tmp_path, capsys):
    _, err = run(capsys, *pair, "--graph", tiny_graph, "--out", tmp_path / "report.json")
    assert "no manifest" in err
    assert json.loads((tmp_path / "report.json").read_text())["manifest"] is None


@pytest.mark.parametrize("content", ["{}", "[]", "notes", '["evaluator_report"]'])
def test_out_never_replaces_anything_but_a_report(content, pair, tmp_path, capsys):
    out = tmp_path / "precious.json"
    out.write_text(content)
    assert str(out) in refusal(capsys, *pair, "--out", out)
    assert out.read_text() == content


def test_out_in_a_folder_that_does_not_exist_is_refused_at_once(pair, tmp_path, capsys):
    assert "does not exist" in refusal(capsys, *pair, "--out", tmp_path / "none" / "report.json")


@pytest.fixture
def computed(monkeypatch):
    """The names of the sets whose features are computed."""
    names = []
    extract = evaluator.extract_features

    def count(image_set, *arguments):
        names.append(image_set.path.name)
        return extract(image_set, *arguments)

    monkeypatch.setattr(evaluator, "extract_features", count)
    return names


def test_features_of_a_reference_are_computed_once_per_content(tiny_graph, pair, capsys, computed):
    first, _ = run(capsys, *pair, "--graph", tiny_graph)
    second, err = run(capsys, *pair, "--graph", tiny_graph)
    assert computed == ["ref.npz", "gen.npz", "gen.npz"] and "from the cache" in err
    assert first == second
    save(pair[0], arr_0=images(30, seed=5))  # the same name, another content
    assert run(capsys, *pair, "--graph", tiny_graph)[0] != first
    assert computed[3:] == ["ref.npz", "gen.npz"]
    assert (pair[0].parent / ".evaluator_cache").is_dir()


def test_roots_and_radii_of_a_reference_are_computed_once(tiny_graph, pair, capsys, monkeypatch):
    asked = []
    for module, name in ((fidelity_metrics, "_factor"), (feature_extraction, "manifold_radii")):
        compute = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, f=compute, name=name: asked.append(name) or f(*x))
    first, _ = run(capsys, *pair, "--graph", tiny_graph)
    assert asked.count("manifold_radii") == 1  # the samples' are computed elsewhere
    once = len(asked)
    assert run(capsys, *pair, "--graph", tiny_graph)[0] == first
    # What is left is the root of the samples, whose singular values this tiny network needs.
    assert asked[once:] == ["_factor"] * (asked[:once].count("_factor") - 1)


def test_features_of_another_graph_are_not_taken_from_the_cache(tf, tiny_graph, pair, tmp_path, capsys, computed):
    run(capsys, *pair, "--graph", tiny_graph)
    run(capsys, *pair, "--graph", write_tiny_graph(tf, tmp_path / "other.pb", offset=1.0))
    assert computed == ["ref.npz", "gen.npz"] * 2
    run(capsys, *pair, "--graph", tiny_graph)  # nor do they take the place of the first graph's
    assert computed[4:] == ["gen.npz"]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("content", [b"", b"PK torn", None])
def test_a_corrupt_cache_is_computed_again(content, tiny_graph, pair, tmp_path, capsys, computed):
    first, _ = run(capsys, *pair, "--graph", tiny_graph, "--cache_dir", tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    good = entry.read_bytes()
    entry.write_bytes(flipped(good) if content is None else content)
    again, err = run(capsys, *pair, "--graph", tiny_graph, "--cache_dir", tmp_path / "cache")
    assert again == first and "computed again" in err and str(entry) in err
    assert computed == ["ref.npz", "gen.npz"] * 2
    assert entry.read_bytes() == good


@pytest.mark.usefixtures("no_home")
def test_without_a_home_features_are_cached_beside_the_reference_or_not_at_all(tiny_graph, pair, capsys, computed):
    for _ in range(2):
        run(capsys, *pair, "--graph", tiny_graph)
    assert computed == ["ref.npz", "gen.npz", "gen.npz"]


def test_no_cache_leaves_no_trace(tiny_graph, pair, tmp_path, capsys, computed):
    before = sorted(tmp_path.iterdir())
    for _ in range(2):
        run(capsys, *pair, "--graph", tiny_graph, "--no_cache")
    assert computed == ["ref.npz", "gen.npz"] * 2 and sorted(tmp_path.iterdir()) == before


def test_a_reference_in_a_folder_that_cannot_be_written_is_cached_for_the_user(
    tiny_graph, pair, tmp_path, capsys, computed, monkeypatch
):
    (pair[0].parent / ".evaluator_cache").write_text("in the way")  # as good as read-only, also for root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for _ in range(2):
        run(capsys, *pair, "--graph", tiny_graph)
    assert computed == ["ref.npz", "gen.npz", "gen.npz"]
    assert len(list((tmp_path / "user" / "masked_diffusion_evaluator").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tiny_graph, pair, tmp_path, capsys, monkeypatch):
    (pair[0].parent / ".evaluator_cache").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(with_bytes(tmp_path / "file", b"")))
    assert "not cached" in run(capsys, *pair, "--graph", tiny_graph)[1]

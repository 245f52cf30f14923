"""The PyTorch backend against TensorFlow running the same full-size graph, and alone without TensorFlow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "evaluations"))

import evaluator  # noqa: E402
import graph_weights  # noqa: E402
from inception_2015 import write_inception_2015  # noqa: E402
from inception_graph import InceptionGraph  # noqa: E402
from inception_torch import TorchInception, torch_device  # noqa: E402
from process_share import ALONE, Share, share_of_launcher  # noqa: E402
from sample_sets import sha256_of  # noqa: E402
from support import environment, run_command  # noqa: E402


@pytest.fixture(scope="session")
def graph(tf, tmp_path_factory):
    return write_inception_2015(tf, tmp_path_factory.mktemp("inception") / "graph.pb")


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def network(graph, weights_folder):
    return TorchInception(graph, sha256_of(graph), [weights_folder], "cpu")


def images(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("size", [(299, 299), (64, 48), (320, 256)])
def test_all_three_outputs_are_those_of_tensorflow(size, graph, network):
    reference = InceptionGraph(graph, sha256_of(graph))
    batch = images(2, *size)
    pool, spatial = reference(batch)
    got_pool, got_spatial = network(batch)
    assert got_pool.dtype == got_spatial.dtype == np.float32
    assert network.widths(*size) == reference.widths(*size) == (2048, 2023)
    np.testing.assert_array_equal(network.softmax_weight, reference.softmax_weight)
    differences = {
        "pool_3": relative(got_pool, pool),
        "mixed_6/conv": relative(got_spatial, spatial),
        "softmax/logits": relative(got_pool @ network.softmax_weight, pool @ reference.softmax_weight),
    }
    assert pool.std() > 1e-3 and spatial.std() > 1e-3
    assert max(differences.values()) < 1e-4, (differences, layers_that_differ(reference, network, batch))


def test_each_layer_is_that_of_tensorflow_and_one_that_is_not_is_named(graph, network, monkeypatch):
    reference, batch = InceptionGraph(graph, sha256_of(graph)), images(1, 64, 48)
    assert layers_that_differ(reference, network, batch) == []
    weight = network._network.get_submodule("Mixed_6d.branch7x7_2.conv").weight
    monkeypatch.setattr(weight, "data", 1.01 * weight.data)
    [(first, difference), *later] = layers_that_differ(reference, network, batch)
    assert first == "mixed_6/tower/conv_1" and difference > 1e-3 and later[0][0] == "mixed_6/tower/conv_2"


def layers_that_differ(
    reference: InceptionGraph, network: TorchInception, batch: np.ndarray
) -> list[tuple[str, float]]:
    """Every convolution, in the order of the network, whose output is not TensorFlow's."""
    outputs, hooks = {}, []
    for scope, module in graph_weights.SCOPES.items():
        hook = network._network.get_submodule(module).register_forward_hook(
            lambda module, inputs, output, scope=scope: outputs.update({scope: output.permute(0, 2, 3, 1).numpy()})
        )
        hooks.append(hook)
    network(batch)
    for hook in hooks:
        hook.remove()
    fetches = {scope: f"{scope}:0" for scope in outputs}
    wanted = reference._session.run(fetches, {reference._images: batch.astype(np.float32)})
    differences = [(scope, relative(outputs[scope], wanted[scope])) for scope in graph_weights.SCOPES]
    return [(scope, difference) for scope, difference in differences if difference >= 1e-4]


def test_the_scale_of_a_batch_norm_counts_only_where_the_graph_says_so(tf, tmp_path, network):
    unscaled = write_inception_2015(tf, tmp_path / "unscaled.pb", scale_after_normalization=False)
    weights = graph_weights.convert(unscaled)
    assert (weights["Mixed_6d.branch1x1.bn.weight"] == 1).all()
    assert network._network.get_submodule("Mixed_6d.branch1x1.bn").weight.std() > 0.1


def test_a_graph_is_converted_once_and_again_when_its_conversion_is_another_ones_or_damaged(
    graph, tmp_path, monkeypatch
):
    calls = []
    small = {"fc.weight": np.ones((3, 2), np.float32)}
    monkeypatch.setattr(graph_weights, "convert", lambda path: calls.append(path) or small)
    digest = "a" * 64
    for _ in range(2):
        weights = graph_weights.inception_weights(graph, digest, [tmp_path])
        np.testing.assert_array_equal(weights["fc.weight"], small["fc.weight"])
    assert len(calls) == 1
    [kept] = tmp_path.iterdir()
    good = kept.read_bytes()  # the order of the entries in the head varies
    for content in (good[:-4], b"", good.replace(digest.encode(), b"b" * 64)):
        kept.write_bytes(content)
        graph_weights.inception_weights(graph, digest, [tmp_path])
        assert len(kept.read_bytes()) == len(good)
    assert len(calls) == 4
    graph_weights.inception_weights(graph, digest, [tmp_path])
    assert len(calls) == 4


def test_constants_are_read_in_both_ways_that_tensorflow_writes_them(tf, tmp_path):
    with tf.compat.v1.Graph().as_default() as plain:
        tf.constant(np.arange(3, dtype=np.float32), name="bytes")
        tf.constant(2.5, shape=(4,), dtype=tf.float32, name="repeated")
        tf.constant(np.arange(3), name="integers")
    path = tmp_path / "constants.pb"
    path.write_bytes(plain.as_graph_def().SerializeToString())
    nodes = graph_weights._read_nodes(path)
    assert graph_weights._constant(nodes, "bytes", 1, path).tolist() == [0, 1, 2]
    assert graph_weights._constant(nodes, "repeated", 1, path).tolist() == [2.5] * 4
    with pytest.raises(ValueError, match=r"constants\.pb: integers is not a finite float32 constant of rank 1"):
        graph_weights._constant(nodes, "integers", 1, path)
    with pytest.raises(ValueError, match="no node conv/batchnorm/beta; other graphs need --backend tensorflow"):
        graph_weights.convert(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"constants\.pb: not a frozen TensorFlow graph"):
        graph_weights.convert(path)


def test_auto_is_a_gpu_for_each_process_and_else_the_processor(monkeypatch):
    assert torch_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert torch_device("auto") == device


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device tpu: cannot be used"):
        torch_device("tpu")


# --- the command line


@pytest.fixture
def pair(tmp_path):
    for name, count, seed in (("ref", 5, 0), ("gen", 4, 1)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), "u1"))
    return tmp_path / "ref.npz", tmp_path / "gen.npz"


def score_in_processes(graph, weights_folder, pair, processes):
    blocker = weights_folder / "blocker" / "tensorflow.py"  # as on a machine without TensorFlow
    blocker.parent.mkdir(exist_ok=True)
    blocker.write_text("raise ImportError('not installed here')")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launch, ROOT / "evaluations" / "evaluator.py", *pair, "--backend", "torch"]
    options = ["--graph", graph, "--batch_size", "2", "--device", "cpu", "--cache_dir", weights_folder / str(processes)]
    done = run_command(
        [str(part) for part in command + options], environment(weights_folder, PYTHONPATH=blocker.parent)
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.e2e
def test_scores_without_tensorflow_are_the_same_on_one_process_and_two(graph, weights_folder, pair):
    one, two = (score_in_processes(graph, weights_folder, pair, processes) for processes in (0, 2))
    assert [line.split(": ")[0] for line in one.stdout.splitlines()] == [
        "Inception Score", "FID", "sFID", "Precision", "Recall",
    ]  # fmt: skip
    assert one.stdout == two.stdout
    assert two.stderr.count("SHA-256") == 1  # one process speaks


def test_several_processes_need_the_torch_backend(pair, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert evaluator.main([str(path) for path in pair]) == 2
    assert "rank 1: error: 2 processes: only --backend torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables, expected",
    [({}, ALONE), ({"RANK": "1"}, ALONE), ({"WORLD_SIZE": "4"}, ALONE), ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
     ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, Share(1, 2)),
     ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2: expected a rank below the number of processes"),
     ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK=a WORLD_SIZE=2: expected a rank below the number of processes"),
     ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not set; start with torchrun")],
)  # fmt: skip
def test_a_place_among_processes_is_that_of_a_launcher_or_none(variables, expected, pair, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, Share):
        assert share_of_launcher() == expected
        return
    assert evaluator.main([str(path) for path in pair]) == 2
    assert expected in capsys.readouterr().err


def test_a_device_without_the_torch_backend_is_refused(pair, capsys):
    assert evaluator.main([*map(str, pair), "--device", "cpu"]) == 2
    assert "--device cpu: has no effect without --backend torch" in capsys.readouterr().err

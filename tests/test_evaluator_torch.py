"""The PyTorch backend against TensorFlow running the same full-size graph, and alone without TensorFlow."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluations"))

import graph_weights  # noqa: E402
from inception_2015 import write_inception_2015  # noqa: E402
from inception_graph import InceptionGraph  # noqa: E402
from inception_torch import TorchInception  # noqa: E402
from sample_sets import sha256_of  # noqa: E402


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


def layers_that_differ(reference: InceptionGraph, network: TorchInception, batch: np.ndarray) -> list[tuple[str, float]]:
    """Every convolution, in the order of the network, whose output is not TensorFlow's."""
    outputs = {}
    for scope, module in graph_weights.SCOPES.items():
        network._network.get_submodule(module).register_forward_hook(
            lambda module, inputs, output, scope=scope: outputs.update({scope: output.permute(0, 2, 3, 1).numpy()})
        )
    network(batch)
    fetches = {scope: f"{scope}:0" for scope in outputs}
    wanted = reference._session.run(fetches, {reference._images: batch.astype(np.float32)})
    differences = [(scope, relative(outputs[scope], wanted[scope])) for scope in graph_weights.SCOPES]
    return [(scope, difference) for scope, difference in differences if difference >= 1e-4]

"""The weights of the frozen Inception graph, read without TensorFlow under the names of torch-fidelity's module.

A graph is converted once: the weights are kept as `.safetensors` with the SHA-256 of the graph they come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from atomic_file import atomic_file

FORMAT = "1"  # raise when the same graph gives other tensors

_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}


def _tower(scope: str, branch: str, count: int) -> dict[str, str]:
    """Convolutions one after another: conv, conv_1, ... in the graph, 1, 2, ... in the module."""
    return {f"{scope}/conv_{i}".removesuffix("_0"): f"{branch}_{i + 1}" for i in range(count)}


def _split(scope: str, branch: str) -> dict[str, str]:
    """Two convolutions side by side at the end of a tower."""
    return {f"{scope}/mixed/conv": f"{branch}a", f"{scope}/mixed/conv_1": f"{branch}b"}


_BRANCHES_OF_ONE = {"conv": "branch1x1", "tower_2/conv": "branch_pool"}
_BLOCK_35 = _BRANCHES_OF_ONE | _tower("tower", "branch5x5", 2) | _tower("tower_1", "branch3x3dbl", 3)
_BLOCK_35_TO_17 = {"conv": "branch3x3"} | _tower("tower", "branch3x3dbl", 3)
_BLOCK_17 = _BRANCHES_OF_ONE | _tower("tower", "branch7x7", 3) | _tower("tower_1", "branch7x7dbl", 5)
_BLOCK_17_TO_8 = _tower("tower", "branch3x3", 2) | _tower("tower_1", "branch7x7x3", 4)
_BLOCK_8 = (
    _BRANCHES_OF_ONE
    | (_tower("tower", "branch3x3", 1) | _split("tower", "branch3x3_2"))
    | (_tower("tower_1", "branch3x3dbl", 2) | _split("tower_1", "branch3x3dbl_3"))
)
# Of the blocks mixed, mixed_1, ..., the name in the module and what is in it.
_BLOCKS = [
    *((f"Mixed_{name}", _BLOCK_35) for name in ("5b", "5c", "5d")),
    ("Mixed_6a", _BLOCK_35_TO_17),
    *((f"Mixed_{name}", _BLOCK_17) for name in ("6b", "6c", "6d", "6e")),
    ("Mixed_7a", _BLOCK_17_TO_8),
    *((f"Mixed_{name}", _BLOCK_8) for name in ("7b", "7c")),
]
# Scope of every convolution in the graph -> name in torch-fidelity's module, in the order of the network.
SCOPES = _STEM | {
    f"mixed_{number}".removesuffix("_0") + f"/{inner}": f"{block}.{branch}"
    for number, (block, branches) in enumerate(_BLOCKS)
    for inner, branch in branches.items()
}


def inception_weights(graph: Path, sha256: str, folders: list[Path]) -> dict[str, np.ndarray]:
    """State dict of torch-fidelity's `FeatureExtractorInceptionV3`, float32, from a graph or its earlier conversion.

    sha256: of the graph. folders: where conversions are kept; the first that can be written to is used, none if none
    can. A conversion that is damaged or of another graph is made again.
    Raises ValueError when the file is not the graph of the 2015 classifier; ImportError without tensorboard.
    """
    name = f"inception_{sha256[:20]}.safetensors"
    for folder in folders:
        weights = _read_conversion(folder / name, sha256)
        if weights is not None:
            return weights
    weights = convert(graph)
    content = safetensors.numpy.save(weights, metadata={"source_sha256": sha256, "format": FORMAT})
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder / name) as file:
                file.write(content)
            break
        except OSError:
            continue  # a cache that cannot be written costs the next run a second
    return weights


def _read_conversion(path: Path, sha256: str) -> dict[str, np.ndarray] | None:
    """A kept conversion of the graph with this hash; None when there is none that can be used."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            if file.metadata() != {"source_sha256": sha256, "format": FORMAT}:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, safetensors.SafetensorError):
        return None


def convert(graph: Path) -> dict[str, np.ndarray]:
    """Read the graph's constants into the names and layouts of torch-fidelity's module. Raises as inception_weights."""
    nodes = _read_nodes(graph)
    weights = dict[str, np.ndarray]()
    for scope, module in SCOPES.items():
        beta, gamma, mean, variance = (
            _constant(nodes, f"{scope}/batchnorm/{part}", 1, graph)
            for part in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        norm = _node(nodes, f"{scope}/batchnorm", graph)
        weights |= {
            f"{module}.conv.weight": _constant(nodes, f"{scope}/conv2d_params", 4, graph).transpose(3, 2, 0, 1),
            f"{module}.bn.weight": gamma if norm.attr["scale_after_normalization"].b else np.ones_like(gamma),
            f"{module}.bn.bias": beta,
            f"{module}.bn.running_mean": mean,
            f"{module}.bn.running_var": variance,
        }
    weights["fc.weight"] = _constant(nodes, "softmax/weights", 2, graph).T
    weights["fc.bias"] = _constant(nodes, "softmax/biases", 1, graph)
    return {name: np.array(value, order="C") for name, value in weights.items()}  # own, writable memory


def _read_nodes(graph: Path) -> dict[str, Any]:
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto import graph_pb2  # a GraphDef without TensorFlow
    except ImportError as error:
        raise ImportError(
            f"tensorboard reads the graph for --backend torch and cannot be imported ({error}); "
            "install it with: pip install -r evaluations/requirements-torch.txt"
        ) from error
    definition = graph_pb2.GraphDef()
    try:
        definition.ParseFromString(graph.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{graph}: not a frozen TensorFlow graph ({error})") from error
    return {node.name: node for node in definition.node}


def _node(nodes: dict[str, Any], name: str, graph: Path) -> Any:
    if name not in nodes:
        raise ValueError(
            f"{graph}: not the Inception graph of 2015, it has no node {name}; other graphs need --backend tensorflow"
        )
    return nodes[name]


def _constant(nodes: dict[str, Any], name: str, rank: int, graph: Path) -> np.ndarray:
    """A constant's float32 value: its bytes, or a list of numbers whose last one fills the rest."""
    node = _node(nodes, name, graph)
    tensor = node.attr["value"].tensor
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    size = int(np.prod(shape))
    if tensor.tensor_content:
        values = np.frombuffer(tensor.tensor_content, "<f4")
    else:
        listed = np.array(tensor.float_val, np.float32)
        values = np.pad(listed, (0, size - len(listed)), mode="edge") if 0 < len(listed) <= size else listed
    if node.op != "Const" or len(shape) != rank or len(values) != size or not np.isfinite(values).all():
        raise ValueError(f"{graph}: {name} is not a finite float32 constant of rank {rank}")
    return values.reshape(shape)

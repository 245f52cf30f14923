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
_BRANCHES_OF_ONE = {"conv": "branch1x1", "tower_2/conv": "branch_pool"}
_BLOCK_35 = _BRANCHES_OF_ONE | {
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
}
_BLOCK_35_TO_17 = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
_BLOCK_17 = _BRANCHES_OF_ONE | {
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
}
_BLOCK_17_TO_8 = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
_BLOCK_8 = _BRANCHES_OF_ONE | {
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
}
_BLOCKS = {
    "mixed": ("Mixed_5b", _BLOCK_35),
    "mixed_1": ("Mixed_5c", _BLOCK_35),
    "mixed_2": ("Mixed_5d", _BLOCK_35),
    "mixed_3": ("Mixed_6a", _BLOCK_35_TO_17),
    "mixed_4": ("Mixed_6b", _BLOCK_17),
    "mixed_5": ("Mixed_6c", _BLOCK_17),
    "mixed_6": ("Mixed_6d", _BLOCK_17),
    "mixed_7": ("Mixed_6e", _BLOCK_17),
    "mixed_8": ("Mixed_7a", _BLOCK_17_TO_8),
    "mixed_9": ("Mixed_7b", _BLOCK_8),
    "mixed_10": ("Mixed_7c", _BLOCK_8),
}
# Scope of every convolution in the graph -> name in torch-fidelity's module, in the order of the network.
SCOPES = _STEM | {
    f"{scope}/{inner}": f"{block}.{branch}"
    for scope, (block, branches) in _BLOCKS.items()
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

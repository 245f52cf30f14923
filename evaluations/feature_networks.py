"""Features of any other network: a program that torch.export wrote, or a node of a frozen TensorFlow graph."""

from __future__ import annotations

import argparse
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from frozen_graph import FrozenGraph, quiet_stderr, reason_of, run
from sample_sets import ImageSource, sha256_of
from torch_runtime import full_precision_inference, import_torch, to_device, torch_device

PROGRAM, GRAPH = ".pt2", ".pb"  # endings of the files


class FeatureNetwork(ABC):
    """A network that turns uint8 images (n, H, W, 3) into features (n, D), for any n."""

    path: Path

    @property
    def identity(self) -> dict[str, str]:
        """What the report says of the network."""
        return {"path": str(self.path), "sha256": sha256_of(self.path)}

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """What the network returns for uint8 (n, H, W, 3), float32."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3) -> (n, D) float32. Raises ValueError when the network takes no such images."""
        try:
            features = self._run(images)
        except Exception as error:  # whatever it raises
            reason = " ".join(reason_of(error).split())[:200]
            raise ValueError(f"--features {self.path}: cannot take uint8 images {images.shape} ({reason})") from error
        shape = features.shape
        # As pools leave them, axes of length 1 may stand between the vectors' own.
        if len(shape) < 2 or shape[0] != len(images) or max(shape[1:]) != np.prod(shape[1:]):
            raise ValueError(
                f"--features {self.path}: returns {shape} for {len(images)} images, expected (n, D) features"
            )
        return features.reshape(len(images), -1)

    def check(self, sets: Sequence[ImageSource], batch_size: int) -> None:
        """Raise ValueError where the network cannot take the sets' batches, or gives features of several widths."""
        widths = set()
        for images in sets:
            assert images.count is not None and images.image_size is not None
            for size in {min(batch_size, images.count), images.count % batch_size} - {0}:
                widths.add(self(np.zeros((size, *images.image_size, 3), dtype=np.uint8)).shape[1])
        if len(widths) > 1:
            raise ValueError(
                f"--features {self.path}: gives features of widths {sorted(widths)} for images of two sizes"
            )

    def of_set(self, images: ImageSource, batch_size: int) -> np.ndarray:
        """Features (N, D) of all images of a set. Raises ValueError when one is not finite."""
        features = np.concatenate([self(batch) for batch in images.batches(batch_size)])
        if not np.isfinite(features).all():
            raise ValueError(f"--features {self.path}: gives NaN or infinite features for images of {images.path}")
        return features


class ExportedProgram(FeatureNetwork):
    """A `.pt2` file, which takes uint8 (n, 3, H, W).

    Loading one can run any code: torch.export falls back to unpickling, evaluates shapes as Python expressions and
    looks functions up by name. `check_network_options` asks for the user's word before.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        """Load the program. Raises ImportError without torch, ValueError for another file or device."""
        torch = import_torch()
        self.path, self._device = path, torch_device(device)
        try:
            program = torch.export.load(path)
            # Parameters are not all that has a device: the program may make tensors where it was exported.
            passes = importlib.import_module("torch.export.passes")
            self._module = passes.move_to_device_pass(program, self._device).module()
        except Exception as error:  # a damaged archive raises almost anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"--features {path}: not a program that torch.export.save wrote ({reason})") from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        with full_precision_inference(self._device):
            features: np.ndarray = self._module(to_device(images, self._device)).float().cpu().numpy()
        return features


class GraphFeatures(FeatureNetwork):
    """A node of a `.pb` file whose input is images (n, H, W, 3) with values 0…255, uint8 or of any float type."""

    def __init__(self, path: Path, node: str, input_node: str | None = None) -> None:
        """Load the graph. node: to read; input_node: takes the images (None: the only placeholder).

        Raises ImportError without TensorFlow; ValueError for another file, for a node that is not there or takes
        something else.
        """
        self.path = path
        with quiet_stderr():
            frozen = FrozenGraph(path, instead="a program of torch.export to --features")
            images = _tensor(frozen, "features_input", input_node or _only_placeholder(frozen))
            if not (images.dtype.is_floating or images.dtype == "uint8") or not _takes_images(images.shape):
                raise ValueError(
                    f"--features_input {images.name}: takes {images.dtype.name} of shape {images.shape} in {path}, "
                    "expected uint8 or float images (n, H, W, 3)"
                )
            name = _tensor(frozen, "features_node", node).name
            self._nodes = {"node": name, "input": images.name}
            graph, self._images, self._session = frozen.on_images(images.name, images.dtype)
            self._features = graph.get_tensor_by_name(name)

    @property
    def identity(self) -> dict[str, str]:
        """With the nodes that are used."""
        return super().identity | self._nodes

    def check(self, sets: Sequence[ImageSource], batch_size: int) -> None:
        """Raise as any network."""
        with quiet_stderr():  # the first run starts the devices, with much ado
            super().check(sets, batch_size)

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(run(self._session, self._features, self._images, images), dtype=np.float32)


def _only_placeholder(frozen: FrozenGraph) -> str:
    placeholders = [node.name for node in frozen.definition.node if node.op == "Placeholder"]
    if len(placeholders) != 1:
        found = f"the placeholders {', '.join(placeholders)}" if placeholders else "no placeholder"
        raise ValueError(f"--features {frozen.path}: has {found}; name the node that takes images by --features_input")
    return placeholders[0]


def _tensor(frozen: FrozenGraph, flag: str, name: str) -> Any:
    """A tensor by its name or its node's."""
    node, _, output = name.partition(":")
    if node not in frozen.names:
        last = ", ".join(frozen.names[-3:])
        raise ValueError(f"--{flag} {name}: {frozen.path} has no such node; its last ones are {last}")
    try:
        return frozen.tensor(f"{node}:{output or 0}")
    except (KeyError, ValueError) as error:
        raise ValueError(f"--{flag} {name}: cannot be read from {frozen.path} ({reason_of(error)})") from error


def _takes_images(shape: Any) -> bool:
    return shape.rank is None or (shape.rank == 4 and shape[3] in (None, 3))


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Options that name another network."""
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="FD and KID with a network of your own, too: a .pt2 of torch.export, or a frozen TensorFlow graph (.pb)",
    )
    parser.add_argument(
        "--trust_features",
        type=_true_or_false,
        default=False,
        metavar="True",
        help="load a .pt2 in --features although it can run any code, because you trust who made it",
    )
    parser.add_argument("--features_node", metavar="NAME", help="node of the --features graph that holds the features")
    parser.add_argument(
        "--features_input",
        metavar="NAME",
        help="node of the --features graph that takes the images (default: its only placeholder)",
    )


def _true_or_false(text: str) -> bool:
    """The value of a switch. Raises argparse.ArgumentTypeError for another word."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() == "true"


def check_network_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that do not fit together, before anything is loaded."""
    path = options.features
    if path is not None and not path.is_file():
        raise ValueError(f"--features {path}: no such file")
    if path is not None and path.suffix not in (PROGRAM, GRAPH):
        raise ValueError(
            f"--features {path}: expected a file that ends in {PROGRAM} (torch.export) or {GRAPH} (TensorFlow)"
        )
    if options.trust_features and (path is None or path.suffix != PROGRAM):
        raise ValueError(f"--trust_features True: has no effect without a program ({PROGRAM}) in --features")
    if path is not None and path.suffix == GRAPH:
        if options.features_node is None:
            raise ValueError(
                f"--features {path}: name the node of this graph that holds the features by --features_node"
            )
        return
    for name in ("features_node", "features_input"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} {getattr(options, name)}: has no effect without a graph ({GRAPH}) in --features"
            )
    if path is not None and path.suffix == PROGRAM and not options.trust_features:
        raise ValueError(
            f"--features {path}: a {PROGRAM} can run any code while it is loaded; add --trust_features True if you "
            f"trust who made it, or give a TensorFlow graph ({GRAPH}), which cannot"
        )


def load_network(options: argparse.Namespace) -> FeatureNetwork | None:
    """The network that is asked for. Raises as its class."""
    if options.features is None:
        return None
    if options.features.suffix == GRAPH:
        return GraphFeatures(options.features, options.features_node, options.features_input)
    return ExportedProgram(options.features, options.device or "auto")

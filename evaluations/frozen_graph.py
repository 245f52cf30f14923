"""TensorFlow graphs that take images: imported, read and run. TensorFlow is imported when a graph is loaded."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

# Operations that keep a state or draw numbers, and do no more than that.
_HARMLESS_STATE = re.compile(
    r"(Assert|CheckNumerics(V2)?|GuaranteeConst|Random(Uniform|UniformInt|StandardNormal)|TruncatedNormal|TensorArray.*"
    r"|Empty|If|While|Case|StatefulPartitionedCall|Variable(V2)?|VarHandleOp|ReadVariableOp|AssignVariableOp"
    r"|VarIsInitializedOp)"
)
# Operations that take strings, handles or further objects, and do no more than compute.
_HARMLESS_ARGUMENTS = re.compile(rf"({_HARMLESS_STATE.pattern}|Decode(AndCrop)?(Jpeg|Png|Gif|Bmp|Image|Raw|Base64))")
# Operations that write or map files, or call what is no TensorFlow, by the word of an attribute.
_BY_ATTRIBUTE = re.compile(r"(Debug.*|Copy|CopyHost|ImmutableConst|PyFunc.*|Xla(CustomCall|Launch).*|Mlir.*)")


class FrozenGraph:
    """A `.pb` file as TensorFlow reads it. definition: the GraphDef."""

    def __init__(self, path: Path, instead: str) -> None:
        """Read the file. instead: what else can be done where TensorFlow is missing.

        Raises ImportError when it is, ValueError when the file is no graph or one that could touch files or run code.
        """
        self.path = path
        self._tf = _import_tensorflow(instead)
        self.version = str(self._tf.__version__)
        self.definition = self._tf.compat.v1.GraphDef()
        try:
            self.definition.ParseFromString(path.read_bytes())
        except Exception as error:  # protobuf's DecodeError: protobuf is TensorFlow's business, not imported here
            raise ValueError(f"{path}: not a frozen TensorFlow graph ({error})") from error
        self.names = [node.name for node in self.definition.node]
        self._refuse_what_does_more_than_compute()

    def _refuse_what_does_more_than_compute(self) -> None:
        """Raise ValueError for an operation that could read or write files, print, connect or run code.

        TensorFlow has those among its operations and would run them as any other. Import runs some already, so all of
        the file is looked at, and before it.
        """
        functions = [function.node_def for function in self.definition.library.function]
        for nodes in (self.definition.node, *functions):
            for node in nodes:
                if self._does_more_than_compute(node.op):
                    raise ValueError(
                        f"{self.path}: refused, because its node {node.name} ({node.op}) could read or write files or "
                        "run code; features need no such operation"
                    )

    def _does_more_than_compute(self, operation: str) -> bool:
        definition = importlib.import_module("tensorflow.python.framework.op_def_registry").get(operation)
        if definition is None:  # a function of the file, whose body is looked at, too, or nothing that can be imported
            return False
        types = self._tf.dtypes
        objects = {kind.as_datatype_enum for kind in (types.string, types.resource, types.variant)}
        takes_objects = any(argument.type in objects for argument in (*definition.input_arg, *definition.output_arg))
        return (
            bool(_BY_ATTRIBUTE.fullmatch(operation))
            or (definition.is_stateful and not _HARMLESS_STATE.fullmatch(operation))
            or (takes_objects and not _HARMLESS_ARGUMENTS.fullmatch(operation))
        )

    def tensor(self, name: str) -> Any:
        """A tensor of the graph as it is in the file, for its type and shape."""
        return self._as_it_is.get_tensor_by_name(name)

    @cached_property
    def _as_it_is(self) -> Any:
        return self._imported({})

    def on_images(self, input_node: str, dtype: Any = "float32") -> tuple[Any, Any, Any]:
        """The graph with batches of images (n, H, W, 3) for any n in the place of a node.

        Returns the graph, the tensor to feed images of this type to, and a session.
        Raises ValueError when TensorFlow cannot do that.
        """
        tf1 = self._tf.compat.v1
        graph = tf1.Graph()
        with graph.as_default():
            # Mapped, not fed: the real graph's own input has a fixed batch size of 1.
            images = tf1.placeholder(dtype, [None, None, None, 3], name="evaluator_images")
            self._imported({input_node: images}, graph)
        config = tf1.ConfigProto()
        config.gpu_options.allow_growth = True
        return graph, images, tf1.Session(graph=graph, config=config)

    def _imported(self, input_map: dict[str, Any], graph: Any = None) -> Any:
        tf1 = self._tf.compat.v1
        graph = graph or tf1.Graph()
        with graph.as_default():
            try:
                tf1.import_graph_def(self.definition, input_map=input_map, name="")
            except ValueError as error:
                raise ValueError(f"{self.path}: TensorFlow cannot use this graph ({error})") from error
        return graph


def _import_tensorflow(instead: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read by the C++ runtime while it is imported
    try:
        tf = importlib.import_module("tensorflow")
    except ImportError as error:
        raise ImportError(
            f"TensorFlow is needed to compute features and cannot be imported ({error}); install it with: "
            f"pip install -r evaluations/requirements.txt, or give {instead}"
        ) from error
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # Published numbers are full float32 ones; Ampere and later would round the inputs of convolutions to 10 bits.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return tf


def _flush_stderr() -> None:
    if sys.stderr is not None:  # as it is where it was closed before the program began
        with suppress(OSError, ValueError):
            sys.stderr.flush()


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drop what the process writes to file descriptor 2 inside the block.

    TensorFlow's C++ start-up messages heed no log level. Python's errors are exceptions and not affected.
    """
    _flush_stderr()
    try:
        saved = os.dup(2)
    except OSError:  # no descriptor 2: nothing to hold back
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            _flush_stderr()
            os.dup2(saved, 2)
            os.close(saved)


def reason_of(error: Exception) -> str:
    """What an error of TensorFlow says, without where the node was made and the stack trace that follows."""
    text = str(error).strip()
    at_node = re.search(r"^Node: '(.*)'\n(.+)$", text, re.MULTILINE)
    return f"{at_node[1]}: {at_node[2]}" if at_node else text.partition("\n")[0]


def run(session: Any, fetches: Any, tensor: Any, images: np.ndarray) -> Any:
    """Values of some tensors for uint8 (n, H, W, 3) images."""
    return session.run(fetches, {tensor: images.astype(tensor.dtype.as_numpy_dtype)})

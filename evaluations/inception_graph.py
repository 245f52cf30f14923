"""The Inception graph of the ADM suite: where it is found, how it is checked, and features through TensorFlow."""

from __future__ import annotations

import os
import queue
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from atomic_file import atomic_file
from frozen_graph import FrozenGraph, quiet_stderr, reason_of, run

GRAPH_NAME = "classify_image_graph_def.pb"
GRAPH_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH_NAME}"
CONNECT_SECONDS = 15.0  # until the server has answered
DOWNLOAD_SECONDS = 900.0  # until the whole graph (about 100 MB) is here

INPUT_NODE = "ExpandDims:0"  # float32 (n, H, W, 3) in [0, 255]
POOL_NODE = "pool_3:0"  # (n, 1, 1, D)
SPATIAL_NODE = "mixed_6/conv:0"  # (n, h, w, channels)
SOFTMAX_NODE = "softmax/logits/MatMul"  # its second input is the (D, classes) weight
SPATIAL_CHANNELS = 7


def find_graph(given: Path | None, folders: list[Path], url: str = GRAPH_URL) -> Path:
    """The graph's file: the given one, else `classify_image_graph_def.pb` in one of the folders, else downloaded.

    folders: searched in order; a download goes into the last of them that can be written to.
    Raises FileNotFoundError that says where to put the graph.
    """
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"{given}: no such graph file; {GRAPH_NAME} is published at {url}")
        return given
    for folder in folders:
        if (folder / GRAPH_NAME).is_file():
            return folder / GRAPH_NAME
    places = " or ".join(str(folder) for folder in folders)
    try:
        content = download(url)
        return _store(content, folders)
    except OSError as error:
        raise FileNotFoundError(
            f"{GRAPH_NAME}: not found in {places} and not downloaded ({error}); "
            f"fetch it from {url} and put it there, or give its path with --graph"
        ) from error


def _store(content: bytes, folders: list[Path]) -> Path:
    # A proxy's login page must not be kept as the graph: it would be found by every later run.
    if any(node.removesuffix(":0").encode() not in content for node in (POOL_NODE, SPATIAL_NODE, SOFTMAX_NODE)):
        raise OSError("what arrived is not the graph")
    for folder in reversed(folders):
        if os.access(folder, os.W_OK):
            with atomic_file(folder / GRAPH_NAME) as file:
                file.write(content)
            return folder / GRAPH_NAME
    raise PermissionError("none of these folders can be written to")


def download(url: str, connect_seconds: float = CONNECT_SECONDS, total_seconds: float = DOWNLOAD_SECONDS) -> bytes:
    """Fetch a file, giving up when the server has not answered or the file not arrived in time.

    A thread does the work, because looking up a name has no timeout of its own; it is left behind on giving up.
    Raises OSError (TimeoutError among others).
    """
    events: queue.Queue[bytes | Exception | None] = queue.Queue()

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=connect_seconds) as response:
                events.put(None)
                content = response.read()
                expected = response.headers.get("Content-Length")
            if expected is not None and len(content) != int(expected):
                raise OSError(f"{len(content)} of {expected} bytes arrived")
            events.put(content)
        except Exception as error:  # whatever it is, the waiting side has to hear of it
            events.put(error)

    def wait(seconds: float, what: str) -> bytes | None:
        try:
            event = events.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError(f"{what} within {seconds:.0f} s") from None
        if isinstance(event, Exception):
            raise event if isinstance(event, OSError) else OSError(f"{type(event).__name__}: {event}")
        return event

    start = time.monotonic()
    threading.Thread(target=fetch, daemon=True).start()
    wait(connect_seconds, "no answer")
    content = wait(total_seconds - (time.monotonic() - start), "download not finished")
    assert content is not None
    return content


class InceptionGraph:
    """Features of a frozen TensorFlow graph with the node names of the 2015 Inception classifier."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Load and check a graph. sha256: of the file, kept as the identity of its features.

        Raises ImportError when TensorFlow is missing; ValueError when the file is no graph or a node is missing or
        of a wrong shape. Feature widths are whatever the graph has.
        """
        self.path, self.sha256, self.identity = path, sha256, sha256
        self._widths: dict[tuple[int, int], tuple[int, int]] = {}
        with quiet_stderr():
            frozen = FrozenGraph(path, instead="--backend torch")
            self.versions = {"tensorflow": frozen.version}
            self._images, self._fetches, weight, self._session = self._start(frozen)
            self.softmax_weight = self._read_weight(weight)

    def _start(self, frozen: FrozenGraph) -> tuple[Any, list[Any], Any, Any]:
        wanted = (INPUT_NODE, POOL_NODE, SPATIAL_NODE, SOFTMAX_NODE)
        missing = [name for name in wanted if name.removesuffix(":0") not in frozen.names]
        if missing:
            raise ValueError(f"{self.path}: not the graph of the suite, it has no node {', '.join(missing)}")
        graph, images, session = frozen.on_images(INPUT_NODE)
        inputs = list(graph.get_operation_by_name(SOFTMAX_NODE).inputs)
        pool, spatial = graph.get_tensor_by_name(POOL_NODE), graph.get_tensor_by_name(SPATIAL_NODE)
        if len(inputs) != 2:
            raise ValueError(f"{self.path}: {SOFTMAX_NODE} has {len(inputs)} inputs, expected 2")
        if spatial.shape.rank not in (None, 4):
            raise ValueError(f"{self.path}: {SPATIAL_NODE} has rank {spatial.shape.rank}, expected 4 (NHWC)")
        with graph.as_default():
            fetches = [pool, spatial[..., :SPATIAL_CHANNELS]]
        return images, fetches, inputs[1], session

    def _read_weight(self, weight: Any) -> np.ndarray:
        try:
            value = np.asarray(self._session.run(weight), dtype=np.float32)
        except Exception as error:  # TensorFlow's own errors share no base class with Python's
            raise ValueError(f"{self.path}: the weight of {SOFTMAX_NODE} cannot be read ({error})") from error
        if value.ndim != 2 or not np.isfinite(value).all():
            raise ValueError(f"{self.path}: the weight of {SOFTMAX_NODE} is not a finite (D, classes) matrix")
        return value

    def widths(self, height: int, width: int) -> tuple[int, int]:
        """Widths (D, D_s) of the features of images of this size, found by running a black image through the graph.

        Raises ValueError when the graph cannot take such images or its nodes have other shapes than expected.
        """
        if (height, width) not in self._widths:
            try:
                with quiet_stderr():  # the first run starts the devices, with much ado
                    pool, spatial = self._run(np.zeros((1, height, width, 3), dtype=np.uint8))
            except Exception as error:
                raise ValueError(f"{self.path}: cannot take images of {height}×{width} ({reason_of(error)})") from error
            depth = len(self.softmax_weight)
            if pool.shape not in ((1, 1, 1, depth), (1, depth)):
                raise ValueError(
                    f"{self.path}: {POOL_NODE} is {pool.shape} for an image of {height}×{width}, expected "
                    f"(1, 1, 1, {depth}) as {SOFTMAX_NODE} takes: this graph is not made for images of this size"
                )
            if spatial.ndim != 4 or len(spatial) != 1 or not spatial.size:
                raise ValueError(
                    f"{self.path}: {SPATIAL_NODE} is {spatial.shape} for an image of {height}×{width}, expected "
                    "(1, h, w, channels)"
                )
            self._widths[height, width] = (depth, spatial.size)
        return self._widths[height, width]

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, H, W, 3) -> pool features (n, D) and spatial features (n, D_s) in H, W, C order, float32."""
        pool, spatial = self._run(images)
        return pool.reshape(len(images), -1), spatial.reshape(len(images), -1)

    def _run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pool, spatial = run(self._session, self._fetches, self._images, images)
        return pool, spatial

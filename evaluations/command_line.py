"""What the command lines of this folder share: the options that choose a network, a line on stderr, exit status 2."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TextIO

from feature_cache import default_folders
from feature_extraction import FeatureBackend
from inception_graph import InceptionGraph, find_graph
from inception_torch import TorchInception
from sample_sets import sha256_of


def put(text: str, stream: TextIO | None) -> bool:
    """Write a line. Returns whether that was possible: a full disk or a closed pipe is no reason to lose the work."""
    if stream is None:  # closed before the program began
        return False
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError as error:
            print(text.encode(error.encoding, "backslashreplace").decode(error.encoding), file=stream, flush=True)
    except (OSError, ValueError):
        return False
    return True


def say(message: str) -> bool:
    """One line on stderr; stdout is for results. Returns whether it could be written."""
    return put(message, sys.stderr)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let the program end as its work did, whatever has become of stdout and stderr.

    Closed descriptors are given to the null device: the next file that is opened would get their number, and with it
    what libraries write to stderr. At its end Python writes what is left, and must not fail with that.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                with suppress(OSError, ValueError), open(os.devnull, "wb") as null:
                    os.dup2(null.fileno(), stream.fileno())


def say_error(who: str, error: Exception) -> None:
    """What cannot be used, as one line on stderr."""
    say(f"{who}: error: {' '.join(str(error).split())}")


def progress(path: Path, done_what: str = "features of", every_seconds: float = 10.0) -> Callable[[int, int], None]:
    """A function of (images done, images in total) that says so now and then."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            say(f"{path}: {done_what} {done} of {total} images")

    return show


class Parser(argparse.ArgumentParser):
    """Raises ValueError for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose the network and what runs it."""
    parser.add_argument(
        "--graph",
        type=Path,
        help="Inception graph (default: found in the working folder, beside the script, or fetched)",
    )
    parser.add_argument("--graph_sha256", metavar="HEX", help="refuse a graph file with another SHA-256")
    parser.add_argument(
        "--backend",
        choices=("tensorflow", "torch"),
        default="tensorflow",
        help="what runs the graph (default tensorflow); torch reads the weights of the same file",
    )
    parser.add_argument("--device", help="for --backend torch: auto (default: the GPU if there is one), cpu, cuda:N")
    parser.add_argument("--batch_size", type=int, default=64, help="images per run of the graph (default 64)")
    caching = parser.add_mutually_exclusive_group()
    caching.add_argument(
        "--cache_dir",
        type=Path,
        help="folder for what is computed of the reference and the graph (default: .evaluator_cache beside them)",
    )
    caching.add_argument("--no_cache", action="store_true", help="neither read nor keep what is computed of them")


def check_backend_options(options: argparse.Namespace) -> None:
    """Raise ValueError for a wrong option, and for one that would be ignored."""
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size}: must be at least 1")
    if options.graph_sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", options.graph_sha256):
        raise ValueError(f"--graph_sha256 {options.graph_sha256}: expected 64 hexadecimal digits")
    if options.device is not None and options.backend != "torch":
        raise ValueError(f"--device {options.device}: has no effect without --backend torch")


def load_backend(options: argparse.Namespace, script: str) -> FeatureBackend:
    """Find, identify and check the graph, and load it into what is to run it. script: the path of the caller.

    Raises ValueError, OSError or ImportError with one sentence.
    """
    path = find_graph(options.graph, [Path.cwd(), Path(script).resolve().parent])
    sha256, expected = sha256_of(path), options.graph_sha256
    if expected is not None and sha256 != expected.lower():
        raise ValueError(f"{path}: its SHA-256 is {sha256}, not {expected.lower()} as --graph_sha256 says")
    if options.backend == "tensorflow":
        return InceptionGraph(path, sha256)
    return TorchInception(path, sha256, cache_folders(options, path), options.device or "auto")


def cache_folders(options: argparse.Namespace, source: Path) -> list[Path]:
    """Where to keep what is computed from a file; the first that can be used counts.

    Raises OSError when a folder asked for by name cannot be made.
    """
    if options.no_cache:
        return []
    if options.cache_dir is None:
        return default_folders(source)
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    return [options.cache_dir]

"""Score a set of generated images against a reference set with the metrics of the ADM suite.

usage: python evaluations/evaluator.py REF.npz SAMPLE.npz [--out REPORT.json]

Prints Inception Score, FID, sFID, Precision and Recall on stdout, everything else on stderr. Exit status 2 with one
line on stderr means that an input cannot be used. See README.md beside this file. Needs no other part of the project.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from atomic_file import atomic_file
from feature_cache import FeatureCache, default_folders
from feature_extraction import Features, extract_features
from fidelity_metrics import Statistics, frechet_distance, inception_score, precision_recall
from inception_graph import InceptionGraph, find_graph
from sample_sets import ImageSet, find_manifest, open_image_set, sha256_of

FEW_SAMPLES = 2048  # with fewer, the covariance of 2048 features has no full rank
REPORT_MARK = "evaluator_report"  # the entry by which a report is told from any other file


@dataclass
class Evaluation:
    """Two checked sets, the network, and what is already known of them: all that the long work needs."""

    reference: ImageSet
    samples: ImageSet
    backend: InceptionGraph
    cache: FeatureCache | None
    reference_sha256: str
    samples_sha256: str
    manifest: tuple[Path, dict[str, Any]] | None
    reference_features: Features | None  # from the cache
    half: bool  # distances of precision and recall in float16
    batch_size: int
    notes: list[str]  # found out on the way and not yet said: an input error is to be the only line on stderr
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Say something on stderr that the report keeps."""
        self.warnings.append(message)
        say(f"warning: {message}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 when an input cannot be used."""
    try:
        options = parse(argv)
        job = prepare(options)
    except (ValueError, OSError, ImportError) as error:  # found before the long work; later errors keep a traceback
        say(f"evaluator.py: error: {' '.join(str(error).split())}")
        return 2
    announce(job)
    metrics = evaluate(job)
    for name, value in metrics.items():
        if value is not None:
            print(f"{name}: {value}")
    if options.out is not None:
        write_report(options.out, job, metrics)
    return 0


def say(message: str) -> None:
    """One line on stderr; stdout is for the five numbers."""
    print(message, file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Raises ValueError for a wrong one."""
    parser = _Parser(prog="evaluator.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("reference", type=Path, metavar="REF.npz", help="reference images and/or their statistics")
    parser.add_argument("samples", type=Path, metavar="SAMPLE.npz", help="generated images (arr_0, uint8 N×H×W×3)")
    parser.add_argument("--out", type=Path, metavar="REPORT.json", help="write numbers, manifest and hashes here, too")
    parser.add_argument(
        "--graph",
        type=Path,
        help="Inception graph (default: found in the working folder, beside the script, or fetched)",
    )
    parser.add_argument("--graph_sha256", metavar="HEX", help="refuse a graph file with another SHA-256")
    parser.add_argument(
        "--distances",
        choices=("float16", "float32"),
        default="float16",
        help="precision of the distances in precision and recall (default float16, as published numbers are)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per run of the graph (default 64)")
    caching = parser.add_mutually_exclusive_group()
    caching.add_argument(
        "--cache_dir", type=Path, help="folder for reference features (default: .evaluator_cache beside the reference)"
    )
    caching.add_argument("--no_cache", action="store_true", help="neither read nor keep features of the reference")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"--batch_size {options.batch_size}: must be at least 1")
    if options.graph_sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", options.graph_sha256):
        raise ValueError(f"--graph_sha256 {options.graph_sha256}: expected 64 hexadecimal digits")
    return options


def prepare(options: argparse.Namespace) -> Evaluation:
    """Find out everything that can be wrong with the inputs, the cheap checks first.

    Raises ValueError, OSError or ImportError with one sentence that names the file.
    """
    reference = open_image_set(options.reference, needs_images=False)
    samples = open_image_set(options.samples)
    notes = [] if options.out is None else check_out(options.out)
    backend = load_graph(options.graph, options.graph_sha256)
    for images in (reference, samples):
        check_widths(images, samples, backend)
    cache = make_cache(options)

    reference_sha256, samples_sha256 = reference.sha256(), samples.sha256()
    features = load_features(cache, reference, reference_sha256, backend, notes)
    if reference.images is not None and features is None:
        reference.verify()
    if samples_sha256 != reference_sha256:
        samples.verify()
    return Evaluation(
        reference=reference,
        samples=samples,
        backend=backend,
        cache=cache,
        reference_sha256=reference_sha256,
        samples_sha256=samples_sha256,
        manifest=find_manifest(samples.path),
        reference_features=features,
        half=options.distances == "float16",
        batch_size=options.batch_size,
        notes=notes,
    )


def announce(job: Evaluation) -> None:
    """Say on stderr what is going to be compared, and what to think of it."""
    for note in job.notes:
        say(note)
    say(f"{job.backend.path}: SHA-256 {job.backend.sha256}")
    if job.manifest is None:
        say(f"no manifest beside {job.samples.path} names it: the report cannot say how the samples were made")
    else:
        path, content = job.manifest
        say(f"{path} says how the samples were made:")
        for line in manifest_lines(content):
            say(f"  {line}")
    warn_about_sets(job)


def manifest_lines(content: dict[str, Any], title: str = "") -> list[str]:
    """All of a manifest to be read by people: a line for the entries of each group, groups within it following."""
    groups = {name: value for name, value in content.items() if isinstance(value, dict)}
    single = ", ".join(f"{name} {value}" for name, value in content.items() if name not in groups)
    lines = [f"{title}: {single}" if title else single] if single else []
    return lines + [line for name, value in groups.items() for line in manifest_lines(value, name)]


def check_out(out: Path) -> list[str]:
    """Notes about the report file to be written.

    Raises ValueError when it cannot be written, or would replace something that is no report.
    """
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} cannot be written to")
    if not out.exists():
        return []
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or REPORT_MARK not in content:
        raise ValueError(f"--out {out}: exists and is not a report of this program; choose another name")
    return [f"{out}: the report that is there will be replaced"]


def load_graph(given: Path | None, expected_sha256: str | None) -> InceptionGraph:
    """Find, identify and check the graph."""
    path = find_graph(given, [Path.cwd(), Path(__file__).resolve().parent])
    sha256 = sha256_of(path)
    if expected_sha256 is not None and sha256 != expected_sha256.lower():
        raise ValueError(f"{path}: its SHA-256 is {sha256}, not {expected_sha256.lower()} as --graph_sha256 says")
    return InceptionGraph(path, sha256)


def check_widths(images: ImageSet, samples: ImageSet, backend: InceptionGraph) -> None:
    """Raise ValueError when a set's features or statistics cannot be compared with the samples'."""
    assert samples.image_size is not None
    widths = backend.widths(*samples.image_size)
    if images.statistics is not None:
        found = tuple(len(statistics.mu) for statistics in images.statistics)
    elif images.image_size is not None:
        found = backend.widths(*images.image_size)
    if found != widths:
        raise ValueError(
            f"{images.path}: pool and spatial features of widths {found}, "
            f"but {backend.path} gives {widths} for the images of {samples.path}"
        )


def make_cache(options: argparse.Namespace) -> FeatureCache | None:
    """The cache that the options ask for. Raises OSError when a folder asked for by name cannot be made."""
    if options.no_cache:
        return None
    if options.cache_dir is None:
        return FeatureCache(default_folders(options.reference))
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    return FeatureCache([options.cache_dir])


def load_features(
    cache: FeatureCache | None, images: ImageSet, sha256: str, backend: InceptionGraph, notes: list[str]
) -> Features | None:
    """Features of the reference from the cache, None when they have to be computed."""
    if cache is None or images.count is None:
        return None
    try:
        features = cache.load(sha256, backend.sha256, images.count)
    except ValueError as error:
        notes.append(f"{error}; features of {images.path} are computed again")
        return None
    if features is not None:
        notes.append(f"{images.path}: features from the cache")
    return features


def warn_about_sets(job: Evaluation) -> None:
    """Warn about what makes the numbers incomparable with others."""
    reference, samples = job.reference, job.samples
    for images in (reference, samples):
        if images.count is not None and images.count < FEW_SAMPLES:
            job.warn(
                f"{images.path}: {images.count} images, fewer than {FEW_SAMPLES}: covariances are rank-deficient, "
                "and FID and sFID say little"
            )
    if reference.count is None:
        job.warn(
            f"{reference.path}: no arr_0, only statistics: Precision and Recall need its images and are left out; "
            "its number and size of images cannot be compared"
        )
        return
    if reference.count != samples.count:
        job.warn(
            f"{samples.path}: {samples.count} images, {reference.path} has {reference.count}: "
            "compare these numbers only with numbers of the same counts"
        )
    if reference.image_size != samples.image_size:
        job.warn(
            f"{samples.path}: images of {_size_text(samples)}, {reference.path} has {_size_text(reference)}: "
            "a part of the distance is the difference in size"
        )


def evaluate(job: Evaluation) -> dict[str, float | None]:
    """The long work: features, then the five numbers by their printed names; None where images are missing."""
    reference = job.reference_features
    if reference is None and job.reference.images is not None:
        reference = _extract(job.reference, job)
        if job.cache is not None:
            try:
                job.cache.save(job.reference_sha256, job.backend.sha256, reference)
            except OSError as error:
                job.warn(f"features of {job.reference.path} are not cached: {error}")
    if reference is not None and job.samples_sha256 == job.reference_sha256:
        samples = reference  # the same file: the same features, to the last bit on any device
    else:
        samples = _extract(job.samples, job)

    pool_reference, spatial_reference = _statistics(job.reference, reference)
    pool_samples, spatial_samples = _statistics(job.samples, samples)
    metrics: dict[str, float | None] = {
        "Inception Score": inception_score(samples.pool, job.backend.softmax_weight),
        "FID": frechet_distance(pool_reference, pool_samples),
        "sFID": frechet_distance(spatial_reference, spatial_samples),
        "Precision": None,
        "Recall": None,
    }
    if reference is not None:
        say("precision and recall ...")
        metrics["Precision"], metrics["Recall"] = precision_recall(reference.pool, samples.pool, job.half)
    return metrics


def _statistics(images: ImageSet, features: Features | None) -> tuple[Statistics, Statistics]:
    """Statistics of pool and spatial features; those that a file brings along replace computed ones."""
    if images.statistics is not None:
        return images.statistics
    assert features is not None
    return features.pool_statistics, features.spatial_statistics


def _extract(images: ImageSet, job: Evaluation) -> Features:
    return extract_features(images, job.backend, job.batch_size, _progress(images.path))


def _progress(path: Path, every_seconds: float = 10.0) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= every_seconds:
            last = time.monotonic()
            say(f"{path}: features of {done} of {total} images")

    return show


def write_report(out: Path, job: Evaluation, metrics: dict[str, float | None]) -> None:
    """Write numbers and what they were computed from as JSON, completely or not at all."""
    report = {
        REPORT_MARK: 1,
        "metrics": metrics,
        "sample": _describe(job.samples, job.samples_sha256),
        "manifest": None if job.manifest is None else job.manifest[1],
        "reference": _describe(job.reference, job.reference_sha256),
        "graph": {"path": str(job.backend.path), "sha256": job.backend.sha256},
        "distances": "float16" if job.half else "float32",
        "warnings": job.warnings,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tensorflow": job.backend.tensorflow_version,
        },
    }
    with atomic_file(out) as file:
        file.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def _describe(images: ImageSet, sha256: str) -> dict[str, Any]:
    return {
        "path": str(images.path),
        "size": images.size,  # bytes
        "N": images.count,
        "image_size": None if images.image_size is None else list(images.image_size),  # [H, W]
        "sha256": sha256,
        "statistics": "computed" if images.statistics is None else "from the file",
    }


def _size_text(images: ImageSet) -> str:
    return "no size" if images.image_size is None else "{}×{}".format(*images.image_size)


if __name__ == "__main__":
    sys.exit(main())

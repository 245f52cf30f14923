"""Score a set of generated images against a reference set with the metrics of the ADM suite.

usage: python evaluations/evaluator.py REF.npz SAMPLE.npz [--out REPORT.json]

Prints Inception Score, FID, sFID, Precision and Recall on stdout, everything else on stderr. Exit status 2 with one
line on stderr means that an input cannot be used. See README.md beside this file. Needs no other part of the project.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from command_line import (
    Parser,
    add_backend_options,
    cache_folders,
    check_backend_options,
    lasting_streams,
    load_backend,
    progress,
    put,
    say,
    say_error,
)
from extras import Extras, add_extra_options, check_extras, compute_extras, write_bytes, write_html
from feature_cache import FeatureCache
from feature_extraction import FeatureBackend, Features, distance_type, extract_features
from feature_networks import FeatureNetwork, load_network
from fidelity_metrics import SPLIT_SIZE, predicted_classes, split_imbalance, spread_order
from process_share import ALONE, Share, connect, disconnect, share_of_launcher
from sample_sets import ImageSource, find_manifest, open_images
from scoring import judge_manifolds, score

ENOUGH_REPEATS = 20  # bootstraps from which on the width of an interval is uncertain by less than a sixth
UNBALANCED = 0.05  # nats of `split_imbalance` from which on the Inception Score is said to suffer: 5 %
FEW_SAMPLES = 2048  # with fewer, the covariance of 2048 features has no full rank
REPORT_MARK = "evaluator_report"  # the entry by which a report is told from any other file


@dataclass
class Evaluation:
    """Two checked sets, the network, and what is already known of them: all that the long work needs."""

    reference: ImageSource
    samples: ImageSource
    backend: FeatureBackend
    cache: FeatureCache | None
    reference_sha256: str
    samples_sha256: str
    manifest: tuple[Path, dict[str, Any]] | None
    reference_features: Features | None  # from the cache
    half: bool  # distances of precision and recall in float16
    batch_size: int
    share: Share
    extras: Extras
    network: FeatureNetwork | None  # of --features
    order: np.ndarray | None  # of the samples in the splits of the Inception Score
    notes: list[str]  # found out on the way and not yet said: an input error is to be the only line on stderr
    warnings: list[str] = field(default_factory=list)
    said_unbalanced: bool = False  # of the splits of the Inception Score

    def warn(self, message: str) -> None:
        """Say something on stderr that the report keeps."""
        self.warnings.append(message)
        say(f"warning: {message}")


@lasting_streams()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 when an input cannot be used, or 1 when there was nowhere to
    write the numbers to."""
    share = ALONE
    try:
        share = share_of_launcher()
        options = parse(argv)
        job = prepare(options, share)
    except (ValueError, OSError, ImportError) as error:  # found before the long work; later errors keep a traceback
        say_error(f"rank {share.rank}" if share.rank else "evaluator.py", error)
        return 2
    if share.rank == 0:
        announce(job)
    connect(share)
    features = compute_features(job)
    disconnect(share)
    if features is None:  # the first process has them all
        return 0
    say("metrics ...")
    inside = judge_manifolds(*features, job.half)
    warn_about_predictions(job, features[1])
    metrics = score(*features, job.backend.softmax_weight, inside, job.order)
    told = show(metrics)
    report = make_report(job, metrics)
    write_report(options.out, report)  # what is there already survives whatever happens to the rest
    found = compute_extras(job, features, metrics, inside)
    told = show(found.metrics) and told
    report |= {"metrics": metrics | found.metrics, **found.entries}
    write_report(options.out, report)
    if job.extras.html is not None:
        write_html(job.extras.html, report, found.pictures)
    for name, (low, high) in found.entries.get("intervals", {}).items():
        say(f"{name}: 95 % interval {low:.6g} … {high:.6g}")
    return 0 if told or options.out is not None else 1


def write_report(out: Path | None, report: dict[str, Any]) -> None:
    """Write the report, if one is wanted, in the place of an earlier one."""
    if out is not None:
        write_bytes(out, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())


def show(metrics: dict[str, float | None]) -> bool:
    """The numbers on stdout, a line each, or on stderr where that cannot be written. Returns whether they were."""
    lines = [f"{name}: {value}" for name, value in metrics.items() if value is not None]
    written = [put(line, sys.stdout) or say(line) for line in lines]  # all of them, also after one that was not
    return all(written)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options. Raises ValueError for a wrong one."""
    parser = Parser(prog="evaluator.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("reference", type=Path, metavar="REF", help="reference: .npz, or folder of PNG files")
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="generated images: .npz, or folder of PNG files")
    parser.add_argument("--out", type=Path, metavar="REPORT.json", help="write numbers, manifest and hashes here, too")
    parser.add_argument(
        "--distances",
        choices=("float16", "float32"),
        default="float16",
        help="precision of the distances in precision and recall (default float16, as published numbers are)",
    )
    parser.add_argument(
        "--shuffle",
        action="store_true",
        help="spread the samples of an .npz over the splits of the Inception Score, as those of a folder are",
    )
    add_extra_options(parser)
    add_backend_options(parser)
    options = parser.parse_args(argv)
    check_backend_options(options)
    return options


def prepare(options: argparse.Namespace, share: Share) -> Evaluation:
    """Find out everything that can be wrong with the inputs, the cheap checks first.

    Raises ValueError, OSError or ImportError with one sentence that names the file.
    """
    if share.size > 1 and options.backend != "torch":
        raise ValueError(f"{share.size} processes: only --backend torch shares the work between processes")
    reference = open_images(options.reference, needs_images=False)
    samples = open_images(options.samples)
    if options.shuffle and samples.is_sorted_by_name:
        raise ValueError(f"--shuffle: has no effect for {samples.path}, a folder, whose images are always spread")
    notes = [] if options.out is None else check_out(options.out)
    extras = check_extras(options, reference, samples)
    backend, network = load_networks(options)
    if network is not None:
        network.check((reference, samples), options.batch_size)
    for images in (reference, samples):
        check_widths(images, samples, backend)
    folders = cache_folders(options, options.reference)
    cache = FeatureCache(folders) if folders else None

    reference_sha256, samples_sha256 = reference.sha256(), samples.sha256()
    features = load_features(cache, reference, reference_sha256, backend, notes)
    if share.rank == 0 and reference.count is not None and features is None:
        reference.verify()
    if share.rank == 0 and samples_sha256 != reference_sha256:
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
        share=share,
        extras=extras,
        network=network,
        order=order_of(samples, options.shuffle),
        notes=notes,
    )


def order_of(samples: ImageSource, shuffle: bool) -> np.ndarray | None:
    """The order of the samples in the splits of the Inception Score, None for the stored one.

    A folder's order is that of names, so that classes may follow one another: its images are always spread.
    """
    assert samples.count is not None
    several = samples.count > SPLIT_SIZE
    return spread_order(samples.count) if several and (shuffle or samples.is_sorted_by_name) else None


def load_networks(options: argparse.Namespace) -> tuple[FeatureBackend, FeatureNetwork | None]:
    """The suite's network, and that of --features. Raises ValueError, OSError or ImportError with one sentence."""
    if options.backend == "torch":  # always before TensorFlow: torch's libraries crash when they come later
        return load_backend(options, __file__), load_network(options)
    network = load_network(options)
    return load_backend(options, __file__), network


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


def check_widths(images: ImageSource, samples: ImageSource, backend: FeatureBackend) -> None:
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


def load_features(
    cache: FeatureCache | None, images: ImageSource, sha256: str, backend: FeatureBackend, notes: list[str]
) -> Features | None:
    """Features of the reference from the cache, None when they have to be computed."""
    if cache is None or images.count is None:
        return None
    try:
        features = cache.load(sha256, backend.identity, images.count)
    except ValueError as error:
        notes.append(f"{error}; features of {images.path} are computed again")
        return None
    if features is not None:
        notes.append(f"{images.path}: features from the cache")
    return features


def warn_about_sets(job: Evaluation) -> None:
    """Warn about what makes the numbers incomparable with others."""
    reference, samples = job.reference, job.samples
    warn_about_splits(job)
    if 0 < job.extras.ci < ENOUGH_REPEATS:
        doubt = 1.0 / math.sqrt(2 * (job.extras.ci - 1))
        job.warn(
            f"--ci {job.extras.ci}: so few repeats say little: the intervals' widths are uncertain by {doubt:.0%}; "
            f"take {ENOUGH_REPEATS} or more"
        )
    if job.extras.left_out:
        classes = job.extras.left_out
        shown = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
        job.warn(f"--per_class: {len(classes)} classes have fewer than 2 images in one of the sets: {shown}")
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


def warn_about_splits(job: Evaluation) -> None:
    """Warn about splits of the Inception Score that are short or, by the labels, hold few of the classes."""
    assert job.samples.count is not None
    if (rest := job.samples.count % SPLIT_SIZE) and job.samples.count > SPLIT_SIZE:
        job.warn(
            f"{job.samples.path}: the last split of the Inception Score has {rest} samples of {SPLIT_SIZE}, and a "
            "short split lowers it"
        )
    try:
        labels = job.samples.labels()
    except ValueError:  # none, or none that can be read: predictions will say
        return
    warn_about_order(job, labels, "labels")


def warn_about_predictions(job: Evaluation, samples: Features) -> None:
    """Warn about splits of the Inception Score that, by what the network sees, hold few of the classes."""
    assert samples.pool is not None
    if not job.said_unbalanced and job.order is None and len(samples.pool) > SPLIT_SIZE:
        warn_about_order(job, predicted_classes(samples.pool, job.backend.softmax_weight), "predicted classes")


def warn_about_order(job: Evaluation, classes: np.ndarray, source: str) -> None:
    """Warn when classes (N,) tell splits apart."""
    if job.order is None and len(classes) > SPLIT_SIZE and split_imbalance(classes) > UNBALANCED:
        job.said_unbalanced = True
        job.warn(
            f"{job.samples.path}: stored class by class, as its {source} show: splits of {SPLIT_SIZE} hold few of the "
            "classes, and the Inception Score is too small; --shuffle spreads the samples"
        )


def compute_features(job: Evaluation) -> tuple[Features, Features] | None:
    """The long work: features of the reference and the samples on the first process, None on the others."""
    reference = reference_features(job)
    if job.samples_sha256 == job.reference_sha256 and not job.extras.ci:
        return None if reference is None else (reference, reference)  # equal to the last bit on any device
    samples = _extract(job.samples, job, keep_spatial=job.extras.ci > 0)
    return None if reference is None or samples is None else (reference, samples)


def reference_features(job: Evaluation) -> Features | None:
    """Features of the reference, known or computed and kept; None on other processes than the first."""
    if job.reference.count is None:
        assert job.reference.statistics is not None
        return Features(None, *job.reference.statistics)
    features = job.reference_features
    if job.share.agree(features is None):
        features = _extract(job.reference, job)
    if features is not None and job.cache is not None and distance_type(job.half) not in features.radii:
        say(f"{job.reference.path}: roots and radii ...")
        features.manifold_radii(job.half)
        try:
            job.cache.save(job.reference_sha256, job.backend.identity, features)
        except OSError as error:
            job.warn(f"features of {job.reference.path} are not cached: {error}")
    return features


def _extract(images: ImageSource, job: Evaluation, keep_spatial: bool = False) -> Features | None:
    return extract_features(images, job.backend, job.batch_size, progress(images.path), job.share, keep_spatial)


def make_report(job: Evaluation, metrics: dict[str, float | None]) -> dict[str, Any]:
    """Numbers and what they were computed from, for JSON."""
    return {
        REPORT_MARK: 1,
        "metrics": metrics,
        "sample": _describe(job.samples, job.samples_sha256),
        "manifest": None if job.manifest is None else job.manifest[1],
        "reference": _describe(job.reference, job.reference_sha256),
        "graph": {"path": str(job.backend.path), "sha256": job.backend.sha256},
        "features": None if job.network is None else job.network.identity,
        "distances": distance_type(job.half),
        "inception_score_order": "stored" if job.order is None else "spread",
        "warnings": job.warnings,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **job.backend.versions,
        },
    }


def _describe(images: ImageSource, sha256: str) -> dict[str, Any]:
    return {
        "path": str(images.path),
        "size": images.size,  # bytes
        "N": images.count,
        "image_size": None if images.image_size is None else list(images.image_size),  # [H, W]
        "sha256": sha256,
        "statistics": "computed" if images.statistics is None else "from the file",
    }


def _size_text(images: ImageSource) -> str:
    return "no size" if images.image_size is None else "{}×{}".format(*images.image_size)


if __name__ == "__main__":
    sys.exit(main())

"""What the evaluator computes beside the suite's five numbers when it is asked to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from atomic_file import atomic_file
from feature_extraction import Features
from feature_networks import add_network_options, check_network_options
from fidelity_metrics import frechet_distance
from html_report import grid, html_page, png_bytes
from more_metrics import (
    confidence_intervals,
    distances_by_class,
    kernel_distance,
    nearest_neighbours,
    pick_images,
    shared_classes,
    statistics_of,
)
from PIL import Image
from sample_sets import ImageSource

if TYPE_CHECKING:
    from evaluator import Evaluation

NEIGHBOURS_SHOWN, SAMPLES_SHOWN = 5, 8
GRID = 8  # samples in a row and in a column of the page's first picture


@dataclass
class Extras:
    """What is asked for, checked. labels: of the reference and the samples, for distances by class."""

    kid: bool
    ci: int
    labels: tuple[np.ndarray, np.ndarray] | None
    nearest: Path | None
    html: Path | None
    left_out: list[str] = field(default_factory=list)  # classes without a distance of their own


@dataclass
class Findings:
    """What was found: further numbers by the names they are printed under, entries of the report, pictures."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)


def add_extra_options(parser: argparse.ArgumentParser) -> None:
    """Options for numbers and pictures beside the suite's."""
    parser.add_argument("--kid", action="store_true", help="kernel distance of the pool features, too")
    add_network_options(parser)
    parser.add_argument("--ci", type=int, default=0, metavar="REPEATS", help="95%% intervals from so many bootstraps")
    parser.add_argument("--per_class", action="store_true", help="FID of each class in the report (needs labels)")
    parser.add_argument("--nearest", type=Path, metavar="FILE.png", help="picture of samples and nearest real images")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="the report as a page with pictures, too")


def check_extras(options: argparse.Namespace, reference: ImageSource, samples: ImageSource) -> Extras:
    """Check what is asked for, without loading a network. Raises ValueError for what the sets cannot give."""
    needing = [f"--{name}" for name in ("kid", "features", "per_class", "nearest") if getattr(options, name)]
    if needing and reference.count is None:
        raise ValueError(f"{reference.path}: no images, which {', '.join(needing)} needs")
    if options.ci < 0 or options.ci == 1:
        raise ValueError(f"--ci {options.ci}: must be 0 (none) or at least 2")
    if options.per_class and options.out is None:
        raise ValueError("--per_class: its distances go into the report; give --out, too")
    for name, suffix in (("nearest", ".png"), ("html", ".html")):
        path = getattr(options, name)
        if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
            raise ValueError(f"--{name} {path}: expected the name of a {suffix} file in a folder that exists")
        if path is not None and path.exists():
            raise ValueError(f"--{name} {path}: exists; choose another name or move it away")
    labels = comparable_labels(reference, samples) if options.per_class else None
    left_out = classes_left_out(*labels) if labels is not None else []
    check_network_options(options)
    return Extras(options.kid, options.ci, labels, options.nearest, options.html, left_out)


def comparable_labels(reference: ImageSource, samples: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and (M,) of the sets: integers, or names on both sides where one side has names.

    Raises ValueError where a set has no labels, and where no class has two images in each of them.
    """
    of_reference, of_samples = reference.labels(), samples.labels()
    if of_reference.dtype.kind != of_samples.dtype.kind:  # folders called 0, 1, 2 are the classes 0, 1, 2
        of_reference, of_samples = of_reference.astype(str), of_samples.astype(str)
    if not shared_classes(of_reference, of_samples):
        raise ValueError(
            f"--per_class: no class has 2 images in both sets: {reference.path} has {_some_of(of_reference)}, "
            f"{samples.path} has {_some_of(of_samples)}; name folders and labels alike"
        )
    return of_reference, of_samples


def classes_left_out(reference: np.ndarray, samples: np.ndarray) -> list[str]:
    """Classes of either set that have no distance of their own, for want of two images in both."""
    everywhere = np.unique(np.concatenate([reference, samples])).tolist()
    shared = set(shared_classes(reference, samples))
    return [str(label) for label in everywhere if label not in shared]


def _some_of(labels: np.ndarray, most: int = 4) -> str:
    classes = [str(label) for label in np.unique(labels)]
    return ", ".join(classes[:most]) + (f" and {len(classes) - most} more" if len(classes) > most else "")


def compute_extras(
    job: Evaluation,
    features: tuple[Features, Features],
    metrics: dict[str, float | None],
    inside: tuple[np.ndarray, np.ndarray] | None,
) -> Findings:
    """Compute what is asked for. features: of the reference and of the samples."""
    extras, network, sets, found = job.extras, job.network, (job.reference, job.samples), Findings()
    reference, samples = features
    assert samples.pool is not None
    if extras.ci:
        found.entries["intervals"] = confidence_intervals(
            metrics, reference, samples, job.backend.softmax_weight, inside, extras.ci, job.order
        )
    if reference.pool is not None and extras.kid:
        found.metrics["KID"], found.entries["KID_deviation"] = kernel_distance(reference.pool, samples.pool)
    if network is not None:
        name = network.path.stem
        pair = [network.of_set(images, job.batch_size) for images in sets]
        found.metrics[f"FD ({name})"] = frechet_distance(*(statistics_of(part) for part in pair))
        found.metrics[f"KID ({name})"], found.entries[f"KID_deviation ({name})"] = kernel_distance(*pair)
    if extras.labels is not None and reference.pool is not None:
        found.entries["FID_by_class"] = distances_by_class(
            reference.pool, extras.labels[0], samples.pool, extras.labels[1]
        )
    if extras.html is not None:
        found.pictures["Samples"] = some_samples(sets[1])
    if reference.pool is not None and (extras.nearest is not None or extras.html is not None):
        picture, distances = neighbour_picture(sets, reference.pool, samples.pool)
        found.pictures["The samples nearest to a real image, and the real images nearest to them"] = picture
        found.entries["nearest_real_image"] = distances
        if extras.nearest is not None:
            write_bytes(extras.nearest, png_bytes(picture))
    return found


def some_samples(samples: ImageSource) -> Image.Image:
    """Some samples at even distances in a square: the first ones are all of one class where classes follow another."""
    assert samples.count is not None
    chosen = np.linspace(0, samples.count - 1, min(GRID * GRID, samples.count)).round()
    images = list(pick_images(samples.batches, chosen).values())
    return grid([images[start : start + GRID] for start in range(0, len(images), GRID)])


def neighbour_picture(
    sets: tuple[ImageSource, ImageSource], reference: np.ndarray, samples: np.ndarray
) -> tuple[Image.Image, dict[str, float]]:
    """Rows of a sample and its nearest real images, of the samples that are nearest to one; quantiles of distances.

    A model that stores its training images shows them here, if the reference holds those.
    """
    indices, distances = nearest_neighbours(reference, samples, NEIGHBOURS_SHOWN)
    shown = np.argsort(distances[:, 0], kind="stable")[:SAMPLES_SHOWN]
    real = pick_images(sets[0].batches, indices[shown].ravel())
    made = pick_images(sets[1].batches, shown)
    rows = [[made[int(sample)], *(real[int(index)] for index in indices[sample])] for sample in shown]
    quantiles = {f"{level:.0%}": float(np.quantile(distances[:, 0], level)) for level in (0.0, 0.01, 0.5)}
    return grid(rows), quantiles


def write_html(path: Path, report: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    """Write the page, completely or not at all."""
    write_bytes(path, html_page(report, pictures).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, completely or not at all."""
    with atomic_file(path) as file:
        file.write(content)

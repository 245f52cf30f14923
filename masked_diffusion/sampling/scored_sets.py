"""Score sample sets of several settings: a folder for each set, one table, one figure against settings and compute.

The programs that sample and score are run as processes, so that their libraries do not share one. A sweep that was
stopped goes on: sets and scores that are there are taken, and nothing that was sampled is overwritten.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masked_diffusion.files import atomic_write, sha256_of, write_json

TABLE_NAME, FIGURE_NAME, SETTINGS_NAME = "sweep.csv", "sweep.png", "sweep.json"
# Columns of the table, with the evaluator's names of the same numbers.
SCORES = {"fid": "FID", "is": "Inception Score", "precision": "Precision", "recall": "Recall"}
PASSES = "passes_per_image"
ALLOWING = "--few_steps"
PANEL_SIZE = (4.5, 3.0)  # inches
Row = dict[str, float | None]
Run = Callable[[Sequence[str], Mapping[str, str]], int]  # a command and its environment -> its exit status


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end. What it prints stands on stderr: stdout is for results."""
    return subprocess.run(command, env=dict(environment), stdout=sys.stderr, check=False).returncode


def figure_class() -> Callable[..., Any]:
    """The class of figures. Raises ValueError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install -e '.[plot]'") from error
    return Figure


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure of so many panels, and the panels (rows, columns)."""
    width, height = PANEL_SIZE
    figure = figure_class()(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def of_images(flags: Sequence[str]) -> Iterator[str]:
    """Flags of image_sample.py without the one that lets a sampling begin and changes no image.

    A sweep that was refused for its few steps, or begun before they were, goes on with it.
    """
    rest = iter(flags)
    for flag in rest:
        if flag == ALLOWING:
            next(rest, None)  # its value
        elif not flag.startswith(f"{ALLOWING}="):
            yield flag


@dataclass(frozen=True)
class Point:
    """One setting. value: of what is swept over. flags: of image_sample.py, for this point alone. make: called before
    the sampling, makes what it needs where that is not there."""

    value: float
    flags: Sequence[str]
    make: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Sweep:
    """A sweep over one setting, in a folder of its own.

    axis: name of what is swept over. sample: image_sample.py with the flags that all points share. score: evaluator.py
    with the reference. network: its flags. launch: what Python starts the sampling with. run: how commands are run.
    source: of the weights, where they are made for the sweep.
    """

    folder: Path
    axis: str
    sample: Sequence[str]
    score: Sequence[str]
    network: Sequence[str] = ()
    launch: Sequence[str] = ()
    run: Run = run_command
    source: Mapping[str, Any] = field(default_factory=dict)

    def claim(self) -> None:
        """Take the folder. Raises ValueError where it holds a sweep of other settings."""
        sample = [*of_images(self.sample[1:])]
        settings = {"axis": self.axis, "sample": sample, "score": [*self.score[1:], *self.network]}
        settings |= self.source
        path = self.folder / SETTINGS_NAME
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
            return
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from None
        if former != settings:
            raise ValueError(f"--out {self.folder}: it holds a sweep of other settings; give another folder")

    def work(self, points: Sequence[Point]) -> int:
        """Make what is missing, in order; after each point the table and the figure have it.

        Returns the exit status: 0, or that of the program that failed, which has said why.
        """
        rows = {row[self.axis]: row for row in self.rows()}
        for point in points:
            folder = self.folder / f"{self.axis}_{point.value:g}"
            point.make()
            command = [sys.executable, *self.launch, *self.sample, *point.flags]
            status = self.run(command, {**os.environ, "OPENAI_LOGDIR": str(folder)})
            if status:
                return status
            row, status = self._scored(folder)
            if status:
                return status
            rows[point.value] = {self.axis: point.value, **row}
            self._write([rows[value] for value in sorted(rows, key=lambda value: value or 0.0)])
        sys.stdout.write(f"{(self.folder / TABLE_NAME).absolute()}\n{(self.folder / FIGURE_NAME).absolute()}\n")
        return 0

    def _scored(self, folder: Path) -> tuple[Row, int]:
        """The numbers of the set in a folder, scored unless they are there, and the exit status of the scoring."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        samples = folder / manifest["samples"]
        report = folder / f"scores_{sha256_of(samples)[:16]}.json"  # a set of other samples keeps its own
        if not report.is_file():
            command = [sys.executable, *self.score, str(samples), "--out", str(report), *self.network]
            status = self.run(command, os.environ)
            if status:
                return {}, status
        metrics = json.loads(report.read_text(encoding="utf-8"))["metrics"]
        scores = {column: metrics.get(name) for column, name in SCORES.items()}
        return {PASSES: manifest[PASSES], **scores}, 0

    def rows(self) -> list[Row]:
        """The rows of the table, which may be of an earlier command; none where there is no table."""
        try:
            text = (self.folder / TABLE_NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [
            {name: float(value) if value else None for name, value in row.items()}
            for row in csv.DictReader(io.StringIO(text))
        ]

    def _write(self, rows: Sequence[Row]) -> None:
        text = io.StringIO()
        table = csv.DictWriter(text, [self.axis, PASSES, *SCORES], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with atomic_write(self.folder / TABLE_NAME) as file:
            file.write(text.getvalue().encode())
        with atomic_write(self.folder / FIGURE_NAME) as file:
            draw(self.axis, rows).savefig(file, format="png")


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how sets are sampled and scored, whatever is swept over."""
    parser.add_argument("--eval_ref", type=Path, help="reference batch or folder, see evaluations/README.md")
    parser.add_argument("--eval_graph", type=Path, help="the evaluator's network (default: where it looks for it)")
    parser.add_argument(
        "--eval_backend", default="torch", choices=("torch", "tensorflow"), help="what runs it (%(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="that sample, such as one per GPU (%(default)s)")


@dataclass(frozen=True)
class Scoring:
    """Where sets go, and how they are sampled and scored; named as the flags of :func:`add_scoring_flags`."""

    out: Path
    eval_ref: Path | None
    eval_graph: Path | None
    eval_backend: str
    processes: int


def open_sweep(
    asked: Scoring, axis: str, of_sampler: Sequence[str], root: Path, source: Mapping[str, Any] | None = None
) -> Sweep:
    """The sweep that is asked for. It takes its folder.

    of_sampler: further flags, of image_sample.py. root: of the repository, where the programs are. source: see
    :class:`Sweep`. Raises ValueError or OSError.
    """
    figure_class()
    if asked.eval_ref is None:
        raise ValueError("--eval_ref: give the reference to compare with")
    if not asked.eval_ref.expanduser().exists():
        raise FileNotFoundError(f"--eval_ref {asked.eval_ref}: no such file; evaluations/README.md says what it is")
    if asked.eval_graph is not None and not asked.eval_graph.expanduser().is_file():
        raise FileNotFoundError(
            f"--eval_graph {asked.eval_graph}: no such file; evaluations/README.md says where to get the network"
        )
    if asked.processes < 1:
        raise ValueError(f"--processes {asked.processes}: must be at least 1")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={asked.processes}"]
    graph = [] if asked.eval_graph is None else ["--graph", str(asked.eval_graph.expanduser())]
    sweep = Sweep(
        folder=asked.out.expanduser(),
        axis=axis,
        sample=[str(root / "scripts" / "image_sample.py"), *of_sampler],
        score=[str(root / "evaluations" / "evaluator.py"), str(asked.eval_ref.expanduser())],
        network=["--backend", asked.eval_backend, *graph],
        launch=launch if asked.processes > 1 else (),
        source=source or {},
    )
    sweep.claim()
    return sweep


def draw(axis: str, rows: Sequence[Row]) -> Any:
    """A row of panels for each score that is there, against the setting and against compute."""
    names = [name for name in SCORES if any(row[name] is not None for row in rows)]
    figure, axes = panels(len(names), 2)
    for name, row_of_panels in zip(names, axes, strict=True):
        for against, panel in zip((axis, PASSES), row_of_panels, strict=True):
            points = [(row[against], row[name], row[axis]) for row in rows if row[name] is not None]
            x, y, values = zip(*sorted(points), strict=True)
            panel.plot(x, y, marker=".", linestyle="-" if against == axis else "")
            if against == PASSES:
                for place in zip(x, y, values, strict=True):
                    panel.annotate(f"{place[2]:g}", place[:2])
            panel.set_xlabel(against.replace("_", " "))
            panel.set_ylabel(SCORES[name])
            panel.grid(alpha=0.3)
    return figure

"""Plot scores and losses of one or several runs against steps, images, compute and seconds.

python scripts/fid_curve.py output_mdt_s2 output_mdt_b2 --out fid_curve.svg
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion.files import atomic_write
from masked_diffusion.sampling.scored_sets import figure_class, panels
from masked_diffusion.script_util import main_of
from masked_diffusion.training.run_log import RunLog, read_run_log

PANELS = {"eval_fid": "FID", "eval_is": "Inception Score", "loss": "loss, all tokens", "m_loss": "loss, masked"}
FORMATS = (".png", ".svg")


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Plot scores and losses of runs against steps, images, compute and seconds."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders of trainings")
    parser.add_argument("--out", type=Path, default=Path("fid_curve.png"), help="picture, .png or .svg (%(default)s)")
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Raises ValueError or OSError for what cannot be plotted."""
    if args.out.suffix not in FORMATS:
        raise ValueError(f"--out {args.out}: expected a name that ends in {' or '.join(FORMATS)}")
    figure_class()
    runs = [read_run_log(folder.expanduser()) for folder in args.runs]
    axes = [scales(run) for run in runs]

    def work() -> None:
        figure = draw(runs, axes)
        with atomic_write(args.out) as file:
            figure.savefig(file, format=args.out.suffix[1:])
        sys.stdout.write(f"{args.out.absolute()}\n")

    return work


def scales(run: RunLog) -> dict[str, np.ndarray]:
    """What a run is plotted against: title -> (rows,). A multiply-add counts as one, as in the papers."""
    from masked_diffusion.models.cost import cost  # with torch, which takes seconds to import

    config, images = run.config(), run.columns["samples"]
    gflops = cost(config.model.build()) / 1e9
    return {
        "steps": run.steps,
        "images": images,
        "training compute, TFLOPs": run.tflops(gflops),
        "seconds": run.elapsed(),
    }


def draw(runs: list[RunLog], axes: list[dict[str, np.ndarray]]) -> Any:
    """A row of panels for each number that some run has, a column for each scale, a line for each run."""
    names = [name for name in PANELS if any(len(run.points(name)[0]) for run in runs)]
    figure, rows_of_panels = panels(len(names), len(axes[0]))
    for name, row in zip(names, rows_of_panels, strict=True):
        for scale, panel in zip(axes[0], row, strict=True):
            for run, positions in zip(runs, axes, strict=True):
                rows, values = run.points(name)
                panel.plot(positions[scale][rows], values, marker=".", label=run.folder.name)
            panel.set_xlabel(scale)
            panel.set_ylabel(PANELS[name])
            panel.grid(alpha=0.3)
    rows_of_panels[0][0].legend()
    return figure


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

"""The command ``mdt``: short names of the scripts.

    mdt train --data_dir IMAGES --image_size 64      # python scripts/image_train.py --data_dir IMAGES --image_size 64

A wheel has the scripts in the folder ``beside`` of the package; in a checkout they stand beside the package.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
USAGE_ERROR = 2


class Command(NamedTuple):
    """A command. program: the script that it runs, below the checkout. does: in a few words."""

    program: str
    does: str


COMMANDS = {
    "train": Command("scripts/image_train.py", "train a model"),
    "sample": Command("scripts/image_sample.py", "sample images into an .npz"),
    "infer": Command("infer_mdt.py", "draw a few pictures"),
    "demo": Command("scripts/demo.py", "draw in the browser"),
    "evaluate": Command("evaluations/evaluator.py", "score samples: FID, Inception Score, precision, recall"),
    "reference": Command("evaluations/make_reference.py", "make the reference that samples are compared with"),
    "check-data": Command("scripts/check_data.py", "find images that cannot be read"),
    "make-dataset": Command("scripts/make_dataset.py", "write a data set in another form"),
    "encode": Command("scripts/encode_latents.py", "encode images once, for all trainings"),
    "train-autoencoder": Command("scripts/train_autoencoder.py", "train a small autoencoder"),
    "convert": Command("scripts/convert_checkpoint.py", "write a checkpoint in another format"),
    "posthoc-ema": Command("scripts/posthoc_ema.py", "make a weight average after a training"),
    "visualize": Command("scripts/visualize.py", "look into a trained model"),
    "on-track": Command("scripts/on_track.py", "compare a run with a recipe's card"),
    "make-card": Command("scripts/make_card.py", "make a card of several runs"),
    "fid-curve": Command("scripts/fid_curve.py", "plot scores and losses of runs"),
    "study": Command("scripts/study.py", "compare ways to train at equal cost"),
    "docs": Command("scripts/make_api_page.py", "build the API pages"),
    "benchmark": Command("scripts/benchmark.py", "measure speed and memory"),
}


def checkout() -> Path:
    """The folder that holds the scripts."""
    beside = PACKAGE / "beside"
    return beside if beside.is_dir() else PACKAGE.parent


def listing() -> str:
    """What ``mdt`` alone prints."""
    lines = (f"  {name:<18} {command.does}" for name, command in COMMANDS.items())
    return "\n".join(["usage: mdt COMMAND ...", "", *lines, "", "mdt COMMAND --help lists its flags.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script of a command in this process, as ``python`` would. Returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else [*argv]) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(listing())
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"mdt: error: {name}: unknown command; choose one of {', '.join(COMMANDS)}\n")
        return USAGE_ERROR
    program = checkout() / COMMANDS[name].program
    sys.argv = [str(program), *rest]
    sys.path.insert(0, str(program.parent))  # scripts import their helpers from their own folder
    runpy.run_path(str(program), run_name="__main__")  # ends in sys.exit
    return 0

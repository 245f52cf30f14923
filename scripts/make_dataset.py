"""Write a data set in another form: images of any source into a zip archive, tar archives or a folder.

    python scripts/make_dataset.py /dataset/flowers flowers.zip
    python scripts/make_dataset.py flowers.zip "shards/flowers-{000..007}.tar" --image_size 256

The same command goes on where it was interrupted. Exit status: 0; 1 when images were left out because they cannot be
read; 2 for what cannot work.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

from masked_diffusion.data.data_config import READING, DataConfig
from masked_diffusion.script_util import MACHINE_FLAGS, main_of, make_parser
from masked_diffusion.settings import Flag, flags_of

DATA_FLAGS = flags_of(DataConfig)
FLAGS = {
    "image_size": Flag(
        None, "crop and resize to this side, and save as PNG; None keeps each file as it is", "data", int | None
    ),
    "crop": Flag(True, "cut the square in the middle; False, with --image_size, resizes the short side alone", "data"),
    **{name: DATA_FLAGS[name] for name in READING[2:]},
    "class_cond": DATA_FLAGS["class_cond"]._replace(help="write class labels"),
    "num_workers": MACHINE_FLAGS["num_workers"],
}


def create_argparser() -> argparse.ArgumentParser:
    parser = make_parser("Write a data set in another form.", FLAGS)
    parser.add_argument("source", metavar="SOURCE", help="images of any form that a training reads, as its --data_dir")
    parser.add_argument(
        "dest",
        metavar="DEST",
        help="what to write: a .zip, a .tar, a pattern such as shard-{000..007}.tar, or a folder",
    )
    return parser


def prepare(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    """Returns the work, and imports torch, which takes seconds. Raises ValueError or OSError."""
    from masked_diffusion.programs import make_dataset

    return make_dataset.prepare(args, stack)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

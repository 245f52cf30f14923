"""Read every image, or all latents, of a data folder as a training would, and name all that cannot be read in one go.

    python scripts/check_data.py --data_dir IMAGES --image_size 256

Exit status: 0 when all can be read, 1 when some cannot, 2 for a folder or flag that cannot work.
"""

import argparse
import sys
from collections.abc import Callable

from masked_diffusion.data.data_config import READING, DataConfig
from masked_diffusion.script_util import MACHINE_FLAGS, main_of, make_parser
from masked_diffusion.settings import Flag, flags_of

FLAGS = {
    "data_dir": Flag("", "images of any form that a training reads, or latents (scripts/encode_latents.py)", "data"),
    "image_size": Flag(256, "side of the square images in pixels, as in the training", "data"),
    **{name: flags_of(DataConfig)[name] for name in READING[2:]},
    "class_cond": flags_of(DataConfig)["class_cond"]._replace(help="look for classes, too"),
    "num_workers": MACHINE_FLAGS["num_workers"],
    "out": Flag("", "also write the bad files, with a tab and the reason, to this file", "saving"),
}


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Check that every image of a data folder can be read.", FLAGS)


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Returns the work, and imports torch, which takes seconds. Raises ValueError or FileNotFoundError."""
    from masked_diffusion.programs import check_data

    return check_data.prepare(args)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

"""Write a data set in another form: images of any source into a zip archive, tar archives or a folder.

    python scripts/make_dataset.py /dataset/flowers flowers.zip
    python scripts/make_dataset.py flowers.zip "shards/flowers-{000..007}.tar" --image_size 256

The same command goes on where it was interrupted. Exit status: 0; 1 when images were left out because they cannot be
read; 2 for what cannot work.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from masked_diffusion.data.bad_images import list_entry
from masked_diffusion.data.conversion import Conversion, Plan
from masked_diffusion.data.data_config import READING, DataConfig
from masked_diffusion.data.image_files import is_remote
from masked_diffusion.data.image_writers import target_of
from masked_diffusion.image_datasets import DigitsDataset, SourceDataset, open_dataset
from masked_diffusion.script_util import MACHINE_FLAGS, args_to_dict, choose_num_workers, make_parser, run_script
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


def main(argv: Sequence[str] | None = None) -> int:
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args, stack))


def prepare(args: argparse.Namespace, stack: ExitStack) -> Callable[[], int]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    plan = Plan(args.image_size, args.crop)
    if not args.dest or is_remote(args.dest):
        raise ValueError(f"DEST {args.dest}: give a local path for the data set")
    target = target_of(args.dest)
    num_workers = choose_num_workers(args.num_workers)
    if not args.crop and args.image_size is None:
        warnings.warn("--crop False is ignored without --image_size", stacklevel=2)
    try:
        dataset = open_dataset(args.source, image_size=args.image_size or 1, **args_to_dict(args, READING[1:]))
        if isinstance(dataset, DigitsDataset):  # as image files, which they become
            dataset = SourceDataset(args.source, image_size=dataset.image_size, class_cond=args.class_cond)
    except (ValueError, OSError) as error:
        raise type(error)(str(error).replace("--data_dir", "SOURCE")) from error
    if not isinstance(dataset, SourceDataset):
        raise ValueError(f"SOURCE {args.source}: holds latents; give the images they were made of")
    conversion = Conversion(dataset, target, plan, stack)
    sys.stderr.write("".join(f"{line}\n" for line in (f"data: {dataset}", *conversion.notes)))
    return lambda: work(conversion, num_workers)


def work(conversion: Conversion, num_workers: int) -> int:
    """Write the data set and report. Returns the exit status."""
    bad = conversion.run(num_workers)
    sys.stderr.write("".join(f"left out: {list_entry(name, reason)}\n" for name, reason in bad.items()))
    sys.stdout.write(f"{conversion.target.path.absolute()}: {len(conversion.dataset) - len(bad)} images\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

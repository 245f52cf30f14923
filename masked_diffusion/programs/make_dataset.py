"""Write images of any source into a zip archive, tar archives or a folder."""

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack

from masked_diffusion.data.bad_images import list_entry
from masked_diffusion.data.conversion import Conversion, Plan
from masked_diffusion.data.data_config import READING, DataConfig
from masked_diffusion.data.image_files import is_remote
from masked_diffusion.data.image_writers import target_of
from masked_diffusion.image_datasets import DigitsDataset, SourceDataset, open_dataset
from masked_diffusion.script_util import args_to_dict, choose_num_workers


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
            dataset = SourceDataset(args.source, DataConfig(class_cond=args.class_cond), image_size=dataset.image_size)
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

"""Measure training steps on one GPU for several models, each at the largest batch that fits, as a table.

    python scripts/gpu_report.py --out gpu_report

Cached latents, bfloat16 under autocast: our step, our step with compiled blocks, and the plain step.
Appends a JSON line per measurement to ``report.jsonl`` and writes a table ``report_TIME.md`` in the folder --out.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable

from benchmarking.settings import Settings, check_plain

from masked_diffusion.script_util import main_of, make_parser
from masked_diffusion.settings import Flag

FLAGS = {
    "models": Flag("MDT_S_2,MDT_B_2,MDT_XL_2", "comma list of models to measure"),
    "image_size": Flag(256, "side of the images whose latents are trained on"),
    "first_batch": Flag(32, "smallest batch tried; it is doubled until the memory is full"),
    "largest_batch": Flag(1024, "largest batch tried"),
    "repeats": Flag(5, "steps measured, of which the median counts"),
    "device": Flag("auto", "auto, cpu, cuda or cuda:N"),
    "out": Flag("gpu_report", "folder for the table; it is made where it is missing"),
}


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Measure training steps at the largest batches; writes a table.", FLAGS)


def prepare(args: argparse.Namespace, stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    if not 1 <= args.first_batch <= args.largest_batch:
        raise ValueError(f"--first_batch {args.first_batch}: must be in 1 ... {args.largest_batch} (--largest_batch)")
    models = [name.strip() for name in args.models.split(",")]
    all_settings = [
        Settings(model=name, image_size=args.image_size, repeats=args.repeats, use_bf16=True) for name in models
    ]
    for settings in all_settings:
        check_plain(settings)
    # With torch, which takes seconds to import.
    from benchmarking import report

    return report.prepare(args, all_settings, stack)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

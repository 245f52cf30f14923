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

from masked_diffusion.script_util import add_dict_to_argparser, main_of

MODELS = "MDT_S_2,MDT_B_2,MDT_XL_2"
HELPS = {
    "models": "comma list of models to measure",
    "image_size": "side of the images whose latents are trained on",
    "first_batch": "smallest batch tried; it is doubled until the memory is full",
    "largest_batch": "largest batch tried",
    "repeats": "steps measured, of which the median counts",
    "device": "auto, cpu, cuda or cuda:N",
    "out": "folder for the table; it is made where it is missing",
}


def create_argparser() -> argparse.ArgumentParser:
    defaults = {
        "models": MODELS,
        "image_size": 256,
        "first_batch": 32,
        "largest_batch": 1024,
        "repeats": 5,
        "device": "auto",
        "out": "gpu_report",
    }
    parser = argparse.ArgumentParser(description="Measure training steps at the largest batches; writes a table.")
    add_dict_to_argparser(parser, defaults, helps=HELPS)
    return parser


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

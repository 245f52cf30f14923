"""Measure the speed and the peak memory of training, sampling, data loading and the writing of samples, alone and
against the plain path.

    python scripts/benchmark.py --case train_step,sample,data,assemble --model MDT_S_2 --image_size 256 --batch_size 4

Prints one JSON object per case, a line each; a case that is alone is measured in this process, several in one child
process each, so that a peak of memory is its own. A new case is a function and a line in ``benchmarking/measuring.py``,
and its name in ``benchmarking/settings.py``.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence

from benchmarking.settings import (
    CASES,
    IN_CHILDREN,
    NEED_PLAIN,
    Settings,
    check_plain,
    with_autoencoder,
)

from masked_diffusion.script_util import args_to_dict, main_of, make_parser
from masked_diffusion.settings import Flag, flags_of

FLAGS = {
    "case": Flag("train_step,sample,data,assemble", "comma list of what to measure"),
    **flags_of(Settings),
    "device": Flag("auto", "auto, cpu, cuda or cuda:N"),
    "out": Flag("", "append the lines to this file, too"),
}


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Measure speed and peak memory; prints a JSON object per case.", FLAGS)


def prepare(args: argparse.Namespace, argv: Sequence[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    cases = [name.strip() for name in args.case.split(",")]
    for name in cases:
        if name not in CASES and name not in IN_CHILDREN:
            raise ValueError(f"--case {name}: unknown; choose of {', '.join([*CASES, *IN_CHILDREN])}")
    if "index_of" in cases and not args.index_dir:
        raise ValueError("--case index_of: opens what --case index writes; use --case index")
    settings = Settings(**args_to_dict(args, flags_of(Settings)))
    if set(cases) & set(NEED_PLAIN):
        check_plain(settings)
    if "encode" in cases:
        with_autoencoder(settings)
    # With torch, which takes seconds to import.
    from benchmarking import measuring

    return measuring.prepare(args, argv, cases, settings, stack)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

"""Judge samples of an embedded data set: train a small classifier, and count the samples it reads as asked for.

    python scripts/read_digits.py output_digits/samples_355x8x8x3.npz --graph output_digits/digits.pb \
        --reference output_digits/digits_test.npz
    python scripts/read_digits.py output_shapes/samples_500x32x32x3.npz --embedded shapes

``--graph`` also writes the classifier as a TensorFlow graph with the node names of the ADM evaluator's, and
``--reference`` the held-back images as a reference batch, so that the evaluator itself scores the samples. Both can be
had without samples, for a training that is to be evaluated.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from masked_diffusion.script_util import run_script


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Count how many samples of an embedded data set are read as asked for."
    )
    parser.add_argument("samples", type=Path, nargs="?", help="samples_Nx8x8x3.npz, class-conditional")
    parser.add_argument(
        "--embedded", choices=("digits", "shapes"), default="digits", help="the data set (default: %(default)s)"
    )
    parser.add_argument("--graph", type=Path, help="write the classifier as a TensorFlow graph for the evaluator")
    parser.add_argument("--reference", type=Path, help="write the held-back images as a reference batch (.npz)")
    args = parser.parse_args(argv)
    return run_script(lambda stack: prepare(args))


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Check the flags, then the samples. Returns the work. Raises ValueError."""
    if args.samples is None and args.graph is None and args.reference is None:
        raise ValueError("nothing to do: give samples to read, or --graph and --reference to write")
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import read_digits

    return read_digits.prepare(args)


if __name__ == "__main__":
    sys.exit(main())

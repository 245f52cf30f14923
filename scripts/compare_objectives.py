"""Compare the objectives on the embedded digits: held-out error, share of samples read right, and seconds of training.

    python scripts/compare_objectives.py --out objectives_digits

Each training is that of ``bash run.sh`` under another objective and seed, shorter, in an ordinary run folder below
--out. A stopped comparison goes on with the same command. At the end it prints the table as Markdown.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from studying.settings import Comparison

from masked_diffusion.choices import OBJECTIVES
from masked_diffusion.script_util import finite_float, main_of


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare the objectives on the embedded digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison; the same one goes on")
    parser.add_argument(
        "--objectives", default=",".join(OBJECTIVES), help="comma list of what to train and show (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of each training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each objective (%(default)s)")
    parser.add_argument("--sampling_steps", default="10,25,50", help="comma list, a sample set each (%(default)s)")
    parser.add_argument("--num_samples", type=int, default=355, help="of each sample set (%(default)s)")
    parser.add_argument(
        "--cfg_scale", type=finite_float, default=4.0, help="largest weight of the guidance (%(default)s)"
    )
    parser.add_argument("--held_out_images", type=int, default=355, help="images to measure on, at most (%(default)s)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (%(default)s)")
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Check the flags. Returns the work. Raises ValueError or OSError."""
    names = list(dict.fromkeys(name.strip() for name in args.objectives.split(",") if name.strip()))
    if unknown := [name for name in names if name not in OBJECTIVES]:
        raise ValueError(f"--objectives {unknown[0]}: unknown; choose some of {', '.join(OBJECTIVES)}")
    if not names:
        raise ValueError(f"--objectives: give one or more of {', '.join(OBJECTIVES)}")
    for name in ("steps", "seeds", "num_samples", "held_out_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    own = ("steps", "sampling_steps", "num_samples", "cfg_scale", "held_out_images")
    comparison = Comparison(**{name: getattr(args, name) for name in own})
    from studying.objective_table import begin  # with torch, which takes seconds to import

    return begin(comparison, args.out, names, args.seeds, args.device)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

"""Sample a set for each weight of the guidance, score the sets, and plot the scores against weight and compute.

    python scripts/guidance_sweep.py --weights 1,1.5,2,3 --eval_ref flowers256.npz --out output_flowers_sweep \
        --model_path output_flowers/ema_0.9999_100000.pt --guidance constant --guide_from masked --num_samples 5000

Further flags are those of scripts/image_sample.py. The same command goes on with a sweep that was stopped.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from masked_diffusion.sampling.scored_sets import Point, Scoring, add_scoring_flags, open_sweep
from masked_diffusion.script_util import finite_float, from_args, main_of

ROOT = Path(__file__).resolve().parent.parent
SWEPT = ("--cfg_scale", "--cfg_cond")


def weights(text: str) -> list[float]:
    """``1,1.5`` -> [1.0, 1.5]. Raises argparse.ArgumentTypeError for anything but numbers of 0 or more."""
    found = [finite_float(part) for part in text.split(",")]
    if any(weight < 0 for weight in found):
        raise argparse.ArgumentTypeError(f"expected weights of 0 or more, got {text!r}")
    return list(dict.fromkeys(found))


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Score sample sets of several weights of the guidance. Further flags are image_sample.py's.",
        allow_abbrev=False,
    )
    parser.add_argument("--weights", type=weights, required=True, help="comma list, such as 1,1.5,2,3; 1 is none")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep; a stopped one goes on there")
    add_scoring_flags(parser)
    return parser


def prepare(args: argparse.Namespace, of_sampler: Sequence[str]) -> Callable[[], int]:
    """Raises ValueError or OSError for what cannot be swept over."""
    for flag in SWEPT:
        if any(part.partition("=")[0] == flag for part in of_sampler):
            raise ValueError(f"{flag}: --weights decides it; leave it out")
    sweep = open_sweep(from_args(Scoring, args), "weight", of_sampler, ROOT)
    points = [Point(weight, ["--cfg_cond", "True", "--cfg_scale", str(weight)]) for weight in args.weights]
    return lambda: sweep.work(points)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

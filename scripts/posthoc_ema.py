"""Make weight averages of any length after a training, from the snapshots that --ema_power kept.

    python scripts/posthoc_ema.py --run output_mdt_s2 --std 0.07 --out output_mdt_s2/posthoc_0.07.pt
    python scripts/posthoc_ema.py --run output_mdt_s2 --sweep 0.02:0.20:10 --out output_mdt_s2_lengths \
        --eval_ref VIRTUAL_imagenet256_labeled.npz --num_samples 10000

In the run's folder, sampling finds the model's config.json beside the new file. A sweep makes a series of averages,
samples a set from each, scores the sets, and plots the scores against the length; further flags are those of
scripts/image_sample.py. The same command goes on with a sweep that was stopped.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from masked_diffusion.choices import check_std
from masked_diffusion.files import sha256_of
from masked_diffusion.sampling.scored_sets import Point, Scoring, add_scoring_flags, open_sweep
from masked_diffusion.script_util import finite_float, from_args, main_of

if TYPE_CHECKING:
    from torch import Tensor

    from masked_diffusion.runs.posthoc_ema import Snapshots

ROOT = Path(__file__).resolve().parent.parent
SWEEP_ONLY = ("eval_ref", "eval_graph")


def lengths(text: str) -> list[float]:
    """``0.02:0.20:10`` -> ten lengths from 0.02 to 0.20. Raises argparse.ArgumentTypeError for anything else."""
    try:
        first, last, count = text.split(":")
        low, high, number = float(first), float(last), int(count)
    except ValueError:
        low, high, number = math.nan, math.nan, 0
    if not (number >= 2 and low < high):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST:COUNT, such as 0.02:0.20:10, got {text!r}")
    return [round(low + (high - low) * i / (number - 1), 6) for i in range(number)]


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make weight averages of any length after a training.", allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a training with --ema_power")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--std", type=finite_float, help="length of the average as a share of the training, such as 0.07"
    )
    which.add_argument("--sweep", type=lengths, help="FIRST:LAST:COUNT, lengths to score, such as 0.02:0.20:10")
    parser.add_argument("--step", type=int, help="step of a snapshot to end at (default: the last one)")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .pt or .safetensors; folder of a sweep")
    add_scoring_flags(parser)
    return parser


def prepare(args: argparse.Namespace, of_sampler: Sequence[str]) -> Callable[[], int | None]:
    """Raises ValueError or OSError for what cannot be made or written."""
    run = args.run.expanduser()
    if not run.is_dir():
        raise FileNotFoundError(f"--run {run}: no such folder; give the output folder of a training")
    for std in args.sweep or [args.std]:
        check_std(std)
    # With torch, which takes seconds to import.
    from masked_diffusion.runs.posthoc_ema import MOST_MISFIT, Snapshots

    snapshots = Snapshots(run)
    for std in args.sweep or [args.std]:
        if (share := snapshots.misfit(std, args.step)) > MOST_MISFIT:
            kept = ", ".join(sorted({snapshot.std for snapshot in snapshots.all()}))
            sys.stderr.write(
                f"warning: length {std:g} is far from those that were kept ({kept}): the result is {share:.0%} off an "
                "average of this length\n"
            )
    if args.sweep:
        return prepare_sweep(args, of_sampler, run, snapshots)
    idle = [f"--{name}" for name in SWEEP_ONLY if getattr(args, name) is not None]
    if idle or of_sampler:
        raise ValueError(f"{[*idle, *of_sampler][0]}: unknown without --sweep")
    out = args.out.expanduser()
    if out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"--out {out}: expected a name that ends in .pt or .safetensors")
    if out.exists():
        raise ValueError(f"--out {out}: it exists; give another name")
    state, step = snapshots.reconstruct(args.std, args.step)
    return partial(write, state, out, args.std, step)


def prepare_sweep(
    args: argparse.Namespace, of_sampler: Sequence[str], run: Path, snapshots: "Snapshots"
) -> Callable[[], int]:
    """Raises ValueError or OSError for what cannot be swept over."""
    from masked_diffusion.runs.posthoc_ema import BASE_NAME

    if any(part.partition("=")[0] == "--model_path" for part in of_sampler):
        raise ValueError("--model_path: the sweep samples its own averages; leave it out")
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"--run {run}: there is no config.json, which sampling needs")
    _, step = snapshots.used_for(args.step)
    out = args.out.expanduser()
    source = {"run": str(run.resolve()), "step": step, "base_sha256": sha256_of(snapshots.folder / BASE_NAME)}
    sweep = open_sweep(from_args(Scoring, args), "std", of_sampler, ROOT, source)
    if not (out / "config.json").exists():
        shutil.copy(run / "config.json", out)

    def point(std: float) -> Point:
        path = out / f"posthoc_{std:g}_{step:06d}.pt"

        def make() -> None:
            if not path.exists():
                write(snapshots.reconstruct(std, step)[0], path, std, step)

        return Point(std, ["--model_path", str(path)], make)

    points = [point(std) for std in args.sweep]
    return lambda: sweep.work(points)


def write(state: "dict[str, Tensor]", out: Path, std: float, step: int) -> None:
    """Write an average to a file whose name says the format."""
    from masked_diffusion.runs.checkpoint import write_part

    write_part(out, state)
    sys.stdout.write(f"{out.absolute()}: the average of length {std} at step {step}\n")


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

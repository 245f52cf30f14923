"""Make a recipe's card of several runs that differ in their seeds alone.

python scripts/make_card.py output_seed0 output_seed1 output_seed2 --recipe "my recipe" --out my_recipe.json
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from masked_diffusion.files import write_json
from masked_diffusion.script_util import main_of
from masked_diffusion.training.run_log import RunLog, make_columns, read_run_log, recipe_settings


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a recipe's card of several runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders of two trainings or more")
    parser.add_argument("--out", type=Path, required=True, help="the card, JSON")
    parser.add_argument("--recipe", required=True, help="what the card is called")
    parser.add_argument("--every", type=int, default=250, help="steps between its numbers (default: 250)")
    parser.add_argument("--hardware", default="", help="what the seconds were measured on")
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Raises ValueError or OSError for runs that make no card."""
    if len(args.runs) < 2:
        raise ValueError("one run alone shows no spread: give two or more that differ in their seeds")
    if args.every < 1:
        raise ValueError(f"--every {args.every}: must be at least 1")
    runs = [read_run_log(folder.expanduser()) for folder in args.runs]
    settings = [recipe_settings(run) for run in runs]
    for run, other in zip(runs, settings, strict=True):
        if other != settings[0]:
            unlike = [name for name in other if other[name] != settings[0].get(name)]
            raise ValueError(
                f"{run.folder}: has another {', '.join(unlike)} than {runs[0].folder}; runs of one recipe are alike"
            )
    columns = make_columns(runs, args.every)
    if not columns:
        raise ValueError(f"--every {args.every}: the runs end before, at step {int(runs[0].steps[-1])}")

    def work() -> None:
        card = {
            "recipe": args.recipe,
            "settings": settings[0],
            "runs": len(runs),
            "cost": cost(runs, args.hardware),
            "every": args.every,
            "columns": columns,
        }
        write_json(args.out, card)
        sys.stdout.write(f"{args.out}\n")

    return work


def cost(runs: list[RunLog], hardware: str) -> dict[str, object]:
    """What one run takes."""
    from masked_diffusion.models.cost import cost as step_cost  # with torch, which takes seconds to import

    config, images = runs[0].config(), int(runs[0].columns["samples"][-1])
    gflops = step_cost(config.model.build()) / 1e9
    return {
        "steps": int(runs[0].steps[-1]),
        "images": images,
        "training_gflops_per_image": round(gflops, 6),
        "training_tflops": round(gflops * images / 1000, 3),
        "seconds": [round(run.seconds()) for run in runs],
        "hardware": hardware,
    }


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

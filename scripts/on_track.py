"""Say whether a run is where a recipe's card has it.

    python scripts/on_track.py output_digits docs/recipes/digits.json

Exit status 0: inside the card's band so far; 1: outside somewhere; 2: there is nothing to compare.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from masked_diffusion.script_util import main_of
from masked_diffusion.training.run_log import compare, read_card, read_run_log, recipe_settings

OUTSIDE = 1


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Say whether a run is where a recipe's card has it.")
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a training, finished or not")
    parser.add_argument("card", type=Path, metavar="CARD", help="a card of docs/recipes/, or one of make_card.py")
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Raises ValueError or OSError where there is nothing to compare."""
    card, run = read_card(args.card), read_run_log(args.run.expanduser())
    found = compare(run, card)
    if not found:
        first = min(min(column["steps"]) for column in card["columns"].values())
        raise ValueError(f"{args.run}: is at step {int(run.steps[-1])}, the card's first number is of step {first}")
    settings = recipe_settings(run)
    asked = {"objective": "ddpm", **card["settings"]}  # cards from before there was a choice
    unlike = {name: value for name, value in asked.items() if name in settings and settings[name] != value}

    def work() -> int:
        for name, value in unlike.items():
            sys.stdout.write(f"another recipe: {name} {settings[name]}, the card has {value}\n")
        outside = [comparison for comparison in found if not comparison.inside]
        for comparison in outside:
            sys.stdout.write(f"{comparison}\n")
        where = f"{len(found) - len(outside)} of {len(found)} numbers up to step {found[-1].step}"
        sys.stdout.write(f"{where} are in the band of {card['recipe']}\n")
        return OUTSIDE if outside else 0

    return work


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

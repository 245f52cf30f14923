"""Compare this code's trainings and samples with those of another checkout, byte for byte.

    git worktree add ../base main && python scripts/refactor_gate.py ../base

Run it after a change that must not change numbers. For each model, both codes train on the embedded digits, and this
one also goes on from a checkpoint of the other. Logs, weights, averages, optimizer states and samples must be equal.
Exit status 0: they are; 1: something differs; 2: there is no such checkout.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from masked_diffusion.script_util import run_script

HERE = Path(__file__).resolve().parent.parent
MODELS = ("MDT_Ti_2", "MDTv2_Ti_2", "DiT_Ti_2")
MEASURED = "images_per_second"  # the only column that may differ
TRAIN = [
    "scripts/image_train.py", "--data_dir", "builtin:digits", "--vae_path", "none", "--image_size", "8", "--batch_size",
    "4", "--mask_ratio", "0.3", "--decode_layer", "2", "--log_interval", "1", "--num_workers", "0", "--device", "cpu",
    "--preview_samples", "0",
]  # fmt: skip
SAMPLE = [
    "scripts/image_sample.py", "--num_samples", "4", "--batch_size", "4", "--num_sampling_steps", "10", "--cfg_cond",
    "True", "--device", "cpu", "--model_path",
]  # fmt: skip


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare this code's numbers with those of another checkout.")
    parser.add_argument("base", type=Path, metavar="BASE_CHECKOUT", help="root of the checkout to compare with")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="models to train")
    parser.add_argument("--steps", type=int, default=50, help="length of the trainings; half-way they are resumed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args))


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Raises FileNotFoundError for a folder that is no checkout, ValueError for too few steps."""
    if not (args.base / TRAIN[0]).is_file():
        raise FileNotFoundError(f"{args.base}: has no {TRAIN[0]}; give the root of a checkout of this project")
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: must be at least 2, as the trainings are resumed half-way")

    def work() -> int:
        found = [difference for name in args.models for difference in differences(args.base, name, args.steps)]
        for difference in found:
            sys.stdout.write(f"{difference}\n")
        sys.stdout.write(f"{len(found)} differences in {', '.join(args.models)}\n")
        return 1 if found else 0

    return work


def run(tree: Path, folder: Path, *arguments: str) -> None:
    """Run a script of a checkout as a process, with its output in ``folder``. Raises RuntimeError where it fails."""
    output = {"OPENAI_LOGDIR": str(folder), "OPENAI_LOG_FORMAT": "csv"}
    env = {**os.environ, **output, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {' '.join(arguments)} failed:\n{done.stderr}")


def differences(base: Path, model: str, steps: int) -> Iterator[str]:
    """What is not equal for a model, a line each."""
    base = base.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        theirs, resumed, ours = (Path(scratch, name) for name in ("theirs", "resumed", "ours"))
        run(base, theirs, *TRAIN, "--model", model, "--max_steps", str(steps // 2))
        shutil.copytree(theirs, resumed)
        run(base, theirs, *TRAIN, "--model", model, "--max_steps", str(steps))
        for folder in (resumed, ours):
            run(HERE, folder, *TRAIN, "--model", model, "--max_steps", str(steps))
        for tree, folder in ((base, theirs), (HERE, ours)):
            run(tree, folder / "samples", *SAMPLE, str(theirs / f"ema_0.9999_{steps:06d}.pt"))
        for folder in (resumed, ours):
            if losses(folder) != losses(theirs):
                yield f"{model}, {folder.name}: progress.csv differs"
            samples = theirs.rglob("*.npz") if folder is ours else ()
            for path in sorted([*theirs.glob(f"*{steps:06d}.pt"), *samples]):
                name = path.relative_to(theirs)
                if not (folder / name).is_file() or (folder / name).read_bytes() != path.read_bytes():
                    yield f"{model}, {folder.name}: {name} differs"


def losses(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log without what was measured."""
    with (folder / "progress.csv").open(encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name != MEASURED} for row in csv.DictReader(file)]


if __name__ == "__main__":
    sys.exit(main())

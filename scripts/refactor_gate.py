"""Compare this code's trainings and samples with those of another checkout, byte for byte.

    git worktree add ../base main && python scripts/refactor_gate.py ../base
    python scripts/refactor_gate.py ../base --step_rounds 8

Run it after a change that must not change numbers. For each model, both codes train on the embedded digits, and this
one also goes on from a checkpoint of the other. Weights, averages, optimizer states and samples must be equal, byte for
byte, and so must the columns of the log and the entries of the state file that the other code has. What this one has
beside them is listed as added. Exit status 0: nothing differs; 1: something does; 2: there is no such checkout.
--step_rounds compares the time of a training step of MDT_S_2 instead.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from masked_diffusion.script_util import main_of

HERE = Path(__file__).resolve().parent.parent
MODELS = ("MDT_Ti_2", "MDTv2_Ti_2", "DiT_Ti_2")
MEASURED = ("images_per_second", "seconds")  # columns and entries that differ from run to run
TRAIN = [
    "scripts/image_train.py", "--data_dir", "builtin:digits", "--vae_path", "none", "--image_size", "8", "--batch_size",
    "4", "--mask_ratio", "0.3", "--decode_layer", "2", "--log_interval", "1", "--num_workers", "0", "--device", "cpu",
    "--preview_samples", "0",
]  # fmt: skip
SAMPLE = [
    "scripts/image_sample.py", "--num_samples", "4", "--batch_size", "4", "--num_sampling_steps", "25", "--cfg_cond",
    "True", "--device", "cpu", "--model_path",
]  # fmt: skip
# Run in a checkout: one training step of the benchmark's settings for each line read, the first to warm up; writes its
# seconds by the clock and by the processor. Older checkouts have the benchmark's parts beside it.
STEPS = """
import importlib, os, sys, time
import torch
from masked_diffusion.dist_util import Place, Ranks
name = "benchmarking.setup" if os.path.isdir("scripts/benchmarking") else "benchmark_setup"
setup = importlib.import_module(name)
loop = setup.make_loop(setup.Settings(), Ranks(Place(), torch.device("cpu")))
batch = setup.training_batch(setup.Settings())
for _ in sys.stdin:
    clock, cpu = time.perf_counter(), time.process_time()
    loop.train_step(*batch)
    print(time.perf_counter() - clock, time.process_time() - cpu, flush=True)
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare this code's numbers with those of another checkout.")
    parser.add_argument("base", type=Path, metavar="BASE_CHECKOUT", help="root of the checkout to compare with")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="models to train")
    parser.add_argument("--steps", type=int, default=50, help="length of the trainings; half-way they are resumed")
    parser.add_argument(
        "--step_rounds", type=int, default=0,
        help="compare the time of a training step of MDT_S_2 instead, in so many rounds, one thread each",
    )  # fmt: skip
    return parser


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Raises FileNotFoundError for a folder that is no checkout, ValueError for too few steps."""
    if not (args.base / TRAIN[0]).is_file():
        raise FileNotFoundError(f"{args.base}: has no {TRAIN[0]}; give the root of a checkout of this project")
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: must be at least 2, as the trainings are resumed half-way")

    if args.step_rounds < 0:
        raise ValueError(f"--step_rounds {args.step_rounds}: must be 0 or more")
    if args.step_rounds:
        return lambda: compare_step_times(args.base, args.step_rounds)

    def work() -> int:
        found = [finding for name in args.models for finding in compare_model(args.base, name, args.steps)]
        for finding in found:
            sys.stdout.write(f"{finding}\n")
        counts = [sum(finding.added is added for finding in found) for added in (False, True)]
        sys.stdout.write(f"{counts[0]} differences and {counts[1]} additions in {', '.join(args.models)}\n")
        return 1 if counts[0] else 0

    return work


def compare_step_times(base: Path, rounds: int) -> int:
    """Print the medians of the rounds' ratios of both codes' steps, ours to theirs. Returns the exit status."""
    ours, theirs = stepping(HERE), stepping(base.resolve())
    with ours, theirs:
        for process in (ours, theirs):
            step(process)
        measured = []
        for number in range(rounds):  # each is the first of a round as often as the other
            both = [ours, theirs][:: -1 if number % 2 else 1]
            seconds = {process: step(process) for process in both}
            measured.append((seconds[ours], seconds[theirs]))
        for process in (ours, theirs):
            assert process.stdin is not None
            process.stdin.close()
    for which, name in enumerate(("clock", "processor")):
        pairs = [(one[which], other[which]) for one, other in measured]
        ratios = [one / other for one, other in pairs]
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        sys.stdout.write(
            f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) times the other's step; "
            f"median seconds {medians[0]:.3f} here, {medians[1]:.3f} there\n"
        )
    return 0


def stepping(tree: Path) -> "subprocess.Popen[str]":
    """A process that makes a training step of a checkout for each line that it is sent."""
    paths = os.pathsep.join([str(tree), str(tree / "scripts")])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", STEPS], cwd=tree, env=env, stdin=pipe, stdout=pipe, text=True)


def step(process: "subprocess.Popen[str]") -> tuple[float, float]:
    """One step: its seconds by the clock and by the processor. Raises RuntimeError where the process ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        clock, cpu = process.stdout.readline().split()
    except (BrokenPipeError, ValueError):
        raise RuntimeError("the measuring of steps failed; its output is above") from None
    return float(clock), float(cpu)


class Finding(NamedTuple):
    """added: this code has it and the other has not; else it is not equal."""

    what: str
    added: bool = False

    def __str__(self) -> str:
        return f"added: {self.what}" if self.added else f"{self.what} differs"


def run(tree: Path, folder: Path, *arguments: str) -> None:
    """Run a script of a checkout as a process, with its output in ``folder``. Raises RuntimeError where it fails."""
    output = {"OPENAI_LOGDIR": str(folder), "OPENAI_LOG_FORMAT": "csv"}
    env = {**os.environ, **output, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree}: {' '.join(arguments)} failed:\n{done.stderr}")


def compare_model(base: Path, model: str, steps: int) -> Iterator[Finding]:
    """Train, resume and sample a model with both codes. Yields what is not equal, and what was added."""
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
            samples = theirs.rglob("*.npz") if folder is ours else ()
            paths = sorted([*theirs.glob(f"*{steps:06d}.pt"), *samples])
            yield from compare_folders(theirs, folder, [path.relative_to(theirs) for path in paths], model)


def compare_folders(theirs: Path, ours: Path, names: Sequence[Path], model: str) -> Iterator[Finding]:
    """Compare a run's log and its files of these names with those of the other code's run."""
    place = f"{model}, {ours.name}"
    yield from compare(columns(theirs), columns(ours), f"{place}: progress.csv")
    for name in names:
        path = ours / name
        if path.is_file() and name.name.startswith("state"):
            yield from compare(read_state(theirs / name), read_state(path), f"{place}: {name}")
        elif not path.is_file() or path.read_bytes() != (theirs / name).read_bytes():
            yield Finding(f"{place}: {name}")


def compare(theirs: Any, ours: Any, place: str) -> Iterator[Finding]:
    """Compare two values entry by entry. What was measured may differ, and entries may be added."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in theirs:
            if name not in ours:
                yield Finding(f"{place}, {name}")
            elif name not in MEASURED:
                yield from compare(theirs[name], ours[name], f"{place}, {name}")
        yield from (Finding(f"{place}, {name}", added=True) for name in ours if name not in theirs)
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(theirs) == len(ours):
        for number, both in enumerate(zip(theirs, ours, strict=True)):
            yield from compare(*both, f"{place}, {number}")
    elif not equal(theirs, ours):
        yield Finding(place)


def equal(theirs: Any, ours: Any) -> bool:
    """Whether two values that have no entries are the same to the bit."""
    import torch  # for the state files alone: its import takes seconds

    if not isinstance(theirs, torch.Tensor) or not isinstance(ours, torch.Tensor):
        return type(theirs) is type(ours) and bool(theirs == ours)
    return (
        theirs.dtype == ours.dtype and theirs.shape == ours.shape and theirs.numpy().tobytes() == ours.numpy().tobytes()
    )


def read_state(path: Path) -> Any:
    """The entries of a state file."""
    import torch  # as above

    return torch.load(path, map_location="cpu", weights_only=True)


def columns(folder: Path) -> dict[str, str]:
    """The columns of a run's log, the values of all rows in each."""
    with (folder / "progress.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: ",".join(row[name] for row in rows) for name in rows[0]}


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

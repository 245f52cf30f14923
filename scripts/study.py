"""Compare all policies at equal compute: one backbone, one loop, one budget, several seeds, and two controls.

    python scripts/study.py --out study_digits

Each run is an ordinary run folder below --out. A killed study goes on with the same command. After each run report.html
and results.csv are brought up to date.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import image_train
import torch
from studying.measure import HeldOut, measure
from studying.plan import (
    QUICK_BUDGET,
    SETTINGS,
    Run,
    Study,
    arms_of,
    as_arguments,
    held_out_of,
    runs_of,
    training_flags,
)
from studying.report import Results, lack_of_power, publish, read_result, standing, verdicts_of, write_report
from studying.verdicts import undecided
from tqdm.auto import tqdm

from masked_diffusion.dist_util import choose_device
from masked_diffusion.files import write_json
from masked_diffusion.processes.preemption import STOPPED
from masked_diffusion.script_util import finite_float, run_script

NO_POWER, NO_RANKING = 3, 4
TRAINING = Path(__file__).resolve().parent / "image_train.py"


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare all policies at equal compute.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; the same one goes on")
    parser.add_argument(
        "--setting",
        default="tokens16",
        choices=SETTINGS,
        help="network, budget and seeds: 16 or 64 tokens (%(default)s)",
    )
    parser.add_argument("--arms", default="all", help="comma list of policies, such as none,tread,sprint (%(default)s)")
    parser.add_argument("--data_dir", default="builtin:digits", help="data to train on (%(default)s)")
    parser.add_argument("--held_out_dir", default="", help="data to measure on; for built-in data its held-out part")
    parser.add_argument(
        "--vae_path", default="none", help="autoencoder of the latents; none is pixel space (%(default)s)"
    )
    parser.add_argument("--image_size", type=int, default=8, help="side of the images in pixels (%(default)s)")
    parser.add_argument("--model", default=None, help="plain network of all arms, such as DiT_S_2; the setting's")
    parser.add_argument(
        "--budget",
        type=finite_float,
        default=None,
        help="compute of each run, in steps without a policy; the setting's",
    )
    parser.add_argument("--seeds", type=int, default=None, help="runs of each arm; the setting's")
    parser.add_argument("--batch_size", type=int, default=64, help="images per step (%(default)s)")
    parser.add_argument("--held_out_images", type=int, default=360, help="images to measure on, at most (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each (%(default)s)")
    parser.add_argument("--launcher", default="", help='starts each training, such as "srun --gpus 1"')
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="a short look at the report, one seed; it claims nothing")
    parser.add_argument(
        "--require_ranking", "--require-ranking", action="store_true",
        help=f"end with status {NO_RANKING} where an arm shows no difference to training without a policy",
    )  # fmt: skip
    parser.add_argument(
        "--publish", type=Path, default=None, help="folder for the table and a figure, as in docs/study"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = create_argparser().parse_args(argv)
    return run_script(lambda stack: prepare(args))


def prepare(args: argparse.Namespace) -> Callable[[], int]:
    """Check everything, and plan all runs. Raises ValueError or OSError."""
    setting = SETTINGS[args.setting]
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else setting.seeds
    for name, number in (("seeds", seeds), ("jobs", args.jobs)):
        if number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    budget = args.budget if args.budget is not None else QUICK_BUDGET if args.quick else setting.budget
    names = ("data_dir", "vae_path", "image_size", "batch_size", "held_out_images")
    study = Study(
        model=args.model or setting.model,
        held_out_dir=args.held_out_dir or held_out_of(args.data_dir),
        budget=budget,
        **{name: getattr(args, name) for name in names},
    )
    device = choose_device(args.device, 0)
    held_out = HeldOut(study, device)
    runs = runs_of(arms_of(study, args.arms, held_out.latent_shape), seeds)
    commands = {run: as_arguments(training_flags(study, run, held_out.latent_shape)) for run in runs}
    take_folder(args.out, study)
    torch.set_num_threads(1)
    trainer = Trainer(args.out / "runs", args.launcher, args.jobs, ["--device", args.device, "--num_workers", "0"])

    def work() -> int:
        results = {run: result for run in runs if (result := read_result(trainer.result_of(run)))}
        pending = {run: command for run, command in commands.items() if run not in results}
        with tqdm(total=len(runs), initial=len(results), unit="run") as bar:
            for run in trainer.train(pending):
                result = measure(trainer.folder / run.name, held_out, device)
                write_json(trainer.result_of(run), result)
                results[run] = result
                bar.set_postfix_str(f"{run.name} {result['error']:.4f}")
                bar.update()
                write_report(args.out, study, in_order(results, runs), len(runs), args.quick)
        if trainer.status:
            sys.stdout.write(f"stopped after {len(results)} of {len(runs)} runs; the same command goes on from here\n")
            return trainer.status
        found = in_order(results, runs)
        write_report(args.out, study, found, len(runs), args.quick)
        if args.publish is not None:
            publish(args.publish, args.setting, study, found)
        sys.stdout.write(f"{standing(found, len(runs), args.quick)}\n{(args.out / 'report.html').absolute()}\n")
        return status_of(found, args)

    return work


def in_order(results: Results, runs: Sequence[Run]) -> Results:
    return {run: results[run] for run in runs if run in results}


def status_of(results: Results, args: argparse.Namespace) -> int:
    """The exit status of a study that has all of its runs."""
    verdicts = verdicts_of(results)
    if args.quick:
        return 0
    if lack_of_power(verdicts):
        return NO_POWER
    if args.require_ranking and (arms := undecided(verdicts)):
        sys.stdout.write(f"no difference shown: {', '.join(arms)}\n")
        return NO_RANKING
    return 0


def take_folder(folder: Path, study: Study) -> None:
    """Make the folder this study's. Raises ValueError where it holds another one."""
    path, record = folder / "study.json", dataclasses.asdict(study)
    if path.is_file():
        former = json.loads(path.read_text(encoding="utf-8"))
        for name, value in record.items():
            if former.get(name) != value:
                raise ValueError(
                    f"--out {folder}: holds a study with {name} {former.get(name)}, this one has {value}; give another "
                    "folder"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, record)


class Trainer:
    """Trains runs, each in a folder of its own: in this process, or several at a time in processes of their own.

    status: of what ended the trainings early; 0 while nothing did.
    """

    def __init__(self, folder: Path, launcher: str, jobs: int, flags: list[str]) -> None:
        self.folder = folder
        self.status = 0
        self._launcher = shlex.split(launcher)
        self._jobs = jobs
        self._flags = flags

    def result_of(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def train(self, commands: dict[Run, list[str]]) -> Iterator[Run]:
        """Yield each run when its training has ended, until one is stopped. Raises RuntimeError for one that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._jobs == 1 and not self._launcher:
            for run, command in commands.items():
                if not self._ended(run, self._train_here(run, command)):
                    return
                yield run
            return
        waiting = list(commands.items())
        running: dict[Future[int], Run] = {}
        with ThreadPoolExecutor(self._jobs) as pool:
            while running or (waiting and not self.status):
                while waiting and len(running) < self._jobs and not self.status:
                    run, command = waiting.pop(0)
                    running[pool.submit(self._train_apart, run, command)] = run
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    run = running.pop(future)
                    if self._ended(run, future.result()):
                        yield run

    def _ended(self, run: Run, status: int) -> bool:
        """Whether a training came to its end."""
        if status not in (0, STOPPED):
            raise RuntimeError(f"{run.name}: its training ended with status {status}; see {self._output_of(run)}")
        self.status = self.status or status
        return status == 0

    def _output_of(self, run: Run) -> Path:
        return self.folder / f"{run.name}.txt"

    def _environment(self, run: Run) -> dict[str, str]:
        return {"OPENAI_LOGDIR": str(self.folder / run.name), "OPENAI_LOG_FORMAT": "csv,log"}

    def _train_here(self, run: Run, command: list[str]) -> int:
        former = dict(os.environ)
        os.environ.update(self._environment(run))
        try:
            with (
                self._output_of(run).open("a", encoding="utf-8") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
            ):
                return image_train.main([*command, *self._flags])
        finally:
            os.environ.clear()
            os.environ.update(former)

    def _train_apart(self, run: Run, command: list[str]) -> int:
        env: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", **self._environment(run)}
        arguments = [*self._launcher, sys.executable, str(TRAINING), *command, *self._flags]
        with self._output_of(run).open("a", encoding="utf-8") as file:
            return subprocess.run(arguments, env=env, stdout=file, stderr=subprocess.STDOUT).returncode


if __name__ == "__main__":
    sys.exit(main())

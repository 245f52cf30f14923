"""A study from its plan to its report: what is trained, what is measured, and what that says."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from studying.judge import judge_of, megabytes_by_policy
from studying.measure import HeldOut, measure
from studying.plan import Run, arms_of, as_arguments, runs_of, training_flags
from studying.progress import Progress
from studying.report import Results, publish, read_result, standing, verdicts_of, write_report
from studying.settings import Comparison, Study
from studying.trainer import Trainer
from studying.verdicts import lack_of_power, undecided

from masked_diffusion.dist_util import choose_device
from masked_diffusion.files import write_json
from masked_diffusion.runs import checkpoint

NO_POWER, NO_RANKING = 3, 4


@dataclass(frozen=True)
class Asked:
    """How a study is done; named as the flags. name: of what is published."""

    out: Path
    arms: str
    seeds: Sequence[int]
    jobs: int
    launcher: str
    device: str
    quick: bool
    report_only: bool
    require_ranking: bool
    publish: Path | None
    samples: int
    name: str


def begin(study: Study, asked: Asked) -> Callable[[], int]:
    """Check all that needs the data and the networks, and plan all runs. Returns the work, which returns the exit
    status. Raises ValueError or OSError."""
    device = choose_device(asked.device, 0)
    held_out = HeldOut(study, device)
    runs = runs_of(arms_of(study, asked.arms, held_out.latent_shape), asked.seeds)
    flags_of = {run: training_flags(study, run, held_out.latent_shape) for run in runs}
    take_folder(asked.out, study)
    torch.set_num_threads(1)
    workers = ["--num_workers", "0"] if study.data_dir.startswith("builtin:") else []
    trainer = Trainer(asked.out / "runs", asked.launcher, asked.jobs, ["--device", asked.device, *workers])

    def work() -> int:
        results = {run: result for run in runs if (result := read_result(trainer.result_of(run)))}
        if asked.report_only:
            return report(study, asked, results, len(runs))
        pending = {run: as_arguments(flags) for run, flags in flags_of.items() if run not in results}
        judge = judge_of(study, asked.samples) if pending else None
        memory = megabytes_by_policy(trainer, pending)
        with Progress({trainer.folder / run.name: flags_of[run]["max_compute"] for run in pending}, len(runs)) as bar:
            for run in trainer.train(pending):
                result = measure(trainer.folder / run.name, held_out, judge, device)
                result["memory_mb"] = memory[run.policy]
                write_json(trainer.result_of(run), result)
                checkpoint.prune(trainer.folder / run.name, 1, 0)  # not before: a killed study measures again
                results[run] = result
                bar.show(f"{run.name} {result['error']:.4f}")
                write_report(asked.out, study, in_order(results, runs), len(runs), asked.quick)
        if trainer.status:
            sys.stdout.write(f"stopped after {len(results)} of {len(runs)} runs; the same command goes on from here\n")
            return trainer.status
        return report(study, asked, in_order(results, runs), len(runs))

    return work


def report(study: Study, asked: Asked, results: Results, planned: int) -> int:
    """Say what a study has found. planned: number of its runs. Returns the exit status."""
    if not results:
        sys.stdout.write(f"none of the {planned} runs is finished\n")
        return 0
    write_report(asked.out, study, results, planned, asked.quick)
    if asked.publish is not None:
        publish(asked.publish, asked.name, study, results, planned)
    said = standing(results, planned, asked.quick)
    sys.stdout.write(f"{said}\n{(asked.out / 'report.html').absolute()}\n")
    return status_of(results, asked)


def in_order(results: Results, runs: Sequence[Run]) -> Results:
    return {run: results[run] for run in runs if run in results}


def status_of(results: Results, asked: Asked) -> int:
    """The exit status of a study with these results."""
    verdicts = verdicts_of(results)
    if asked.quick:
        return 0
    if lack_of_power(verdicts):
        return NO_POWER
    if asked.require_ranking and (arms := undecided(verdicts)):
        sys.stdout.write(f"no difference shown: {', '.join(arms)}\n")
        return NO_RANKING
    return 0


def take_folder(folder: Path, study: Study | Comparison) -> None:
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

"""Save checkpoints atomically, find them, and read them back.

A checkpoint of step s is ``model{s:06d}.pt``, ``ema_{rate}_{s:06d}.pt`` for each EMA rate, ``opt{s:06d}.pt``,
``state{s:06d}.pt`` (position in the data stream, gradient scaler, timestep sampler) and, written last, its manifest
``checkpoint{s:06d}.json`` with the configuration and the sizes and SHA-256 of the others: no manifest, no checkpoint. A
model or EMA file is a plain state dict, and may be a ``.safetensors`` instead. Nothing here runs code from a file.
"""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masked_diffusion.choices import WEIGHTS_FORMATS
from masked_diffusion.files import atomic_write, sha256_of, write_json

BEST_NAME = "best.json"
JOB_NAME = ".job.json"
MODEL_FILE = re.compile(r"model(\d{6,})\.(?:pt|safetensors)")
EMA_FILE = re.compile(r"ema_(.+)_(\d{6,})\.(?:pt|safetensors)")
MANIFEST_FILE = re.compile(r"checkpoint(\d{6,})\.json")
RUN_FILES = (
    MODEL_FILE,
    EMA_FILE,
    MANIFEST_FILE,
    re.compile(r"(opt|state)\d{6,}\.pt"),
    re.compile(r"preview_\d{6,}\.png"),
    re.compile(
        r"config\.json|progress\.csv|progress\.json|log\.txt|bad_files\.txt|tb|best\.json|\.job\.json|evaluation|"
        r"ema_snapshots"
    ),
)
# Where training files keep the weights; the averaged ones are those to use.
WRAPPER_ENTRIES = ("ema", "model", "state_dict")
WRAPPER_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
LABEL_TABLE = "y_embedder.embedding_table.weight"
PATCH_EMBEDDING = "x_embedder.proj.weight"


def model_file(step: int, weights_format: str = "pt") -> str:
    return f"model{step:06d}.{weights_format}"


def ema_file(rate: str, step: int, weights_format: str = "pt") -> str:
    return f"ema_{rate}_{step:06d}.{weights_format}"


def opt_file(step: int) -> str:
    return f"opt{step:06d}.pt"


def state_file(step: int) -> str:
    return f"state{step:06d}.pt"


def manifest_file(step: int) -> str:
    return f"checkpoint{step:06d}.json"


# -- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Any], config: dict[str, Any]) -> None:
    """Write ``parts`` (file name -> state) and then their manifest, which carries ``config``. Each file is atomic.

    Weights of this step in another format are of a former run through it, and go before the manifest is written.
    """
    files: dict[str, dict[str, Any]] = {}
    try:
        for name, part in parts.items():
            write_part(folder / name, part)
            files[name] = {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for other in (folder / name for part in parts for name in _in_all_formats(part) if name not in parts):
            other.unlink(missing_ok=True)
        write_json(folder / manifest_file(step), {"step": step, "files": files, "config": config})
    except BaseException:
        for name in files:  # of no use without a manifest, and the disk may be full
            (folder / name).unlink(missing_ok=True)
        raise


def _in_all_formats(name: str) -> list[str]:
    """The names that a model or EMA file may have; none for other files."""
    weights = MODEL_FILE.fullmatch(name) or EMA_FILE.fullmatch(name)
    return [str(Path(name).with_suffix(f".{form}")) for form in WEIGHTS_FORMATS] if weights else []


def write_part(path: Path, part: Any) -> None:
    """Write a file: of ``.safetensors`` a mapping of names to tensors, else what ``torch.save`` takes."""
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            file.write(save({name: tensor.contiguous() for name, tensor in part.items()}))
            return
        try:
            torch.save(part, file)
        except RuntimeError as error:  # torch's zip writer complains of its own position after the disk has refused
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def snapshot(value: Any, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor, keep: bool = True) -> Any:
    """Copy a state, nested dicts and lists with tensors, to host memory, where further training does not change it.

    gather: makes a full tensor of one that the ranks share, such as :func:`masked_diffusion.training.sharding.whole`;
    then every rank must call this. keep: False leaves the tensors out, on a rank that has no use for them.
    """
    if isinstance(value, Tensor):
        value = gather(value.detach())
        return value.to("cpu", copy=True).contiguous() if keep else None
    if isinstance(value, Mapping):
        return {name: snapshot(item, gather, keep) for name, item in value.items()}
    if isinstance(value, list):
        return [snapshot(item, gather, keep) for item in value]
    return value


class CheckpointWriter:
    """Writes checkpoints one at a time on a thread of its own, while training goes on.

    A process that dies while writing leaves no manifest, so the checkpoint before stays the newest one. keep_last,
    keep_every: see :func:`prune`.
    """

    def __init__(self, folder: Path, keep_last: int = 0, keep_every: int = 0) -> None:
        self._folder = folder
        self._keep = (keep_last, keep_every)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def start(self, step: int, parts: Mapping[str, Any], config: dict[str, Any]) -> None:
        """Begin to write a checkpoint of parts that nobody changes, such as a :func:`snapshot`.

        The one before must have been collected with :meth:`outcome`.
        """
        assert self._pending is None
        self._pending = step, self._thread.submit(self._write, step, parts, config)

    def outcome(self, wait: bool = False) -> tuple[int, OSError | None] | None:
        """Step of the checkpoint begun last, and what kept it from being written; None while that is not known, and
        once it has been told. wait: until it is known. Raises what is not an OSError."""
        if self._pending is None or not (wait or self._pending[1].done()):
            return None
        (step, written), self._pending = self._pending, None
        try:
            written.result()
        except OSError as error:
            return step, error
        return step, None

    def _write(self, step: int, parts: Mapping[str, Any], config: dict[str, Any]) -> None:
        save_checkpoint(self._folder, step, parts, config)
        with contextlib.suppress(OSError):  # the checkpoint is there; old ones can go after the next
            prune(self._folder, *self._keep)


def record_best(folder: Path, record: dict[str, Any]) -> None:
    """Name the best checkpoint of a run: ``step`` and how it was judged."""
    write_json(folder / BEST_NAME, record)


def read_best(folder: Path) -> dict[str, Any] | None:
    """Read what :func:`record_best` wrote. Returns None when there is no readable record."""
    try:
        record = json.loads((folder / BEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def prune(folder: Path, keep_last: int, keep_every: int) -> list[int]:
    """Remove old complete checkpoints. Returns the steps removed.

    keep_last: how many of the newest stay, never fewer than two; 0 removes nothing. keep_every: steps divisible by it
    stay as well; 0 for none. So does the best one. Files that belong to no complete checkpoint are left alone.
    """
    if not keep_last:
        return []
    matches = (MANIFEST_FILE.fullmatch(path.name) for path in folder.iterdir())
    steps = sorted(int(match[1]) for match in matches if match)
    removed = []
    best = (read_best(folder) or {}).get("step")
    for step in steps[: -max(2, keep_last)]:
        if step == best or (keep_every and step % keep_every == 0):
            continue
        # The manifest goes first: a crash in between leaves no checkpoint that would be found to be damaged.
        (folder / manifest_file(step)).unlink()
        for path in _files_of_step(folder, step):
            path.unlink()
        removed.append(step)
    return removed


def _step_of(path: Path) -> int:
    """Of a model or EMA file."""
    match = MODEL_FILE.fullmatch(path.name)
    return int(match[1] if match else EMA_FILE.fullmatch(path.name)[2])  # type: ignore[index]


def is_run_file(name: str) -> bool:
    """Whether a training writes files of this name into its folder."""
    return any(pattern.fullmatch(name) for pattern in RUN_FILES)


def weights_in(folder: Path) -> list[Path]:
    """Model and EMA files in a folder, by name, whether their checkpoints are complete or not."""
    patterns = (MODEL_FILE, EMA_FILE)
    return sorted(path for path in folder.glob("*") if any(pattern.fullmatch(path.name) for pattern in patterns))


# -- finding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a training begins.

    step: completed updates; their checkpoint lies in ``folder``. At step 0 the weights are fresh, or those of
    ``init_from``. messages: lines that tell the user about the choice.
    """

    step: int
    folder: Path
    init_from: Path | None = None
    messages: tuple[str, ...] = ()


def _listed_files(folder: Path, step: int) -> dict[str, Any] | None:
    """The files that the manifest of a step lists; None where there is none."""
    path = folder / manifest_file(step)
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else None


def damage(folder: Path, step: int) -> str | None:
    """Say what is wrong with the checkpoint of a step that has a manifest; None when nothing is."""
    try:
        files = json.loads((folder / manifest_file(step)).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / Path(name).name  # a manifest cannot point out of its folder
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} does not have the recorded SHA-256"
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a disk that fails for now proves nothing
        return f"its manifest cannot be read ({error})"
    return None


def newest_complete_step(folder: Path, report: Callable[[str], None], dry_run: bool = False) -> int | None:
    """Find the step of the newest undamaged checkpoint in a folder.

    Damaged checkpoints on the way are reported and renamed with the suffix ``.corrupt``, so that no later start takes
    them. A dry run only reports them.
    """
    for step in sorted(_steps_in(folder), reverse=True):
        problem = damage(folder, step)
        if problem is None:
            return step
        damaged = f"the checkpoint of step {step} in {folder} is damaged: {problem}"
        if dry_run:
            report(damaged)
            continue
        report(f"{damaged}; renamed to .corrupt")
        # The manifest goes last: a crash in between leaves a checkpoint that is still found to be damaged.
        for path in [*_files_of_step(folder, step), folder / manifest_file(step)]:
            _set_aside(path)
    return None


def _set_aside(path: Path) -> None:
    target, number = path.with_name(f"{path.name}.corrupt"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.corrupt{number}")
    path.rename(target)


def _files_of_step(folder: Path, step: int) -> list[Path]:
    weights = [path for form in WEIGHTS_FORMATS for path in folder.glob(ema_file("*", step, form))]
    others = [folder / name for name in (*(model_file(step, form) for form in WEIGHTS_FORMATS), opt_file(step))]
    return [*weights, *(path for path in [*others, folder / state_file(step)] if path.exists())]


def plan_start(
    folder: Path, resume_checkpoint: str, init_from: str | None, overwrite: bool, dry_run: bool = False
) -> Start:
    """Decide where a training begins, before anything is loaded.

    resume_checkpoint: ``auto``, a path, or empty for a fresh run; a file without a step in its name is taken as
    ``init_from``. A complete checkpoint in the run folder that is later than what is asked for wins, so that a job
    that was stopped goes on with the same command. overwrite: move the run in the folder into a numbered one first.
    dry_run: decide the same, and touch nothing.
    Raises ValueError or FileNotFoundError, with the remedy, when no training can begin so.
    """
    messages: list[str] = []
    asked = _asked_start(folder, resume_checkpoint, init_from)
    newest = newest_complete_step(folder, messages.append, dry_run)
    if overwrite and folder.is_dir() and any(is_run_file(path.name) for path in folder.iterdir()):
        source = asked.folder / model_file(asked.step) if asked.step else asked.init_from
        if source is not None and source.resolve().parent == folder.resolve():
            raise ValueError(
                f"--overwrite True would move {source} away, which --resume_checkpoint or --init_from asks for; give "
                "another OPENAI_LOGDIR"
            )
        messages.append(f"moved the former run to {_move_run_aside(folder, dry_run)}")
        newest = None
    if newest is not None and resume_checkpoint == "":
        raise ValueError(
            f"--resume_checkpoint is empty, but {folder} has checkpoints up to step {newest}: give another "
            "OPENAI_LOGDIR, or --overwrite True to move them aside"
        )
    if newest is not None and newest > asked.step:
        wins = " (later than what the flags ask for)" if asked.step or asked.init_from else ""
        messages.append(f"resuming from the checkpoint of step {newest} in {folder}{wins}")
        return Start(newest, folder, messages=tuple(messages))
    # Only a run that resumes from checkpoints found here may overwrite them or write its config.json beside them.
    goes_on_here = newest is not None or (asked.step and asked.folder == folder)
    if not goes_on_here and not overwrite and not (folder / "config.json").exists() and (foreign := weights_in(folder)):
        raise ValueError(
            f"{foreign[-1]} was not written by this code (it has no manifest and no config.json): to go on from it, "
            "give the path of its model file as --resume_checkpoint, else give another OPENAI_LOGDIR"
        )
    if asked.step and asked.folder == folder and not (folder / "config.json").exists():
        later = [path for path in weights_in(folder) if _step_of(path) > asked.step]
        if later and not overwrite:
            raise ValueError(
                f"--resume_checkpoint of step {asked.step}: the run would write over {later[-1].name}, which another "
                f"code left in {folder}; give another OPENAI_LOGDIR"
            )
    return Start(asked.step, asked.folder, asked.init_from, (*messages, *asked.messages))


def run_to_resume(folder: Path, resume_checkpoint: str, overwrite: bool) -> Path | None:
    """The folder of the run that a training will go on with, as far as names tell; None for a new run.

    This is for what has to be known before :func:`plan_start`, which reads all files of a checkpoint.
    """
    steps = [(-1, folder)] if overwrite or resume_checkpoint == "" else [(step, folder) for step in _steps_in(folder)]
    path = Path(resume_checkpoint).expanduser()
    if match := MODEL_FILE.fullmatch(path.name):
        steps.append((int(match[1]), path.parent))
    newest, run = max(steps, default=(-1, folder), key=lambda pair: pair[0])
    return run if newest >= 0 else None


def _steps_in(folder: Path) -> list[int]:
    """The steps of all checkpoints in a folder, damaged or not."""
    matches = (MANIFEST_FILE.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return [int(match[1]) for match in matches if match]


def _asked_start(folder: Path, resume_checkpoint: str, init_from: str | None) -> Start:
    """Return the start that the flags alone ask for."""
    if resume_checkpoint not in ("", "auto"):
        path = Path(resume_checkpoint).expanduser()
        if ema := EMA_FILE.fullmatch(path.name):
            raise ValueError(
                f"--resume_checkpoint {path}: this is an EMA file; give "
                f"{path.with_name(model_file(int(ema[2]), path.suffix[1:]))}, or use it with --init_from"
            )
        if not path.is_file():
            raise FileNotFoundError(f"--resume_checkpoint {path}: no such file")
        if init_from:
            raise ValueError(f"--resume_checkpoint {path} and --init_from {init_from}: a run starts from one of them")
        if match := MODEL_FILE.fullmatch(path.name):
            step = int(match[1])
            if (path.parent / manifest_file(step)).exists() and (problem := damage(path.parent, step)):
                raise ValueError(f"--resume_checkpoint {path}: this checkpoint is damaged: {problem}; give another one")
            listed = _listed_files(path.parent, step)
            if listed is not None and path.name not in listed:
                given = next((name for name in listed if MODEL_FILE.fullmatch(name)), "another one")
                raise ValueError(
                    f"--resume_checkpoint {path}: this file is left over from another run, {manifest_file(step)} does "
                    f"not list it; give {given}"
                )
            if listed is None and (path.parent / "config.json").exists():
                raise ValueError(
                    f"--resume_checkpoint {path}: this checkpoint is incomplete, it has no {manifest_file(step)}; give "
                    "an earlier one, or take its weights alone with --init_from"
                )
            source_folder = folder if path.parent.resolve() == folder.resolve() else path.parent
            return Start(step, source_folder, messages=(f"resuming from {path}",))
        init_from = resume_checkpoint
    if init_from:
        source = Path(init_from).expanduser()
        if not source.is_file():
            raise FileNotFoundError(f"--init_from {init_from}: no such file")
        return Start(0, folder, source, (f"starting at step 0 with the weights of {source}",))
    return Start(0, folder, messages=(f"no checkpoint in {folder}: starting at step 0",))


def _move_run_aside(folder: Path, dry_run: bool) -> Path:
    number = 1
    while (former := folder / f"former_{number}").exists():
        number += 1
    if dry_run:
        return former
    former.mkdir()
    for path in list(folder.iterdir()):
        if is_run_file(path.name):
            path.rename(former / path.name)
    return former


# -- reading ----------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> Any:
    """Read a ``.pt`` or ``.safetensors`` file without running code from it.

    Raises FileNotFoundError, and ValueError, each naming the file, for a Git LFS pointer, a file with pickled code,
    and anything that is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com"):
            raise ValueError(f"{path}: this is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(str(path))
        # DiT's training files carry their command line in one. It is a bag of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        if "GLOBAL" in str(error):  # torch names the class or function that it does not call
            raise ValueError(f"{path}: refused, because reading it could run code that is pickled in it") from None
        raise ValueError(f"{path}: not a readable checkpoint, it may be cut off ({type(error).__name__})") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a model's state dict as float32.

    Unwraps training files (entry ``ema``, else ``model`` or ``state_dict``) and the prefixes of module wrappers.

    Raises ValueError, naming the file, when it holds something else.
    """
    state = read_file(path)
    for entry in WRAPPER_ENTRIES:
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a model's state dict (a mapping of names to tensors)")
    return {
        WRAPPER_PREFIXES.sub("", name): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def read_state(start: Start) -> dict[str, Any] | None:
    """Read a checkpoint's state file; None at step 0 and for published checkpoints, which have none."""
    path = start.folder / state_file(start.step)
    return read_file(path) if start.step and path.is_file() else None


def sibling(start: Start, name: Callable[[int, str], str]) -> Path:
    """The file of a checkpoint in the format that its manifest lists; of one without a manifest, in whichever it has.

    name: of step and format, such as :func:`model_file`. Raises FileNotFoundError naming the file.
    """
    paths = [start.folder / name(start.step, form) for form in WEIGHTS_FORMATS]
    listed = _listed_files(start.folder, start.step)
    for path in paths:
        if path.is_file() and (listed is None or path.name in listed):
            return path
    raise FileNotFoundError(f"{paths[0]}: no such file; it belongs to the checkpoint of step {start.step}")


def load_weights(model: nn.Module, state: dict[str, Tensor], source: Path, drop_extra: bool = False) -> None:
    """Load a state dict strictly. Raises ValueError, naming ``source``, when names or shapes are not the model's.

    drop_extra: leave out names that the model does not have.
    """
    if drop_extra:
        expected = model.state_dict()
        state = {name: value for name, value in state.items() if name in expected}
    check_names(model, state, source)
    model.load_state_dict(state)


def check_names(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Raise ValueError, naming ``source``, unless a state dict has exactly the model's names and shapes."""
    expected = model.state_dict()
    problems = []
    if missing := sorted(set(expected) - set(state)):
        problems.append(f"{len(missing)} names are missing, such as {missing[0]}")
    if extra := sorted(set(state) - set(expected)):
        problems.append(
            f"{len(extra)} names are not this model's, such as {extra[0]} (--drop_extra True leaves them out)"
        )
    common = [name for name in expected if name in state]
    if wrong := [name for name in common if state[name].shape != expected[name].shape]:
        shapes = f"{tuple(state[wrong[0]].shape)} instead of {tuple(expected[wrong[0]].shape)}"
        problems.append(f"{len(wrong)} shapes differ, such as {wrong[0]} {shapes}")
    if problems:
        raise ValueError(f"{source}: the checkpoint is of another model or size: {'; '.join(problems)}")

"""What all command-line scripts share: flags, explicit settings, one-line usage errors."""

import argparse
import contextlib
import inspect
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TextIO, TypeVar, get_args

from masked_diffusion.choices import family_of
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.logger import output_folder
from masked_diffusion.processes.launchers import (
    Place,
    abort_mpi,
    find_place,
    launched_rank,
    local_world_size,
    under_mpi,
)
from masked_diffusion.processes.refusals import former_refusal, note_refusal
from masked_diffusion.processes.standard_streams import lasting_streams
from masked_diffusion.processes.waiting import LoaderError
from masked_diffusion.runs.config import ModelConfig, RunConfig
from masked_diffusion.runs.family_defaults import SAMPLING
from masked_diffusion.runs.request import Request
from masked_diffusion.settings import Flag, flags_of

USAGE_ERROR = 2
INTERVAL = re.compile(r"([0-9]+(?:\.[0-9]+)?)-([0-9]+(?:\.[0-9]+)?)")
NO_HOME = "home directory"  # how Path.expanduser says that ~ stands for nothing
Settings = TypeVar("Settings")
# The headings of --help, in their order.
MOST_USED, COMPATIBILITY, LAUNCHER = "most used", "for compatibility only", "launcher"
GROUPS = (
    MOST_USED,
    "data",
    "model",
    "diffusion",
    "sampling",
    "guidance",
    "training",
    "saving",
    "evaluation",
    "machine",
    LAUNCHER,
    COMPATIBILITY,
)
MACHINE_FLAGS = {
    "num_workers": Flag(-1, "loader processes per process; 0 = this one; -1 chooses by the number of cores", "machine"),
    "device": Flag("auto", "auto, cpu, cuda, cuda:N; or mps, to sample", "machine"),
    "tf32": Flag(False, "allow TF32 matrix products on CUDA", "machine"),
}
OUT_FLAG = Flag("", "output folder, as OPENAI_LOGDIR, over which it wins", "saving")
# What can be asked of a checkpoint, beside --model_path.
RECORDED = "; the checkpoint's config.json or its weights say, where they can"
CHECKPOINT_FLAGS = {
    **{
        name: flag._replace(help=flag.help + RECORDED)
        for name, flag in flags_of(ModelConfig, DiffusionConfig).items()
        if name not in ("policy", "route", "choose", "path_drop", "decoder", "min_snr_gamma")  # of training
    },
    "num_classes": Flag(None, "number of classes" + RECORDED, "model", int | None),
    "sigma_small": flags_of(DiffusionConfig)["sigma_small"],  # sampling may have the other one
    **flags_of(Request),
}


def apply_sampling_defaults(config: RunConfig, args: argparse.Namespace, explicit: set[str]) -> list[str]:
    """Set what the model's objective, and above it its family, are sampled with where no flag says otherwise.

    Returns warnings.
    """
    if "use_ddim" in explicit:
        explicit = explicit | {"sampler"}
    warnings = _apply_objective_defaults(config.objective, args, explicit)
    apply_family_defaults(SAMPLING, config.model.model, args, explicit)
    return warnings


def _apply_objective_defaults(config: ObjectiveConfig, args: argparse.Namespace, explicit: set[str]) -> list[str]:
    """Set the sampler and the guided channels of an objective.

    Returns warnings: the published slip of guiding three channels belongs to ``ddpm`` alone.
    """
    if config.objective == "ddpm":
        return []
    if "sampler" not in explicit:
        args.sampler = config.default_sampler
    if "cfg_channels" not in explicit:
        args.cfg_channels = config.guided_channels
    elif args.cfg_channels != config.guided_channels:
        return [
            f"--cfg_channels {args.cfg_channels} leaves channels unguided, which --objective {config.objective} is not "
            f"known for; the default is {config.guided_channels}"
        ]
    return []


def checkpoint_flags(model: str, vae_decoder: str) -> dict[str, Flag]:
    """Flags that open a checkpoint, of those that are looked into. model, vae_decoder: their defaults."""
    names = ("model", "image_size", "decode_layer", *flags_of(Request))
    defaults = {"model": model, "vae_decoder": vae_decoder}
    flags = {name: CHECKPOINT_FLAGS[name] for name in names}
    return {name: flag._replace(default=defaults.get(name, flag.default)) for name, flag in flags.items()}


def str2bool(value: str | bool) -> bool:
    """True/False/yes/no/t/f/y/n/1/0 in any case -> bool. Raises argparse.ArgumentTypeError for anything else."""
    if isinstance(value, bool):
        return value
    if value.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if value.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {value!r}")


def finite_float(text: str) -> float:
    """The type of every flag that takes a float. Raises argparse.ArgumentTypeError for text, nan, inf and 1e999.

    A nan passes every later check of a range (all comparisons are False) and spoils the work without a word.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Converter of a flag that may be given as ``None``."""

    def convert_or_none(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    convert_or_none.__name__ = convert.__name__  # argparse names it in its error message
    return convert_or_none


def interval(text: str) -> list[float]:
    """``80-470`` -> [80, 470], ``0.1-0.7`` -> [0.1, 0.7]. Raises argparse.ArgumentTypeError for anything else."""
    matched = INTERVAL.fullmatch(text)
    ends: list[float] = []
    if matched is not None:
        convert = float if "." in text else int
        ends = [convert(end) for end in matched.groups()]
    if not ends or ends[0] > ends[1]:
        raise argparse.ArgumentTypeError(
            "expected two timesteps or two shares of noise, the smaller one first, such as 80-470 or 0.1-0.7, got "
            f"{text!r}"
        )
    return ends


# What turns text into a value of a default's type, where that is not the type itself.
CONVERTERS: dict[Any, Callable[[str], Any]] = {bool: str2bool, float: finite_float, list[float]: interval}


def add_dict_to_argparser(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    defaults: dict[str, Any],
    types: dict[str, Callable[[str], Any]] | None = None,
    helps: dict[str, str] | None = None,
) -> None:
    """Add one flag ``--name`` per entry of ``defaults``.

    A flag's type is its default's (booleans through :func:`str2bool`, floats through :func:`finite_float`), or the
    entry of ``types``, which flags with a default of None need. helps: help texts by name.
    """
    for name, default in defaults.items():
        convert = (types or {}).get(name)
        if convert is None:
            kind = str if default is None else type(default)
            convert = CONVERTERS.get(kind, kind)
        _add_flag(parser, name, default, convert, (helps or {}).get(name, ""))


def _add_flag(parser: Any, name: str, default: Any, convert: Callable[[str], Any], text: str) -> None:
    parser.add_argument(f"--{name}", default=default, type=convert, help=f"{text} (default: {default!r})".strip())


def make_parser(
    description: str, flags: Mapping[str, Flag], most_used: Sequence[str] = (), launched: bool = False
) -> argparse.ArgumentParser:
    """A parser of these flags, under their groups' headings. most_used: those to show before all others. launched:
    with the flags that launchers pass."""
    parser = argparse.ArgumentParser(description=description)
    groups = {"": parser, **{title: parser.add_argument_group(title) for title in GROUPS}}
    for name in dict.fromkeys([*most_used, *flags]):
        flag = flags[name]
        group = groups[MOST_USED if name in most_used else flag.group]
        _add_flag(group, name, flag.default, _converter(flag), flag.help)
    if launched:
        add_launcher_flags(parser)
    return parser


def _converter(flag: Flag) -> Callable[[str], Any]:
    """What turns a flag's text into its value: by its type, or a field's annotation, or the default."""
    kind: Any = flag.type or type(flag.default)
    if not isinstance(kind, UnionType):
        return CONVERTERS.get(kind, kind)
    [kind] = [one for one in get_args(kind) if one is not NoneType]
    convert = CONVERTERS.get(kind, kind)
    return optional(convert) if kind in (int, float, str) else convert


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """The values of ``keys``, in their order."""
    return {key: getattr(args, key) for key in keys}


def explicit_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Names of the settings that stand on the command line, as opposed to those left at their defaults."""
    defaults = {action.dest: action.default for action in parser._actions}
    try:
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_args(argv)))
    finally:
        for action in parser._actions:
            action.default = defaults[action.dest]


def apply_family_defaults(
    recipes: dict[str, dict[str, Any]], model: str, args: argparse.Namespace, explicit: set[str]
) -> None:
    """Set what a model's family stands for and no flag says. Raises ValueError for an unknown model.

    recipes: of ``runs.family_defaults``.
    """
    for name, value in recipes[family_of(model)].items():
        if name not in explicit:
            setattr(args, name, value)


def request_of(args: argparse.Namespace, explicit: set[str], **usual: Any) -> Request:
    """What the command line asks of a checkpoint. usual: further fields of the request."""
    return Request(**args_to_dict(args, explicit & Request.__dataclass_fields__.keys()), **usual)


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that launchers pass, or that scripts written for the published code do."""
    group = _group(parser, LAUNCHER)
    group.description = "set by torchrun and friends; needed only where nothing sets them"
    group.add_argument("--local-rank", "--local_rank", type=int, help="passed by torch.distributed.launch")
    group.add_argument("--rank", type=int, help="number of this process among all")
    group.add_argument("--world_size", type=int, help="number of processes")
    group.add_argument(
        "--dist_url", default="env://", help="where the processes meet (default: MASTER_ADDR:MASTER_PORT)"
    )
    _group(parser, COMPATIBILITY).add_argument(
        "--dist_on_itp", action="store_true", help="accepted for compatibility: MPI launchers are recognised"
    )


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)


def from_args(cls: type[Settings], args: argparse.Namespace) -> Settings:
    """A dataclass of settings, as the flags of their names say. Raises ValueError for what it refuses."""
    names: Any = cls.__dataclass_fields__  # type: ignore[attr-defined]
    return cls(**args_to_dict(args, names))


def place_from_args(args: argparse.Namespace) -> Place:
    """This process's place, from the launcher flags and the environment."""
    return find_place(os.environ, args.rank, args.world_size, args.local_rank)


def choose_num_workers(asked: int) -> int:
    """-1: as many loader processes as there are spare cores for this training process, at most 8."""
    if asked < -1:
        raise ValueError(f"--num_workers {asked}: must be 0 (load in the training process) or more, or -1 to choose")
    if asked >= 0:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // local_world_size(os.environ) - 1))


def main_of(
    new_parser: Callable[[], argparse.ArgumentParser], prepare: Callable[..., Callable[[], int | None]]
) -> Callable[..., int]:
    """The ``main(argv=None)`` of a script: parses a command line, then does :func:`run_script`.

    prepare: is given those of these that it names. ``args``, ``explicit``: as parsed, and :func:`explicit_flags`.
    ``stack``. ``argv``: the command line. ``of_sampler``: flags that the parser does not know, which else are refused.
    """
    names = inspect.signature(prepare).parameters

    def main(argv: Sequence[str] | None = None) -> int:
        parser = new_parser()
        offered: dict[str, Any] = {"argv": sys.argv[1:] if argv is None else argv}
        if "of_sampler" in names:
            offered["args"], offered["of_sampler"] = parser.parse_known_args(argv)
        else:
            offered["args"] = parser.parse_args(argv)
        if "explicit" in names:
            offered["explicit"] = explicit_flags(parser, argv)
        given = {name: value for name, value in offered.items() if name in names}
        return run_script(lambda stack: prepare(**given, **({"stack": stack} if "stack" in names else {})))

    return main


def run_script(prepare: Callable[[contextlib.ExitStack], Callable[[], int | None]]) -> int:
    """Prepare, then work. Returns the exit status: the work's, None being 0.

    prepare: checks the input and returns the work, registering on the stack what has to be closed. Only its ValueError
    and OSError become one line on stderr and status 2: an error on day three keeps its traceback. A LoaderError, which
    says all there is to say, becomes a line and status 1. A command that torchrun starts again after it was refused is
    refused with the same line, and nothing is prepared.
    """
    write_any_character(sys.stdout, sys.stderr)
    with lasting_streams():
        if (said := former_refusal(os.environ)) is not None:
            return usage_error(ValueError(said), launched_rank(os.environ))
        try:
            return _run(prepare)
        except LoaderError as error:
            report_error(error, launched_rank(os.environ))
            return 1


def _run(prepare: Callable[[contextlib.ExitStack], Callable[[], int | None]]) -> int:
    with contextlib.ExitStack() as stack:
        try:
            work = prepare(stack)
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and NO_HOME not in str(error):
                raise
            note_refusal(error, os.environ)
            status = usage_error(error, launched_rank(os.environ))
            abort_mpi(status)
            return status
        try:
            return work() or 0
        except BaseException:
            if under_mpi():
                traceback.print_exc()  # aborting leaves no time for it
                abort_mpi(1)
            raise


def write_any_character(*streams: TextIO) -> None:
    """Let text streams write what their encoding lacks as an escape, instead of ending the work over a file's name."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def ignored_folder(out: str, environ: Mapping[str, str]) -> list[str]:
    """What to say where --out and OPENAI_LOGDIR name two folders."""
    other = environ.get("OPENAI_LOGDIR", "")
    if not out or not other or output_folder(environ) == output_folder(environ, out):
        return []
    return [f"OPENAI_LOGDIR {other} is ignored: --out {out} is given"]


def say(message: str) -> None:
    """One line on stderr, which is not the result."""
    sys.stderr.write(message + "\n")


def say_moved(moved: Sequence[Path]) -> None:
    """Say where another picture was moved that had the name of a new one."""
    if moved:
        say(f"another picture of this name was moved aside: {', '.join(path.name for path in moved)}")


def usage_error(error: Exception, rank: int = 0) -> int:
    """Report bad input as one line on stderr and return the exit status, 2."""
    report_error(error, rank)
    return USAGE_ERROR


def report_error(error: Exception, rank: int = 0) -> None:
    """One line on stderr. Other ranks than 0 name themselves."""
    text = " ".join(str(error).split())
    program = sys.argv[0].rsplit("/", 1)[-1]
    sys.stderr.write(f"{program}: error: {text}\n" if rank == 0 else f"{program}: rank {rank}: error: {text}\n")

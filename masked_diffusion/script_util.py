"""What all command-line scripts share: flags, explicit settings, one-line usage errors."""

import argparse
import contextlib
import io
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from masked_diffusion import dist_util
from masked_diffusion.processes.loader_processes import LoaderError
from masked_diffusion.runs.trained import Request

USAGE_ERROR = 2
NO_HOME = "home directory"  # how Path.expanduser says that ~ stands for nothing
# Help of the flags in model_and_diffusion_defaults().
MODEL_AND_DIFFUSION_HELPS = {
    "image_size": "side of the square images in pixels",
    "mask_ratio": "share of the tokens to mask, such as 0.30; None trains without masking",
    "decode_layer": "decoder blocks; None means 2, for MDTv2 4",
    "class_cond": "use class labels",
    "use_fp16": "compute in float16",
    "learn_sigma": "the network predicts a variance, too",
    "diffusion_steps": "timesteps of the process",
    "noise_schedule": "linear, or squaredcos_cap_v2 (cosine)",
    "timestep_respacing": "train on some of the timesteps only, such as 250 or 10,15,20; empty = all",
    "use_kl": "train on the variational bound alone",
    "predict_xstart": "the network predicts x_0 instead of the noise",
    "sigma_small": "of the two fixed variances (--learn_sigma False), the posterior's",
    "rescale_learned_sigmas": "multiply the variational term by diffusion_steps / 1000",
}
# Help of what scripts that read weights can be told.
WEIGHTS_HELPS = {
    "interpolate_pos": "take weights of another resolution: resize their position and relative tables",
    "drop_extra": "leave out weights that the model does not have, instead of refusing the file",
}

# Help of the flags that open a checkpoint, beside --model_path.
CHECKPOINT_HELPS = {
    "model": "name of the model, where no config.json lies beside the checkpoint",
    "image_size": "side of the images, where no config.json lies beside the checkpoint",
    "decode_layer": "decoder blocks, where no config.json lies beside the checkpoint; None means 2",
    "vae_path": "hub name or folder of a diffusers AutoencoderKL; default: the one the model was trained with",
    "vae_decoder": "ema or mse, where the first stage is the hub's default",
    "device": "auto, cpu, cuda or cuda:N",
}
# Help of the sampling flags that scripts share.
SAMPLER_HELPS = {
    "sampler": "ddpm or ddim; or, for fewer steps, a solver without noise: dpmsolver++, unipc, heun",
    "guide_from": "what predictions are led away from: null_label (classifier-free guidance)",
    "guidance": "weight over time: power_cosine, constant, or interval (1 outside of --cfg_interval)",
    "cfg_interval": "first and last timestep that --guidance interval guides at, such as 80-470",
    "cfg_channels": "latent channels that are guided: 3, as published, or 4",
    "cfg_skip_tol": "do not compute the weak prediction where the weight is within this of 1, such as 0.01: faster",
}


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


def interval(text: str) -> list[int]:
    """``80-470`` -> [80, 470]. Raises argparse.ArgumentTypeError for anything else."""
    low, dash, high = text.partition("-")
    if not (dash and low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"expected two timesteps, the smaller one first, such as 80-470, got {text!r}")
    return [int(low), int(high)]


# What turns text into a value of a default's type, where that is not the type itself.
CONVERTERS: dict[type, Callable[[str], Any]] = {bool: str2bool, float: finite_float}


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
        text = (helps or {}).get(name, "")
        parser.add_argument(f"--{name}", default=default, type=convert, help=f"{text} (default: {default!r})".strip())


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


def request_of(args: argparse.Namespace, explicit: set[str], **usual: Any) -> Request:
    """What the command line asks of a checkpoint. usual: further fields of the request."""
    return Request(**args_to_dict(args, explicit & Request.__dataclass_fields__.keys()), **usual)


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that launchers pass, or that scripts written for the published code do."""
    group = parser.add_argument_group("launcher", "set by torchrun and friends; needed only where nothing sets them")
    group.add_argument("--local-rank", "--local_rank", type=int, help="passed by torch.distributed.launch")
    group.add_argument("--rank", type=int, help="number of this process among all")
    group.add_argument("--world_size", type=int, help="number of processes")
    group.add_argument(
        "--dist_url", default="env://", help="where the processes meet (default: MASTER_ADDR:MASTER_PORT)"
    )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="for compatibility only: MPI launchers are recognised"
    )


def place_from_args(args: argparse.Namespace) -> dist_util.Place:
    """This process's place, from the launcher flags and the environment."""
    return dist_util.find_place(os.environ, args.rank, args.world_size, args.local_rank)


def choose_num_workers(asked: int) -> int:
    """-1: as many loader processes as there are spare cores for this training process, at most 8."""
    if asked < -1:
        raise ValueError(f"--num_workers {asked}: must be 0 (load in the training process) or more, or -1 to choose")
    if asked >= 0:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // dist_util.local_world_size(os.environ) - 1))


def run_script(prepare: Callable[[contextlib.ExitStack], Callable[[], int | None]]) -> int:
    """Prepare, then work. Returns the exit status: the work's, None being 0.

    prepare: checks the input and returns the work, registering on the stack what has to be closed. Only its ValueError
    and OSError become one line on stderr and status 2: an error on day three keeps its traceback. A LoaderError, which
    says all there is to say, becomes a line and status 1.
    """
    write_any_character(sys.stdout, sys.stderr)
    try:
        return _run(prepare)
    except LoaderError as error:
        report_error(error, dist_util.launched_rank(os.environ))
        return 1


def _run(prepare: Callable[[contextlib.ExitStack], Callable[[], int | None]]) -> int:
    with contextlib.ExitStack() as stack:
        try:
            work = prepare(stack)
        except (ValueError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and NO_HOME not in str(error):
                raise
            status = usage_error(error, dist_util.launched_rank(os.environ))
            dist_util.abort_mpi(status)
            return status
        try:
            return work() or 0
        except BaseException:
            if dist_util.under_mpi():
                traceback.print_exc()  # aborting leaves no time for it
                dist_util.abort_mpi(1)
            raise


def write_any_character(*streams: TextIO) -> None:
    """Let text streams write what their encoding lacks as an escape, instead of ending the work over a file's name."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def usage_error(error: Exception, rank: int = 0) -> int:
    """Report bad input as one line on stderr and return the exit status, 2."""
    report_error(error, rank)
    return USAGE_ERROR


def report_error(error: Exception, rank: int = 0) -> None:
    """One line on stderr. Other ranks than 0 name themselves."""
    text = " ".join(str(error).split())
    program = sys.argv[0].rsplit("/", 1)[-1]
    sys.stderr.write(f"{program}: error: {text}\n" if rank == 0 else f"{program}: rank {rank}: error: {text}\n")

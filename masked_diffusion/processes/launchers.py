"""Where a launcher put this process, and which job it belongs to."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from masked_diffusion.processes.refusals import parent_process


@dataclass(frozen=True)
class Place:
    """Where a launcher put this process. rank: in 0 ... world_size - 1; local_rank: number on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


# Launchers in the order in which they are asked: name, (rank, world size, local rank) variables. A launcher counts
# when rank and size are set: torchrun inside a SLURM step wins over the step. Of MPICH all three are asked for, because
# srun, too, sets the first two for MPI programs.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "SLURM": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def find_place(
    environ: Mapping[str, str], rank: int | None = None, world_size: int | None = None, local_rank: int | None = None
) -> Place:
    """Read this process's place from flags, which win, or from the launcher's environment; a bare process is alone.

    Raises ValueError for a rank outside the world, or a rank without a world size.
    """
    found: dict[str, int] = {}
    for launcher, variables in LAUNCHERS.items():
        if set(variables if launcher == "MPICH" else variables[:2]) <= set(environ):
            names = ("rank", "world_size", "local_rank")
            found = {name: int(environ[v]) for name, v in zip(names, variables, strict=True) if v in environ}
            break
    rank = found.get("rank", 0) if rank is None else rank
    world_size = found.get("world_size", 1) if world_size is None else world_size
    local_rank = found.get("local_rank", rank) if local_rank is None else local_rank
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank} --world_size {world_size}: the rank must be in 0 ... {world_size - 1}")
    return Place(rank, world_size, local_rank)


def launched_rank(environ: Mapping[str, str]) -> int:
    """The rank a launcher gave this process, for messages; 0 where that cannot be told."""
    try:
        return find_place(environ).rank
    except ValueError:
        return 0


def local_world_size(environ: Mapping[str, str]) -> int:
    """Number of processes on this machine, 1 where no launcher says."""
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"):
        if environ.get(name, "").isdigit():
            return max(1, int(environ[name]))
    if number := re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):  # such as 8(x2)
        return max(1, int(number[0]))
    return 1


def was_restarted(environ: Mapping[str, str]) -> bool:
    """Whether torchrun or SLURM started this command again by itself."""
    return any(environ.get(name, "0") != "0" for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


@dataclass(frozen=True)
class Job:
    """A job of a launcher that starts its command again. name: what it is known by. command: what it starts. attempt:
    how often SLURM and torchrun have started it again, [0, 0] at first."""

    name: str
    command: str
    attempt: list[int]


def job_of(environ: Mapping[str, str], command: str) -> Job | None:
    """The job that this process belongs to; None for a command that nobody starts again.

    torchrun has no name for a job unless it is given one: then the launcher's own process is the name.
    """
    attempt = [int(environ.get(name, 0)) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    if "SLURM_JOB_ID" in environ:
        return Job(f"SLURM {environ['SLURM_JOB_ID']}", command, attempt)
    name = environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    if name == "none":
        name = parent_process()
    return Job(f"torchrun {name}", command, attempt)


def under_mpi() -> bool:
    """Whether this process has joined others through mpi4py."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1


def abort_mpi(status: int) -> None:
    """End all processes of an MPI job when this one fails; no effect elsewhere.

    At exit, mpi4py waits for the other ranks, and those may be waiting for this one.
    """
    if under_mpi():
        sys.stdout.flush()
        sys.stderr.flush()
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status)

"""Join the processes of a run under every launcher, and choose the device.

No other file asks for a device. ``processes/launchers.py`` finds out which rank this process is.
"""

import contextlib
import hashlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from masked_diffusion.processes.launchers import Place, local_world_size
from masked_diffusion.processes.refusals import NotNowError
from masked_diffusion.processes.rendezvous import meet

# A rank that does not join within this time is reported. Listing data and loading the first stage happen before.
JOIN_TIMEOUT = timedelta(minutes=5)
# Longest wait inside one collective: meanwhile rank 0 may be drawing a preview.
COLLECTIVE_TIMEOUT = timedelta(minutes=15)
# How often rank 0 lets the others know that it is still at work which may take longer than that.
NEWS_INTERVAL = timedelta(minutes=1)
# A model that ranks share keeps gloo's threads alive. One that lets the last collective's tensors go only while the
# interpreter ends aborts the process (seen with sharded models): it gets the time to have done so.
LETTING_GO = timedelta(seconds=0.5)


def allow_tf32(allowed: bool) -> None:
    """Let CUDA matrix products round their inputs to TF32. This has no effect elsewhere."""
    # Torch refuses to compute once its newer setting, which also rules CPUs, and this one disagree.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device.

    local_rank: chooses the GPU of a machine with several. Raises ValueError for another name, for CUDA or MPS where
    there is none, and for a GPU that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--device mps: no MPS device is available here; use --device cpu")
        return torch.device("mps")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available here; use --device cpu")
    # srun can show each process its own GPU only.
    index = int(number) if number else local_rank if torch.cuda.device_count() > 1 else 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device cuda:{index}: this machine has {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


class Ranks:
    """The processes of one run, and what they tell each other. A single process tells nobody anything."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self.device = device
        self._asked: tuple[Tensor, Any] | None = None

    @property
    def is_main(self) -> bool:
        """True for the process that writes logs and checkpoints."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place. Collective: every rank must call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, asked: bool) -> bool:
        """Return whether some rank asked for something. All ranks get the same answer. Collective.

        Alone, the answer is immediate. Among several ranks it comes one call late: this call sends its question and
        returns the answer to the last one. Flags travel from host to host, because a flag on a GPU would make the host
        wait for all the work that it has given the GPU.
        """
        if self.world_size == 1:
            return asked
        answered = self._asked
        flag = torch.tensor([int(asked)], dtype=torch.int32)
        self._asked = (flag, dist.all_reduce(flag, async_op=True))
        if answered is None:
            return False
        answered[1].wait()
        return bool(answered[0].item())

    def concat(self, tensor: Tensor) -> Tensor:
        """Put tensors (n, ...) of all ranks, of equal shapes, together in the order of the ranks: (world_size * n,
        ...).

        Collective: every rank must call it.
        """
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def check_alike(self, fingerprints: Mapping[str, str], what: str) -> None:
        """Raise ValueError on all ranks where a rank's fingerprint differs from that of rank 0. Collective.

        fingerprints: by name, such as "data". what: this rank's data in words, for the message.
        """
        digests = [hashlib.sha256(value.encode()).digest()[:7] for value in fingerprints.values()]
        mine = torch.tensor([[int.from_bytes(digest, "big") for digest in digests]], device=self.device)
        everyones = self.concat(mine).tolist()
        for rank, theirs in enumerate(everyones):
            names = [n for n, a, b in zip(fingerprints, everyones[0], theirs, strict=True) if a != b]
            if names:
                raise ValueError(
                    f"rank {rank} has other {' and '.join(names)} than rank 0 (here: {what}); give all the same"
                )

    def from_main(self, compute: Callable[[], Any]) -> Any:
        """Run ``compute`` on rank 0 and return its result on all ranks. Collective: every rank must call it.

        An error on rank 0 is raised on all ranks.
        """
        if self.world_size == 1:
            return compute()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = compute()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        if box[1] is not None:
            if self.is_main:
                raise box[1]
            raise box[1] from RuntimeError("it is rank 0 that met it")  # so that rank 0 alone judges its causes
        return box[0]

    def from_main_patiently(self, compute: Callable[[], Any], doing: str) -> Any:
        """Do the same as :meth:`from_main` for long work, such as looking at a million files on a network disk.

        No collective waits for the work. Every ``NEWS_INTERVAL`` rank 0 tells the others that it goes on, and says on
        stderr what it is doing.
        """
        result: Future[Any] = Future()

        def work() -> None:
            try:
                result.set_result(compute())
            except Exception as error:
                result.set_exception(error)

        if self.is_main:  # a daemon: nobody waits for a disk that does not answer when the run is broken off
            threading.Thread(target=work, daemon=True).start()

        def is_done() -> bool:
            wait([result], timeout=NEWS_INTERVAL.total_seconds())
            if not result.done():
                sys.stderr.write(f"still {doing}\n")
            return result.done()

        while not self.from_main(is_done):
            pass
        return self.from_main(result.result)

    def close(self) -> None:
        """Leave the process group. All ranks must have called the last collective."""
        if self.world_size > 1 and dist.is_initialized():
            if self._asked is not None:
                self._asked[1].wait()
            dist.destroy_process_group()
            time.sleep(LETTING_GO.total_seconds())


@contextlib.contextmanager
def joined_ranks(place: Place, device: torch.device, dist_url: str = "env://") -> Iterator[Ranks]:
    """Join the process group of a run, and leave it at the end.

    Tensors on GPUs travel over nccl, others over gloo. dist_url: where the ranks meet; ``env://`` takes MASTER_ADDR and
    MASTER_PORT. Raises ValueError when these are missing, or when a rank has not joined within ``JOIN_TIMEOUT``.
    """
    ranks = Ranks(place, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.world_size > 1:
        _join(place, device, dist_url)
    yield ranks
    # Not after an error: leaving takes part in the others' collectives, and those may wait for ever.
    ranks.close()


def meeting_point(place: Place, environ: Mapping[str, str]) -> str:
    """Find the URL where the ranks meet from what SLURM or MPI say, for a run without MASTER_ADDR or MASTER_PORT.

    Raises ValueError, with the remedy, where they say nothing.
    """
    if "SLURM_STEP_NODELIST" in environ and "RANK" not in environ:
        # The first of host names such as "gpu[03-05,9],login": all ranks derive the same, and nobody has to be asked.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])
        port = environ.get("MASTER_PORT", 10_000 + int(environ.get("SLURM_JOB_ID", 0)) % 50_000)
        if first:
            return f"tcp://{environ.get('MASTER_ADDR', first[1] + (first[2] or ''))}:{port}"
    if "PMI_RANK" in environ or "OMPI_COMM_WORLD_RANK" in environ:
        return _shared_over_mpi(local_world_size(environ) == place.world_size)
    raise ValueError(
        f"this is rank {place.rank} of {place.world_size}, but MASTER_ADDR and MASTER_PORT are not set: start with "
        "torchrun, or set both to the address and a free port of the first machine"
    )


def _shared_over_mpi(one_machine: bool) -> str:
    """Let rank 0 choose an address and tell the others."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "under mpiexec the ranks find each other through mpi4py, which cannot be imported here: install "
            "masked-diffusion[mpi] and an MPI library, or set MASTER_ADDR and MASTER_PORT"
        ) from error
    url = None
    if MPI.COMM_WORLD.Get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        url = f"tcp://{'127.0.0.1' if one_machine else socket.gethostname()}:{port}"
    return MPI.COMM_WORLD.bcast(url)


def _join(place: Place, device: torch.device, dist_url: str) -> None:
    # torchrun's agent may itself hold the store at MASTER_ADDR: then only env:// knows how to reach it.
    known = dist_url != "env://" or {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    url = dist_url if known else meeting_point(place, os.environ)
    address = url if url != "env://" else "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    try:
        rendezvous = dist.rendezvous(url, place.rank, place.world_size, timeout=JOIN_TIMEOUT)
        store, _, _ = next(iter(rendezvous))
        store = dist.PrefixStore("masked_diffusion", store)
        meeting = meet(store, place.rank, place.world_size, JOIN_TIMEOUT)
        store.set_timeout(COLLECTIVE_TIMEOUT)
    except (TimeoutError, RuntimeError) as error:  # torch's own kinds, and for file:// a bare one
        missing = f" ({error})" if isinstance(error, TimeoutError) else ""
        raise NotNowError(
            f"rank {place.rank} of {place.world_size}: not all ranks met at {address} within "
            f"{int(JOIN_TIMEOUT.total_seconds())} s{missing}; check that every node was started, with the same address "
            "and port"
        ) from error
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # by where a tensor is
        store=dist.PrefixStore(meeting, store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )

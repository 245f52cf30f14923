"""Measure cases of ``scripts/benchmark.py``, from checked flags: one here, several in a process each."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from benchmarking.cases import Child, against_plain, encode, memory, plain_step, policies, scaling
from benchmarking.indexes import index, index_of
from benchmarking.own_cases import assemble, data, noise, sample, train_step
from benchmarking.settings import Settings
from benchmarking.setup import memory_held
from benchmarking.sources import sources

from masked_diffusion import dist_util
from masked_diffusion.dist_util import Ranks
from masked_diffusion.processes.launchers import find_place

SCRIPT = Path(__file__).parent.parent / "benchmark.py"

CASES: dict[str, Callable[[Settings, Ranks], dict[str, Any]]] = {
    "train_step": train_step,
    "sample": sample,
    "data": data,
    "sources": sources,
    "encode": encode,
    "assemble": assemble,
    "noise": noise,
    "plain_step": plain_step,
    "against_plain": against_plain,
    "policies": policies,
    "index_of": index_of,
}
IN_CHILDREN: dict[str, Callable[[Child, Settings], dict[str, Any]]] = {
    "memory": memory,
    "scaling": scaling,
    "index": index,
}


def record(case: str, settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Measure a case."""
    held = memory_held(ranks.device)
    shared = ("model", "image_size", "batch_size", "mask_ratio", "with_vae", "repeats", "warmup")
    fields = CASES[case](settings, ranks)
    return {
        "case": case,
        **{name: getattr(settings, name) for name in shared},
        **fields,
        "net_memory_bytes": fields["peak_memory_bytes"] - held,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def in_child(case: str, argv: Sequence[str], processes: int = 1) -> str:
    """The line of a case measured by the script in a process of its own, which ends this one if it fails.

    processes: so many under torchrun, of which the first says the line.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(SCRIPT), *argv, "--case", case, "--out", ""]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0:
        raise SystemExit(f"case {case}: ended by signal {-done.returncode} (9: probably out of memory)")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return done.stdout


def prepare(
    args: argparse.Namespace,
    argv: Sequence[str],
    cases: Sequence[str],
    settings: Settings,
    stack: contextlib.ExitStack,
) -> Callable[[], None]:
    """Choose the device and open the file. Returns the work. Raises ValueError for either."""
    place = find_place(os.environ)
    device = dist_util.choose_device(args.device, place.local_rank)
    outputs = [sys.stdout]
    if args.out:
        try:
            outputs.append(stack.enter_context(Path(args.out).expanduser().open("a", encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"--out {args.out}: cannot write there ({error.strerror})") from error

    def line_of(case: str) -> str:
        if case in IN_CHILDREN:
            result = IN_CHILDREN[case](
                lambda of, *flags, **how: json.loads(in_child(of, [*argv, *flags], **how)), settings
            )
            return json.dumps({**result, "case": case}) + "\n"
        if len(cases) > 1:
            return in_child(case, argv)
        with dist_util.joined_ranks(place, device) as ranks:
            line = json.dumps(record(case, settings, ranks)) + "\n"
            return line if ranks.is_main else ""

    def work() -> None:
        for case in cases:
            line = line_of(case)
            for output in outputs:
                output.write(line)
                output.flush()

    return work

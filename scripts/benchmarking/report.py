"""Measure training steps at the largest batches that fit, from checked flags of ``scripts/gpu_report.py``."""

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarking.cases import plain_training
from benchmarking.settings import Settings
from benchmarking.setup import (
    choose_precision,
    common,
    make_loop,
    timed,
    train_step_flops,
    training_batch,
    utilisation,
)

from masked_diffusion import dist_util
from masked_diffusion.dist_util import Place, Ranks

OURS, COMPILED, PLAIN = "ours", "ours, compiled", "plain"
COLUMNS = ("model", "path", "batch", "images/s", "MFU", "peak GB", "of plain")

Step = Callable[[], Any]


def make_step(path: str, settings: Settings, ranks: Ranks) -> Step:
    """A training step of one of the paths, on a model and a batch of its own."""
    batch = training_batch(settings)
    if path != PLAIN:
        loop = make_loop(dataclasses.replace(settings, compile=path == COMPILED), ranks)
        return lambda: loop.train_step(*batch)
    training = plain_training(settings, ranks.device)

    def step() -> None:
        with torch.autocast(ranks.device.type, dtype=settings.dtype, enabled=settings.dtype != torch.float32):
            training.step(*batch)

    return step


def free(device: torch.device) -> None:
    """Give back the memory of what was measured before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fits(make: Callable[[], Step], device: torch.device) -> bool:
    """Whether two steps fit into the memory: the optimizer's state is made in the first."""
    try:
        step = make()
        for _ in range(2):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        free(device)
    return True


def largest_batch(make: Callable[[int], Step], sizes: Sequence[int], device: torch.device) -> int | None:
    """The last of growing sizes whose steps fit, None where the first does not."""
    best = None
    for size in sizes:
        if not fits(partial(make, size), device):
            break
        best = size
    return best


def measure(path: str, settings: Settings, sizes: Sequence[int], ranks: Ranks, flops: int) -> dict[str, Any]:
    """The largest batch of a path, and its speed and memory there. flops: of one image's step.

    Where not even the first size fits, ``batch`` is None and nothing is measured.
    """

    def sized(size: int) -> Settings:
        return dataclasses.replace(settings, batch_size=size)

    batch = largest_batch(lambda size: make_step(path, sized(size), ranks), sizes, ranks.device)
    record: dict[str, Any] = {"model": settings.model, "path": path, "batch": batch}
    if batch is None:
        return record
    step = make_step(path, sized(batch), ranks)
    timing = timed(step, settings, ranks.device)
    del step
    free(ranks.device)
    return {
        **record,
        **common(timing, ranks.device, batch),
        **utilisation(flops * batch, timing.median, settings, ranks.device, tf32=False),
    }


def measure_model(settings: Settings, sizes: Sequence[int], ranks: Ranks) -> list[dict[str, Any]]:
    """All paths of a model."""
    one = dataclasses.replace(settings, batch_size=1)
    flops = train_step_flops(make_loop(one, ranks), training_batch(one))
    free(ranks.device)
    return [measure(path, settings, sizes, ranks, flops) for path in (OURS, COMPILED, PLAIN)]


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table. The last column: images/s over those of the model's plain path."""
    plain = {record["model"]: record.get("images_per_second") for record in records if record["path"] == PLAIN}
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for record in records:
        cells = [record["model"], record["path"]]
        if record["batch"] is None:
            cells += ["does not fit", *[""] * 4]
        else:
            mfu, of_plain, speed = record.get("mfu"), plain.get(record["model"]), record["images_per_second"]
            cells += [
                str(record["batch"]),
                f"{speed:.1f}",
                "" if mfu is None else f"{mfu:.0%}",
                f"{record['peak_memory_bytes'] / 1e9:.1f}",
                "" if of_plain is None else f"{speed / of_plain:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def prepare(
    args: argparse.Namespace, all_settings: Sequence[Settings], stack: contextlib.ExitStack
) -> Callable[[], None]:
    """Choose the device and open the file. Returns the work. Raises ValueError or OSError."""
    sizes = [args.first_batch]
    while 2 * sizes[-1] <= args.largest_batch:
        sizes.append(2 * sizes[-1])
    device = dist_util.choose_device(args.device)
    folder = Path(args.out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lines = stack.enter_context((folder / "report.jsonl").open("a", encoding="utf-8"))
    now = datetime.now(timezone.utc)

    def work() -> None:
        choose_precision(all_settings[0], device, tf32=False)
        records = []
        with dist_util.joined_ranks(Place(), device) as ranks:
            for settings in all_settings:
                for record in measure_model(settings, sizes, ranks):
                    records.append(record)
                    text = json.dumps({**record, "torch": torch.__version__, "date": now.date().isoformat()})
                    lines.write(text + "\n")
                    lines.flush()
        text = table(records)
        with (folder / f"report_{now:%Y%m%dT%H%M%S%fZ}.md").open("x", encoding="utf-8") as file:
            file.write(
                f"{records[0].get('device_name', device)}, torch {torch.__version__}, bfloat16, {now.date()}\n\n"
            )
            file.write(text)
        sys.stdout.write(text)

    return work

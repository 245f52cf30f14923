"""What a training would cost, from a step or two of it that are made and forgotten."""

import resource
import sys
import time

import torch
from torch import nn

from masked_diffusion.choices import SHARDINGS
from masked_diffusion.dist_util import Ranks
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.block_modes import blocks_of
from masked_diffusion.models.cost import cost, forward_cost
from masked_diffusion.models.policies import View
from masked_diffusion.train_util import TrainLoop
from masked_diffusion.training.optimizers import MOMENTS
from masked_diffusion.training.train_config import TERA

GIGA = 1e9


def view_gflops(model: LatentTransformer, view: View) -> float:
    """Forward of one image in a view of a training step; a multiply-add counts as one, as in the papers' tables. Where
    the mask ratio is drawn, it is the mean one."""
    return forward_cost(model, model.num_keep(0.5) if view.drops else None) / GIGA


def state_gigabytes(model: LatentTransformer, opt: str, num_emas: int, shard: str, processes: int) -> float:
    """Weights, gradients, the optimizer's state and the EMAs, in float32, of one of so many processes.

    With fsdp, also what is gathered at a time: all that is outside the blocks, two blocks, and the gradient of one.
    """
    copies = {"weights and gradients": 2.0, "moments": MOMENTS[opt], "averages": num_emas}
    if shard == "zero":
        copies["moments"] /= processes
    size = numel(model)
    numbers = size * sum(copies.values())
    if shard == "fsdp" and processes > 1:
        blocks = [numel(block) for block in blocks_of(model)]
        numbers = numbers / processes + (size - sum(blocks)) + 3 * max(blocks)
    return 4 * numbers / GIGA


def numel(module: nn.Module) -> int:
    """Number of parameters, all shards of each taken together."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_table(model: LatentTransformer, opt: str, num_emas: int, processes: int) -> list[str]:
    """:func:`state_gigabytes` under each sharding on this number of processes, and on two, four and eight times it."""
    rows = [
        (count, [state_gigabytes(model, opt, num_emas, shard, count) for shard in SHARDINGS])
        for count in (processes, 2 * processes, 4 * processes, 8 * processes)
    ]
    return [
        "memory per process for weights, gradients, optimizer, EMA, by --shard:",
        *(
            f"{count:6d} process{'es' if count > 1 else ''}: "
            + ", ".join(f"{shard} {size:.2f} GB" for shard, size in zip(SHARDINGS, sizes, strict=True))
            for count, sizes in rows
        ),
    ]


def peak_gigabytes(ranks: Ranks) -> float:
    """Most memory this process has held: of its GPU, else of its host."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device) / GIGA
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIGA


def try_out(loop: TrainLoop, num_images: int) -> list[str]:
    """Train two steps, of which the second is timed, and say what a run would need. Nothing is written."""
    seconds = [_timed(loop) for _ in range(2)][1]
    model, config = loop.model, loop.config
    gflops = [view_gflops(loop.skeleton, view) for view in loop.views]
    words = [" masked" if view.drops else " with all tokens" for view in loop.views]
    words = words if loop.model.policy.drops else [""]
    passes = ", ".join(f"{number:.4g}{word}" for number, word in zip(gflops, words, strict=True))
    step = cost(loop.skeleton) / GIGA
    peak = peak_gigabytes(loop.ranks)
    where = "on the GPU" if loop.ranks.device.type == "cuda" else "on the host"
    lines = [
        f"parameters: {numel(model) / 1e6:.1f} M",
        f"GFLOPs per image: forward {passes}, a training step {step:.4g} (a multiply-add counts as one)",
        *state_table(model, config.opt, len(loop.emas), loop.ranks.world_size),
        f"peak of a step here, --shard {config.shard}, activations and all: {peak:.2f} GB {where}",
        f"images per epoch: {num_images}, steps per epoch: {num_images / loop.global_batch:.1f} of {loop.global_batch}",
        f"seconds per step: {seconds:.4g} ({loop.global_batch / seconds:.1f} images/s)",
    ]
    if (end := loop.budget.last_step) is None:
        return [*lines, "no end: give --max_steps, --max_compute or --lr_anneal_steps to see how long a run takes"]
    if config.finale and loop.model.policy.drops:
        whole = cost(loop.skeleton, loop.skeleton.num_tokens) / GIGA
        lines.append(
            f"finale: the last {config.finale:.0%} of the run on all tokens, {whole:.4g} GFLOPs per image in a step"
        )
    lines.append(f"compute of the whole run: {loop.budget.at_end().compute / TERA:.4g} TFLOPs")
    left = max(0, end - loop.start_step)
    days = left * seconds / 86400
    epochs = left * loop.global_batch / num_images
    return [*lines, f"steps to the end: {left} ({epochs:.1f} epochs), days to the end: {days:.3g}"]


def _timed(loop: TrainLoop) -> float:
    """Seconds of a step, with the loading of its batch."""
    begin = time.perf_counter()
    loop.train_step(*next(loop.data))
    if loop.ranks.device.type == "cuda":
        torch.cuda.synchronize(loop.ranks.device)
    return time.perf_counter() - begin


def report(loop: TrainLoop, num_images: int) -> int:
    """Say on rank 0 what :func:`try_out` found. Returns the exit status, 0."""
    loop.shared_model.train()
    for line in [*try_out(loop, num_images), "dry run: nothing was written"]:
        loop.logger.text(line)
    return 0

"""Sample images from a trained model into an ``.npz`` that the evaluator reads.

    python scripts/image_sample.py --model_path output_mdt_s2/ema_0.9999_400000.pt --cfg_cond True --num_samples 50000

Runs alone or under any launcher, with the same bytes. --out, or OPENAI_LOGDIR, names the output
folder.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable

from masked_diffusion.choices import GUIDANCE_FLAGS, foreign_settings
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.runs.config import ModelConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import (
    CHECKPOINT_FLAGS,
    COMPATIBILITY,
    MACHINE_FLAGS,
    OUT_FLAG,
    RECORDED,
    from_args,
    ignored_folder,
    main_of,
    make_parser,
)
from masked_diffusion.settings import Flag, flags_of

IGNORED = {
    "mask_ratio": "sampling does not mask",
    "timestep_respacing": "--num_sampling_steps decides",
    "use_kl": "a training loss",
    "rescale_learned_sigmas": "a training loss",
}


FLAGS = {
    "model_path": Flag("", "checkpoint to sample, such as ema_0.9999_400000.pt", "sampling"),
    "num_samples": Flag(5000, "images in the .npz", "sampling"),
    "batch_size": Flag(16, "images per batch; batches are shared out over the processes", "sampling"),
    "out": OUT_FLAG,
    "labels": Flag("random", "random, balanced, or a comma list of labels or class names", "sampling"),
    **flags_of(SamplerConfig),
    "few_steps": Flag(
        False, "sample although --num_sampling_steps is so low that the samples come out too narrow or wide", "sampling"
    ),
    **CHECKPOINT_FLAGS,
    "objective": Flag("ddpm", flags_of(ObjectiveConfig)["objective"].help + RECORDED, "diffusion"),
    "vae_decoder": CHECKPOINT_FLAGS["vae_decoder"]._replace(default=Request.usual_decoder),
    "class_cond": Flag(True, "False samples the null class and writes no labels", "model"),
    "use_fp16": Flag(False, "compute in float16", "machine"),
    "compile": Flag(
        False, "compile the blocks: some minutes at the start, then faster steps; pixels differ by rounding", "machine"
    ),
    "device": MACHINE_FLAGS["device"],
    "tf32": MACHINE_FLAGS["tf32"]._replace(default=True),
    "use_ddim": Flag(False, "the published spelling of --sampler ddim (eta 0)", COMPATIBILITY),
    **{
        name: flags_of(ModelConfig, DiffusionConfig)[name]._replace(
            help=f"accepted for compatibility: {reason}", group=COMPATIBILITY
        )
        for name, reason in IGNORED.items()
    },
}
MOST_USED = (
    "model_path", "num_samples", "batch_size", "labels", "cfg_cond", "cfg_scale", "sampler", "num_sampling_steps",
    "seed", "device",
)  # fmt: skip


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Sample images from a trained model into an .npz.", FLAGS, MOST_USED, launched=True)


def check_settings(args: argparse.Namespace, explicit: set[str]) -> None:
    """Raise ValueError for what can be refused before the weights are read."""
    args.sampler = sampler_name(args, explicit)
    from_args(SamplerConfig, args)
    for name in ("num_samples", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.vae_decoder not in ("ema", "mse"):
        raise ValueError(f"--vae_decoder {args.vae_decoder}: choose ema or mse")
    if not args.model_path:
        raise ValueError("--model_path: give the checkpoint to sample, such as ema_0.9999_400000.pt")


def sampler_name(args: argparse.Namespace, explicit: set[str]) -> str:
    """The sampler that --sampler and its published spelling name. Raises ValueError where they differ."""
    if "use_ddim" not in explicit:
        return args.sampler
    if "sampler" in explicit and args.use_ddim != (args.sampler == "ddim"):
        raise ValueError(f"--sampler {args.sampler} and --use_ddim {args.use_ddim} contradict each other; give one")
    return "ddim" if args.use_ddim else args.sampler


def warnings_of(args: argparse.Namespace, explicit: set[str]) -> list[str]:
    """Settings that are given and have no effect."""
    found = [f"--{name} is ignored: sampling does not use it" for name in IGNORED if name in explicit]
    if not args.cfg_cond:
        found += [f"--{name} is ignored without --cfg_cond True" for name in GUIDANCE_FLAGS if name in explicit]
    else:
        found += [
            f"--{name} is ignored with --guidance {args.guidance}"
            for name in sorted(explicit & foreign_settings(args.guidance).keys())
        ]
    if args.device == "cpu" and "tf32" in explicit:
        found.append("--tf32 is ignored on a CPU")
    if not args.class_cond and "labels" in explicit:
        found.append("--labels is ignored with --class_cond False")
    return found


def prepare(args: argparse.Namespace, explicit: set[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    check_settings(args, explicit)
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import image_sample

    idle = [*warnings_of(args, explicit), *ignored_folder(args.out, os.environ)]
    return image_sample.prepare(args, explicit, idle, stack)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

"""Measure the speed and the peak memory of training, sampling, data loading and the writing of samples, alone and
against the plain path.

    python scripts/benchmark.py --case train_step,sample,data,assemble --model MDT_S_2 --image_size 256 --batch_size 4

Prints one JSON object per case, a line each; a case that is alone is measured in this process, several in one child
process each, so that a peak of memory is its own. A new case is a function and a line in ``benchmarking/measuring.py``,
and its name in ``benchmarking/settings.py``.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence

from benchmarking.settings import (
    CASES,
    DEFAULTS,
    FULL_SAMPLING_STEPS,
    IN_CHILDREN,
    NEED_PLAIN,
    Settings,
    check_plain,
    with_autoencoder,
)

from masked_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    finite_float,
    main_of,
    optional,
    str2bool,
)

HELPS = {
    "case": "comma list of what to measure",
    "downsample": "image side / latent side; 1 for pixel space",
    "in_channels": "channels of the latents",
    "mask_ratio": "share of the tokens masked in the second view; None measures training without masking",
    "decode_layer": "decoder blocks; None means 2",
    "policy": "which tokens leave in training; None is the model's own",
    "objective": "what the network learns to predict",
    "batch_size": "images per step",
    "repeats": "measurements, of which median, minimum and maximum are printed",
    "warmup": "rounds before the first measurement",
    "num_sampling_steps": f"steps that are measured, and extrapolated to {FULL_SAMPLING_STEPS}",
    "num_samples": "images of the assemble case",
    "num_workers": "loader processes of the data case; 0 loads in the measured process",
    "with_vae": "encode and decode with a Stable Diffusion autoencoder of random weights; False takes latents as given",
    "compile": "compile the blocks in training",
    "grad_checkpointing": "run the blocks again in backward",
    "trace": "write torch's profile of a training step to this file, which chrome://tracing and Perfetto show",
    "use_fp16": "autocast to float16",
    "use_bf16": "autocast to bfloat16",
    "tf32": "allow TF32 on CUDA; None does as the scripts do: not in training, but in sampling",
    "device": "auto, cpu, cuda or cuda:N",
    "out": "append the lines to this file, too",
}


def create_argparser() -> argparse.ArgumentParser:
    defaults = {"case": "train_step,sample,data,assemble", **DEFAULTS, "device": "auto", "out": ""}
    types = {"mask_ratio": optional(finite_float), "decode_layer": optional(int), "tf32": optional(str2bool)}
    types["policy"] = str  # "none" is one
    parser = argparse.ArgumentParser(description="Measure speed and peak memory; prints a JSON object per case.")
    add_dict_to_argparser(parser, defaults, types, HELPS)
    return parser


def prepare(args: argparse.Namespace, argv: Sequence[str], stack: contextlib.ExitStack) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    cases = [name.strip() for name in args.case.split(",")]
    for name in cases:
        if name not in CASES and name not in IN_CHILDREN:
            raise ValueError(f"--case {name}: unknown; choose of {', '.join([*CASES, *IN_CHILDREN])}")
    settings = Settings(**args_to_dict(args, DEFAULTS))
    if set(cases) & set(NEED_PLAIN):
        check_plain(settings)
    if "encode" in cases:
        with_autoencoder(settings)
    # With torch, which takes seconds to import.
    from benchmarking import measuring

    return measuring.prepare(args, argv, cases, settings, stack)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

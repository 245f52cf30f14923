"""Look into a trained model.

    python scripts/visualize.py relative_bias --model_path output_digits/ema_0.99_002000.pt --out bias.png
    python scripts/visualize.py reconstruction --model_path output_digits/ema_0.99_002000.pt \
        --data_dir builtin:digits-test --out reconstruction.png

Pictures of samples (sweeps, how they come out of the noise, filled photos) are infer_mdt.py's.
"""

import argparse
import sys
from collections.abc import Callable

from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import (
    MACHINE_FLAGS,
    checkpoint_flags,
    finite_float,
    main_of,
    make_parser,
)
from masked_diffusion.settings import Flag, flags_of

MODES = ("relative_bias", "reconstruction")
OPENED_BY = ("model", "image_size", "decode_layer", "vae_path", "vae_decoder")
FLAGS = {
    "model_path": Flag("", "checkpoint, such as ema_0.9999_400000.pt", "sampling"),
    "out": Flag(None, "picture to write, .png or .jpg; default: the mode's name .png", "sampling", str),
    "data_dir": Flag("", "images of any form that a training reads; for reconstruction", "data"),
    "num_images": Flag(8, "images to reconstruct, evenly spaced in the data", "data"),
    "mask_ratio": Flag(
        None, "share of the tokens to mask; default: the training's, else 0.3", "sampling", finite_float
    ),
    "seed": Flag(0, "determines masks and noise", "sampling"),
    "sampler": flags_of(SamplerConfig)["sampler"]._replace(default="ddim"),
    "num_sampling_steps": flags_of(SamplerConfig)["num_sampling_steps"]._replace(default=50),
    **{name: flag for name, flag in checkpoint_flags("MDT_XL_2", "mse").items() if name in OPENED_BY},
    "device": MACHINE_FLAGS["device"],
}


def create_argparser() -> argparse.ArgumentParser:
    parser = make_parser("Look into a trained model.", FLAGS)
    parser.add_argument("mode", choices=MODES, help="heat maps of the position biases, or images masked and filled")
    return parser


def prepare(args: argparse.Namespace, explicit: set[str]) -> Callable[[], None]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    if not args.model_path:
        raise ValueError("--model_path: give the checkpoint to look into, such as ema_0.9999_400000.pt")
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import visualize

    return visualize.prepare(args, explicit)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

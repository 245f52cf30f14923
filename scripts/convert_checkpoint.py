"""Write a checkpoint in another format, with the configuration that makes it usable.

    python scripts/convert_checkpoint.py --model_path mdt_xl2_v1_ckpt.pt --out mdt_xl2/mdt_xl2_v1.safetensors

Takes our files and the published ones of MDT, MDTv2, DiT and SiT. The suffix of --out says what is written:
.safetensors or .pt (the weights, with config.json beside them); a name without one is a folder for diffusers.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.runs.config import ModelConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.script_util import (
    main_of,
    make_parser,
)
from masked_diffusion.settings import Flag, flags_of

UNRECORDED = "; for files without config.json"
BY_FLAGS = ("diffusion_steps", "noise_schedule", "predict_xstart", "sigma_small", "decode_layer")
FLAGS = {
    "model_path": Flag("", "checkpoint to read: ours or a published one, raw, EMA or a training file", "model"),
    "model": Flag(
        None, "such as SiT_XL_2, of weights that could be a DiT's or a SiT's alike" + UNRECORDED, "model", str
    ),
    "out": Flag("", "what to write: a file ending in .safetensors or .pt, or a folder for diffusers", "saving"),
    "diffusers_class": Flag(
        "ours",
        "of a DiT, in a folder for diffusers: ours (MaskedDiffusionPipeline), dit_pipeline (diffusers' DiTPipeline), "
        "or dit (its DiTTransformer2DModel alone)",
        "saving",
    ),
    **{
        name: flag._replace(help=flag.help + UNRECORDED)
        for name, flag in flags_of(ModelConfig, DiffusionConfig).items()
        if name in BY_FLAGS
    },
    "drop_extra": flags_of(Request)["drop_extra"],
    "vae_path": Flag(
        None,
        "hub name or folder of the autoencoder, or none for pixel space; for files without config.json, and for "
        "folders for diffusers, which get a copy of it",
        "model",
        str,
    ),
}
DIFFUSERS_CLASSES = ("ours", "dit_pipeline", "dit")


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Write a checkpoint in another format.", FLAGS)


def prepare(args: argparse.Namespace, explicit: set[str]) -> Callable[[], None]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    for name in ("model_path", "out"):
        if not getattr(args, name):
            raise ValueError(f"--{name}: give the file to {'read' if name == 'model_path' else 'write'}")
    source, out = Path(args.model_path).expanduser(), Path(args.out).expanduser()
    if out.suffix not in (".safetensors", ".pt", ""):
        raise ValueError(f"--out {out}: end the name in .safetensors or .pt, or give a folder's name without a suffix")
    if out.exists():
        raise ValueError(f"--out {out}: exists; give another name, or move it away")
    if args.diffusers_class not in DIFFUSERS_CLASSES:
        raise ValueError(f"--diffusers_class {args.diffusers_class}: choose {', '.join(DIFFUSERS_CLASSES)}")
    if "diffusers_class" in explicit and out.suffix:
        sys.stderr.write("warning: --diffusers_class is ignored: a file is written\n")
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import convert_checkpoint

    return convert_checkpoint.prepare(args, explicit, source, out)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

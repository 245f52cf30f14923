"""Draw a few pictures from a trained model.

python infer_mdt.py                                   # a published checkpoint, or your newest training
python infer_mdt.py --labels "golden retriever,panda" --cfg_scale 4 --out dogs_and_pandas.png
python infer_mdt.py --sweep cfg_scale=1,2,4           # the same noise under other settings
python infer_mdt.py --out denoising.gif               # how pictures come out of the noise
python infer_mdt.py --image photo.png --mask mask.png --labels 207    # fill what is white in the mask
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masked_diffusion.sampling.sampler_config import PICTURE_FLAGS, SamplerConfig
from masked_diffusion.script_util import (
    MACHINE_FLAGS,
    checkpoint_flags,
    finite_float,
    main_of,
    make_parser,
    say,
)
from masked_diffusion.settings import Flag, flags_of

if TYPE_CHECKING:
    from masked_diffusion.programs.infer_mdt import Drawing

V1_FILE, V2_FILE = "mdt_xl2_v1_ckpt.pt", "mdt_xl2_v2_ckpt.pt"
# What the published script draws with this file.
PUBLISHED: dict[str, Any] = {
    "model": "MDT_XL_2",
    "decode_layer": 2,
    "image_size": 256,
    "seed": 0,
    "num_sampling_steps": 500,
    "cfg_scale": 5.0,
    "scale_pow": 0.01,
    "labels": "208,208,208",
    "vae_decoder": "mse",
    "out": "sample.jpg",
}
PUBLISHED_V2: dict[str, Any] = {
    **PUBLISHED,
    "model": "MDTv2_XL_2",
    "decode_layer": 4,
    "seed": 1,
    "num_sampling_steps": 250,
    "cfg_scale": 4.0,
    "labels": "19,23,106,108,278,282",
}
# For one's own models, of whatever classes; no labels: all classes in turn.
OWN: dict[str, Any] = {"num_sampling_steps": 100, "cfg_scale": 4.0, "scale_pow": 4.0, "labels": "", "out": "sample.png"}

FLAGS = {
    "model_path": Flag(
        "",
        f"checkpoint; default: {V1_FILE} or {V2_FILE} in the working directory, else the newest EMA under output_*",
        "sampling",
    ),
    "labels": Flag(
        None,
        "comma list of labels or class names; default: 208 three times for the published file, else each class",
        "sampling",
        str,
    ),
    "out": Flag(
        None,
        "picture to write, .png, .jpg, or .gif for the denoising; default: sample.jpg for the published file, else "
        "sample.png",
        "sampling",
        str,
    ),
    **{name: flags_of(SamplerConfig)[name] for name in PICTURE_FLAGS},
    "num_sampling_steps": Flag(None, "default: 500 for the published file, else 100", "sampling", int),
    "seed": Flag(PUBLISHED["seed"], "determines the noise of each picture, with its number", "sampling"),
    "cfg_scale": Flag(
        None,
        "largest weight of the guidance; default: 5 for the published file, else 4",
        "guidance",
        finite_float,
    ),
    "scale_pow": Flag(
        None,
        "power of --guidance power_cosine; default: 0.01 for the published file, else 4",
        "guidance",
        finite_float,
    ),
    "sweep": Flag(
        None,
        "one row for each value of a setting, with the same noise, such as cfg_scale=1,2,4 or labels=207,360",
        "sampling",
        str,
    ),
    "frames": Flag(
        0, "states of the denoising to show, from noise to picture; 0 shows the picture, or 25 in a .gif", "sampling"
    ),
    "image": Flag(None, "photo to fill; with --mask", "sampling", str),
    "mask": Flag(None, "picture of the size of --image, white where to fill", "sampling", str),
    "inpaint_mode": Flag(
        "side",
        "side: what is filled is masked and interpolated, as in training; plain: without masking",
        "sampling",
    ),
    **checkpoint_flags(PUBLISHED["model"], PUBLISHED["vae_decoder"]),
    "device": MACHINE_FLAGS["device"],
}
MOST_USED = (
    "model_path", "labels", "out", "cfg_scale", "num_sampling_steps", "seed", "sampler", "sweep", "frames", "device",
)  # fmt: skip


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Draw a few pictures from a trained model.", FLAGS, MOST_USED)


def prepare(args: argparse.Namespace, explicit: set[str], open_model: Callable[..., Any] | None = None) -> "Drawing":
    """Check the flags, then all else that input can get wrong. Returns what draws.

    open_model: reads the checkpoint, called as ``open_trained``, which is the default. Raises ValueError or OSError.
    """
    if bool(args.image) != bool(args.mask):
        raise ValueError("--image and --mask: give both, the photo and what to fill in it")
    if not args.sweep:  # else a setting is still to come
        given = {name: value for name in PICTURE_FLAGS if (value := getattr(args, name)) is not None}
        SamplerConfig(**given)  # what it refuses is refused here
    # With torch, which takes seconds to import.
    from masked_diffusion.programs import infer_mdt
    from masked_diffusion.runs.trained import open_trained

    path = Path(args.model_path).expanduser() if args.model_path else find_model(Path.cwd())
    say(f"model: {path}")
    presets = {V1_FILE: PUBLISHED, V2_FILE: PUBLISHED_V2}.get(path.name, OWN)
    for name, value in presets.items():
        if name not in explicit:
            setattr(args, name, value)
    parse = create_argparser().parse_args
    return infer_mdt.prepare(args, explicit, presets.keys(), path, parse, open_model or open_trained)


def find_model(folder: Path) -> Path:
    """The published checkpoint in a folder, else the newest EMA of the trainings below it."""
    for name in (V1_FILE, V2_FILE):
        if (folder / name).is_file():
            return folder / name
    from masked_diffusion.runs import checkpoint

    averages = [path for path in folder.glob("output_*/ema_*") if checkpoint.EMA_FILE.fullmatch(path.name)]
    if not averages:
        raise FileNotFoundError(
            f"there is no {V1_FILE}, no {V2_FILE} and no output_*/ema_*.pt in {folder}: train a model with `bash "
            "run.sh`, or give one with --model_path"
        )
    return max(averages, key=lambda path: path.stat().st_mtime)


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

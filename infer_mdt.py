"""Draw a few pictures from a trained model.

python infer_mdt.py                                   # a published checkpoint, or your newest training
python infer_mdt.py --labels "golden retriever,panda" --cfg_scale 4 --out dogs_and_pandas.png
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_diffusion import checkpoint, diffusion_defaults, dist_util
from masked_diffusion.class_names import ClassNames
from masked_diffusion.pictures import check_picture_path, grid, save_picture
from masked_diffusion.sample_util import ImageSampler, SamplerConfig
from masked_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    explicit_flags,
    optional,
    run_script,
)
from masked_diffusion.trained import Trained, open_trained

V1_FILE = "mdt_xl2_v1_ckpt.pt"
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
# For one's own models, of whatever classes; no labels: all classes in turn.
OWN: dict[str, Any] = {"num_sampling_steps": 100, "cfg_scale": 4.0, "scale_pow": 4.0, "labels": "", "out": "sample.png"}
OWN_IMAGES = 20
COLUMNS, MOST_COLUMNS = 3, 10
BATCH_SIZE = 20

HELPS = {
    "model": "name of the model, where no config.json lies beside the checkpoint",
    "image_size": "side of the images, where no config.json lies beside the checkpoint",
    "decode_layer": "decoder blocks, where no config.json lies beside the checkpoint; None means 2",
    "seed": "determines the noise of each picture, with its number",
    "vae_decoder": "ema or mse, where the first stage is the hub's default",
    "device": "auto, cpu, cuda or cuda:N",
    "model_path": f"checkpoint; default: {V1_FILE} in the working directory, else the newest EMA under output_*",
    "labels": "comma list of labels or class names; default: 208 three times for the published file, else each class",
    "out": "picture to write, .png or .jpg; default: sample.jpg for the published file, else sample.png",
    "vae_path": "hub name or folder of a diffusers AutoencoderKL; default: the one the model was trained with",
    "cfg_scale": "guidance at the last step; default: 5 for the published file, else 4",
    "scale_pow": "power of the guidance schedule; default: 0.01 for the published file, else 4",
    "num_sampling_steps": "default: 500 for the published file, else 100",
}


def create_argparser() -> argparse.ArgumentParser:
    defaults = {
        "model_path": "",
        "model": PUBLISHED["model"],
        "image_size": PUBLISHED["image_size"],
        "decode_layer": None,
        "labels": None,
        "cfg_scale": None,
        "scale_pow": None,
        "num_sampling_steps": None,
        "seed": PUBLISHED["seed"],
        "out": None,
        "vae_path": None,
        "vae_decoder": PUBLISHED["vae_decoder"],
        "device": "auto",
    }
    types: dict[str, Callable[[str], Any]] = {
        "decode_layer": optional(int),
        "cfg_scale": float,
        "scale_pow": float,
        "num_sampling_steps": int,
    }
    parser = argparse.ArgumentParser(description="Draw a few pictures from a trained model.")
    add_dict_to_argparser(parser, defaults, types, HELPS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = create_argparser()
    args = parser.parse_args(argv)
    explicit = explicit_flags(parser, argv)
    return run_script(lambda stack: prepare(args, explicit))


def prepare(args: argparse.Namespace, explicit: set[str]) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    path = Path(args.model_path).expanduser() if args.model_path else find_model(Path.cwd())
    say(f"model: {path}")
    presets = PUBLISHED if path.name == V1_FILE else OWN
    for name, value in presets.items():
        if name not in explicit:
            setattr(args, name, value)
    sampler = SamplerConfig(
        cfg_cond=True, **args_to_dict(args, ["num_sampling_steps", "cfg_scale", "scale_pow", "seed"])
    )
    out = Path(args.out).expanduser()
    check_picture_path(out)
    device = dist_util.choose_device(args.device)
    dist_util.allow_tf32(True)
    flags = {**diffusion_defaults(), "class_cond": True, "num_classes": None, **vars(args)}
    trained = open_trained(path, flags, explicit, device, warn=lambda text: say(f"warning: {text}"))
    labels = labels_of(args.labels, trained)
    sampler = dataclasses.replace(sampler, cfg_cond=trained.config.class_cond)
    if "num_sampling_steps" not in explicit:
        steps = min(sampler.num_sampling_steps, trained.config.diffusion.diffusion_steps)
        sampler = dataclasses.replace(sampler, num_sampling_steps=steps)
    make = ImageSampler(trained.model, trained.config, sampler, trained.first_stage, device, progress=True)
    # Small sets of classes in turn: one column per class.
    columns = min(COLUMNS, len(labels)) if len(labels) <= 2 * COLUMNS else None
    if not args.labels and trained.config.model.num_classes <= MOST_COLUMNS:
        columns = trained.config.model.num_classes
    return lambda: draw(make, labels, columns, out)


def find_model(folder: Path) -> Path:
    """The published checkpoint in a folder, else the newest EMA of the trainings below it."""
    published = folder / V1_FILE
    if published.is_file():
        return published
    averages = [path for path in folder.glob("output_*/ema_*.pt") if checkpoint.EMA_FILE.fullmatch(path.name)]
    if not averages:
        raise FileNotFoundError(
            f"there is no {V1_FILE} and no output_*/ema_*.pt in {folder}: train a model with `bash run.sh`, or give "
            "one with --model_path"
        )
    return max(averages, key=lambda path: path.stat().st_mtime)


def labels_of(text: str, trained: Trained) -> list[int]:
    """Labels of the pictures to draw, the null label where the model has no classes."""
    num_classes = trained.config.model.num_classes
    if not trained.config.class_cond:
        if text:
            raise ValueError(f"--labels {text}: {trained.path} was trained without classes")
        return [num_classes] * OWN_IMAGES
    if not text:
        return [i % num_classes for i in range(OWN_IMAGES)]
    return ClassNames(num_classes, trained.config.class_names).labels(text)


def draw(make: ImageSampler, labels: list[int], columns: int | None, out: Path) -> None:
    batches = [range(i, min(i + BATCH_SIZE, len(labels))) for i in range(0, len(labels), BATCH_SIZE)]
    images = [make(batch, labels[batch.start : batch.stop]) for batch in batches]
    save_picture(grid(np.concatenate(images), columns), out)
    sys.stdout.write(f"{out.absolute()}\n")


def say(message: str) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    sys.exit(main())

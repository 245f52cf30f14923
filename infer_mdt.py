"""Draw a few pictures from a trained model.

python infer_mdt.py                                   # a published checkpoint, or your newest training
python infer_mdt.py --labels "golden retriever,panda" --cfg_scale 4 --out dogs_and_pandas.png
python infer_mdt.py --sweep cfg_scale=1,2,4           # the same noise under other settings
python infer_mdt.py --out denoising.gif               # how pictures come out of the noise
python infer_mdt.py --image photo.png --mask mask.png --labels 207    # fill what is white in the mask
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masked_diffusion import dist_util
from masked_diffusion.choices import GUIDANCE_FLAGS, GUIDED_CHANNELS, PUBLISHED_CHANNELS, foreign_settings
from masked_diffusion.data.class_names import ClassNames
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import Trained, open_trained
from masked_diffusion.sampling.few_steps import few_steps_warning
from masked_diffusion.sampling.gallery import Row, draw, num_frames, parse_sweep
from masked_diffusion.sampling.guides import open_away
from masked_diffusion.sampling.image_sampler import ImageSampler, labels_for
from masked_diffusion.sampling.inpainting import image_channels, open_photo, side_interpolation
from masked_diffusion.sampling.pictures import check_picture_path
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import (
    MACHINE_FLAGS,
    apply_sampling_defaults,
    args_to_dict,
    checkpoint_flags,
    explicit_flags,
    finite_float,
    make_parser,
    request_of,
    run_script,
)
from masked_diffusion.settings import Flag, flags_of

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
OWN_IMAGES = 20
COLUMNS, MOST_COLUMNS = 3, 10
OpenModel = Callable[..., Trained]  # called as open_trained
SAMPLER_FLAGS = [name for name in SamplerConfig.__dataclass_fields__ if name not in ("clip_denoised", "cfg_cond")]
SWEPT = ("labels", *SAMPLER_FLAGS, "inpaint_mode")

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
    **{name: flags_of(SamplerConfig)[name] for name in SAMPLER_FLAGS},
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = create_argparser()
    args = parser.parse_args(argv)
    explicit = explicit_flags(parser, argv)
    return run_script(lambda stack: prepare(args, explicit))


@dataclass(frozen=True)
class Drawing:
    """A checked request for pictures; call it to draw them. Arguments as of ``gallery.draw``."""

    rows: list[Row]
    frames: int
    columns: int | None
    class_names: Sequence[str]
    out: Path

    def __call__(self) -> None:
        draw(self.rows, self.frames, self.columns, self.class_names, self.out)
        sys.stdout.write(f"{self.out.absolute()}\n")


def prepare(args: argparse.Namespace, explicit: set[str], open_model: OpenModel = open_trained) -> Drawing:
    """Check everything that input can get wrong. open_model: reads the checkpoint. Raises ValueError or OSError."""
    path = Path(args.model_path).expanduser() if args.model_path else find_model(Path.cwd())
    say(f"model: {path}")
    presets = {V1_FILE: PUBLISHED, V2_FILE: PUBLISHED_V2}.get(path.name, OWN)
    for name, value in presets.items():
        if name not in explicit:
            setattr(args, name, value)
    out = Path(args.out).expanduser()
    check_picture_path(out, animation=True)
    swept, values = parse_sweep(args.sweep, SWEPT) if args.sweep else ("", [])
    frames = num_frames(args.frames, out, bool(swept))
    if bool(args.image) != bool(args.mask):
        raise ValueError("--image and --mask: give both, the photo and what to fill in it")
    device = dist_util.choose_device(args.device)
    dist_util.allow_tf32(True)
    usual = {"usual_decoder": args.vae_decoder, "usual_decode_layer": args.decode_layer}
    request = request_of(args, explicit, **usual)
    trained = open_model(path, request, device, warn=lambda text: say(f"warning: {text}"))
    for message in apply_sampling_defaults(trained.config, args, explicit | presets.keys()):
        say(f"warning: {message}")
    reasons = without_effect(args, swept, trained.config)
    if swept in reasons:
        raise ValueError(f"--sweep {args.sweep}: all rows would be equal, because {reasons[swept]}")
    for name in sorted(explicit & {swept, *reasons}):
        say(f"warning: --{name} is ignored here, because {reasons.get(name, 'it is swept over')}")
    if "num_sampling_steps" not in explicit:
        args.num_sampling_steps = min(args.num_sampling_steps, trained.config.most_steps or args.num_sampling_steps)
    if swept != "num_sampling_steps":
        frames = min(frames, args.num_sampling_steps)  # no state twice
    variants = [(f"{swept} {value}", with_setting(args, swept, value)) for value in values] or [("", args)]
    for text in {few_steps_warning(trained.config, sampler_of(variant, trained.config)) for _, variant in variants}:
        if text:
            say(f"warning: {text}")
    few = bool(swept) or frames > 1
    rows = [row_of(name, variant, trained, device, few, swept == "labels") for name, variant in variants]
    # Small sets of classes in turn: one column per class.
    labels = rows[0].labels
    columns = min(COLUMNS, len(labels)) if len(labels) <= 2 * COLUMNS else None
    if not args.labels and trained.config.model.num_classes <= MOST_COLUMNS:
        columns = trained.config.model.num_classes
    return Drawing(rows, frames, columns, trained.config.class_names, out)


def without_effect(args: argparse.Namespace, swept: str, config: RunConfig) -> dict[str, str]:
    """Flags that change nothing beside the others and with this model, and why."""
    reasons = {} if args.image else {"inpaint_mode": "it needs --image and --mask"}
    if not config.class_cond:
        return reasons | dict.fromkeys(GUIDANCE_FLAGS, "the model was trained without classes and cannot be guided")
    if config.model.in_channels <= GUIDED_CHANNELS:
        reasons["cfg_channels"] = f"there are no more than {GUIDED_CHANNELS} channels to guide"
    elif config.model.in_channels > PUBLISHED_CHANNELS:
        reasons["cfg_channels"] = f"all channels of latents with more than {PUBLISHED_CHANNELS} are guided"
    if swept != "guidance":
        reasons |= {flag: f"it needs --guidance {name}" for flag, name in foreign_settings(args.guidance).items()}
    return reasons


def with_setting(args: argparse.Namespace, name: str, text: str) -> argparse.Namespace:
    """The arguments with one of them as if ``--name text`` had been given."""
    value = getattr(create_argparser().parse_args([f"--{name}={text}"]), name)
    return argparse.Namespace(**{**vars(args), name: value})


def row_of(
    name: str, args: argparse.Namespace, trained: Trained, device: torch.device | str, few: bool, repeat: bool
) -> Row:
    """The samples of one setting. few: a row's worth at most; repeat: each label with several noises."""
    config = trained.config
    sampler = sampler_of(args, config)
    labels = labels_of(args.labels, trained, few) * (COLUMNS if repeat else 1)
    guide = Request(vae_path=args.vae_path, usual_decoder=args.vae_decoder)
    new_away, _ = open_away(sampler, trained, guide, device, lambda text: None)
    make = ImageSampler(trained.model, config, sampler, trained.first_stage, device, progress=True, new_away=new_away)
    if not args.image:
        return Row(name, make, labels)
    grey = image_channels(trained.first_stage) == 1
    photo = open_photo(Path(args.image).expanduser(), Path(args.mask).expanduser(), config.model.image_size, grey)
    side = side_interpolation(trained.model, config, args.inpaint_mode)
    return Row(name, make, labels, photo.inpainting(trained.first_stage, side, device), photo)


def sampler_of(args: argparse.Namespace, config: RunConfig) -> SamplerConfig:
    return SamplerConfig(cfg_cond=config.class_cond, **args_to_dict(args, SAMPLER_FLAGS))


def find_model(folder: Path) -> Path:
    """The published checkpoint in a folder, else the newest EMA of the trainings below it."""
    for name in (V1_FILE, V2_FILE):
        if (folder / name).is_file():
            return folder / name
    averages = [path for path in folder.glob("output_*/ema_*") if checkpoint.EMA_FILE.fullmatch(path.name)]
    if not averages:
        raise FileNotFoundError(
            f"there is no {V1_FILE}, no {V2_FILE} and no output_*/ema_*.pt in {folder}: train a model with `bash "
            "run.sh`, or give one with --model_path"
        )
    return max(averages, key=lambda path: path.stat().st_mtime)


def labels_of(text: str, trained: Trained, few: bool) -> list[int]:
    """Labels of the pictures to draw, the null label where the model has no classes. few: as many as fit in a row."""
    config = trained.config
    num_classes = config.model.num_classes
    if text and not config.class_cond:
        raise ValueError(f"--labels {text}: {trained.path} was trained without classes")
    if text:
        return ClassNames(num_classes, config.class_names).labels(text)
    small = 1 < num_classes <= MOST_COLUMNS
    count = OWN_IMAGES if not few else num_classes if small else COLUMNS
    return labels_for(config, "balanced", count).tolist()


def say(message: str) -> None:
    sys.stderr.write(message + "\n")


if __name__ == "__main__":
    sys.exit(main())

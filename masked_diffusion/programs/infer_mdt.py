"""Draw a few pictures from a trained model, from checked flags."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masked_diffusion import dist_util
from masked_diffusion.choices import (
    GUIDANCE_FLAGS,
    GUIDE_SETTINGS,
    GUIDED_CHANNELS,
    PUBLISHED_CHANNELS,
    foreign_settings,
)
from masked_diffusion.data.class_names import ClassNames
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import Trained
from masked_diffusion.sampling.few_steps import few_steps_warning
from masked_diffusion.sampling.gallery import Row, draw, num_frames, parse_sweep
from masked_diffusion.sampling.guides import open_away
from masked_diffusion.sampling.image_sampler import ImageSampler, labels_for
from masked_diffusion.sampling.inpainting import Photo, image_channels, open_photo, side_interpolation
from masked_diffusion.sampling.pictures import check_picture_path
from masked_diffusion.sampling.sampler_config import PICTURE_FLAGS, SamplerConfig
from masked_diffusion.script_util import (
    apply_sampling_defaults,
    args_to_dict,
    request_of,
    say,
    say_moved,
)

OWN_IMAGES = 20  # where there are many classes
COLUMNS, MOST_COLUMNS = 3, 10
SWEPT = ("labels", *PICTURE_FLAGS, "inpaint_mode")
OpenModel = Callable[..., Trained]  # called as open_trained


@dataclass(frozen=True)
class Drawing:
    """A checked request for pictures; call it to draw them. Arguments as of ``gallery.draw``."""

    rows: list[Row]
    frames: int
    columns: int | None
    class_names: Sequence[str]
    out: Path

    def __call__(self) -> None:
        moved = draw(self.rows, self.frames, self.columns, self.class_names, self.out)
        say_moved(moved)
        sys.stdout.write(f"{self.out.absolute()}\n")


def prepare(
    args: argparse.Namespace,
    explicit: set[str],
    preset: Set[str],
    path: Path,
    parse: Callable[[list[str]], argparse.Namespace],
    open_model: OpenModel,
) -> Drawing:
    """Check everything that input can get wrong. preset: flags that stand for the published settings of the file at
    ``path``. parse: the parser of a command line. open_model: reads the checkpoint. Raises ValueError or OSError."""
    out = Path(args.out).expanduser()
    check_picture_path(out, animation=True)
    swept, values = parse_sweep(args.sweep, SWEPT) if args.sweep else ("", [])
    frames = num_frames(args.frames, out, bool(swept))
    device = dist_util.choose_device(args.device)
    dist_util.allow_tf32(True)
    usual = {"usual_decoder": args.vae_decoder, "usual_decode_layer": args.decode_layer}
    request = request_of(args, explicit, **usual)
    trained = open_model(path, request, device, warn=lambda text: say(f"warning: {text}"))
    for message in apply_sampling_defaults(trained.config, args, explicit | preset):
        say(f"warning: {message}")
    reasons = without_effect(bool(args.image), args.guidance, swept, trained.config)
    if swept == "guide_from":
        check_guide_settings(explicit, values, args.sweep)
    if swept in reasons:
        raise ValueError(f"--sweep {args.sweep}: all rows would be equal, because {reasons[swept]}")
    for name in sorted(explicit & {swept, *reasons}):
        say(f"warning: --{name} is ignored here, because {reasons.get(name, 'it is swept over')}")
    if "num_sampling_steps" not in explicit:
        args.num_sampling_steps = min(args.num_sampling_steps, trained.config.most_steps or args.num_sampling_steps)
    if swept != "num_sampling_steps":
        frames = min(frames, args.num_sampling_steps)  # no state twice
    settings = args_to_dict(args, SWEPT)
    variants = [(f"{swept} {value}", settings | settings_as_given(parse, swept, value)) for value in values]
    variants = variants or [("", settings)]
    for text in {few_steps_warning(trained.config, sampler_of(variant, trained.config)) for _, variant in variants}:
        if text:
            say(f"warning: {text}")
    photo = None
    if args.image:
        image, mask = Path(args.image).expanduser(), Path(args.mask).expanduser()
        photo = open_photo(image, mask, trained.config.model.image_size, image_channels(trained.first_stage) == 1)
    guide = Request(vae_path=args.vae_path, usual_decoder=args.vae_decoder)
    few, repeat = bool(swept) or frames > 1, swept == "labels"
    rows = [row_of(name, variant, trained, guide, photo, device, few, repeat) for name, variant in variants]
    say(cost_of(rows))
    # Small sets of classes in turn: one column per class.
    labels = rows[0].labels
    columns = min(COLUMNS, len(labels)) if len(labels) <= 2 * COLUMNS else None
    if not args.labels and trained.config.model.num_classes <= MOST_COLUMNS:
        columns = trained.config.model.num_classes
    return Drawing(rows, frames, columns, trained.config.class_names, out)


def without_effect(has_image: bool, guidance: str, swept: str, config: RunConfig) -> dict[str, str]:
    """Flags that change nothing beside the others and with this model, and why."""
    reasons = {} if has_image else {"inpaint_mode": "it needs --image and --mask"}
    if not config.class_cond:
        return reasons | dict.fromkeys(GUIDANCE_FLAGS, "the model was trained without classes and cannot be guided")
    if config.model.in_channels <= GUIDED_CHANNELS:
        reasons["cfg_channels"] = f"there are no more than {GUIDED_CHANNELS} channels to guide"
    elif config.model.in_channels > PUBLISHED_CHANNELS:
        reasons["cfg_channels"] = f"all channels of latents with more than {PUBLISHED_CHANNELS} are guided"
    if swept != "guidance":
        reasons |= {flag: f"it needs --guidance {name}" for flag, name in foreign_settings(guidance).items()}
    return reasons


def check_guide_settings(explicit: set[str], kinds: list[str], sweep: str) -> None:
    """Raise ValueError for a setting of guidance that no kind of a sweep has."""
    for name in sorted(explicit & GUIDE_SETTINGS.keys()):
        if not set(kinds) & {*GUIDE_SETTINGS[name]}:
            raise ValueError(f"--{name}: no row of --sweep {sweep} has a use for it; leave it out")


def settings_as_given(parse: Callable[[list[str]], argparse.Namespace], name: str, text: str) -> dict[str, Any]:
    """What ``--name text`` sets.

    Of a kind of guidance, settings that it does not have are as if they had not been given: another row has them.
    """
    foreign = [setting for setting, kinds in GUIDE_SETTINGS.items() if name == "guide_from" and text not in kinds]
    return args_to_dict(parse([f"--{name}={text}"]), (name, *foreign))


def row_of(
    name: str,
    settings: Mapping[str, Any],
    trained: Trained,
    guide: Request,
    photo: Photo | None,
    device: torch.device | str,
    few: bool,
    repeat: bool,
) -> Row:
    """The samples of one setting. settings: of :data:`SWEPT`. few: a row's worth at most; repeat: each label with
    several noises."""
    config = trained.config
    sampler = sampler_of(settings, config)
    labels = labels_of(settings["labels"], trained, few) * (COLUMNS if repeat else 1)
    new_away, _ = open_away(sampler, trained.model, config, str(trained.path), guide, device)
    make = ImageSampler(trained.model, config, sampler, trained.first_stage, device, progress=True, new_away=new_away)
    if photo is None:
        return Row(name, make, labels)
    side = side_interpolation(trained.model, config, settings["inpaint_mode"])
    return Row(name, make, labels, photo.inpainting(trained.first_stage, side, device), photo)


def cost_of(rows: Sequence[Row]) -> str:
    """What an image of each row costs, for the user. A hole that is filled by halves takes two passes for one."""
    costs = {}
    for row in rows:
        side = None if row.inpainting is None else row.inpainting.side
        costs[row.name] = f"{row.make.passes() * (2 if side is not None and side.halves else 1):g}"
    if len(set(costs.values())) == 1:
        return f"cost: {costs[rows[0].name]} passes of the model per image"
    each = ", ".join(f"{passes} of {name}" for name, passes in costs.items())
    return f"cost in passes of the model per image: {each}"


def sampler_of(settings: Mapping[str, Any], config: RunConfig) -> SamplerConfig:
    return SamplerConfig(cfg_cond=config.class_cond, **{name: settings[name] for name in PICTURE_FLAGS})


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

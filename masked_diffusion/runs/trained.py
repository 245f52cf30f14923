"""A trained model from a file: its weights, the configuration they need, and the first stage they were trained with."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masked_diffusion.files import sha256_of
from masked_diffusion.first_stage import DEFAULT_VAE, FirstStage, load_first_stage
from masked_diffusion.models import MDT, can_mask
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import (
    FIXED_MODEL_SETTINGS,
    FIXED_PROCESS_SETTINGS,
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    read_config,
)
from masked_diffusion.runs.weights import Recognised, fit_positions, recognise

HUB_DEFAULTS = [DEFAULT_VAE.format(decoder) for decoder in ("ema", "mse")]


@dataclass(frozen=True)
class Trained:
    """A model in eval mode with everything it needs. recorded: whether its configuration lay beside the file."""

    path: Path
    model: LatentTransformer
    config: RunConfig
    first_stage: FirstStage
    recorded: bool

    def identity(self) -> dict[str, Any]:
        """What a manifest says of the weights: file name, SHA-256, and EMA rate and step where the name has them."""
        ema = checkpoint.EMA_FILE.fullmatch(self.path.name)
        raw = checkpoint.MODEL_FILE.fullmatch(self.path.name)
        return {
            "file": self.path.name,
            "sha256": sha256_of(self.path),
            "ema_rate": ema[1] if ema else None,
            "step": int(ema[2]) if ema else int(raw[1]) if raw else None,
        }


def open_trained(
    path: Path,
    flags: dict[str, Any],
    explicit: set[str],
    device: torch.device | str,
    warn: Callable[[str], None],
) -> Trained:
    """Read a checkpoint, by the configuration beside it, or by what its weights show and the flags where there is none.

    flags: by name, the model and process flags (``FIXED_*_SETTINGS``), ``class_cond``, ``sigma_small``, ``vae_path``,
    ``vae_decoder``, ``interpolate_pos`` (sample at another ``image_size``) and ``drop_extra`` (leave out weights that
    the model does not have). explicit: those given on the command line. warn: told of flags that have no effect.
    Raises FileNotFoundError, and ValueError for weights of another model, or a flag that contradicts what is recorded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--model_path {path}: no such file; {_what_there_is(path.parent)}")
    state = checkpoint.read_weights(path)
    shown = recognise(state, path)
    recorded = read_config(path.parent)
    other_size = flags["interpolate_pos"] and "image_size" in explicit
    if recorded is not None:
        check_contradictions(recorded, flags, explicit - {"image_size"} if other_size else explicit, path)
        first_stage = _recorded_first_stage(recorded, flags, explicit, shown.in_channels, device, warn)
        config = recorded
        if "sigma_small" in explicit:
            process = dataclasses.replace(recorded.diffusion, sigma_small=flags["sigma_small"])
            config = dataclasses.replace(recorded, diffusion=process)
    else:
        vae_path = flags["vae_path"] or DEFAULT_VAE.format(flags["vae_decoder"])
        if flags["vae_path"] and "vae_decoder" in explicit:
            warn(f"--vae_decoder {flags['vae_decoder']} is ignored: the first stage is {vae_path}")
        first_stage = load_first_stage(vae_path, device, shown.in_channels)
        config = config_of_weights(shown, flags, explicit, first_stage.description, first_stage.downsample, path, warn)
    if other_size:
        size = dataclasses.replace(config.model, image_size=flags["image_size"])
        config = dataclasses.replace(config, model=size)
    model = config.model.build()
    state = fit_positions(state, model, path, flags["interpolate_pos"], warn)
    checkpoint.load_weights(model, state, path, flags["drop_extra"])
    model.to(device).eval().requires_grad_(False)
    model.expand_bias()
    return Trained(path, model, config, first_stage, recorded is not None)


def _what_there_is(folder: Path) -> str:
    """For whoever gave a checkpoint that is not there."""
    matches = (checkpoint.EMA_FILE.fullmatch(path.name) for path in folder.glob("ema_*"))
    found = sorted((match for match in matches if match), key=lambda match: int(match[2]))
    if found:
        return f"{folder} has {', '.join(match[0] for match in found[-3:])}"
    there = "has no ema_*.pt" if folder.is_dir() else "does not exist"
    return f"{folder} {there}; train a model, or get published weights as README.md says"


def check_contradictions(recorded: RunConfig, flags: dict[str, Any], explicit: set[str], path: Path) -> None:
    """Raise ValueError for a flag on the command line that says something else than a configuration."""
    known = {name: getattr(recorded.diffusion, name) for name in FIXED_PROCESS_SETTINGS}
    known |= {name: getattr(recorded.model, name) for name in FIXED_MODEL_SETTINGS}
    if not recorded.class_cond:  # a model with classes can be sampled without them, but not the other way round
        known["class_cond"] = False
    for name in sorted(explicit & set(known)):
        if flags[name] is not None and flags[name] != known[name]:
            raise ValueError(
                f"--{name} {flags[name]}: {path} was trained with {known[name]}, as its config.json says; leave the "
                "flag out"
            )


def _recorded_first_stage(
    recorded: RunConfig,
    flags: dict[str, Any],
    explicit: set[str],
    channels: int,
    device: torch.device | str,
    warn: Callable[[str], None],
) -> FirstStage:
    vae_path = flags["vae_path"] or recorded.first_stage["vae_path"]
    if vae_path in HUB_DEFAULTS and not flags["vae_path"]:
        vae_path = DEFAULT_VAE.format(flags["vae_decoder"])
    elif "vae_decoder" in explicit:
        warn(f"--vae_decoder {flags['vae_decoder']} is ignored: the first stage is {vae_path}")
    first_stage = load_first_stage(vae_path, device, channels)
    check_first_stage(recorded, first_stage, vae_path)
    return first_stage


def check_first_stage(recorded: RunConfig, first_stage: FirstStage, vae_path: str) -> None:
    """Raise ValueError where an autoencoder makes other latents than the recorded one does, by shape or scale."""
    shape = (first_stage.downsample, first_stage.latent_channels)
    if shape != (recorded.model.downsample, recorded.model.in_channels):
        raise ValueError(
            f"--vae_path {vae_path}: it divides by {shape[0]} into {shape[1]} channels, the model was trained with "
            f"{recorded.model.downsample} and {recorded.model.in_channels}; give the autoencoder it was trained with"
        )
    for name in ("scaling_factor", "shift_factor"):
        if first_stage.description[name] != recorded.first_stage[name]:
            raise ValueError(
                f"--vae_path {vae_path}: its {name} is {first_stage.description[name]}, the model was trained with "
                f"{recorded.first_stage[name]}; give the autoencoder it was trained with"
            )


def config_of_weights(
    shown: Recognised,
    flags: dict[str, Any],
    explicit: set[str],
    first_stage: dict[str, Any],
    downsample: int,
    path: Path,
    warn: Callable[[str], None],
) -> RunConfig:
    """The configuration of a file that has none beside it: the model is what its weights show, the process the flags'.

    Raises ValueError for a flag that the weights contradict.
    """
    model = ModelConfig(
        model=shown.model,
        image_size=shown.input_size * downsample,
        downsample=downsample,
        in_channels=shown.in_channels,
        num_classes=shown.num_classes,
        decode_layer=shown.decode_layer,
        learn_sigma=shown.learn_sigma,
    )
    cannot_show = {"decode_layer"} if shown.decode_layer is None else set()
    if flags["interpolate_pos"]:
        cannot_show.add("image_size")
    for name in sorted(explicit & set(FIXED_MODEL_SETTINGS) - cannot_show):
        if flags[name] is not None and flags[name] != getattr(model, name):
            raise ValueError(
                f"--{name} {flags[name]}: the weights in {path} are of {getattr(model, name)}; leave the flag out"
            )
    if not can_mask(shown.model):
        if flags["decode_layer"] is not None and "decode_layer" in explicit:
            warn(f"--decode_layer {flags['decode_layer']} is ignored: {shown.model} has no decoder")
    elif shown.decode_layer is None:
        decode_layer = flags["decode_layer"]
        if decode_layer is None:
            decode_layer = MDT.DEFAULT_DECODE_LAYER
            warn(f"--decode_layer is taken to be {decode_layer}: neither the weights of an MDT nor a config.json say")
        model = dataclasses.replace(model, decode_layer=decode_layer)
    return RunConfig(
        model=model,
        diffusion=DiffusionConfig(
            sigma_small=flags["sigma_small"],
            **{name: flags[name] for name in FIXED_PROCESS_SETTINGS} | {"learn_sigma": shown.learn_sigma},
        ),
        first_stage=first_stage,
    )

"""A trained model from a file: its weights, the configuration they need, and the first stage they were trained with."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masked_diffusion import checkpoint
from masked_diffusion.config import (
    FIXED_MODEL_SETTINGS,
    FIXED_PROCESS_SETTINGS,
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    read_config,
)
from masked_diffusion.files import sha256_of
from masked_diffusion.first_stage import DEFAULT_VAE, FirstStage, load_first_stage
from masked_diffusion.models import LatentTransformer

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
    """Read a checkpoint, by the configuration beside it, or by the flags where there is none.

    flags: by name, the model and process flags (``FIXED_*_SETTINGS``), ``class_cond``, ``sigma_small``, ``vae_path``
    and ``vae_decoder``. explicit: those given on the command line. warn: told of flags that have no effect.
    Raises FileNotFoundError, and ValueError for weights of another model, or a flag that contradicts what is recorded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--model_path {path}: no such file; {_what_there_is(path.parent)}")
    state = checkpoint.read_weights(path)
    if not {checkpoint.LABEL_TABLE, checkpoint.PATCH_EMBEDDING} <= set(state):
        raise ValueError(f"{path}: not an MDT checkpoint, it has no {checkpoint.LABEL_TABLE}")
    channels = state[checkpoint.PATCH_EMBEDDING].shape[1]
    recorded = read_config(path.parent)
    if recorded is not None:
        _check_contradictions(recorded, flags, explicit, path)
        first_stage = _recorded_first_stage(recorded, flags, explicit, channels, device, warn)
        config = recorded
        if "sigma_small" in explicit:
            process = dataclasses.replace(recorded.diffusion, sigma_small=flags["sigma_small"])
            config = dataclasses.replace(recorded, diffusion=process)
    else:
        vae_path = flags["vae_path"] or DEFAULT_VAE.format(flags["vae_decoder"])
        if flags["vae_path"] and "vae_decoder" in explicit:
            warn(f"--vae_decoder {flags['vae_decoder']} is ignored: the first stage is {vae_path}")
        first_stage = load_first_stage(vae_path, device, channels)
        config = _config_of_flags(flags, state[checkpoint.LABEL_TABLE].shape[0] - 1, channels, first_stage, path)
    model = config.model.build()
    checkpoint.load_weights(model, state, path)
    return Trained(path, model.to(device).eval().requires_grad_(False), config, first_stage, recorded is not None)


def _what_there_is(folder: Path) -> str:
    """For whoever gave a checkpoint that is not there."""
    matches = (checkpoint.EMA_FILE.fullmatch(path.name) for path in folder.glob("ema_*"))
    found = sorted((match for match in matches if match), key=lambda match: int(match[2]))
    if found:
        return f"{folder} has {', '.join(match[0] for match in found[-3:])}"
    there = "has no ema_*.pt" if folder.is_dir() else "does not exist"
    return f"{folder} {there}; train a model, or get published weights as README.md says"


def _check_contradictions(recorded: RunConfig, flags: dict[str, Any], explicit: set[str], path: Path) -> None:
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
    return first_stage


def _config_of_flags(
    flags: dict[str, Any], num_classes: int, channels: int, first_stage: FirstStage, path: Path
) -> RunConfig:
    if flags["num_classes"] not in (None, num_classes):
        raise ValueError(f"--num_classes {flags['num_classes']}: {path} has {num_classes} classes and the null class")
    return RunConfig(
        model=ModelConfig(
            model=flags["model"],
            image_size=flags["image_size"],
            downsample=first_stage.downsample,
            in_channels=channels,
            num_classes=num_classes,
            decode_layer=flags["decode_layer"],
            learn_sigma=flags["learn_sigma"],
        ),
        diffusion=DiffusionConfig(
            sigma_small=flags["sigma_small"], **{name: flags[name] for name in FIXED_PROCESS_SETTINGS}
        ),
        first_stage=first_stage.description,
    )

"""A trained model from a file: its weights, the configuration they need, and the first stage they were trained with."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masked_diffusion.choices import DEFAULT_VAE, FAMILIES, family_of, ignored_settings
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.files import sha256_of
from masked_diffusion.first_stage import ChannelStatistics, FirstStage, load_first_stage
from masked_diffusion.models import MDT
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import (
    FIXED_MODEL_SETTINGS,
    FIXED_PROCESS_SETTINGS,
    ModelConfig,
    RunConfig,
    read_config,
)
from masked_diffusion.runs.request import Request
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


def open_trained(path: Path, request: Request, device: torch.device | str, warn: Callable[[str], None]) -> Trained:
    """Read a checkpoint, by the configuration beside it, or by its weights and the request where there is none.

    warn: told of what is asked for in vain. Raises FileNotFoundError, and ValueError for weights of another model, or a
    request that contradicts what is recorded.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--model_path {path}: no such file; {_what_there_is(path.parent)}")
    state = checkpoint.read_weights(path)
    shown = recognise(state, path)
    recorded = read_config(path.parent)
    if recorded is not None:
        check_contradictions(recorded, request, path)
        first_stage = _recorded_first_stage(recorded, request, device, warn)
        process = dataclasses.replace(recorded.diffusion, **request.asked(["sigma_small"]))
        config = dataclasses.replace(recorded, diffusion=process)
    else:
        vae_path = request.vae_path or request.hub_vae
        if request.vae_path and request.vae_decoder:
            warn(f"--vae_decoder {request.vae_decoder} is ignored: the first stage is {vae_path}")
        first_stage = load_first_stage(vae_path, device, shown.in_channels)
        config = config_of_weights(shown, request, first_stage.description, first_stage.downsample, path, warn)
    if request.interpolate_pos:
        size = dataclasses.replace(config.model, **request.asked(["image_size"]))
        config = dataclasses.replace(config, model=size)
    model = config.model.build()
    if recorded is None and model.policy.takes_route:
        route = ",".join(map(str, model.route))
        warn(f"--route is taken to be {route}: neither the weights of {config.model.policy_name} nor a config.json say")
    state = fit_positions(state, model, path, request.interpolate_pos, warn)
    checkpoint.load_weights(model, state, path, request.drop_extra)
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


def check_contradictions(recorded: RunConfig, request: Request, path: Path) -> None:
    """Raise ValueError for a request that says something else than a configuration."""
    known = {name: getattr(recorded.diffusion, name) for name in FIXED_PROCESS_SETTINGS}
    known |= {name: getattr(recorded.model, name) for name in FIXED_MODEL_SETTINGS}
    known["objective"] = recorded.objective.objective
    if not recorded.class_cond:  # a model with classes can be sampled without them, but not the other way round
        known["class_cond"] = False
    if request.interpolate_pos:
        del known["image_size"]
    for name, value in request.asked(sorted(known)).items():
        if value != known[name]:
            raise ValueError(
                f"--{name} {value}: {path} was trained with {known[name]}, as its config.json says; leave the flag out"
            )


def _recorded_first_stage(
    recorded: RunConfig, request: Request, device: torch.device | str, warn: Callable[[str], None]
) -> FirstStage:
    vae_path = request.vae_path or recorded.first_stage["vae_path"]
    if vae_path in HUB_DEFAULTS and not request.vae_path:
        vae_path = request.hub_vae
    elif request.vae_decoder:
        warn(f"--vae_decoder {request.vae_decoder} is ignored: the first stage is {vae_path}")
    return matching_first_stage(recorded, vae_path, device)


def matching_first_stage(recorded: RunConfig, vae_path: str, device: torch.device | str) -> FirstStage:
    """Load an autoencoder that makes latents as the recorded one does, by shape, scale and each channel's statistics.

    Raises ValueError for one that does not, and what :func:`masked_diffusion.first_stage.load_first_stage` does.
    """
    first_stage = load_first_stage(vae_path, device, recorded.model.in_channels)
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
    if (statistics := ChannelStatistics.recorded(recorded.first_stage)) is not None:
        first_stage.normalise(statistics)
    return first_stage


def config_of_weights(
    shown: Recognised,
    request: Request,
    first_stage: dict[str, Any],
    downsample: int,
    path: Path,
    warn: Callable[[str], None],
) -> RunConfig:
    """The configuration of a file that has none beside it: its weights show the model, the request has the process.

    Of two models whose weights have the same names and shapes, the request says which one it is.
    Raises ValueError for a request that the weights contradict.
    """
    if shown.twin is not None:
        check_twin(shown, request, path, warn)
    shown = shown.named(request.model)
    known = dataclasses.asdict(shown)
    model = ModelConfig(image_size=known.pop("input_size") * downsample, downsample=downsample, **known)
    cannot_show = {"decode_layer"} if shown.decode_layer is None else set()
    if request.interpolate_pos:
        cannot_show.add("image_size")
    for name, value in request.asked(sorted(set(FIXED_MODEL_SETTINGS) - cannot_show)).items():
        if value != getattr(model, name):
            raise ValueError(
                f"--{name} {value}: the weights in {path} are of {getattr(model, name)}; leave the flag out"
            )
    if "decode_layer" in ignored_settings(shown.model, shown.policy, shown.decoder):
        if request.decode_layer is not None:
            warn(f"--decode_layer {request.decode_layer} is ignored: {shown.model} has no decoder")
    elif shown.decode_layer is None:
        decode_layer = request.usual_decode_layer if request.decode_layer is None else request.decode_layer
        if decode_layer is None:
            decode_layer = MDT.DEFAULT_DECODE_LAYER
            warn(f"--decode_layer is taken to be {decode_layer}: neither the weights of an MDT nor a config.json say")
        model = dataclasses.replace(model, decode_layer=decode_layer)
    process = request.asked(["sigma_small", *FIXED_PROCESS_SETTINGS]) | {"learn_sigma": shown.learn_sigma}
    settings = {"objective": FAMILIES[family_of(shown.model)].objective or "ddpm", **request.asked(["objective"])}
    objective = ObjectiveConfig(**settings)
    return RunConfig(model=model, diffusion=DiffusionConfig(**process), first_stage=first_stage, objective=objective)


def check_twin(shown: Recognised, request: Request, path: Path, warn: Callable[[str], None]) -> None:
    """Warn where the request does not say which of two models the weights are of.

    Raises ValueError, naming both, where it names a third one, or an objective of the other one alone.
    """
    twin = shown.twin
    if request.model not in (None, shown.model, twin):
        raise ValueError(
            f"--model {request.model}: the weights in {path} are of {shown.model} or {twin}, which have the same "
            "names; give one of them"
        )
    if request.model != twin and request.objective not in (None, "ddpm"):
        raise ValueError(
            f"--objective {request.objective}: the weights in {path} are taken for {shown.model}, which serves "
            f"--objective ddpm; if they are of {twin}, which has the same names, give --model {twin}"
        )
    if request.model is None:
        warn(f"{path} is taken for {shown.model}; if it is {twin}, which has the same names, give --model {twin}")

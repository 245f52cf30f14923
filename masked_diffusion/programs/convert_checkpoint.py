"""Write a checkpoint in another format, from checked flags."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from masked_diffusion.choices import DEFAULT_DOWNSAMPLE, DEFAULT_SCALE, DEFAULT_VAE, family_of
from masked_diffusion.files import write_json
from masked_diffusion.first_stage import load_first_stage
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import CONFIG_NAME, RunConfig, read_config
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import check_contradictions, config_of_weights, matching_first_stage
from masked_diffusion.runs.weights import recognise
from masked_diffusion.script_util import request_of


def prepare(args: argparse.Namespace, explicit: set[str], source: Path, out: Path) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    state, request = checkpoint.read_weights(source), request_of(args, explicit)
    config = config_of(request, source, out, state)
    model = config.model.build()
    checkpoint.load_weights(model, state, source, request.drop_extra)
    if not out.suffix:
        return diffusers_work(model.eval(), config, out, args.diffusers_class, request.vae_path)
    former = read_config(out.parent) if out.parent.is_dir() else None
    if former is not None and former != config:
        raise ValueError(f"--out {out}: the {CONFIG_NAME} beside it is of other weights; give another folder")
    if former is None and out.parent.is_dir() and (others := weight_files(out.parent, source)):
        raise ValueError(
            f"--out {out}: a new {CONFIG_NAME} in {out.parent} would be read for {others[0].name}, too; give another "
            "folder"
        )
    return lambda: write_weights(model.state_dict(), config, out)


def weight_files(folder: Path, source: Path) -> list[Path]:
    """Weights in a folder other than those that are converted."""
    files = (path for form in checkpoint.WEIGHTS_FORMATS for path in sorted(folder.glob(f"*.{form}")))
    return [path for path in files if path.resolve() != source.resolve()]


def config_of(request: Request, source: Path, out: Path, state: dict[str, Tensor]) -> RunConfig:
    """The configuration beside the source, or one by its weights and the flags."""
    recorded = read_config(source.parent)
    if recorded is not None:
        check_contradictions(recorded, request, source)
        # A folder gets a copy of the autoencoder.
        for name in request.asked(("sigma_small", "vae_path") if out.suffix else ("sigma_small",)):
            warn(f"--{name} is ignored: {source.parent / CONFIG_NAME} says it")
        return recorded
    shown = recognise(state, source)
    vae_path = request.vae_path or DEFAULT_VAE.format("ema")
    description: dict[str, Any] = {"vae_path": vae_path, **DEFAULT_SCALE}
    downsample = DEFAULT_DOWNSAMPLE
    if request.vae_path:
        first_stage = load_first_stage(vae_path, "cpu", shown.in_channels)
        description, downsample = first_stage.description, first_stage.downsample
    return config_of_weights(shown, request, description, downsample, source, warn)


def write_weights(state: dict[str, Tensor], config: RunConfig, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.parent / CONFIG_NAME, config.as_json())
    checkpoint.write_part(out, state)
    say(f"{out.absolute()}")


def diffusers_work(
    model: Any, config: RunConfig, out: Path, diffusers_class: str, vae_path: str | None
) -> Callable[[], None]:
    from masked_diffusion.diffusers_format import check_timesteps, diffusers_dit, dit_pipeline_of, pipeline_of

    if diffusers_class != "ours" and (family_of(config.model.model) != "DiT" or model.rejoin.weights):
        name = f"{config.model.model} trained under --policy {config.model.policy_name}"
        raise ValueError(f"--diffusers_class {diffusers_class}: {name} is no DiT; leave the flag out")
    if diffusers_class != "ours":
        check_timesteps(config)
    saved: Any
    if diffusers_class == "dit":
        if vae_path:
            warn("--vae_path is ignored: the transformer is written alone")
        saved = diffusers_dit(model)
    else:
        first_stage = matching_first_stage(config, vae_path or config.first_stage["vae_path"], "cpu")
        make = pipeline_of if diffusers_class == "ours" else dit_pipeline_of
        saved = make(model, config, getattr(first_stage, "vae", None))

    def work() -> None:
        saved.save_pretrained(out)
        say(f"{out.absolute()}")

    return work


def say(message: str) -> None:
    sys.stdout.write(message + "\n")


def warn(message: str) -> None:
    sys.stderr.write(f"warning: {message}\n")

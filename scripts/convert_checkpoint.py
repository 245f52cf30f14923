"""Write a checkpoint in another format, with the configuration that makes it usable.

    python scripts/convert_checkpoint.py --model_path mdt_xl2_v1_ckpt.pt --out mdt_xl2/mdt_xl2_v1.safetensors

Takes our files and the published ones of MDT, MDTv2, DiT and SiT. The suffix of --out says what is written:
.safetensors or .pt (the weights, with config.json beside them); a name without one is a folder for diffusers.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from masked_diffusion.choices import DEFAULT_DOWNSAMPLE, DEFAULT_SCALE, DEFAULT_VAE, family_of
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.files import atomic_write, write_json
from masked_diffusion.first_stage import load_first_stage
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.config import CONFIG_NAME, ModelConfig, RunConfig, read_config
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import check_contradictions, config_of_weights, matching_first_stage
from masked_diffusion.runs.weights import recognise
from masked_diffusion.script_util import (
    explicit_flags,
    make_parser,
    request_of,
    run_script,
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = create_argparser()
    args = parser.parse_args(argv)
    explicit = explicit_flags(parser, argv)
    return run_script(lambda stack: prepare(args, explicit))


def prepare(args: argparse.Namespace, explicit: set[str]) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
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
        warn("--diffusers_class is ignored: a file is written")
    state = checkpoint.read_weights(source)
    config = config_of(args, explicit, source, state)
    model = config.model.build()
    checkpoint.load_weights(model, state, source, args.drop_extra)
    if not out.suffix:
        return diffusers_work(model.eval(), config, out, args)
    former = read_config(out.parent) if out.parent.is_dir() else None
    if former is not None and former != config:
        raise ValueError(f"--out {out}: the {CONFIG_NAME} beside it is of other weights; give another folder")
    if former is None and out.parent.is_dir() and (others := weight_files(out.parent, source)):
        raise ValueError(
            f"--out {out}: a new {CONFIG_NAME} in {out.parent} would speak of {others[0].name}, too; give another "
            "folder"
        )
    return lambda: write_weights(model.state_dict(), config, out)


def weight_files(folder: Path, source: Path) -> list[Path]:
    """Weights in a folder other than those that are converted."""
    files = (path for form in checkpoint.WEIGHTS_FORMATS for path in sorted(folder.glob(f"*.{form}")))
    return [path for path in files if path.resolve() != source.resolve()]


def config_of(args: argparse.Namespace, explicit: set[str], source: Path, state: dict[str, Tensor]) -> RunConfig:
    """The configuration beside the source, or one by its weights and the flags."""
    request = request_of(args, explicit)
    recorded = read_config(source.parent)
    if recorded is not None:
        check_contradictions(recorded, request, source)
        in_a_folder = set() if Path(args.out).suffix else {"vae_path"}  # it gets a copy of the autoencoder
        for name in sorted(explicit & {"vae_path", "sigma_small"} - in_a_folder):
            warn(f"--{name} is ignored: {source.parent / CONFIG_NAME} says it")
        return recorded
    shown = recognise(state, source)
    vae_path = args.vae_path or DEFAULT_VAE.format("ema")
    description: dict[str, Any] = {"vae_path": vae_path, **DEFAULT_SCALE}
    downsample = DEFAULT_DOWNSAMPLE
    if args.vae_path:
        first_stage = load_first_stage(vae_path, "cpu", shown.in_channels)
        description, downsample = first_stage.description, first_stage.downsample
    return config_of_weights(shown, request, description, downsample, source, warn)


def write_weights(state: dict[str, Tensor], config: RunConfig, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.parent / CONFIG_NAME, config.as_json())
    with atomic_write(out) as file:
        if out.suffix == ".safetensors":
            file.write(save({name: value.contiguous() for name, value in state.items()}))
        else:
            torch.save(state, file)
    say(f"{out.absolute()}")


def diffusers_work(model: Any, config: RunConfig, out: Path, args: argparse.Namespace) -> Callable[[], None]:
    from masked_diffusion.diffusers_format import check_timesteps, diffusers_dit, dit_pipeline_of, pipeline_of

    if args.diffusers_class != "ours" and (family_of(config.model.model) != "DiT" or model.rejoin.weights):
        name = f"{config.model.model} trained under --policy {config.model.policy_name}"
        raise ValueError(f"--diffusers_class {args.diffusers_class}: {name} is no DiT; leave the flag out")
    if args.diffusers_class != "ours":
        check_timesteps(config)
    saved: Any
    if args.diffusers_class == "dit":
        if args.vae_path:
            warn("--vae_path is ignored: the transformer is written alone")
        saved = diffusers_dit(model)
    else:
        vae_path = args.vae_path or config.first_stage["vae_path"]
        first_stage = matching_first_stage(config, vae_path, "cpu")
        make = pipeline_of if args.diffusers_class == "ours" else dit_pipeline_of
        saved = make(model, config, getattr(first_stage, "vae", None))

    def work() -> None:
        saved.save_pretrained(out)
        say(f"{out.absolute()}")

    return work


def say(message: str) -> None:
    sys.stdout.write(message + "\n")


def warn(message: str) -> None:
    sys.stderr.write(f"warning: {message}\n")


if __name__ == "__main__":
    sys.exit(main())

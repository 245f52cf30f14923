"""Look into a trained model, from checked flags."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from masked_diffusion import dist_util
from masked_diffusion.data.class_names import in_one_form
from masked_diffusion.data.latent_cache import is_latent_cache, read_record
from masked_diffusion.files import write_beside_former
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.runs import checkpoint
from masked_diffusion.runs.trained import Trained, open_trained
from masked_diffusion.sampling.gallery import masked_inputs, reconstruction, relative_bias
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.inpainting import image_channels
from masked_diffusion.sampling.pictures import check_picture_path, encode_picture
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import request_of, say_moved

DEFAULT_MASK_RATIO = 0.3


def prepare(args: argparse.Namespace, explicit: set[str]) -> Callable[[], None]:
    """Check everything that input can get wrong. Returns the work. Raises ValueError or OSError."""
    out = Path(args.out or f"{args.mode}.png").expanduser()
    check_picture_path(out)
    path, data_dir = Path(args.model_path).expanduser(), os.path.expanduser(args.data_dir)  # noqa: PTH111  (a bucket?)
    if args.mode == "relative_bias":
        draw = plan_biases(path, explicit)
    else:
        if args.num_images < 1:
            raise ValueError(f"--num_images {args.num_images}: must be at least 1")
        if data_dir and is_latent_cache(data_dir):
            source = read_record(data_dir).data_dir
            raise ValueError(f"--data_dir {data_dir}: holds latents; give the images they were made of ({source})")
        device = dist_util.choose_device(args.device)
        dist_util.allow_tf32(True)
        sampler = SamplerConfig(args.num_sampling_steps, args.sampler, seed=args.seed)
        trained = open_trained(path, request_of(args, explicit, usual_decoder=args.vae_decoder), device, warn)
        draw = plan_reconstruction(trained, args.data_dir, args.num_images, args.mask_ratio, sampler, device)

    def work() -> None:
        say_moved(write_beside_former(out, encode_picture(draw(), out)))
        sys.stdout.write(f"{out.absolute()}\n")

    return work


def plan_biases(path: Path, explicit: set[str]) -> Callable[[], Image.Image]:
    for name in sorted(explicit - {"mode", "model_path", "out"}):
        warn(f"--{name} is ignored with relative_bias")
    picture, limit = relative_bias(checkpoint.read_weights(path), path)

    def draw() -> Image.Image:
        sys.stdout.write(f"white is 0, full red {limit:.3g}, full blue {-limit:.3g}\n")
        return picture

    return draw


def plan_reconstruction(
    trained: Trained,
    data_dir: str,
    num_images: int,
    mask_ratio: float | None,
    sampler: SamplerConfig,
    device: torch.device,
) -> Callable[[], Image.Image]:
    config = trained.config
    grey = image_channels(trained.first_stage) == 1
    dataset = open_dataset(data_dir, image_size=config.model.image_size, class_cond=config.class_cond, grey=grey)
    if trained.recorded and in_one_form(dataset.class_names) != in_one_form(config.class_names):
        raise ValueError(f"--data_dir {data_dir}: has other classes than {trained.path} was trained with")
    ratio = mask_ratio if mask_ratio is not None else config.model.mask_ratio or DEFAULT_MASK_RATIO
    make = ImageSampler(trained.model, config, sampler, trained.first_stage, device, progress=True)
    inputs = masked_inputs(trained, dataset, num_images, ratio, sampler.seed, device)
    return lambda: reconstruction(inputs, make)


def warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")

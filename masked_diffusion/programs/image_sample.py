"""Sample images into an ``.npz``, from checked flags."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masked_diffusion import dist_util, script_util
from masked_diffusion.choices import NULL_KINDS, PUBLISHED_CHANNELS, family_policy, foreign_settings
from masked_diffusion.dist_util import Ranks
from masked_diffusion.models.block_modes import compile_blocks
from masked_diffusion.randomness import stream_entry
from masked_diffusion.runs.config import library_versions
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.run_folder import held, own_folder, writing_to
from masked_diffusion.runs.trained import Trained, open_trained
from masked_diffusion.sampling.few_steps import check_few_steps
from masked_diffusion.sampling.guides import open_away
from masked_diffusion.sampling.image_sampler import ImageSampler, labels_for
from masked_diffusion.sampling.sample_set import SampleSet, begun_stream, generate
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import (
    apply_sampling_defaults,
    args_to_dict,
    from_args,
    place_from_args,
    request_of,
)


def prepare(
    args: argparse.Namespace, explicit: set[str], idle: list[str], stack: contextlib.ExitStack
) -> Callable[[], None]:
    """Check everything that input can get wrong. idle: warnings of flags without effect. Returns the work. Raises
    ValueError or OSError."""
    # Machine
    place = place_from_args(args)
    device = dist_util.choose_device(args.device, place.local_rank)
    dist_util.allow_tf32(args.tf32)
    say: Callable[[str], None] = script_util.say if place.rank == 0 else lambda message: None
    for message in idle:
        say(f"warning: {message}")
    # Model and first stage
    trained = open_model(Path(args.model_path).expanduser(), request_of(args, explicit), device, say)
    for message in apply_sampling_defaults(trained.config, args, explicit):
        say(f"warning: {message}")
    sampler = from_args(SamplerConfig, args)
    tell_sampler(sampler, args.few_steps, explicit, trained, say)
    # Labels and images
    class_cond = args.class_cond and trained.config.class_cond
    check_null_class(sampler, class_cond, trained)
    labels = labels_for(trained.config, args.labels, args.num_samples, args.seed, args.class_cond)
    if args.compile and (problem := compile_blocks(trained.model, device)):
        say(f"--compile True is ignored: this machine cannot compile ({problem})")
    as_denoiser = partial(half_precision, enabled=args.use_fp16)
    guide = Request(vae_path=args.vae_path, usual_decoder=args.vae_decoder)
    new_away, guide_record = open_away(
        sampler, trained.model, trained.config, str(trained.path), guide, device, as_denoiser
    )
    new_sampler = partial(
        ImageSampler,
        as_denoiser(trained.model),
        trained.config,
        sampler,
        trained.first_stage,
        device,
        new_away=new_away,
    )
    passes = new_sampler().passes()  # before the processes meet: what it refuses is refused here
    say(f"cost: {passes:g} passes of the model per image")
    # Sets made before there was --compile stay the same ones.
    computed = args_to_dict(args, ("batch_size", "use_fp16", *(["compile"] if args.compile else []), "tf32"))
    asked = args.labels if class_cond else None
    settings = settings_of(trained, sampler, asked, args.num_samples) | computed
    if guide_record:
        settings["guidance"] |= guide_record
    # The folder and its lock. The processes meet once, before the work, and never again: none waits for a slow one.
    circumstances = {
        "processes": place.world_size,
        "device": str(device),
        "passes_per_image": passes,
        "versions": library_versions(),
    }
    with dist_util.joined_ranks(place, device, args.dist_url) as ranks:
        folder = ranks.from_main(lambda: own_folder(stack, args.out))
        stream = ranks.from_main(lambda: begun_stream(folder, settings))
        settings |= stream_entry(stream)
        samples = SampleSet(folder, args.num_samples, trained.config.model.image_size, args.batch_size, settings)
        needed = ranks.from_main(lambda: claim(samples, circumstances, stack, say))
    return partial(work, samples, new_sampler(stream=stream), labels, class_cond, ranks, needed)


def open_model(path: Path, request: Request, device: torch.device, say: Callable[[str], None]) -> Trained:
    trained = open_trained(path, request, device, warn=lambda text: say(f"warning: {text}"))
    if not trained.recorded:
        model = trained.config.model
        say(
            f"no config.json beside {trained.path}: by its weights it is {model.model} for {model.image_size} x "
            f"{model.image_size}; the process is taken from the flags"
        )
    return trained


def tell_sampler(
    sampler: SamplerConfig, few_steps: bool, explicit: set[str], trained: Trained, say: Callable[[str], None]
) -> None:
    """Say what the model's family decided, and which flags have no effect beside that. Raises ValueError for few steps
    that lead far off."""
    name, channels = trained.config.model.model, trained.config.model.in_channels
    if sampler.cfg_cond and "cfg_channels" in explicit and channels != PUBLISHED_CHANNELS:
        say(f"warning: --cfg_channels is ignored: the latents have {channels}")
    if sampler.cfg_cond:
        say(f"guidance of {name}: {sampler.guidance}, cfg_scale {sampler.cfg_scale}")
        if "guidance" not in explicit:  # else it was said above
            for ignored in sorted(explicit & foreign_settings(sampler.guidance).keys()):
                say(f"warning: --{ignored} is ignored by {name}: its guidance is {sampler.guidance}")
    if text := check_few_steps(trained.config, sampler, few_steps):
        say(f"warning: {text}")


def claim(
    samples: SampleSet, circumstances: dict[str, Any], stack: contextlib.ExitStack, say: Callable[[str], None]
) -> bool:
    """Whether there is anything to do; on rank 0, before any work."""
    if not samples.is_complete():  # to find that out takes no right to write
        stack.enter_context(held(samples.folder, "sampling"))
    if samples.is_complete():
        samples.remove_parts()
        say("these samples are already complete")
        return False
    if samples.restore():
        say(f"these samples were complete and had been moved aside; they are {samples.path.name} again")
        return False
    with writing_to(samples.folder):
        moved = samples.open(circumstances)
    if moved:
        say(f"samples of other settings were moved aside: {', '.join(path.name for path in moved)}")
    return True


def work(
    samples: SampleSet, make: ImageSampler, labels: np.ndarray, with_labels: bool, ranks: Ranks, needed: bool
) -> None:
    if needed:
        generate(samples, make, labels, ranks)
    if ranks.is_main:
        if needed:
            samples.assemble(labels if with_labels else None)
        sys.stdout.write(f"{samples.path.absolute()}\n")


def check_null_class(sampler: SamplerConfig, class_cond: bool, trained: Trained) -> None:
    """Raise ValueError where guidance, or sampling without classes, has no null class to go by."""
    if sampler.cfg_cond and not class_cond:
        raise ValueError("--cfg_cond True: guidance needs classes; leave it out, or --class_cond False")
    needed = not class_cond or (sampler.cfg_cond and sampler.guide_from in NULL_KINDS)
    if needed and not trained.model.has_null_class:
        flag = "--cfg_cond True" if sampler.cfg_cond else "--class_cond False"
        raise ValueError(f"{flag}: {trained.path} has no null class in its label table")


def half_precision(model: torch.nn.Module, enabled: bool) -> Callable[..., torch.Tensor]:
    """The model, computing in float16 if asked to."""

    def forward(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **view: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, dtype=torch.float16, enabled=enabled):
            return model(x, t, y, **view).float()

    return forward


def settings_of(trained: Trained, sampler: SamplerConfig, labels: str | None, num_samples: int) -> dict[str, Any]:
    """What determines the images beside how they are computed: two runs of equal settings make equal bytes. labels: as
    asked for, None without classes."""
    config = trained.config
    return {
        "weights": trained.identity(),
        "model": config.model.model,
        "image_size": config.model.image_size,
        "decode_layer": config.model.decode_layer,
        # Sets made before there were policies stay the same ones.
        **({"policy": policy} if (policy := config.model.policy_name) != family_policy(config.model.model) else {}),
        "num_classes": config.model.num_classes,
        "process": {
            "diffusion_steps": config.diffusion.diffusion_steps,
            "noise_schedule": config.diffusion.noise_schedule,
            "learn_sigma": config.diffusion.learn_sigma,
            "predict_xstart": config.diffusion.predict_xstart,
            "sigma_small": None if config.diffusion.learn_sigma else config.diffusion.sigma_small,
        },
        **config.objective.record(),
        "sampler": sampler.sampler,
        **sampler.steps_record(),
        "num_sampling_steps": sampler.num_sampling_steps,
        "clip_denoised": sampler.clip_denoised,
        "guidance": sampler.guidance_record(),
        "decoder": trained.first_stage.identity(),
        "labels": labels,
        "seed": sampler.seed,
        "sample_indices": [0, num_samples - 1],
    }

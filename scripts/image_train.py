"""Train a Masked Diffusion Transformer.

    python scripts/image_train.py --data_dir IMAGES --image_size 256 --model MDT_S_2 --mask_ratio 0.30 --decode_layer 2

Runs alone, or under torchrun, torch.distributed.launch or mpiexec. --out, or OPENAI_LOGDIR, names the output folder.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from masked_diffusion.choices import (
    AUTOENCODERS,
    DEFAULT_DOWNSAMPLE,
    DEFAULT_VAE,
    DISCRETE_OBJECTIVES,
    OBJECTIVE_SETTINGS,
    OBJECTIVES,
    POLICIES,
    check_objective,
    downsample_of,
    family_of,
    family_policy,
    foreign_settings,
    ignored_settings,
    with_patch,
)
from masked_diffusion.data.data_config import DataConfig
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.process import DiffusionConfig
from masked_diffusion.runs.config import (
    ModelConfig,
)
from masked_diffusion.runs.family_defaults import SAMPLING, TRAINING
from masked_diffusion.runs.request import Request
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.script_util import (
    COMPATIBILITY,
    MACHINE_FLAGS,
    OUT_FLAG,
    apply_family_defaults,
    args_to_dict,
    from_args,
    ignored_folder,
    main_of,
    make_parser,
)
from masked_diffusion.settings import Flag, flags_of
from masked_diffusion.training.eval_config import EvalConfig
from masked_diffusion.training.guide_config import GuideConfig
from masked_diffusion.training.train_config import TrainConfig

WITH_INIT, WEIGHTS_FLAGS = ", with --init_from", ("interpolate_pos", "drop_extra")
FLAGS = {
    **flags_of(DataConfig, ModelConfig, DiffusionConfig, ObjectiveConfig, TrainConfig, EvalConfig, GuideConfig),
    "vae_path": Flag(
        DEFAULT_VAE.format("mse"),
        f"hub name or folder of an autoencoder of diffusers ({', '.join(AUTOENCODERS)}), or none for pixel space",
        "model",
    ),
    "normalize": Flag(
        "none", "channel: give each channel of the pixels mean 0 and deviation 1; none: they stay in [-1, 1]", "model"
    ),
    "finale": flags_of(TrainConfig)["finale"]._replace(default=None),
    "init_from": Flag(None, "weights to start from at step 0; label rows follow the class names", "model", str),
    **{
        name: flag._replace(help=flag.help + WITH_INIT)
        for name, flag in flags_of(Request).items()
        if name in WEIGHTS_FLAGS
    },
    "freeze": Flag(
        "", "regular expression: parameters whose names match are not trained, such as ^(blocks|x_embedder)", "model"
    ),
    "schedule_sampler": Flag("uniform", "uniform or loss-second-moment", "diffusion"),
    "dry_run": Flag(
        False, "check everything, train two steps, say what a run would take, and write nothing", "training"
    ),
    "resume_checkpoint": Flag("auto", "auto, a model file, or empty for a fresh run", "saving"),
    "out": OUT_FLAG,
    "overwrite": Flag(False, "move the checkpoints in the output folder aside and start anew", "saving"),
    **MACHINE_FLAGS,
    "use_zero": Flag(False, "True is --shard zero, False is --shard none; the published name of it", COMPATIBILITY),
}
MOST_USED = (
    "data_dir", "image_size", "model", "mask_ratio", "decode_layer", "batch_size", "lr", "max_steps", "save_interval",
    "dry_run",
)  # fmt: skip
OF_THE_MACHINE = {
    "device",
    "num_workers",
    "data_dir",
    "labels_file",
    "vae_path",
    "out",
    "eval_ref",
    "eval_graph",
    "guide_path",
}
OF_THE_LAUNCHER = {"local_rank", "rank", "world_size", "dist_url"}
EVAL_SETTINGS = [name for name in EvalConfig.__dataclass_fields__ if name != "eval_interval"]
EVALUATOR = Path(__file__).resolve().parent.parent / "evaluations" / "evaluator.py"


def create_argparser() -> argparse.ArgumentParser:
    return make_parser("Train a Masked Diffusion Transformer.", FLAGS, MOST_USED, launched=True)


def prepare(args: argparse.Namespace, explicit: set[str], stack: contextlib.ExitStack) -> Callable[[], int]:
    """Check the flags, then all else that input can get wrong. Returns the work. Raises ValueError or OSError."""
    # Settings
    args.model = with_patch_of(args.model, args.vae_path)
    apply_family_defaults(TRAINING, args.model, args, explicit)
    idle = [*warnings_of(args, explicit), *ignored_folder(args.out, os.environ)]
    resolve(args, explicit)
    if args.normalize not in ("none", "channel"):
        raise ValueError(f"--normalize {args.normalize}: choose none or channel")
    config, eval_config = from_args(TrainConfig, args), from_args(EvalConfig, args)
    guides = from_args(GuideConfig, args)
    guides.check({config.preview_guide_from, eval_config.eval_guide_from})
    data, process = from_args(DataConfig, args), from_args(DiffusionConfig, args)
    model = args_to_dict(args, [*flags_of(ModelConfig), "learn_sigma"])
    objective = args_to_dict(args, ObjectiveConfig.__dataclass_fields__)
    weights = Request(**args_to_dict(args, WEIGHTS_FLAGS))
    flags = {name: value for name, value in vars(args).items() if name not in OF_THE_LAUNCHER | OF_THE_MACHINE}
    # The run, with torch, which takes seconds to import.
    from masked_diffusion.programs import image_train

    command, alike = command_of(args, explicit), repr(sorted(flags.items()))
    asked = image_train.Asked(
        config, eval_config, guides, data, model, process, objective, from_args(image_train.Beginning, args), weights,
        idle, explicit, command, alike,
    )  # fmt: skip
    return image_train.prepare(args, asked, EVALUATOR, stack)


def with_patch_of(model: str, vae_path: str) -> str:
    """Complete a model's name that has no patch size, such as MDT_S, by the first stage in a local folder, or the
    default one. Other names are returned as they are. Raises ValueError for another autoencoder of the hub, whose
    latents are not known before it is loaded.
    """
    path = Path(vae_path).expanduser() / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_bytes())
            return with_patch(model, downsample_of(config))
        except (ValueError, KeyError, TypeError, AttributeError):  # loading it says what is wrong
            return model
    complete = with_patch(model, DEFAULT_DOWNSAMPLE)
    is_on_hub = vae_path.count("/") == 1 and not vae_path.startswith((".", "/", "~")) and not Path(vae_path).exists()
    if complete != model and is_on_hub and vae_path not in (DEFAULT_VAE.format("ema"), DEFAULT_VAE.format("mse")):
        raise ValueError(f"--model {model}: --vae_path {vae_path} does not say its patch; give it, such as {complete}")
    return complete


def command_of(args: argparse.Namespace, explicit: set[str]) -> str:
    """What was asked for, alike for all ranks and attempts of a job."""
    return " ".join(f"--{name} {getattr(args, name)}" for name in sorted(explicit - OF_THE_LAUNCHER))


def resolve(args: argparse.Namespace, explicit: set[str]) -> None:
    """Give the flags that were left out the values that the other ones stand for.

    Raises ValueError where --shard and --use_zero contradict each other, and as :func:`resolve_objective`.
    """
    resolve_objective(args, explicit)
    if "use_zero" in explicit:
        asked = "zero" if args.use_zero else "none"
        if "shard" in explicit and args.shard != asked:
            raise ValueError(
                f"--use_zero {args.use_zero} is --shard {asked}, but --shard {args.shard} is given; leave one out"
            )
        args.shard = asked
    args.policy = args.policy or family_policy(args.model)
    for name in ignored_settings(args.model, args.policy, args.decoder):
        setattr(args, name, None)
    if args.finale is None:  # the policy's own
        ends = args.max_steps or args.max_compute or args.lr_anneal_steps
        args.finale = POLICIES[args.policy].finale if ends else 0.0


def resolve_objective(args: argparse.Namespace, explicit: set[str]) -> None:
    """Give the flags that were left out the values that the objective stands for.

    Raises ValueError for an unknown objective, one that the model does not predict, and for settings of ``ddpm`` with
    another one.
    """
    config = ObjectiveConfig(objective=args.objective)
    check_objective(args.model, args.objective)
    if args.objective == "ddpm":
        return
    for name in ("learn_sigma", "predict_xstart", "use_kl"):
        if name in explicit and getattr(args, name):
            raise ValueError(f"--{name} True: it belongs to --objective ddpm, and --objective is {args.objective}")
    args.learn_sigma = False
    if not config.is_discrete:
        args.min_snr_gamma = None
    if "eval_sampler" not in explicit:
        args.eval_sampler = config.default_sampler


def warnings_of(args: argparse.Namespace, explicit: set[str]) -> list[str]:
    """Settings that are given and have no effect. Raises ValueError for a model or policy that is none."""
    policy = args.policy or family_policy(args.model)
    continuous, by_objective = args.objective not in DISCRETE_OBJECTIVES, f"with --objective {args.objective}"
    of_objective = OBJECTIVES.get(args.objective, ())  # an unknown one is refused later
    by_law = args.level_law != "logit_normal" and f"with --level_law {args.level_law}"
    idle = {
        "adam_beta2": args.opt != "adamw" and f"with --opt {args.opt}",
        "fp16_scale_growth": not args.use_fp16 and "without --use_fp16 True",
        "sigma_small": args.learn_sigma and "with --learn_sigma True",
        "rescale_learned_sigmas": (args.use_kl and "with --use_kl True")
        or (not args.learn_sigma and "with --learn_sigma False"),
        **dict.fromkeys(WEIGHTS_FLAGS, not args.init_from and "without --init_from"),
        "min_snr_gamma": (args.use_kl and "with --use_kl True") or (continuous and by_objective),
        **dict.fromkeys(("diffusion_steps", "noise_schedule", "timestep_respacing"), continuous and by_objective),
        **dict.fromkeys(("level_mean", "level_std"), by_law),
        **dict.fromkeys(set(OBJECTIVE_SETTINGS) - set(of_objective), by_objective),
        **dict.fromkeys(ignored_settings(args.model, policy, args.decoder), f"by {args.model} under --policy {policy}"),
        "ema_snapshot_interval": not args.ema_power and "without --ema_power",
        "ema_warmup": args.ema_rate.lower() == "none" and "with --ema_rate none",
        **dict.fromkeys(("finale", "ratio_schedule"), not POLICIES[policy].drops and f"under --policy {policy}"),
        "preview_steps": not args.preview_samples and "with --preview_samples 0",
        **dict.fromkeys(EVAL_SETTINGS, not args.eval_interval and "without --eval_interval"),
        **idle_guidance(args),
        "random_flip": args.data_dir.startswith("builtin:digits") and "for the embedded digits",
        "max_bad_share": args.data_dir.startswith("builtin:digits") and "for the embedded digits",
        "tf32": args.device == "cpu" and "on a CPU",
    }
    return [f"--{name} is ignored {reason}" for name, reason in idle.items() if reason and name in explicit]


def idle_guidance(args: argparse.Namespace) -> dict[str, str | bool]:
    """Why flags of guidance have no effect, where they have none."""
    of_previews = (not args.preview_samples and "with --preview_samples 0") or (
        not args.class_cond and "with --class_cond False"
    )
    of_evaluations = (not args.eval_interval and "without --eval_interval") or (
        not args.eval_cfg_scale and "with --eval_cfg_scale 0"
    )
    of_both = bool(of_previews and of_evaluations) and f"{of_previews} and {of_evaluations}"
    schedule = args.guidance or SAMPLING[family_of(args.model)].get("guidance", SamplerConfig.guidance)
    foreign = dict.fromkeys(foreign_settings(schedule), f"with --guidance {schedule}")
    return {
        **foreign,
        **dict.fromkeys(("preview_guide_from", "preview_cfg_scale"), of_previews),
        "eval_guide_from": of_evaluations,
        **(dict.fromkeys(GuideConfig.__dataclass_fields__, of_both) if of_both else {}),
    }


main = main_of(create_argparser, prepare)

if __name__ == "__main__":
    sys.exit(main())

"""What settings can choose among: names, and what a check of settings has to know of each.

This module and the settings' dataclasses import no torch, so that ``--help`` and a wrong flag are answered at once.
What a name stands for is built elsewhere: a new model, policy, objective, sampler, schedule or optimizer has its line
there, and its name here. ``tests/test_choices.py`` fails where the two differ.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A family of models. policy: that it is trained under where none is asked for. has_decoder: whether its models
    have decoder blocks under every policy. sizes: of its models, with their patch size. objective: the only one that
    they are networks of; None for any."""

    policy: str
    has_decoder: bool
    sizes: tuple[str, ...]
    objective: str | None = None


# For latents of autoencoders that divide the side by 16 or more.
ONE_TO_A_TOKEN = ("XL_1", "L_1", "B_1", "S_1", "Ti_1")
ALL_SIZES = (
    "XL_2", "XL_4", "XL_8", "L_2", "L_4", "L_8", "B_2", "B_4", "B_8", "S_2", "S_4", "S_8", "Ti_2", "Ti_4",
    *ONE_TO_A_TOKEN,
)  # fmt: skip
V2_SIZES = ("XL_2", "L_2", "B_2", "S_2", "Ti_2", *ONE_TO_A_TOKEN, "Mini_2", "Micro_1")
FAMILIES = {
    "MDT": Family("mdt", True, ALL_SIZES),
    "MDTv2": Family("mdtv2", True, V2_SIZES),
    "DiT": Family("none", False, (*ALL_SIZES, "Mini_2", "Micro_1")),
    "SiT": Family("none", False, ALL_SIZES, objective="flow"),
}
MODELS = [f"{name}_{size}" for name, family in FAMILIES.items() for size in family.sizes]


def with_patch(model: str, downsample: int) -> str:
    """``MDT_S`` -> ``MDT_S_2``, or ``MDT_S_1`` where the first stage divides the side by more than 8. Other names are
    returned as they are."""
    complete = f"{model}_{2 if downsample <= DEFAULT_DOWNSAMPLE else 1}"
    return complete if model not in MODELS and complete in MODELS else model


def family_of(model: str) -> str:
    """``MDTv2_S_2`` -> ``MDTv2``, a key of FAMILIES. Raises ValueError, listing the names, for an unknown one."""
    if model not in MODELS:
        raise ValueError(f"--model {model}: unknown; choose one of {', '.join(MODELS)}")
    return model.split("_")[0]


def family_policy(model: str) -> str:
    """The policy, a key of POLICIES, that the model called ``model`` is trained under where none is asked for."""
    return FAMILIES[family_of(model)].policy


def check_objective(model: str, objective: str) -> None:
    """Raise ValueError where the model called ``model`` predicts something else than an objective asks for."""
    own = FAMILIES[family_of(model)].objective
    if own not in (None, objective):
        raise ValueError(
            f"--objective {objective}: {model} is a network of --objective {own} alone; use that, or another --model"
        )


class PolicyTraits(NamedTuple):
    """What settings have to know of a policy. families: of the models that can be trained under it. drops: whether it
    has a mask ratio. leaves: whether it is of tokens that leave. has_decoder: whether they come back at the decoder.
    takes_route, takes_decoder: whether another route, a decoder can be asked for. finale: its own."""

    families: tuple[str, ...]
    drops: bool = True
    leaves: bool = True
    has_decoder: bool = False
    takes_route: bool = False
    takes_decoder: bool = False
    finale: float = 0.0


POLICIES = {
    "none": PolicyTraits(("MDT", "MDTv2", "DiT", "SiT"), drops=False, leaves=False),
    "mdt": PolicyTraits(("MDT", "DiT", "SiT"), has_decoder=True),
    "mdtv2": PolicyTraits(("MDTv2",), has_decoder=True),
    "mdt_one_view": PolicyTraits(("MDT", "DiT", "SiT"), has_decoder=True),
    "tread": PolicyTraits(("MDT", "DiT", "SiT"), takes_route=True),
    "sprint": PolicyTraits(("MDT", "DiT", "SiT"), takes_route=True, finale=0.1),
    "deferred": PolicyTraits(("MDT", "DiT", "SiT"), finale=0.1),
    "maskdit": PolicyTraits(("MDT", "DiT", "SiT"), takes_decoder=True, finale=0.1),
    "dual_timestep": PolicyTraits(("MDT", "DiT", "SiT"), leaves=False),
}
LAST_BLOCKS = "blocks"  # as a decoder: the last blocks of the network itself
CONSTANT = "const"


def ratio_schedule(text: str) -> Callable[[float], float]:
    """The share of the mask ratio that holds at a progress in [0, 1]; MaskDiT's schedules (2306.09305).

    ``const``, ``cosine:K`` for cos(pi progress / 2)^K, which falls from 1 to 0, or ``linear``, which rises from 0 to 1.
    Raises ValueError for anything else.
    """
    if text == CONSTANT:
        return lambda progress: 1.0
    if text == "linear":
        return lambda progress: progress
    name, _, power = text.partition(":")
    if name == "cosine" and power.isdecimal() and int(power) > 0:
        return lambda progress: math.cos(math.pi * progress / 2) ** int(power)
    raise ValueError(f"--ratio_schedule {text}: expected const, linear, or cosine:K with a whole number, as cosine:4")


def check_policy(name: str, family: str) -> None:
    """Raise ValueError for an unknown policy, and for one that does not fit the family."""
    if name not in POLICIES:
        raise ValueError(f"--policy {name}: unknown; choose one of {', '.join(POLICIES)}")
    families = POLICIES[name].families
    if family not in families:
        fitting = ", ".join(other for other, one in POLICIES.items() if family in one.families)
        raise ValueError(
            f"--policy {name}: is for {', '.join(f'{f}_*' for f in families)} models, and this one is {family}; "
            f"choose one of {fitting}"
        )


def ignored_settings(model: str, policy: str | None, decoder: str | None = None) -> list[str]:
    """Which of mask_ratio, decode_layer, route, choose and decoder the model called ``model`` has no use for.

    policy: None is the model's own. decoder: where the policy takes one.
    Raises ValueError for an unknown model or policy, or a policy that is not for this model.
    """
    family = family_of(model)
    name = policy or family_policy(model)
    check_policy(name, family)
    traits = POLICIES[name]
    in_blocks = traits.has_decoder or (traits.takes_decoder and decoder == LAST_BLOCKS)
    used = {"mask_ratio": traits.drops, "decode_layer": in_blocks or FAMILIES[family].has_decoder}
    used |= {"route": traits.takes_route, "choose": traits.leaves, "decoder": traits.takes_decoder}
    return [setting for setting, is_used in used.items() if not is_used]


DISCRETE_OBJECTIVES = ("ddpm", "x0", "v")  # whose levels are the steps of a process
# Objectives, and the settings that each has and no process of steps.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(DISCRETE_OBJECTIVES, ()),
    "flow": ("level_law", "level_mean", "level_std", "time_shift", "learned_uncertainty"),
    "edm": ("sigma_data", "p_mean", "p_std", "learned_uncertainty"),
}
OBJECTIVE_SETTINGS = tuple(name for settings in OBJECTIVES.values() for name in settings)
# Samplers, and the objectives that each serves.
SAMPLERS: dict[str, tuple[str, ...]] = {
    "ddpm": DISCRETE_OBJECTIVES,
    "ddim": tuple(OBJECTIVES),
    "dpmsolver++": (*DISCRETE_OBJECTIVES, "flow"),
    "unipc": (*DISCRETE_OBJECTIVES, "flow"),
    "heun": tuple(OBJECTIVES),
    "euler": ("flow", "edm"),
    "euler_maruyama": ("flow",),
}


def check_serves(sampler: str, objective: str, flag: str = "--sampler") -> None:
    """Raise ValueError, listing those that do, where a sampler of SAMPLERS does not serve an objective."""
    if objective not in SAMPLERS[sampler]:
        fitting = ", ".join(name for name, served in SAMPLERS.items() if objective in served)
        raise ValueError(f"{flag} {sampler}: it does not serve --objective {objective}; choose one of {fitting}")


# The published numbers guide three of the four latent channels (inherited from DiT, where it was a slip).
GUIDED_CHANNELS = 3
PUBLISHED_CHANNELS = 4  # of the latents that this is about; of more channels, all are guided
ALL_CHANNELS = sys.maxsize
# Flags that only guidance heeds.
GUIDANCE_FLAGS = (
    "guide_path",
    "guide_labels",
    "guide_ratio",
    "guide_strong_ratio",
    "guide_from",
    "guidance",
    "cfg_scale",
    "scale_pow",
    "cfg_interval",
    "cfg_channels",
    "cfg_skip_tol",
)
# What predictions can be led away from.
GUIDE_FROM = ("null_label", "checkpoint", "path_drop", "masked", "routed")
NULL_KINDS = ("null_label", "path_drop")  # whose weak prediction has the null label
SPARSE_KINDS = ("masked", "routed")  # whose weak prediction has fewer tokens
# Settings of some kinds alone, with these.
GUIDE_SETTINGS: dict[str, tuple[str, ...]] = {
    "guide_path": ("checkpoint",),
    "guide_labels": ("checkpoint",),
    "guide_ratio": SPARSE_KINDS,
    "guide_strong_ratio": ("routed",),
}
# Guidance schedules, and the settings that each has and no other.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "power_cosine": ("scale_pow",),
    "constant": (),
    "interval": ("cfg_interval",),
    "linear": (),
    "beta": (),
}


def parse_guidance(guidance: str) -> tuple[str, dict[str, Any]]:
    """The name of a schedule, and the settings that the text itself holds, such as those of ``beta:2,4``.

    Raises ValueError for another name, listing the names.
    """
    name, colon, rest = guidance.partition(":")
    if name not in SCHEDULES or (colon and name != "beta"):
        raise ValueError(f"--guidance {guidance}: unknown; choose one of {', '.join(SCHEDULES)}")
    if name != "beta":
        return name, {}
    try:
        a, b = (float(part) for part in rest.split(","))
    except ValueError:
        a = b = math.nan
    if not (1 <= a < math.inf and 1 <= b < math.inf):
        raise ValueError(f"--guidance {guidance}: expected beta:A,B with numbers of 1 or more, such as beta:2,4")
    return name, {"beta": (a, b)}


def foreign_settings(guidance: str) -> dict[str, str]:
    """Settings of the other schedules, which have no effect on this one, and whose they are."""
    others = {name: settings for name, settings in SCHEDULES.items() if name != guidance.partition(":")[0]}
    return {setting: name for name, settings in others.items() for setting in settings}


OPTIMIZERS = ("adamw", "adan")
SHARDINGS = ("none", "zero", "fsdp")
WEIGHTS_FORMATS = ("pt", "safetensors")
LATENT_DTYPES = ("fp32", "fp16", "bf16")

LONGEST_STD = 0.28  # of a power-function average; that of equal weights is sqrt(1 / 12)


def check_std(std: float) -> None:
    """Raise ValueError for a relative length that no power-function average has."""
    if not 0 < std <= LONGEST_STD:
        raise ValueError(f"--std {std}: must be in (0, {LONGEST_STD}], a share of the training, such as 0.05")


PIXEL_SPACE = "none"  # what --vae_path says where there is no autoencoder

# Classes of diffusers that are first stages, and the setting that lists the widths of the encoder's maps.
AUTOENCODERS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
    "VQModel": "block_out_channels",
}


def class_of(config: Mapping[str, Any]) -> str:
    """The class of diffusers that the ``config.json`` of an autoencoder names."""
    return config.get("_class_name", "AutoencoderKL")


def downsample_of(config: Mapping[str, Any]) -> int:
    """Image side / latent side, by the config of an autoencoder of AUTOENCODERS: each width but the first halves it."""
    return 2 ** (len(config[AUTOENCODERS[class_of(config)]]) - 1)


DEFAULT_VAE = "stabilityai/sd-vae-ft-{}"  # "mse" in training; "ema" or "mse" in sampling
# Of the autoencoders under DEFAULT_VAE, known without loading one.
DEFAULT_DOWNSAMPLE = 8
DEFAULT_SCALE = {"scaling_factor": 0.18215, "shift_factor": 0.0}

# Editions of the random numbers, see randomness.py.
FIRST_STREAM = 1  # of what was begun before editions were recorded
STREAM = 2

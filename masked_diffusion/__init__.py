"""Masked Diffusion Transformer (MDT, 2303.14389): the public front door."""

from typing import Any

from masked_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from masked_diffusion.respace import SpacedDiffusion, space_timesteps

__all__ = ["create_diffusion", "diffusion_defaults", "model_and_diffusion_defaults"]


def create_diffusion(
    timestep_respacing: str | list[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    min_snr_gamma: float | None = None,
) -> SpacedDiffusion:
    """Build a diffusion process.

    timestep_respacing: see :func:`masked_diffusion.respace.space_timesteps`; None or "" for all steps.
    noise_schedule: ``linear`` or ``squaredcos_cap_v2`` (``cosine``). use_kl: train on the variational bound; wins over
    rescale_learned_sigmas, which multiplies the variational term by T / 1000. sigma_small: of the two fixed variances
    (learn_sigma False), the posterior's. predict_xstart: the network predicts x_0, not the noise. min_snr_gamma: 5.0
    for MDTv2's loss weighting. Raises ValueError for an unknown schedule or respacing.
    """
    if use_kl:
        loss_type = LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = LossType.RESCALED_MSE
    else:
        loss_type = LossType.MSE
    if learn_sigma:
        model_var_type = ModelVarType.LEARNED_RANGE
    else:
        model_var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        space_timesteps(diffusion_steps, timestep_respacing),
        betas=get_named_beta_schedule(noise_schedule, diffusion_steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=model_var_type,
        loss_type=loss_type,
        min_snr_gamma=min_snr_gamma,
    )


def diffusion_defaults() -> dict[str, Any]:
    """Default settings of :func:`create_diffusion`, as the scripts' flags have them."""
    return {
        "learn_sigma": True,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "sigma_small": False,
        "rescale_learned_sigmas": False,
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Default settings of the model and the diffusion process, as the scripts' flags have them."""
    return {
        "image_size": 256,
        "mask_ratio": None,
        "decode_layer": None,
        "class_cond": True,
        "use_fp16": False,
        **diffusion_defaults(),
    }

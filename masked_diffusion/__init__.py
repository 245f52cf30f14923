"""Masked Diffusion Transformer (MDT, 2303.14389): the public front door.

``import masked_diffusion`` takes no time: torch and the modules come with their first use.
"""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from masked_diffusion.diffusion.process import DiffusionConfig

if TYPE_CHECKING:
    from masked_diffusion.respace import SpacedDiffusion

__all__ = ["create_diffusion", "diffusion_defaults", "model_and_diffusion_defaults"]
# Attributes that came with ``import masked_diffusion`` in 0.1.0.
_MODULES = ("gaussian_diffusion", "respace")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"masked_diffusion.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def create_diffusion(
    timestep_respacing: str | list[int] | None,
    noise_schedule: str = DiffusionConfig.noise_schedule,
    use_kl: bool = DiffusionConfig.use_kl,
    sigma_small: bool = DiffusionConfig.sigma_small,
    predict_xstart: bool = DiffusionConfig.predict_xstart,
    learn_sigma: bool = DiffusionConfig.learn_sigma,
    rescale_learned_sigmas: bool = DiffusionConfig.rescale_learned_sigmas,
    diffusion_steps: int = DiffusionConfig.diffusion_steps,
    min_snr_gamma: float | None = DiffusionConfig.min_snr_gamma,
) -> "SpacedDiffusion":
    """Build a diffusion process.

    timestep_respacing: see :func:`masked_diffusion.respace.space_timesteps`; None or "" for all steps.
    noise_schedule: ``linear`` or ``squaredcos_cap_v2`` (``cosine``). use_kl: train on the variational bound; wins over
    rescale_learned_sigmas, which multiplies the variational term by T / 1000. sigma_small: of the two fixed variances
    (learn_sigma False), the posterior's. predict_xstart: the network predicts x_0, not the noise. min_snr_gamma: 5.0
    for MDTv2's loss weighting. Raises ValueError for an unknown schedule or respacing.
    """
    return DiffusionConfig(**locals()).build()


def diffusion_defaults() -> dict[str, Any]:
    """Default settings of :func:`create_diffusion`, as the scripts' flags have them."""
    defaults = dataclasses.asdict(DiffusionConfig())
    return {name: value for name, value in defaults.items() if name != "min_snr_gamma"}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Default settings of the model and the diffusion process, as the scripts' flags have them."""
    from masked_diffusion.data.data_config import DataConfig
    from masked_diffusion.runs.config import ModelConfig
    from masked_diffusion.settings import flags_of
    from masked_diffusion.training.train_config import TrainConfig

    flags = flags_of(ModelConfig, DataConfig, TrainConfig)
    names = ("image_size", "mask_ratio", "decode_layer", "class_cond", "use_fp16")
    return {**{name: flags[name].default for name in names}, **diffusion_defaults()}

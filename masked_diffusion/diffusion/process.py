"""The settings of a diffusion process, and the process of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from masked_diffusion.settings import setting

if TYPE_CHECKING:
    from masked_diffusion.respace import SpacedDiffusion


@dataclass(frozen=True)
class DiffusionConfig:
    """What a diffusion process is built from, see :func:`masked_diffusion.create_diffusion`."""

    diffusion_steps: int = setting(1000, "timesteps of the process", "diffusion")
    noise_schedule: str = setting("linear", "linear, or squaredcos_cap_v2 (cosine)", "diffusion")
    timestep_respacing: str | list[int] | None = setting(
        "", "train on some of the timesteps only, such as 250 or 10,15,20; empty = all", "diffusion", str
    )
    use_kl: bool = setting(False, "train on the variational bound alone", "diffusion")
    predict_xstart: bool = setting(False, "the network predicts x_0 instead of the noise", "diffusion")
    learn_sigma: bool = setting(True, "the network predicts a variance, too", "diffusion")
    sigma_small: bool = setting(False, "of the two fixed variances (--learn_sigma False), the posterior's", "diffusion")
    rescale_learned_sigmas: bool = setting(
        False, "multiply the variational term by diffusion_steps / 1000", "diffusion"
    )
    min_snr_gamma: float | None = setting(
        None,
        "cap of the min-SNR loss weighting, such as 5; None weights all timesteps alike; MDTv2 has 5 by default",
        "diffusion",
    )

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"--min_snr_gamma {self.min_snr_gamma}: must be positive, or None for no weighting")

    def build(self) -> "SpacedDiffusion":
        """The process. Raises ValueError for an unknown schedule or an impossible respacing."""
        from masked_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
        from masked_diffusion.respace import SpacedDiffusion, space_timesteps

        if self.use_kl:
            loss_type = LossType.RESCALED_KL
        elif self.rescale_learned_sigmas:
            loss_type = LossType.RESCALED_MSE
        else:
            loss_type = LossType.MSE
        if self.learn_sigma:
            model_var_type = ModelVarType.LEARNED_RANGE
        else:
            model_var_type = ModelVarType.FIXED_SMALL if self.sigma_small else ModelVarType.FIXED_LARGE
        return SpacedDiffusion(
            space_timesteps(self.diffusion_steps, self.timestep_respacing),
            betas=get_named_beta_schedule(self.noise_schedule, self.diffusion_steps),
            model_mean_type=ModelMeanType.START_X if self.predict_xstart else ModelMeanType.EPSILON,
            model_var_type=model_var_type,
            loss_type=loss_type,
            min_snr_gamma=self.min_snr_gamma,
        )

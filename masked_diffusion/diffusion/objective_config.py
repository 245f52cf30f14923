"""The settings of an objective."""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from masked_diffusion.choices import DISCRETE_OBJECTIVES, GUIDED_CHANNELS, OBJECTIVES
from masked_diffusion.settings import setting


def number_or_auto(text: str) -> float | str:
    """A finite number, or ``auto``. Raises argparse.ArgumentTypeError for anything else."""
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number or auto, got {text!r}")
    return value


@dataclass(frozen=True)
class ObjectiveConfig:
    """What ``config.json`` says of the objective; named as the flags.

    level_law, level_mean, level_std, time_shift: of ``flow``; the law is ``uniform`` or ``logit_normal``. sigma_data:
    the standard deviation of the latents, p_mean, p_std: of the logarithm of the noise's; of ``edm``.
    learned_uncertainty: see :class:`masked_diffusion.diffusion.levels.Uncertainty`. Raises ValueError for unknown
    names, and numbers that cannot be.
    """

    objective: str = setting("ddpm", "what the network learns to predict: ddpm, x0, v, flow or edm", "diffusion")
    level_law: str = setting("uniform", "of --objective flow: uniform or logit_normal times in training", "diffusion")
    level_mean: float = setting(0.0, "mean of --level_law logit_normal", "diffusion")
    level_std: float = setting(1.0, "standard deviation of --level_law logit_normal", "diffusion")
    time_shift: float = setting(
        1.0,
        "of --objective flow: moves times towards the noise, in training and sampling; auto goes by the latent's size",
        "diffusion",
        number_or_auto,
    )
    sigma_data: float | None = setting(
        None, "of --objective edm: standard deviation of the latents; None measures it", "diffusion"
    )
    p_mean: float = setting(-1.2, "of --objective edm: mean of log sigma in training", "diffusion")
    p_std: float = setting(1.2, "of --objective edm: standard deviation of log sigma in training", "diffusion")

    learned_uncertainty: bool = setting(
        False,
        "of --objective flow and edm: divide the loss at each level by its running mean there (EDM2's u)",
        "diffusion",
    )

    def __post_init__(self) -> None:
        for name, choices in (("objective", tuple(OBJECTIVES)), ("level_law", ("uniform", "logit_normal"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: unknown; choose one of {', '.join(choices)}")
        for name in ("level_std", "time_shift", "sigma_data", "p_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} {value}: must be positive")

    @property
    def is_discrete(self) -> bool:
        """Whether levels are the timesteps of a process, of which there are only so many."""
        return self.objective in DISCRETE_OBJECTIVES

    @property
    def default_sampler(self) -> str:
        """What samples are drawn with where no flag says otherwise."""
        return {"edm": "heun"}.get(self.objective, "ddpm" if self.is_discrete else "euler")

    @property
    def guided_channels(self) -> int:
        """Latent channels that guidance leads: the published slip of three is ``ddpm``'s alone."""
        return GUIDED_CHANNELS if self.objective == "ddpm" else 4

    def record(self) -> dict[str, Any]:
        """What a manifest says: nothing of ``ddpm``, whose sets from before there was a choice stay the same ones, and
        nothing that the training alone uses and older manifests do not say."""
        settings = dataclasses.asdict(self)
        del settings["learned_uncertainty"]
        return {} if self.objective == "ddpm" else {"objective": settings}

"""The settings of a sampling."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from masked_diffusion.choices import (
    ALL_CHANNELS,
    GUIDE_FROM,
    GUIDED_CHANNELS,
    SAMPLERS,
    SPARSE_KINDS,
    check_serves,
    family_of,
    parse_guidance,
)
from masked_diffusion.choices import SCHEDULES as SCHEDULE_SETTINGS
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.runs.family_defaults import SAMPLING
from masked_diffusion.settings import setting

if TYPE_CHECKING:
    from masked_diffusion.diffusion.guidance import Away, Guidance
    from masked_diffusion.diffusion.objectives import Objective

# Which edition of a sampler's steps this is; those that are not named step as in 0.1.0, or were not there.
STEPS_EDITION = {"heun": 2}
CONTINUOUS_STEPS = 1000  # what guidance schedules count the time of a continuous objective in


@dataclass(frozen=True)
class SamplerConfig:
    """How a trained model is sampled; named as the flags.

    num_sampling_steps: steps of the sampling. sampler: a name of ``SAMPLERS``. cfg_cond: guide with
    the schedule ``guidance`` (see ``choices.parse_guidance``) up to cfg_scale. guide_from: what predictions are led
    away from, one of ``GUIDE_FROM``. guide_path: the weaker model of ``checkpoint``. guide_labels: ``same`` labels for
    it, or ``null``. guide_ratio: share of the tokens that leave in the weak prediction of ``masked`` and ``routed``;
    None is the training's. guide_strong_ratio: the share in the strong prediction of ``routed``. cfg_interval: first
    and last original timestep that ``interval`` guides at, or, where levels are continuous, shares of noise in [0, 1].
    cfg_channels: 3 latent channels are guided, or with 4 all. cfg_skip_tol: where the weight is within this of 1, no
    weak prediction is computed. Raises ValueError for other values.
    """

    num_sampling_steps: int = setting(250, "steps of the sampler, whichever it is", "sampling")
    sampler: str = setting(
        "ddpm", "ddpm or ddim; or, for fewer steps, a solver without noise: dpmsolver++, unipc, heun", "sampling"
    )
    clip_denoised: bool = setting(False, "clamp every estimate of x_0 to [-1, 1]", "sampling")
    cfg_cond: bool = setting(False, "guide with the schedule --guidance up to --cfg_scale", "guidance")
    guide_from: str = setting(
        "null_label",
        "what predictions are led away from: null_label (classifier-free guidance), checkpoint (the weaker model of "
        "--guide_path), path_drop (the null label without the blocks of the route), masked (the model's own masked "
        "view) or routed (fewer tokens on the route than in the strong prediction)",
        "guidance",
    )
    guide_path: str = setting("", "checkpoint of the weaker model, with --guide_from checkpoint", "guidance")
    guide_labels: str = setting("same", "what the model of --guide_path is given: same labels, or null", "guidance")
    guide_ratio: float | None = setting(
        None,
        "share of the tokens that leave in the weak prediction of --guide_from masked or routed; None is the "
        "training's",
        "guidance",
    )
    guide_strong_ratio: float = setting(
        0.0,
        "share of the tokens that leave in the strong prediction of --guide_from routed, less than the weak one's",
        "guidance",
    )
    guidance: str = setting(
        "power_cosine",
        "weight over time: power_cosine, constant, linear, beta:A,B, or interval (1 outside of --cfg_interval)",
        "guidance",
    )
    cfg_scale: float = setting(
        3.8, "largest weight of the guidance; needs --cfg_cond True; DiT has 1.5 by default", "guidance"
    )
    scale_pow: float = setting(4.0, "power of --guidance power_cosine; needs --cfg_cond True", "guidance")
    cfg_interval: list[float] | None = setting(
        None,
        "where --guidance interval guides: first and last timestep, such as 80-470, or under --objective flow and edm "
        "shares of noise, such as 0.1-0.7",
        "guidance",
    )
    cfg_channels: int = setting(
        GUIDED_CHANNELS, "latent channels that are guided: 3, as published, or 4 for all", "guidance"
    )
    cfg_skip_tol: float = setting(
        0.0,
        "do not compute the weak prediction where the weight is within this of 1, such as 0.01: faster",
        "guidance",
    )
    seed: int = setting(0, "with a sample's number, determines its noise and label", "sampling")

    def __post_init__(self) -> None:
        if self.num_sampling_steps < 1:
            raise ValueError(f"--num_sampling_steps {self.num_sampling_steps}: must be at least 1")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler {self.sampler}: unknown; choose one of {', '.join(SAMPLERS)}")
        if self.guide_from not in GUIDE_FROM:
            raise ValueError(f"--guide_from {self.guide_from}: unknown; choose one of {', '.join(GUIDE_FROM)}")
        self._check_guide()
        parse_guidance(self.guidance)
        if self.guidance == "interval" and self.cfg_interval is None:
            raise ValueError("--guidance interval: give the timesteps to guide at, such as --cfg_interval 80-470")
        if self.cfg_channels not in (3, 4):
            raise ValueError(f"--cfg_channels {self.cfg_channels}: choose 3 (as published) or 4")
        if not self.cfg_skip_tol >= 0:  # NaN is not
            raise ValueError(f"--cfg_skip_tol {self.cfg_skip_tol}: must be 0 or more, such as 0.01")
        if not 0 <= self.cfg_scale < float("inf"):
            raise ValueError(f"--cfg_scale {self.cfg_scale}: must be 0 or more, such as 1.5")

    def _check_guide(self) -> None:
        """Raise ValueError where what guides, and what it needs, do not belong together."""
        if (self.guide_from == "checkpoint") != bool(self.guide_path):
            raise ValueError("--guide_from checkpoint and --guide_path: give both, or none")
        if self.guide_labels not in ("same", "null"):
            raise ValueError(f"--guide_labels {self.guide_labels}: choose same or null")
        if self.guide_labels == "null" and self.guide_from != "checkpoint":
            raise ValueError("--guide_labels null: needs --guide_from checkpoint")
        if self.guide_ratio is not None and self.guide_from not in SPARSE_KINDS:
            raise ValueError(f"--guide_ratio {self.guide_ratio}: needs --guide_from masked or routed")
        if self.guide_ratio is not None and not 0 < self.guide_ratio < 1:
            raise ValueError(f"--guide_ratio {self.guide_ratio}: must be between 0 and 1, a share of the tokens")
        if self.guide_strong_ratio and self.guide_from != "routed":
            raise ValueError(f"--guide_strong_ratio {self.guide_strong_ratio}: needs --guide_from routed")
        if not 0 <= self.guide_strong_ratio < 1:
            raise ValueError(
                f"--guide_strong_ratio {self.guide_strong_ratio}: must be in [0, 1), a share of the tokens"
            )

    @classmethod
    def of_family(cls, model: str, **settings: Any) -> "SamplerConfig":
        """The settings that the family of a model's name is published with, but for ``settings``."""
        return cls(**{**SAMPLING[family_of(model)], **settings})

    @property
    def guidance_settings(self) -> dict[str, Any]:
        """The settings of the chosen schedule alone."""
        schedule, settings = parse_guidance(self.guidance)
        return {**{name: getattr(self, name) for name in SCHEDULE_SETTINGS[schedule]}, **settings}

    def record(self) -> dict[str, Any]:
        """All settings, for a manifest."""
        # Sets that were begun before there was the flag stay the same ones.
        silent = self.guide_from == "null_label"
        said = {name: value for name, value in asdict(self).items() if not (silent and name.startswith("guide_"))}
        return said | self.steps_record()

    def steps_record(self) -> dict[str, int]:
        """What a manifest says of the sampler's steps where 0.1.0 took others: its sets are not gone on with."""
        return {"sampler_steps": STEPS_EDITION[self.sampler]} if self.sampler in STEPS_EDITION else {}

    def guidance_record(self) -> dict[str, Any] | None:
        """What a manifest says of the guidance."""
        if not self.cfg_cond:
            return None
        record = {"schedule": self.guidance, "cfg_scale": self.cfg_scale, **self.guidance_settings}
        return {**record, "cfg_channels": self.cfg_channels, "cfg_skip_tol": self.cfg_skip_tol}

    def build_guidance(self, num_classes: int, diffusion_steps: int | None, away: "Away | None" = None) -> "Guidance":
        """The guidance that ``cfg_cond`` asks for, of a model of so many classes and a process of so many steps.

        diffusion_steps: None where levels are continuous. away: None is the null label.
        Raises ValueError for an interval outside the trained process.
        """
        from masked_diffusion.diffusion.guidance import SCHEDULES, Guidance, NullLabel

        settings = self.guidance_settings
        if self.guidance == "interval":
            settings["cfg_interval"] = self._interval(diffusion_steps)
        weight = partial(
            SCHEDULES[parse_guidance(self.guidance)[0]],
            cfg_scale=self.cfg_scale,
            diffusion_steps=diffusion_steps or CONTINUOUS_STEPS,
            **settings,
        )
        channels = GUIDED_CHANNELS if self.cfg_channels == GUIDED_CHANNELS else ALL_CHANNELS
        return Guidance(away or NullLabel(num_classes), weight, channels, self.cfg_skip_tol)

    def _interval(self, diffusion_steps: int | None) -> list[float]:
        """``cfg_interval`` in timesteps."""
        assert self.cfg_interval is not None
        low, high = self.cfg_interval
        if not 0 <= low <= high:
            raise ValueError(f"--cfg_interval {low}-{high}: give the smaller one first, from 0 on, such as 80-470")
        if diffusion_steps is None and high > 1:
            raise ValueError(
                f"--cfg_interval {low}-{high}: of this --objective it is a share of noise, from 0 (clean) to 1, such "
                "as 0.1-0.7"
            )
        if diffusion_steps is None:
            return [CONTINUOUS_STEPS * low, CONTINUOUS_STEPS * high]
        if high >= diffusion_steps or not isinstance(high, int):
            raise ValueError(f"--cfg_interval {low}-{high}: timesteps are 0 ... {diffusion_steps - 1}")
        return [low, high]

    def build_objective(self, config: RunConfig) -> "Objective":
        """The objective for a sampling of ``num_sampling_steps``.

        Raises ValueError when the process has fewer steps, or the sampler does not serve the objective.
        """
        check_serves(self.sampler, config.objective.objective)
        if config.most_steps is not None and self.num_sampling_steps > config.most_steps:
            raise ValueError(f"--num_sampling_steps {self.num_sampling_steps}: the process has {config.most_steps}")
        return config.build_objective(self.num_sampling_steps)


# Those that infer_mdt.py has as flags.
PICTURE_FLAGS = [name for name in SamplerConfig.__dataclass_fields__ if name not in ("clip_denoised", "cfg_cond")]

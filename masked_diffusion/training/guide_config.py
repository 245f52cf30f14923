"""How the previews and the evaluations of a training are guided."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from masked_diffusion.choices import GUIDE_SETTINGS
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.settings import flags_of, setting

HELP = {name: flag.help for name, flag in flags_of(SamplerConfig).items()}
IN_TRAINING = ", in previews and evaluations"
OF_FAMILY = "; None is that of the model's family"


@dataclass(frozen=True)
class GuideConfig:
    """Settings of guidance that previews and evaluations share; named as the flags, and as those of a sampling.

    guidance: None for the schedule that the model's family is published with. Others as of :class:`SamplerConfig`.
    """

    guide_path: str = setting(
        "", "checkpoint of a weaker model, with --preview_guide_from or --eval_guide_from checkpoint", "guidance"
    )
    guide_labels: str = setting(SamplerConfig.guide_labels, HELP["guide_labels"] + IN_TRAINING, "guidance")
    guide_ratio: float | None = setting(
        SamplerConfig.guide_ratio,
        "share of the tokens that leave in the weak prediction of --preview_guide_from or --eval_guide_from masked or "
        "routed; None is the training's",
        "guidance",
    )
    guide_strong_ratio: float = setting(
        SamplerConfig.guide_strong_ratio,
        "share of the tokens that leave in the strong prediction of --preview_guide_from or --eval_guide_from routed",
        "guidance",
    )
    guidance: str | None = setting(None, HELP["guidance"] + IN_TRAINING + OF_FAMILY, "guidance")
    scale_pow: float = setting(SamplerConfig.scale_pow, "power of --guidance power_cosine" + IN_TRAINING, "guidance")
    cfg_interval: list[float] | None = setting(
        SamplerConfig.cfg_interval, HELP["cfg_interval"] + IN_TRAINING, "guidance"
    )

    def check(self, kinds: Set[str]) -> None:
        """Raise ValueError for settings that no sampling can have, or that belong to none of these kinds.

        kinds: of the previews and of the evaluations, names of ``GUIDE_FROM``.
        """
        if bool(self.guide_path) != ("checkpoint" in kinds):
            raise ValueError(
                "--guide_path and --preview_guide_from checkpoint or --eval_guide_from checkpoint: give both, or none"
            )
        for name, fitting in GUIDE_SETTINGS.items():
            value = getattr(self, name)
            if value != getattr(SamplerConfig, name) and not kinds & {*fitting}:
                raise ValueError(
                    f"--{name} {value}: needs --preview_guide_from or --eval_guide_from {' or '.join(fitting)}"
                )
        for kind in sorted(kinds):
            SamplerConfig(**self.of_kind(kind))  # what it refuses is refused here

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The settings of a sampling that is led away from ``kind``, without those that it has no use for."""
        own = [name for name, fitting in GUIDE_SETTINGS.items() if kind in fitting]
        settings = {name: getattr(self, name) for name in (*own, "scale_pow", "cfg_interval")}
        schedule = {} if self.guidance is None else {"guidance": self.guidance}
        return {"cfg_cond": True, "guide_from": kind, **settings, **schedule}

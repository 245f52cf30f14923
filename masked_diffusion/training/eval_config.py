"""The settings of a training's evaluations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masked_diffusion.choices import GUIDE_FROM, SAMPLERS, check_serves
from masked_diffusion.runs.config import RunConfig
from masked_diffusion.sampling.sampler_config import SamplerConfig
from masked_diffusion.settings import flags_of, setting
from masked_diffusion.training.guide_config import GuideConfig

BACKENDS = ("torch", "tensorflow")
# The log's columns and the evaluator's names of the same numbers.
METRICS = {
    "eval_fid": "FID",
    "eval_sfid": "sFID",
    "eval_is": "Inception Score",
    "eval_precision": "Precision",
    "eval_recall": "Recall",
}


@dataclass(frozen=True)
class EvalConfig:
    """How a training is evaluated; named as the flags. eval_interval: steps, 0 for never. eval_ref: the reference
    batch. eval_graph: the network's file, empty for where the evaluator looks for it. eval_cfg_scale: 0 for no
    guidance. Raises ValueError or FileNotFoundError for what cannot be."""

    eval_interval: int = setting(
        0, "steps between evaluations of the EMA, each of which saves a checkpoint; 0 = never", "evaluation"
    )
    eval_num_samples: int = setting(10000, "images to sample for an evaluation", "evaluation")
    eval_ref: str = setting(
        "", "reference batch or folder to compare them with, see evaluations/README.md", "evaluation"
    )
    eval_graph: str = setting("", "the evaluator's network; default: where the evaluator looks for it", "evaluation")
    eval_backend: str = setting(
        "torch", "what runs that network: torch, or tensorflow for other graphs than Inception", "evaluation"
    )
    eval_sampler: str = setting(SamplerConfig.sampler, flags_of(SamplerConfig)["sampler"].help, "evaluation")
    eval_sampling_steps: int = setting(SamplerConfig.num_sampling_steps, "steps of that sampler", "evaluation")
    eval_cfg_scale: float = setting(0.0, "largest weight of the guidance; 0 = none", "evaluation")
    eval_guide_from: str = setting(
        "null_label",
        "what predictions are guided away from, such as masked; see --guide_from of image_sample.py",
        "evaluation",
    )
    eval_batch_size: int = setting(32, "images per process that are sampled at a time", "evaluation")

    def __post_init__(self) -> None:
        for name, least in (
            ("eval_interval", 0),
            ("eval_num_samples", 2),
            ("eval_sampling_steps", 1),
            ("eval_batch_size", 1),
            ("eval_cfg_scale", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be {least} or more")
        choices_of = {"eval_backend": BACKENDS, "eval_sampler": SAMPLERS, "eval_guide_from": GUIDE_FROM}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)}: unknown; choose one of {', '.join(choices)}")
        if not self.eval_interval:
            return
        if not self.eval_ref:
            raise ValueError(
                f"--eval_interval {self.eval_interval}: give the reference batch to compare with --eval_ref"
            )
        if not Path(self.eval_ref).expanduser().exists():
            raise FileNotFoundError(f"--eval_ref {self.eval_ref}: no such file; evaluations/README.md says what it is")
        if self.eval_graph and not Path(self.eval_graph).expanduser().is_file():
            raise FileNotFoundError(
                f"--eval_graph {self.eval_graph}: no such file; evaluations/README.md says where to get the network"
            )

    def sampler(self, run_config: RunConfig, guides: GuideConfig) -> SamplerConfig:
        """The published sampling of the model's family with these settings. Raises ValueError for what the trained
        process or model cannot do, and for a sampler that does not serve the objective."""
        check_serves(self.eval_sampler, run_config.objective.objective, "--eval_sampler")
        if (steps := run_config.most_steps) is not None and self.eval_sampling_steps > steps:
            raise ValueError(f"--eval_sampling_steps {self.eval_sampling_steps}: the process has {steps}")
        if self.eval_cfg_scale and not run_config.class_cond:
            raise ValueError(
                f"--eval_cfg_scale {self.eval_cfg_scale}: guidance needs classes, and --class_cond is False"
            )
        settings: dict[str, Any] = {"sampler": self.eval_sampler, "num_sampling_steps": self.eval_sampling_steps}
        if not self.eval_cfg_scale:
            return SamplerConfig(**settings)
        settings |= guides.of_kind(self.eval_guide_from)
        settings |= {"cfg_channels": run_config.objective.guided_channels}
        return SamplerConfig.of_family(run_config.model.model, cfg_scale=self.eval_cfg_scale, **settings)

"""What a study trains: its settings, its arms, and the runs of each."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from studying.settings import OTHER_SEEDS, Study

from masked_diffusion.choices import LAST_BLOCKS, MODELS, family_of
from masked_diffusion.choices import POLICIES as TRAITS
from masked_diffusion.models import MODELS as BUILDERS
from masked_diffusion.models import create_model
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.cost import cost
from masked_diffusion.models.policies import POLICIES
from masked_diffusion.training.budget import Budget
from masked_diffusion.training.train_config import TERA, TrainConfig

# An arm is a policy, or a policy and a word of how it is trained.
PLAIN, WEAKER, AGAIN = "none", "none-60", "none-again"
CONTROLS = (WEAKER, AGAIN)
WEAKER_SHARE = 0.6
# A policy without a finale of its own, once more with one.
TREAD_FINALE, TREADS_FINALE = "tread-finale", 0.1
OBJECTIVE = "flow"
EMA_RATE = "0.995"
POINTS, ROWS = 4, 5  # of each run's curve, and of its log between two of them


def network_of(study: Study, policy: str, latent_shape: Sequence[int]) -> LatentTransformer:
    """The network of the arms of a policy, as ``image_train.py`` builds it. latent_shape: (C, H, W)."""
    name = study.model_of(policy)
    return create_model(
        name,
        input_size=latent_shape[1],
        in_channels=latent_shape[0],
        learn_sigma=False,
        policy=policy,
        mask_ratio=POLICIES[policy].mask_ratio,
        **decoder_of(name, policy),
    )


def tflops_of(study: Study, latent_shape: Sequence[int]) -> float:
    """The compute of the budget, a multiply-add counting as one."""
    return study.budget * study.batch_size * cost(network_of(study, PLAIN, latent_shape)) / TERA


def decoder_of(model: str, policy: str) -> dict[str, Any]:
    """Settings of a policy's decoder: of MDTv2 6 of 12 blocks, as in its smaller models; of MaskDiT the last blocks,
    because a decoder of its own makes small networks dearer than plain ones."""
    depth = BUILDERS[model].keywords["depth"]  # type: ignore[attr-defined]
    if policy == "mdtv2" and depth <= 12:
        return {"decode_layer": min(6, depth // 2)}
    return {"decoder": LAST_BLOCKS} if policy == "maskdit" else {}


def arms_of(
    study: Study, asked: str, latent_shape: Sequence[int], say: Callable[[str], Any] = sys.stderr.write
) -> list[str]:
    """The arms that are asked for, ``all`` that can be or a comma list, plain first. latent_shape: (C, H, W). say: told
    which arms of all cannot be, and why.

    Raises ValueError for an unknown one, and for one that is named and cannot be.
    """
    family = family_of(study.model)
    fitting = [name for name, policy in TRAITS.items() if family in policy.families]
    if study.model_of("mdtv2") in MODELS:
        fitting.append("mdtv2")
    known = [*fitting, *([TREAD_FINALE] if "tread" in fitting else [])]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if asked == "all":
        reasons = {name: why_not(study, Run(name, 0).policy, latent_shape) for name in known}
        names = [name for name, reason in reasons.items() if reason is None]
        say("".join(f"left out: {name}: {reason}\n" for name, reason in reasons.items() if reason))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--arms {unknown[0]}: unknown; choose some of {', '.join(known)}")
    for name in names:
        if reason := why_not(study, Run(name, 0).policy, latent_shape):
            raise ValueError(reason)
    return list(dict.fromkeys([PLAIN, *names]))


def why_not(study: Study, policy: str, latent_shape: Sequence[int]) -> str | None:
    """Why there can be no such arm, as MaskDiT's with patches of one value; None where it can be."""
    try:
        model = network_of(study, policy, latent_shape)
        model.policy.check_objective(OBJECTIVE, latent_shape[0] * model.patch_size**2)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Run:
    """One training. name: of its folder."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def policy(self) -> str:
        return self.arm.partition("-")[0]

    @property
    def share(self) -> float:
        """Of the budget that it may spend."""
        return WEAKER_SHARE if self.arm == WEAKER else 1.0

    @property
    def finale(self) -> float:
        return TREADS_FINALE if self.arm == TREAD_FINALE else POLICIES[self.policy].finale


def runs_of(arms: list[str], seeds: Sequence[int]) -> list[Run]:
    """All runs, the controls among them, a seed of every arm after the other: what is there early compares all arms."""
    rounds = ([*(Run(arm, seed) for arm in [*arms, WEAKER]), Run(AGAIN, OTHER_SEEDS + seed)] for seed in seeds)
    return [run for one in rounds for run in one]


def training_flags(study: Study, run: Run, latent_shape: Sequence[int]) -> dict[str, Any]:
    """The flags of ``image_train.py`` for a run. latent_shape: (C, H, W)."""
    length: dict[str, Any] = {"max_compute": run.share * tflops_of(study, latent_shape), "finale": run.finale}
    network = network_of(study, run.policy, latent_shape)
    last_step = Budget(TrainConfig(**length), network, study.batch_size).last_step
    assert last_step is not None
    every = max(1, last_step // POINTS)
    row = max(1, every // ROWS)  # the bar of the study goes by the rows
    every -= every % row
    return {
        "data_dir": study.data_dir,
        "image_size": study.image_size,
        "vae_path": study.vae_path,
        "normalize": study.normalize,
        "model": study.model_of(run.policy),
        "policy": run.policy,
        "mask_ratio": network.mask_ratio,
        **decoder_of(study.model_of(run.policy), run.policy),
        "objective": OBJECTIVE,
        "level_law": "logit_normal",
        "batch_size": study.batch_size,
        "opt": "adamw",
        "lr": 1e-3,
        "adam_beta2": study.adam_beta2,
        "lr_warmup": 50,
        "lr_decay": 0.2,
        "shard": "none",
        "grad_clip": 1.0,
        "ema_rate": EMA_RATE,
        "ema_warmup": True,
        "seed": run.seed,
        "preview_samples": 0,
        "save_interval": every,
        "log_interval": row,
        **length,
    }


def as_arguments(flags: dict[str, Any]) -> list[str]:
    """A command line of flags; those of None are left out."""
    return [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]

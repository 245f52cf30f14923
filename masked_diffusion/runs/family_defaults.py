"""What a family of models stands for in training and in sampling, where no flag says otherwise.

The flags' own defaults are MDT's. Sources: the published trainings of MDTv2 (2303.14389) and DiT (2212.09748).
"""

import argparse
from typing import Any

from masked_diffusion.models import family_of

Settings = dict[str, Any]

# Adan's betas, eps and weight decay are its own defaults, see optimizers.py.
TRAINING: dict[str, Settings] = {
    "MDT": {},
    "MDTv2": {"opt": "adan", "grad_clip": 1.0, "min_snr_gamma": 5.0, "shard": "zero"},
    "DiT": {"lr": 1e-4},
}
SAMPLING: dict[str, Settings] = {"MDT": {}, "MDTv2": {}, "DiT": {"cfg_scale": 1.5, "guidance": "constant"}}


def apply_family_defaults(
    recipes: dict[str, Settings], model: str, args: argparse.Namespace, explicit: set[str]
) -> None:
    """Set what the recipe of ``model``'s family says and no flag does. Raises ValueError for an unknown model."""
    for name, value in recipes[family_of(model)].items():
        if name not in explicit:
            setattr(args, name, value)

"""Defaults of a model family for training and sampling; flags win over them.

The flags' own defaults are MDT's. Sources: the published trainings of MDTv2 (2303.14389) and DiT (2212.09748).
"""

from typing import Any

Settings = dict[str, Any]

# Adan's betas, eps and weight decay are its own defaults, see optimizers.py.
TRAINING: dict[str, Settings] = {
    "MDT": {},
    "MDTv2": {"opt": "adan", "grad_clip": 1.0, "min_snr_gamma": 5.0, "shard": "zero"},
    "DiT": {"lr": 1e-4},
}
SAMPLING: dict[str, Settings] = {"MDT": {}, "MDTv2": {}, "DiT": {"cfg_scale": 1.5, "guidance": "constant"}}

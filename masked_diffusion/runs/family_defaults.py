"""Defaults of a model family for training and sampling; flags win over them.

The flags' own defaults are MDT's. Sources: the published trainings and samplings of MDTv2 (2303.14389), DiT
(2212.09748) and SiT (2401.08740).
"""

from typing import Any

Settings = dict[str, Any]

# Adan's betas, eps and weight decay are its own defaults, see optimizers.py.
TRAINING: dict[str, Settings] = {
    "MDT": {},
    "MDTv2": {"opt": "adan", "grad_clip": 1.0, "min_snr_gamma": 5.0, "shard": "zero"},
    "DiT": {"lr": 1e-4},
    "SiT": {"lr": 1e-4, "objective": "flow"},
}
SAMPLING: dict[str, Settings] = {
    "MDT": {},
    "MDTv2": {},
    "DiT": {"cfg_scale": 1.5, "guidance": "constant"},
    "SiT": {"cfg_scale": 1.5, "guidance": "constant", "sampler": "euler_maruyama"},
}

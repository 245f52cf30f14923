"""Builders and registry of the models: MDT and MDTv2 (2303.14389), and the baselines they start from (DiT, 2212.09748;
SiT, 2401.08740).

Read in this order: ``backbone.py`` (what all share, and DiT), ``tokens.py`` and ``routes.py`` (how tokens leave and
come back), ``policies.py`` (what a training makes of that), ``mdt.py`` (what the versions of MDT add). Their common
layers are in ``layers.py``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from masked_diffusion.choices import MODELS as NAMES
from masked_diffusion.choices import family_of
from masked_diffusion.models.backbone import DiT, LatentTransformer, SiT
from masked_diffusion.models.mdt import MDT, MDTv2

SIZES: dict[str, dict[str, Any]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "Ti": {"depth": 4, "hidden_size": 128, "num_heads": 4},  # ours: learns 8 x 8 digits in minutes on a laptop
    # Ours: 12 blocks, which the published routes are for, for comparisons on 8 x 8 digits (scripts/study.py).
    "Mini": {"depth": 12, "hidden_size": 64, "num_heads": 4},
    "Micro": {"depth": 12, "hidden_size": 32, "num_heads": 2},
}
FAMILIES: dict[str, type[LatentTransformer]] = {"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT, "SiT": SiT}


def _builder(name: str) -> Callable[..., LatentTransformer]:
    """A function of the further keyword arguments of the model called ``name``, such as MDT_XL_2."""
    family, size, patch_size = name.split("_")
    return partial(FAMILIES[family], patch_size=int(patch_size), **SIZES[size])


MODELS = {name: _builder(name) for name in NAMES}
globals().update(MODELS)  # as attributes of this module, also for ``import *``: ``models.MDT_XL_2(num_classes=10)``


def create_model(name: str, **kwargs: Any) -> LatentTransformer:
    """Build the model called ``name`` (a key of MODELS). Raises ValueError, listing the names, for an unknown one.

    A mask_ratio or decode_layer for which the model has no use under its policy is ignored.
    """
    family_of(name)
    return MODELS[name](**kwargs)

"""Builders and registry of the models: MDT and MDTv2 (2303.14389), and the baselines they start from (DiT, 2212.09748;
SiT, 2401.08740).

Read in this order: ``backbone.py`` (what all share, and DiT), ``tokens.py`` and ``routes.py`` (how tokens leave and
come back), ``policies.py`` (what a training makes of that), ``mdt.py`` (what the versions of MDT add). Their common
layers are in ``layers.py``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from masked_diffusion.choices import family_of
from masked_diffusion.models.backbone import DiT, LatentTransformer, SiT
from masked_diffusion.models.mdt import MDT, MDTv2

Model = TypeVar("Model", bound=LatentTransformer)

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
MODELS: dict[str, Callable[..., LatentTransformer]] = {}


def _builder(family: type[Model], size: str, patch_size: int) -> Callable[..., Model]:
    """A function of the model's further keyword arguments, also found in MODELS by its name."""
    build = partial(family, patch_size=patch_size, **SIZES[size])
    MODELS[f"{family.__name__}_{size}_{patch_size}"] = build
    return build


MDT_XL_2 = _builder(MDT, "XL", 2)
MDT_XL_4 = _builder(MDT, "XL", 4)
MDT_XL_8 = _builder(MDT, "XL", 8)
MDT_L_2 = _builder(MDT, "L", 2)
MDT_L_4 = _builder(MDT, "L", 4)
MDT_L_8 = _builder(MDT, "L", 8)
MDT_B_2 = _builder(MDT, "B", 2)
MDT_B_4 = _builder(MDT, "B", 4)
MDT_B_8 = _builder(MDT, "B", 8)
MDT_S_2 = _builder(MDT, "S", 2)
MDT_S_4 = _builder(MDT, "S", 4)
MDT_S_8 = _builder(MDT, "S", 8)
MDT_Ti_2 = _builder(MDT, "Ti", 2)
MDT_XL_1 = _builder(MDT, "XL", 1)
MDT_L_1 = _builder(MDT, "L", 1)
MDT_B_1 = _builder(MDT, "B", 1)
MDT_S_1 = _builder(MDT, "S", 1)
MDT_Ti_1 = _builder(MDT, "Ti", 1)
MDTv2_XL_2 = _builder(MDTv2, "XL", 2)
MDTv2_L_2 = _builder(MDTv2, "L", 2)
MDTv2_B_2 = _builder(MDTv2, "B", 2)
MDTv2_S_2 = _builder(MDTv2, "S", 2)
MDTv2_Ti_2 = _builder(MDTv2, "Ti", 2)
MDTv2_XL_1 = _builder(MDTv2, "XL", 1)
MDTv2_L_1 = _builder(MDTv2, "L", 1)
MDTv2_B_1 = _builder(MDTv2, "B", 1)
MDTv2_S_1 = _builder(MDTv2, "S", 1)
MDTv2_Ti_1 = _builder(MDTv2, "Ti", 1)
MDTv2_Mini_2 = _builder(MDTv2, "Mini", 2)
MDTv2_Micro_1 = _builder(MDTv2, "Micro", 1)
DiT_XL_2 = _builder(DiT, "XL", 2)
DiT_XL_4 = _builder(DiT, "XL", 4)
DiT_XL_8 = _builder(DiT, "XL", 8)
DiT_L_2 = _builder(DiT, "L", 2)
DiT_L_4 = _builder(DiT, "L", 4)
DiT_L_8 = _builder(DiT, "L", 8)
DiT_B_2 = _builder(DiT, "B", 2)
DiT_B_4 = _builder(DiT, "B", 4)
DiT_B_8 = _builder(DiT, "B", 8)
DiT_S_2 = _builder(DiT, "S", 2)
DiT_S_4 = _builder(DiT, "S", 4)
DiT_S_8 = _builder(DiT, "S", 8)
DiT_Ti_2 = _builder(DiT, "Ti", 2)
DiT_XL_1 = _builder(DiT, "XL", 1)
DiT_L_1 = _builder(DiT, "L", 1)
DiT_B_1 = _builder(DiT, "B", 1)
DiT_S_1 = _builder(DiT, "S", 1)
DiT_Ti_1 = _builder(DiT, "Ti", 1)
DiT_Mini_2 = _builder(DiT, "Mini", 2)
DiT_Micro_1 = _builder(DiT, "Micro", 1)
SiT_XL_2 = _builder(SiT, "XL", 2)
SiT_XL_4 = _builder(SiT, "XL", 4)
SiT_XL_8 = _builder(SiT, "XL", 8)
SiT_L_2 = _builder(SiT, "L", 2)
SiT_L_4 = _builder(SiT, "L", 4)
SiT_L_8 = _builder(SiT, "L", 8)
SiT_B_2 = _builder(SiT, "B", 2)
SiT_B_4 = _builder(SiT, "B", 4)
SiT_B_8 = _builder(SiT, "B", 8)
SiT_S_2 = _builder(SiT, "S", 2)
SiT_S_4 = _builder(SiT, "S", 4)
SiT_S_8 = _builder(SiT, "S", 8)
SiT_Ti_2 = _builder(SiT, "Ti", 2)
SiT_XL_1 = _builder(SiT, "XL", 1)
SiT_L_1 = _builder(SiT, "L", 1)
SiT_B_1 = _builder(SiT, "B", 1)
SiT_S_1 = _builder(SiT, "S", 1)
SiT_Ti_1 = _builder(SiT, "Ti", 1)


def create_model(name: str, **kwargs: Any) -> LatentTransformer:
    """Build the model called ``name`` (a key of MODELS). Raises ValueError, listing the names, for an unknown one.

    A mask_ratio or decode_layer for which the model has no use under its policy is ignored.
    """
    family_of(name)
    return MODELS[name](**kwargs)

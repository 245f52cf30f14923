"""What a trained model's predictions can be led away from, beside the null label: another model, or its masked self."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masked_diffusion.diffusion.guidance import Away, Denoiser, MaskedView, OtherModel
from masked_diffusion.models.tokens import num_kept_tokens
from masked_diffusion.randomness import SampleNoise
from masked_diffusion.runs.config import FIXED_PROCESS_SETTINGS, LATENT_SCALES
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import Trained, open_trained
from masked_diffusion.sampling.image_sampler import NewAway, SamplerConfig


def open_away(
    sampler: SamplerConfig,
    trained: Trained,
    request: Request,
    device: torch.device | str,
    warn: Callable[[str], None],
    as_denoiser: Callable[[nn.Module], Denoiser] = lambda model: model,
) -> tuple[NewAway | None, dict[str, Any]]:
    """What the settings lead a model's predictions away from, for each batch, and what a manifest says of it.

    request: for the second checkpoint. as_denoiser: how a model is called, such as in half precision. None is the null
    label. Raises ValueError or FileNotFoundError for a second checkpoint that does not fit, and a model that cannot
    mask.
    """
    if not sampler.cfg_cond or sampler.guide_from == "null_label":
        return None, {}
    if sampler.guide_from == "masked":
        return _masked(trained, sampler.guide_ratio)
    path = Path(sampler.guide_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--guide_path {path}: no such file; give the checkpoint of the weaker model")
    other = open_trained(path, request, device, warn)
    if difference := _difference(trained, other):
        raise ValueError(f"--guide_path {path}: it does not fit {trained.path}: {difference}")
    takes_null = sampler.guide_labels == "null"
    if takes_null and not other.model.has_null_class:
        raise ValueError(f"--guide_labels null: {path} has no null class in its label table")
    away = OtherModel(as_denoiser(other.model), other.config.model.num_classes if takes_null else None)
    return lambda draws: away, {"from": "checkpoint", "weights": other.identity(), "labels": sampler.guide_labels}


def _difference(strong: Trained, weak: Trained) -> str | None:
    """The first thing that makes the predictions of two models no predictions of the same; None where there is none."""
    a, b = strong.config, weak.config
    pairs = [
        ("the shape of its latents", a.model.latent_shape, b.model.latent_shape),
        ("the number of classes", a.model.num_classes, b.model.num_classes),
        ("--class_cond", a.class_cond, b.class_cond),
        ("the objective", a.objective, b.objective),
        *(
            (f"--{name}", getattr(a.diffusion, name), getattr(b.diffusion, name))
            for name in FIXED_PROCESS_SETTINGS
            if name != "learn_sigma"
        ),
        *((name, a.first_stage.get(name), b.first_stage.get(name)) for name in LATENT_SCALES),
    ]
    if a.class_names and b.class_names:
        pairs.append(("the list of class names", a.class_names[:5], b.class_names[:5]))
        pairs.append(("the list of class names", hash(tuple(a.class_names)), hash(tuple(b.class_names))))
    return next((f"{name} is {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs), None)


def _masked(trained: Trained, ratio: float | None) -> tuple[NewAway, dict[str, Any]]:
    """The model's own masked view. ratio: None is the training's."""
    model, config = trained.model, trained.config
    trained_ratio = config.model.mask_ratio
    if not model.policy.leaves or (config.training and trained_ratio is None):
        raise ValueError(
            f"--guide_from masked: {trained.path} was trained without masking; choose --guide_from null_label"
        )
    ratio = trained_ratio if ratio is None else ratio
    if ratio is None:
        raise ValueError(f"--guide_from masked: nothing says how {trained.path} was masked; give --guide_ratio")
    num_keep = num_kept_tokens(model.num_tokens, ratio)
    depth, away = len(model.stack), model.route.back - model.route.leave
    side = len(getattr(model, "sideblocks", ()))
    cost = 1 + (depth - away + away * num_keep / model.num_tokens + side) / depth

    def new_away(draws: SampleNoise) -> Away:
        def new_view() -> dict[str, Any]:
            device = model.pos_embed.device
            uniform = torch.special.ndtr(draws.randn((model.num_tokens,), device))
            return {"draw": model.policy.draw(uniform, num_keep, None)}

        return MaskedView(new_view, cost)

    return new_away, {"from": "masked", "ratio": ratio}

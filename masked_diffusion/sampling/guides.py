"""Open what guidance leads predictions away from, beside the null label: another model, or less of the model itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masked_diffusion.data.class_names import in_one_form
from masked_diffusion.diffusion.guidance import Away, Denoiser, OtherModel, PathDrop, SparserSelf
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.policies import POLICIES
from masked_diffusion.models.tokens import Draw, num_kept_tokens
from masked_diffusion.runs.config import FIXED_PROCESS_SETTINGS, LATENT_SCALES, RunConfig, settings_of_both
from masked_diffusion.runs.request import Request
from masked_diffusion.runs.trained import open_trained
from masked_diffusion.sampling.image_sampler import Draws, NewAway
from masked_diffusion.sampling.sampler_config import SamplerConfig

GUIDE_FLAG = "--guide_from"


def open_away(
    sampler: SamplerConfig,
    model: LatentTransformer,
    config: RunConfig,
    name: str,
    request: Request,
    device: torch.device | str,
    as_denoiser: Callable[[nn.Module], Denoiser] = lambda model: model,
    flag: str = GUIDE_FLAG,
) -> tuple[NewAway | None, dict[str, Any]]:
    """Open what the settings lead predictions away from. Returns what makes it for a batch, and its entry in a
    manifest.

    model: the guided model; only its structure is looked at, not its weights. name: of the model, for messages.
    request: opens the second checkpoint. as_denoiser: how a second model is called, such as in half precision. flag:
    the flag that asked for the kind. The null label needs nothing: None is returned for it.

    Raises ValueError or FileNotFoundError for a second checkpoint that does not fit, and for a kind that the model or
    its training does not have.
    """
    if not sampler.cfg_cond or sampler.guide_from == "null_label":
        return None, {}
    if sampler.guide_from != "checkpoint":
        masks = not config.training or config.model.mask_ratio is not None
        return own_away(sampler, model, config.model.mask_ratio if masks else 0.0, name, device, flag)
    path = Path(sampler.guide_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--guide_path {path}: no such file; give the checkpoint of the weaker model")
    other = open_trained(path, request, device, lambda text: None)
    if difference := _difference(config, other.config):
        raise ValueError(f"--guide_path {path}: it does not fit {name}: {difference}")
    takes_null = sampler.guide_labels == "null"
    if takes_null and not other.model.has_null_class:
        raise ValueError(f"--guide_labels null: {path} has no null class in its label table")
    weak = with_fitting_views(as_denoiser(other.model), model, other.model)
    away = OtherModel(weak, other.config.model.num_classes if takes_null else None)
    return lambda draws: away, {"from": "checkpoint", "weights": other.identity(), "labels": sampler.guide_labels}


def own_away(
    sampler: SamplerConfig,
    model: LatentTransformer,
    trained_ratio: float | None,
    name: str,
    device: torch.device | str,
    flag: str = GUIDE_FLAG,
) -> tuple[NewAway, dict[str, Any]]:
    """Open a kind that needs no second model: ``path_drop``, ``masked`` or ``routed``.

    trained_ratio: share of the tokens that left in the training; 0 for none, None where nothing says it. Other
    arguments, results and errors as of :func:`open_away`.
    """
    if sampler.guide_from == "path_drop":
        return _path_drop(model, name, flag)
    # The model itself with fewer tokens on its route. The strong prediction of ``masked`` has all tokens.
    kind, strong, weak = sampler.guide_from, sampler.guide_strong_ratio, sampler.guide_ratio
    if not model.policy.leaves or trained_ratio == 0:
        raise ValueError(f"{flag} {kind}: {name} is trained without masking; choose null_label")
    if model.policy.counts_kept:
        raise ValueError(f"{flag} {kind}: {name} learns nothing of the tokens that leave; choose null_label")
    weak = trained_ratio if weak is None else weak
    if weak is None:
        raise ValueError(f"{flag} {kind}: nothing says how {name} was masked; give --guide_ratio")
    strong_keep, weak_keep = (num_kept_tokens(model.num_tokens, ratio) for ratio in (strong, weak))
    if strong_keep <= weak_keep:
        raise ValueError(
            f"--guide_strong_ratio {strong}: keeps {strong_keep} of the {model.num_tokens} tokens, and the weak "
            f"prediction keeps {weak_keep}; it must keep more"
        )

    def view_at(num_keep: int) -> Callable[[Tensor], dict[str, Any]]:
        return lambda noise: {"draw": model.policy.draw(noise, num_keep, None)}

    strong_view = view_at(strong_keep) if strong else None
    alone = _passes(model, strong_keep) if strong else 1.0

    def new_away(draws: Draws) -> Away:
        def noise() -> Tensor:  # uniform
            return torch.special.ndtr(draws.randn((model.num_tokens,), device))

        return SparserSelf(noise, strong_view, view_at(weak_keep), alone + _passes(model, weak_keep), alone)

    return new_away, {"from": kind, "ratio": weak, **({"strong_ratio": strong} if kind == "routed" else {})}


def with_fitting_views(denoiser: Denoiser, model: LatentTransformer, other: LatentTransformer) -> Denoiser:
    """Wrap a second model's denoiser: it takes the views of the first model where it can, and else sees all tokens.

    denoiser: calls ``other``. Inpainting masks tokens of ``model``. A model with other tokens, or one that does not
    interpolate, has no such view.
    """
    if other.rejoin.interpolates and other.num_tokens == model.num_tokens:
        return denoiser
    return lambda x, t, y, **view: denoiser(x, t, y)


def _difference(strong: RunConfig, weak: RunConfig) -> str | None:
    """Name the first thing by which two models predict different things; None where they predict the same."""
    a, b = strong, weak
    pairs = [
        ("the shape of its latents", a.model.latent_shape, b.model.latent_shape),
        ("the number of classes", a.model.num_classes, b.model.num_classes),
        ("--class_cond", a.class_cond, b.class_cond),
        ("the objective", a.objective.objective, b.objective.objective),
        *settings_of_both(a, b, "objective", ("sigma_data", "time_shift")),
        *settings_of_both(a, b, "diffusion", (name for name in FIXED_PROCESS_SETTINGS if name != "learn_sigma")),
        *((name, a.first_stage.get(name), b.first_stage.get(name)) for name in LATENT_SCALES),
    ]
    if a.class_names and b.class_names:
        ours, theirs = in_one_form(a.class_names), in_one_form(b.class_names)
        pairs.append(("the list of class names", ours[:5], theirs[:5]))
        pairs.append(("the list of class names", hash(tuple(ours)), hash(tuple(theirs))))
    return next((f"{name} is {weaks} instead of {own}" for name, own, weaks in pairs if own != weaks), None)


def _path_drop(model: LatentTransformer, name: str, flag: str) -> tuple[NewAway, dict[str, Any]]:
    """Lead away from the null label without the blocks of the route."""
    if not model.policy.path_drop:
        fitting = ", ".join(name for name, policy in POLICIES.items() if policy.path_drop)
        raise ValueError(
            f"{flag} path_drop: {name} is trained without dropping paths, which --policy {fitting} does; choose "
            "null_label"
        )
    depth, routed = len(model.stack), model.route.back - model.route.leave
    away = PathDrop(model.num_classes, lambda count: {"draw": Draw(past=count)}, 1 + (depth - routed) / depth)
    return lambda draws: away, {"from": "path_drop"}


def _passes(model: LatentTransformer, num_keep: int) -> float:
    """Compute the cost of a pass with so many tokens on the route, in passes with all tokens."""
    depth, routed = len(model.stack), model.route.back - model.route.leave
    side = len(model.sideblocks) if model.rejoin.interpolates else 0
    return (depth - routed + routed * num_keep / model.num_tokens + side) / depth

"""Define the policies: which views of an image a training makes, which tokens leave in them, and how they come back.

A policy is an entry of POLICIES. Its traits stand in choices.py. The network has the policy's route and the weights of
its rejoin; the training makes its views.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from masked_diffusion.choices import LAST_BLOCKS, check_policy
from masked_diffusion.gaussian_diffusion import Extra, Reduction, mean_flat
from masked_diffusion.models.routes import HEAD_WIDTH, Decode, Fuse, Interpolate, MaskToken, Never, Rejoin, Route
from masked_diffusion.models.tokens import Draw, KeptTokens, num_kept_tokens, pixels_by_token

INTERPOLATE = Interpolate()


class View(NamedTuple):
    """One pass over an image in a training step. prefix: of the names of its losses and draws. drops: whether tokens
    leave.
    """

    prefix: str
    drops: bool


FULL, MASKED = View("", drops=False), View("m_", drops=True)
SPARSE = View("", drops=True)  # the only one


def no_route(depth: int, decode_layer: int) -> Route:
    """Return a route on which no token leaves."""
    return Route(depth, depth)


def to_decoder(depth: int, decode_layer: int) -> Route:
    """Return the route from the first block to the decoder, the last ``decode_layer`` blocks."""
    return Route(0, depth - decode_layer)


def throughout(depth: int, decode_layer: int) -> Route:
    """Return the route through all blocks."""
    return Route(0, depth)


def after(dense: int) -> Callable[[int, int], Route]:
    """All blocks but these many dense ones at the beginning, fewer in models of less than 12 blocks, and for good."""
    return lambda depth, decode_layer: Route(max(1, min(dense, dense * depth // 12)), depth)


def inner(before: int, after: int) -> Callable[[int, int], Route]:
    """All blocks but these many dense ones at both ends, as in models of 12 blocks or more; fewer in smaller ones."""

    def route(depth: int, decode_layer: int) -> Route:
        first, last = (max(1, min(count, count * depth // 12)) for count in (before, after))
        return Route(first, depth - last)

    return route


CHOOSE = ("uniform", "cells")
PATCH_EPS = 1e-6  # of a patch's variance
MOST_OF_SECOND_LEVEL = 0.5


def cell_side(grid_size: int, num_keep: int) -> int | None:
    """Find the side of the smallest cells, 2 or 4, that fill a grid and keep as many tokens each; None if there is
    none.
    """
    sides = (side for side in (2, 4) if grid_size % side == 0 and num_keep % (grid_size // side) ** 2 == 0)
    return next(sides, None)


def usual_decoder(hidden_size: int, depth: int) -> str:
    """Return the size of MaskDiT's decoder beside blocks of this width and number: 512x8 for S and larger models."""
    width = min(512, -(-4 * hidden_size // (3 * HEAD_WIDTH)) * HEAD_WIDTH)
    return f"{width}x{max(1, min(8, 8 * depth // 12))}"


def parse_decoder(text: str) -> Decode:
    """Turn ``512x8`` into Decode(512, 8). Raises ValueError for anything else."""
    parts = text.split("x")
    if len(parts) == 2 and all(part.isdecimal() and int(part) > 0 for part in parts):
        width, depth = map(int, parts)
        if width % HEAD_WIDTH == 0:
            return Decode(width, depth)
    raise ValueError(
        f"--decoder {text}: expected WIDTHxBLOCKS with a width divisible by {HEAD_WIDTH}, such as 512x8, or "
        f"{LAST_BLOCKS}, the last blocks of the model"
    )


@dataclass(frozen=True)
class Policy:
    """A way to train on a part of the tokens, or on all at two noise levels.

    views: of a step, in their order. route: (depth, decode_layer)
    -> Route. ratio_spread: how much more than the mask ratio may leave; how much is drawn for each step, uniformly.
    has_decoder: whether the decoder blocks are where tokens are back, so that no other route can be asked for.
    takes_decoder: whether the decoder can be chosen, see :meth:`with_options`. choose: ``uniform``, or ``cells``: as
    many tokens of each cell of neighbours. path_drop: probability that a sample's way through the route counts for
    nothing, where the rejoin heeds it. counts_kept: whether kept tokens alone count in the loss. mae: weight of the
    term by which dropped tokens show the noisy patch, see :meth:`extra`. two_levels: nobody leaves; what would has a
    noise level of its own instead. objectives: those that it can be trained for; empty for all. finale: last share of
    a run in which all tokens stay, where nothing else is asked for.
    """

    views: tuple[View, ...] = (FULL,)
    route: Callable[[int, int], Route] = no_route
    rejoin: Rejoin = Rejoin()
    mask_ratio: float | None = None
    ratio_spread: float = 0.0
    has_decoder: bool = False
    takes_decoder: bool = False
    choose: str = "uniform"
    path_drop: float = 0.0
    counts_kept: bool = False
    mae: float = 0.0
    two_levels: bool = False
    objectives: tuple[str, ...] = ()
    finale: float = 0.0

    @property
    def drops(self) -> bool:
        """True when a mask ratio matters, because a view is not of all tokens alike."""
        return any(view.drops for view in self.views)

    @property
    def leaves(self) -> bool:
        """True when tokens leave in a view."""
        return self.drops and not self.two_levels

    def views_at(self, mask_ratio: float | None) -> tuple[View, ...]:
        """Return the views of a training with this mask ratio. None leaves out those that drop tokens."""
        return tuple(view for view in self.views if not view.drops or mask_ratio is not None)

    def num_keep(self, num_tokens: int, mask_ratio: float, u: float, share: float = 1.0) -> int:
        """Compute how many of a sample's tokens stay.

        u: uniform in [0, 1), one for all samples of a step. share: of the ratio that holds now, 0 for all tokens.
        """
        return int(num_tokens * (1 - (mask_ratio + self.ratio_spread * u) * share))

    @property
    def takes_route(self) -> bool:
        """True when another route can be asked for."""
        return self.leaves and self.rejoin.comes_back and not self.has_decoder

    def with_options(self, choose: str | None, path_drop: float | None, decoder: str | None = None) -> "Policy":
        """Return this policy with other options than its own. None leaves an option as it is.

        decoder: where it can be chosen, ``512x8`` for one of eight blocks of width 512 beside the network, or
        ``blocks`` for the last blocks of the network. Raises ValueError for an unknown way to choose, a probability
        outside [0, 1), an option without effect, or a decoder that is none.
        """
        if decoder is not None and self.takes_decoder:
            return self._with_decoder(decoder).with_options(choose, path_drop)
        if choose is not None and choose not in CHOOSE:
            raise ValueError(f"--choose {choose}: unknown; choose one of {', '.join(CHOOSE)}")
        if path_drop is not None and not 0 <= path_drop < 1:
            raise ValueError(f"--path_drop {path_drop}: must be in [0, 1), a probability")
        if path_drop and not self.rejoin.drops_path:
            fitting = ", ".join(name for name, one in POLICIES.items() if one.rejoin.drops_path)
            raise ValueError(
                f"--path_drop {path_drop}: this policy has no path to drop; leave it out, or use {fitting}"
            )
        return replace(
            self,
            choose=self.choose if choose is None else choose,
            path_drop=self.path_drop if path_drop is None else path_drop,
        )

    def _with_decoder(self, decoder: str) -> "Policy":
        if decoder != LAST_BLOCKS:
            return replace(self, rejoin=parse_decoder(decoder))
        return replace(self, rejoin=MaskToken(), route=to_decoder, has_decoder=True)

    def draw(self, token_noise: Tensor, num_keep: int, path_noise: Tensor | None) -> Draw:
        """Draw which tokens leave. token_noise: (N, L), path_noise: (N,) or None; uniform in [0, 1)."""
        num_tokens = token_noise.shape[1]
        path_drop = None if path_noise is None else path_noise < self.path_drop
        if num_keep == num_tokens and not self.rejoin.runs_whole:
            return Draw(None, path_drop)
        if self.two_levels:
            return Draw(group=KeptTokens.from_noise(token_noise, num_keep).dropped)
        side = cell_side(math.isqrt(num_tokens), num_keep) if self.choose == "cells" else None
        if side is None:
            return Draw(KeptTokens.from_noise(token_noise, num_keep), path_drop)
        return Draw(KeptTokens.from_cells(token_noise, num_keep, side), path_drop)

    def counts(self, draw: Draw | None) -> Reduction:
        """Return how the squared errors of a view's pixels become its losses: (N, C, H, W) -> (N,)."""
        if draw is None or draw.kept is None or not self.counts_kept:
            return mean_flat
        return draw.kept.mean

    @property
    def extra_names(self) -> list[str]:
        """Return the names of the loss terms of :meth:`extra`."""
        return ["mae"] if self.mae else []

    def extra(self, draw: Draw | None) -> Extra | None:
        """Return the loss terms of a view beside the objective's; None for none.

        ``mae``: at dropped tokens, the estimate of the clean patch should be the noisy patch, standardised patch by
        patch (MaskDiT, 2306.09305). The term uses nothing of the clean data that the noisy data does not show.
        """
        if draw is None or draw.kept is None or not self.mae:
            return None
        kept = draw.kept

        def masked_patches(denoised: Tensor, x: Tensor) -> dict[str, Tensor]:
            num_tokens = kept.dropped.shape[1]
            patches = pixels_by_token(x.float(), num_tokens)
            variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
            target = (patches - mean) / (variance + PATCH_EPS).sqrt()
            errors = ((pixels_by_token(denoised.float(), num_tokens) - target) ** 2).mean(dim=2)  # (N, L)
            return {"mae": self.mae * kept.mean_of_dropped(errors)}

        return masked_patches

    def check_objective(self, name: str, patch_values: int, learned_uncertainty: bool = False) -> None:
        """Raise ValueError for an objective that this policy is not for, and for patches of a single value.

        patch_values: numbers of the latent in a patch. learned_uncertainty: whether the loss is divided by its mean at
        each level.
        """
        if self.objectives and name not in self.objectives:
            raise ValueError(
                f"--objective {name}: not with this policy, which is for {', '.join(self.objectives)}; use one of "
                "these, or another --policy"
            )
        if learned_uncertainty and (self.two_levels or self.mae):
            raise ValueError(
                "--learned_uncertainty True: not with this policy, whose loss is not the error at one noise level; "
                "leave it out, or use another --policy"
            )
        if self.mae and patch_values < 2:
            raise ValueError(
                "--policy maskdit: its term on dropped tokens standardises patches, which have one value each here; "
                "use a model with a larger patch"
            )

    def check_ratio(self, grid_size: int, mask_ratio: float, family: str) -> None:
        """Raise ValueError for a mask ratio that keeps no token, or for which there are no cells."""
        if self.two_levels and mask_ratio > MOST_OF_SECOND_LEVEL:
            raise ValueError(
                f"mask_ratio {mask_ratio}: under dual_timestep it is the share of tokens with the second noise level, "
                f"at most {MOST_OF_SECOND_LEVEL}; use a smaller ratio"
            )
        num_tokens = grid_size**2
        num_keep = num_kept_tokens(num_tokens, mask_ratio)
        if self.choose == "cells" and (self.ratio_spread or cell_side(grid_size, num_keep) is None):
            raise ValueError(
                f"mask_ratio {mask_ratio}: --choose cells keeps as many tokens of each cell of 2 x 2 or 4 x 4, which "
                f"cannot be with this ratio on a grid of {grid_size} x {grid_size} tokens; use 0.5 or 0.75 on an even "
                "grid, or --choose uniform"
            )
        if self.num_keep(num_tokens, mask_ratio, 1.0) < 1:
            raise ValueError(
                f"mask_ratio {mask_ratio}: {family} masks up to {self.ratio_spread} more, which keeps none of the "
                f"{num_tokens} tokens; use a smaller ratio"
            )


POLICIES = {
    # Every block sees every token.
    "none": Policy(),
    # A full and a masked view; the side-interpolater predicts the masked tokens (2303.14389).
    "mdt": Policy(
        views=(FULL, MASKED),
        route=to_decoder,
        rejoin=INTERPOLATE,
        mask_ratio=0.3,
        has_decoder=True,
    ),
    # The same along version 2's skips, with a ratio drawn for each step.
    "mdtv2": Policy(
        views=(FULL, MASKED),
        route=to_decoder,
        rejoin=INTERPOLATE,
        mask_ratio=0.3,
        ratio_spread=0.2,
        has_decoder=True,
    ),
    # MDT's masked view alone.
    "mdt_one_view": Policy(
        views=(SPARSE,),
        route=to_decoder,
        rejoin=INTERPOLATE,
        mask_ratio=0.3,
        has_decoder=True,
    ),
    # Tokens skip the blocks in the middle and come back as they left (2501.04765).
    "tread": Policy(views=(SPARSE,), route=inner(2, 3), mask_ratio=0.5),
    # One token of each cell goes through the blocks in the middle, and is fused with all from before them (2510.21986).
    "sprint": Policy(
        views=(SPARSE,),
        route=inner(2, 2),
        rejoin=Fuse(),
        mask_ratio=0.75,
        choose="cells",
        path_drop=0.1,
        finale=0.1,
    ),
    # The first blocks mix all tokens, a quarter of which goes on alone (MicroDiT's deferred masking, 2407.15811).
    "deferred": Policy(
        views=(SPARSE,),
        route=after(2),
        rejoin=Never(),
        mask_ratio=0.75,
        counts_kept=True,
        finale=0.1,
    ),
    # Half of the tokens go through the blocks; a small decoder beside them sees all (2306.09305).
    "maskdit": Policy(
        views=(SPARSE,),
        route=throughout,
        rejoin=Decode(),
        takes_decoder=True,
        mask_ratio=0.5,
        counts_kept=True,
        mae=0.1,
        objectives=("x0", "v", "flow", "edm"),
        finale=0.1,
    ),
    # Nobody leaves; a quarter of an image's tokens have a second noise level (Self-Flow).
    "dual_timestep": Policy(views=(SPARSE,), mask_ratio=0.25, two_levels=True, objectives=("flow",)),
}


def policy_for(name: str, family: str) -> Policy:
    """Return the policy called ``name``. Raises ValueError for an unknown one, and for one that does not fit the
    family.
    """
    check_policy(name, family)
    return POLICIES[name]

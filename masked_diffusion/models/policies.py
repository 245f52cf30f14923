"""Policies: which views of an image a training makes, which tokens leave in them, and how these come back.

A policy is an entry of POLICIES, and its traits stand in choices.py. The network has its route and the weights of its
rejoin; the training makes its views.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from masked_diffusion.choices import check_policy
from masked_diffusion.gaussian_diffusion import Reduction, mean_flat
from masked_diffusion.models.routes import Fuse, Interpolate, Never, Rejoin, Route
from masked_diffusion.models.tokens import Draw, KeptTokens, num_kept_tokens

INTERPOLATE = Interpolate()


class View(NamedTuple):
    """One pass over an image in a training step. prefix: of the names of its losses and draws. drops: whether tokens
    leave."""

    prefix: str
    drops: bool


FULL, MASKED = View("", drops=False), View("m_", drops=True)
SPARSE = View("", drops=True)  # the only one


def no_route(depth: int, decode_layer: int) -> Route:
    """Nobody leaves."""
    return Route(depth, depth)


def to_decoder(depth: int, decode_layer: int) -> Route:
    """From the first block to the decoder, the last ``decode_layer`` blocks."""
    return Route(0, depth - decode_layer)


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


def cell_side(grid_size: int, num_keep: int) -> int | None:
    """Side of the smallest cells, 2 or 4, that fill a grid and each keep as many of its tokens; None for no such."""
    sides = (side for side in (2, 4) if grid_size % side == 0 and num_keep % (grid_size // side) ** 2 == 0)
    return next(sides, None)


@dataclass(frozen=True)
class Policy:
    """A way to train on a part of the tokens.

    views: of a step, in their order. route: (depth, decode_layer)
    -> Route. ratio_spread: how much more than the mask ratio may leave; how much is drawn for each step, uniformly.
    has_decoder: whether the decoder blocks are where tokens are back, so that no other route can be asked for. choose:
    ``uniform``, or ``cells``: as many tokens of each cell of neighbours. path_drop: probability that a sample's way
    through the route counts for nothing, where the rejoin heeds it.
    """

    views: tuple[View, ...] = (FULL,)
    route: Callable[[int, int], Route] = no_route
    rejoin: Rejoin = Rejoin()
    mask_ratio: float | None = None
    ratio_spread: float = 0.0
    has_decoder: bool = False
    choose: str = "uniform"
    path_drop: float = 0.0

    @property
    def drops(self) -> bool:
        """Whether tokens leave in any of its views."""
        return any(view.drops for view in self.views)

    def views_at(self, mask_ratio: float | None) -> tuple[View, ...]:
        """The views of a training with this mask ratio; None leaves out those that drop tokens."""
        return tuple(view for view in self.views if not view.drops or mask_ratio is not None)

    def num_keep(self, num_tokens: int, mask_ratio: float, u: float) -> int:
        """How many of a sample's tokens stay. u: uniform in [0, 1), one for all samples of a step."""
        return int(num_tokens * (1 - (mask_ratio + self.ratio_spread * u)))

    @property
    def takes_route(self) -> bool:
        """Whether another route can be asked for."""
        return self.drops and self.rejoin.comes_back and not self.has_decoder

    def with_options(self, choose: str | None, path_drop: float | None) -> "Policy":
        """This policy with other options than its own; None leaves one as it is.

        Raises ValueError for an unknown way to choose, a probability outside [0, 1), or one that nothing heeds.
        """
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

    def draw(self, token_noise: Tensor, num_keep: int, path_noise: Tensor | None) -> Draw:
        """Which tokens leave. token_noise: (N, L), path_noise: (N,) or None; uniform in [0, 1).

        Where all stay, the interpolater runs all the same: a data-parallel run would wait for its gradients.
        """
        num_tokens = token_noise.shape[1]
        path_drop = None if path_noise is None else path_noise < self.path_drop
        if num_keep == num_tokens and not self.rejoin.interpolates:
            return Draw(None, path_drop)
        side = cell_side(math.isqrt(num_tokens), num_keep) if self.choose == "cells" else None
        if side is None:
            return Draw(KeptTokens.from_noise(token_noise, num_keep), path_drop)
        return Draw(KeptTokens.from_cells(token_noise, num_keep, side), path_drop)

    def counts(self, draw: Draw | None) -> Reduction:
        """How the squared errors of a view's pixels become its losses: (N, C, H, W) -> (N,)."""
        if draw is None or draw.kept is None or self.rejoin.comes_back:
            return mean_flat
        return draw.kept.mean

    def check_ratio(self, grid_size: int, mask_ratio: float, family: str) -> None:
        """Raise ValueError for a mask ratio that keeps no token, or for which there are no cells."""
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
    ),
    # The first blocks mix all tokens, a quarter of which goes on alone (MicroDiT's deferred masking, 2407.15811).
    "deferred": Policy(views=(SPARSE,), route=after(2), rejoin=Never(), mask_ratio=0.75),
}


def policy_for(name: str, family: str) -> Policy:
    """The policy called ``name``. Raises ValueError for an unknown one, and for one that does not fit the family."""
    check_policy(name, family)
    return POLICIES[name]

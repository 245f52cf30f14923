"""Policies: which views of an image a training makes, which tokens leave in them, and how these come back.

A policy is an entry of POLICIES. The network has its route and the weights of its rejoin; the training makes its views.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from masked_diffusion.models.routes import Interpolate, Rejoin, Route
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


def inner(before: int, after: int) -> Callable[[int, int], Route]:
    """All blocks but these many dense ones at both ends, as in models of 12 blocks or more; fewer in smaller ones."""

    def route(depth: int, decode_layer: int) -> Route:
        first, last = (max(1, min(count, count * depth // 12)) for count in (before, after))
        return Route(first, depth - last)

    return route


@dataclass(frozen=True)
class Policy:
    """A way to train on a part of the tokens.

    families: of the models that can be trained under it. views: of a step, in their order. route: (depth, decode_layer)
    -> Route. ratio_spread: how much more than the mask ratio may leave; how much is drawn for each step, uniformly.
    has_decoder: whether the decoder blocks are where tokens are back, so that no other route can be asked for.
    """

    families: tuple[str, ...]
    views: tuple[View, ...] = (FULL,)
    route: Callable[[int, int], Route] = no_route
    rejoin: Rejoin = Rejoin()
    mask_ratio: float | None = None
    ratio_spread: float = 0.0
    has_decoder: bool = False

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
        return self.drops and not self.has_decoder

    def draw(self, token_noise: Tensor, num_keep: int) -> Draw:
        """Which tokens leave. token_noise: (N, L), uniform in [0, 1)."""
        return Draw(KeptTokens.from_noise(token_noise, num_keep))

    def check_ratio(self, num_tokens: int, mask_ratio: float, family: str) -> None:
        """Raise ValueError for a mask ratio that keeps no token."""
        num_kept_tokens(num_tokens, mask_ratio)
        if self.num_keep(num_tokens, mask_ratio, 1.0) < 1:
            raise ValueError(
                f"mask_ratio {mask_ratio}: {family} masks up to {self.ratio_spread} more, which keeps none of the "
                f"{num_tokens} tokens; use a smaller ratio"
            )


POLICIES = {
    # Every block sees every token.
    "none": Policy(families=("MDT", "MDTv2", "DiT")),
    # A full and a masked view; the side-interpolater predicts the masked tokens (2303.14389).
    "mdt": Policy(
        families=("MDT", "DiT"),
        views=(FULL, MASKED),
        route=to_decoder,
        rejoin=INTERPOLATE,
        mask_ratio=0.3,
        has_decoder=True,
    ),
    # The same along version 2's skips, with a ratio drawn for each step.
    "mdtv2": Policy(
        families=("MDTv2",),
        views=(FULL, MASKED),
        route=to_decoder,
        rejoin=INTERPOLATE,
        mask_ratio=0.3,
        ratio_spread=0.2,
        has_decoder=True,
    ),
    # MDT's masked view alone.
    "mdt_one_view": Policy(
        families=("MDT", "DiT"),
        views=(SPARSE,),
        route=to_decoder,
        rejoin=INTERPOLATE,
        mask_ratio=0.3,
        has_decoder=True,
    ),
    # Tokens skip the blocks in the middle and come back as they left (2501.04765).
    "tread": Policy(families=("MDT", "DiT"), views=(SPARSE,), route=inner(2, 3), mask_ratio=0.5),
}


def policy_for(name: str, family: str) -> Policy:
    """The policy called ``name``. Raises ValueError for an unknown one, and for one that does not fit the family."""
    if name not in POLICIES:
        raise ValueError(f"--policy {name}: unknown; choose one of {', '.join(POLICIES)}")
    policy = POLICIES[name]
    if family not in policy.families:
        fitting = ", ".join(other for other, one in POLICIES.items() if family in one.families)
        raise ValueError(
            f"--policy {name}: is for {' and '.join(f'{f}_*' for f in policy.families)} models, and this one is "
            f"{family}; choose one of {fitting}"
        )
    return policy

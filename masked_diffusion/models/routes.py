"""Routes of tokens through the blocks: between which blocks some are away, and what puts all together again.

Shapes: N samples, L tokens of width D, K kept tokens when some are away.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from masked_diffusion.models.layers import Block
from masked_diffusion.models.tokens import Draw

EMBEDDED = -1  # in place of a block's number: the embedded tokens, before the first block


class Route(NamedTuple):
    """Tokens that leave are away in blocks ``leave`` ... ``back - 1``, counted from 0; ``back`` = depth is for good."""

    leave: int
    back: int


def parse_route(text: str, depth: int) -> Route:
    """``2,9`` -> Route(2, 9). Raises ValueError for anything else, and for a route that a model does not have."""
    parts = text.split(",")
    route = Route(*map(int, parts)) if len(parts) == 2 and all(part.strip().isdigit() for part in parts) else None
    if route is None or not 0 <= route.leave < route.back < depth:
        raise ValueError(
            f"--route {text}: expected LEAVE,BACK with 0 <= LEAVE < BACK < {depth}: tokens leave and come back before "
            f"these of the {depth} blocks"
        )
    return route


class Net(Protocol):
    """What walks and rejoins use of a network.

    stack: the blocks in the order in which they run. skips: for each block that takes the output of an earlier one, or
    the embedded tokens, its number -> that one's. rel_index: (L, L) relative positions, None without biases.
    decoder_start: the block before which decoder_pos_embed is added, None in a net without such positions of its own.
    """

    route: Route
    rejoin: "Rejoin"
    rel_index: Tensor | None
    decoder_start: int | None
    decoder_pos_embed: nn.Parameter
    mask_token: nn.Parameter
    sideblocks: nn.ModuleList
    fuse: nn.Linear
    route_token: nn.Parameter

    @property
    def stack(self) -> Sequence[Block]: ...

    @property
    def skips(self) -> Mapping[int, int]: ...

    def make_blocks(self, count: int) -> nn.ModuleList: ...

    def place(self, positions: Tensor) -> None: ...


class Rejoin:
    """How tokens come back at the end of a route. This one puts the kept tokens among those that waited outside.

    The tokens that were away come back as they left (TREAD, 2501.04765).

    The weights of a rejoin are parameters of the network, under the names that published files have.
    """

    has_weights = False
    adds_positions = False  # decoder_pos_embed, so that the walk does not
    interpolates = False  # predicts tokens from the others
    drops_path = False  # heeds a draw's path_drop
    comes_back = True  # else the output has the kept tokens only, and zeros for the others

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        """Give a network under construction what this rejoin learns. trained: whether any view drops tokens."""

    def initialize(self, net: Net, trained: bool) -> None:
        """Draw the first values of these weights, as far as the network does not do so for all its layers."""

    def cost(self, net: Net, num_tokens: int, away: bool) -> int:
        """Multiply-adds of leading a sample's tokens back. away: whether any left."""
        return 0

    def __call__(self, net: Net, h: Tensor, stash: Tensor, c: Tensor, draw: Draw) -> Tensor:
        """Lead the tokens back that were away.

        h: the kept tokens (N, K, D), or all where nobody was away. stash: all tokens from before the route (N, L, D).
        c: conditioning (N, D). Returns (N, L, D).
        """
        return h if draw.kept is None else draw.kept.put_back(h, stash)


class Interpolate(Rejoin):
    """MDT's side-interpolater (2303.14389): one block predicts the tokens that were away from those that were not."""

    has_weights = True
    adds_positions = True
    interpolates = True

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        net.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_tokens, hidden_size))
        net.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size), requires_grad=trained)
        net.sideblocks = net.make_blocks(1)
        # Without masking they never get a gradient, which a data-parallel run would wait for.
        net.sideblocks.requires_grad_(trained)

    def initialize(self, net: Net, trained: bool) -> None:
        net.place(net.decoder_pos_embed)
        if trained:
            nn.init.normal_(net.mask_token, std=0.02)

    def cost(self, net: Net, num_tokens: int, away: bool) -> int:
        return cast(Block, net.sideblocks[0]).cost(num_tokens) if away else 0

    def __call__(self, net: Net, h: Tensor, stash: Tensor, c: Tensor, draw: Draw) -> Tensor:
        """Only the positions of tokens that were away take the side block's output; the others pass by it."""
        if draw.kept is None:
            return h + net.decoder_pos_embed
        h = draw.kept.come_back(h, net.mask_token) + net.decoder_pos_embed
        return torch.where(draw.kept.dropped[..., None], net.sideblocks[0](h, c, net.rel_index), h)


class Fuse(Rejoin):
    """SPRINT's fusion (2510.21986): a Linear of what went through the route and of what waited before it.

    A fixed token stands where nobody came through. It also stands for all of a sample's tokens whose path is dropped,
    so that the network learns to do without the route.
    """

    has_weights = True
    drops_path = True

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        net.fuse = nn.Linear(2 * hidden_size, hidden_size)
        net.route_token = nn.Parameter(torch.zeros(1, 1, hidden_size), requires_grad=False)

    def initialize(self, net: Net, trained: bool) -> None:
        nn.init.normal_(net.route_token, std=0.02)

    def cost(self, net: Net, num_tokens: int, away: bool) -> int:
        return num_tokens * net.fuse.weight.numel()

    def __call__(self, net: Net, h: Tensor, stash: Tensor, c: Tensor, draw: Draw) -> Tensor:
        if draw.kept is not None:
            h = draw.kept.come_back(h, net.route_token)
        if draw.path_drop is not None:
            h = torch.where(draw.path_drop[:, None, None], net.route_token.to(h.dtype), h)
        return net.fuse(torch.cat([h, stash.to(h.dtype)], dim=-1))


class Never(Rejoin):
    """Nobody comes back: what left has no prediction, and only the kept tokens count in the loss."""

    comes_back = False


def walk(net: Net, h: Tensor, c: Tensor, draw: Draw) -> Tensor:
    """Lead embedded tokens (N, L, D) with their conditioning (N, D) through the blocks.

    Returns (N, L, D), or (N, K, D) where the route brings nobody back.
    """
    stash, index, kept = h, net.rel_index, None  # kept: None while all are here
    skips, outputs = net.skips, {EMBEDDED: h}
    for number, block in enumerate(net.stack):
        if number == net.route.leave:
            stash = h
            if draw.kept is not None:
                kept = draw.kept
                h, index = kept.leave(h), kept.relative_index(net.rel_index)
        if number == net.route.back:
            h = net.rejoin(net, h, stash, c, draw)
            kept, index = None, net.rel_index
        if number == net.decoder_start and not net.rejoin.adds_positions:
            positions = net.decoder_pos_embed
            h = h + (positions if kept is None else kept.leave(positions.expand(len(h), -1, -1)))
        h = block(h, c, index, outputs[skips[number]] if number in skips else None)
        if number in skips.values():
            outputs[number] = h
    return h

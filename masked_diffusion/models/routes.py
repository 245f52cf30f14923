"""Lead tokens through the blocks: between which blocks some are away, and how all come together again.

Shapes: N samples, L tokens of width D, K kept tokens when some are away.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from masked_diffusion.models.layers import Block, FinalLayer, sincos_position_table, zero_
from masked_diffusion.models.tokens import Draw, KeptTokens

HEAD_WIDTH = 32  # of a decoder's attention, as published: 16 heads of 512
EMBEDDED = -1  # in place of a block's number: the embedded tokens, before the first block


class Route(NamedTuple):
    """Tokens that leave are away in blocks ``leave`` ... ``back - 1``, counted from 0. With ``back`` = depth they leave
    for good.
    """

    leave: int
    back: int


def parse_route(text: str, depth: int) -> Route:
    """Turn ``2,9`` into Route(2, 9). Raises ValueError for anything else, and for a route that the model lacks."""
    parts = text.split(",")
    route = Route(*map(int, parts)) if len(parts) == 2 and all(part.strip().isdigit() for part in parts) else None
    if route is None or not 0 <= route.leave < route.back < depth:
        raise ValueError(
            f"--route {text}: expected LEAVE,BACK with 0 <= LEAVE < BACK < {depth}: tokens leave and come back before "
            f"these of the {depth} blocks"
        )
    return route


class Net(Protocol):
    """The parts of a network that walks and rejoins use.

    stack: the blocks in the order in which they run. skips: for each block that takes the output of an earlier one, or
    the embedded tokens, its number -> that one's. rel_index: (L, L) relative positions; None without biases.
    decoder_start: the block before which decoder_pos_embed is added; None in a network without such positions.
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
    decoder: "MaskDecoder"
    final_layer: FinalLayer

    @property
    def stack(self) -> Sequence[Block]: ...

    @property
    def skips(self) -> Mapping[int, int]: ...

    def make_blocks(self, count: int) -> nn.ModuleList: ...

    def place(self, positions: Tensor) -> None: ...


class Rejoin:
    """How tokens come back at the end of a route. This one puts them back as they left (TREAD, 2501.04765).

    The kept tokens take their places among the tokens that waited outside. The weights of a rejoin are parameters of
    the network, under the names that published files have.
    """

    weights: tuple[str, ...] = ()  # first parts of their names, in the network
    adds_positions = False  # decoder_pos_embed, so that the walk does not
    interpolates = False  # predicts tokens from the others
    runs_whole = False  # has a part where all stay, too: a data-parallel run would wait for its gradients
    drops_path = False  # heeds a draw's path_drop and past
    comes_back = True  # to the blocks of the network

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        """Give a network under construction the weights of this rejoin. trained: whether any view drops tokens."""

    def initialize(self, net: Net, trained: bool) -> None:
        """Draw the first values of these weights, where the network does not do so for all its layers."""

    def cost(self, net: Net, num_tokens: int, away: bool) -> int:
        """Count the multiply-adds of leading a sample's tokens back. away: whether any token left."""
        return 0

    def __call__(self, net: Net, h: Tensor, stash: Tensor, c: Tensor, draw: Draw) -> Tensor:
        """Lead the tokens back that were away.

        h: the kept tokens (N, K, D), or all where nobody was away; without the draw's last samples where these went
        past the route. stash: all tokens from before the route (N, L, D). c: conditioning (N, D). Returns (N, L, D).
        """
        return h if draw.kept is None else draw.kept.put_back(h, stash)

    def output_width(self, hidden_size: int) -> int:
        """Return the width of what the network's last layer takes. hidden_size: of the blocks."""
        return hidden_size

    def output(self, net: Net, h: Tensor, c: Tensor, draw: Draw) -> Tensor:
        """From what leaves the blocks to patches of all tokens: (N, L or K, D) -> (N, L, patch_size**2 * C_out)."""
        return net.final_layer(h, c, draw.group)

    def output_cost(self, net: Net, num_tokens: int, here: int, levels: int) -> int:
        """Multiply-adds of :meth:`output` for a sample. here: how many of its tokens leave the blocks. levels: how many
        noise levels it has."""
        return net.final_layer.cost(here, levels)


class MaskToken(Rejoin):
    """Put a learned token where no token came through, and add the positions to all tokens once more.

    The blocks after the route predict the missing tokens from it.
    """

    weights: tuple[str, ...] = ("decoder_pos_embed", "mask_token")
    adds_positions = True
    runs_whole = True

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        net.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_tokens, hidden_size))
        net.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size), requires_grad=trained)

    def initialize(self, net: Net, trained: bool) -> None:
        net.place(net.decoder_pos_embed)
        if trained:
            nn.init.normal_(net.mask_token, std=0.02)

    def __call__(self, net: Net, h: Tensor, stash: Tensor, c: Tensor, draw: Draw) -> Tensor:
        h = h if draw.kept is None else draw.kept.come_back(h, net.mask_token)
        return h + net.decoder_pos_embed


class Interpolate(MaskToken):
    """Predict the tokens that were away from the others with one block, MDT's side-interpolater (2303.14389)."""

    weights = (*MaskToken.weights, "sideblocks")
    interpolates = True

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        super().add_weights(net, hidden_size, num_tokens, trained)
        net.sideblocks = net.make_blocks(1)
        # Without masking they never get a gradient, which a data-parallel run would wait for.
        net.sideblocks.requires_grad_(trained)

    def cost(self, net: Net, num_tokens: int, away: bool) -> int:
        return cast(Block, net.sideblocks[0]).cost(num_tokens) if away else 0

    def __call__(self, net: Net, h: Tensor, stash: Tensor, c: Tensor, draw: Draw) -> Tensor:
        """Only the positions of tokens that were away take the side block's output; the others pass by it."""
        h = super().__call__(net, h, stash, c, draw)
        if draw.kept is None:
            return h
        return torch.where(draw.kept.dropped[..., None], net.sideblocks[0](h, c, net.rel_index), h)


class Fuse(Rejoin):
    """Fuse what went through the route with what waited before it, by a Linear (SPRINT, 2510.21986).

    A fixed token stands where no token came through. It also stands for all tokens of a sample whose path is dropped,
    so that the network learns to do without the route.
    """

    weights = ("fuse", "route_token")
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
        if draw.past:
            h = torch.cat([h, net.route_token.to(h.dtype).expand(draw.past, h.shape[1], -1)])
        return net.fuse(torch.cat([h, stash.to(h.dtype)], dim=-1))


class Never(Rejoin):
    """Bring no token back: the output has the kept tokens, and zeros for those that left."""

    comes_back = False

    def output(self, net: Net, h: Tensor, c: Tensor, draw: Draw) -> Tensor:
        patches = super().output(net, h, c, draw)
        if draw.kept is None:
            return patches
        return draw.kept.come_back(patches, patches.new_zeros(1, 1, patches.shape[-1]))


class MaskDecoder(nn.Module):
    """MaskDiT's decoder (2306.09305): blocks of a width of their own over all tokens, with a mask token for the others.

    embed: a LayerNorm under adaLN and a Linear into that width, both zero in a fresh network. Positions are fixed. The
    blocks have the conditioning of the network, and no relative positions.
    """

    pos_embed: Tensor

    def __init__(self, hidden_size: int, width: int, depth: int, num_tokens: int) -> None:
        super().__init__()
        self.embed = FinalLayer(hidden_size, 1, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = torch.from_numpy(sincos_position_table(width, math.isqrt(num_tokens))).float()[None]
        self.register_buffer("pos_embed", positions, persistent=False)
        heads = max(1, width // HEAD_WIDTH)
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, condition_size=hidden_size) for _ in range(depth))

    def forward(self, h: Tensor, c: Tensor, kept: KeptTokens | None) -> Tensor:
        """h: (N, L or K, D). c: (N, D). Returns (N, L, width)."""
        h = self.embed(h, c)
        h = (h if kept is None else kept.come_back(h, self.mask_token)) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        return h


class Decode(Rejoin):
    """Tokens come back after the last block, to a decoder beside the network: see :class:`MaskDecoder`.

    width, depth: of the decoder's blocks.
    """

    weights = ("decoder", "final_layer")
    comes_back = False
    runs_whole = True

    def __init__(self, width: int = 512, depth: int = 8) -> None:
        self.width, self.depth = width, depth

    def add_weights(self, net: Net, hidden_size: int, num_tokens: int, trained: bool) -> None:
        net.decoder = MaskDecoder(hidden_size, self.width, self.depth, num_tokens)

    def initialize(self, net: Net, trained: bool) -> None:
        zero_(net.decoder.embed)
        nn.init.normal_(net.decoder.mask_token, std=0.02)

    def output_width(self, hidden_size: int) -> int:
        return self.width

    def output(self, net: Net, h: Tensor, c: Tensor, draw: Draw) -> Tensor:
        return net.final_layer(net.decoder(h, c, draw.kept), c)

    def output_cost(self, net: Net, num_tokens: int, here: int, levels: int) -> int:
        blocks = sum(cast(Block, block).cost(num_tokens) for block in net.decoder.blocks)
        return net.decoder.embed.cost(here) + blocks + net.final_layer.cost(num_tokens)


def walk(net: Net, h: Tensor, c: Tensor, draw: Draw) -> Tensor:
    """Lead embedded tokens (N, L, D) with their conditioning through the blocks.

    c: (N, D), or (2, N, D) where the draw has a group, under which no token leaves.
    Returns (N, L, D), or (N, K, D) where the route brings nobody back.
    """
    stash, index, kept = h, net.rel_index, None  # kept: None while all are here
    conditioning = c  # of the samples in the blocks
    skips, outputs = net.skips, {EMBEDDED: h}
    for number, block in enumerate(net.stack):
        if number == net.route.leave:
            stash = h
            if draw.kept is not None:
                kept = draw.kept
                h, index = kept.leave(h), kept.relative_index(net.rel_index)
            if draw.past:
                h, conditioning = h[: -draw.past], c[: -draw.past]
        if number == net.route.back:
            h = net.rejoin(net, h, stash, c, draw)
            kept, index, conditioning = None, net.rel_index, c
        if number == net.decoder_start and not net.rejoin.adds_positions:
            positions = net.decoder_pos_embed
            h = h + (positions if kept is None else kept.leave(positions.expand(len(h), -1, -1)))
        h = block(h, conditioning, index, outputs[skips[number]] if number in skips else None, draw.group)
        if number in skips.values():
            outputs[number] = h
    return h

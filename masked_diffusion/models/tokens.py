"""Masking: which tokens leave, how they come back, how the relative positions follow them.

Shapes: N samples, L tokens of width D, L_keep tokens when some are masked.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptTokens:
    """A random subset of each sample's tokens (MAE, 2111.06377, with two argsorts and a gather).

    ids_keep: (N, L_keep) positions of the kept tokens. ids_restore: (N, L), where each position's token went, so
    that ``ids_restore < L_keep`` says which positions are kept. dropped: (N, L) bool.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    dropped: Tensor

    @classmethod
    def from_noise(cls, token_noise: Tensor, num_keep: int) -> "KeptTokens":
        """Keep the ``num_keep`` tokens of each sample with the smallest noise. token_noise: (N, L)."""
        ids_shuffle = token_noise.argsort(dim=1)  # of equal noises, devices may take either
        ids_restore = ids_shuffle.argsort(dim=1)
        return cls(ids_shuffle[:, :num_keep], ids_restore, ids_restore >= num_keep)

    @classmethod
    def from_cells(cls, token_noise: Tensor, num_keep: int, side: int) -> "KeptTokens":
        """Keep as many tokens of each cell of ``side`` x ``side`` tokens as of any other: those of the smallest noise.

        token_noise: (N, L) of a square grid that such cells fill. num_keep: a multiple of the number of cells.
        """
        count, num_tokens = token_noise.shape
        across = math.isqrt(num_tokens) // side
        cells = token_noise.view(count, across, side, across, side).transpose(2, 3)
        rank = cells.flatten(3).argsort(dim=3).argsort(dim=3).view_as(cells).transpose(2, 3)
        order = torch.linspace(0, 0.5, num_tokens, device=token_noise.device)
        return cls.from_noise((rank.reshape(count, -1) >= num_keep // across**2) + order, num_keep)

    @classmethod
    def all_but(cls, dropped: Tensor) -> "KeptTokens":
        """Keep the tokens that are not dropped. dropped: (N, L) bool, the same number in each row."""
        order = torch.linspace(0, 0.5, dropped.shape[1], device=dropped.device)
        return cls.from_noise(dropped + order, int((~dropped[0]).sum()))

    def repeat(self, times: int) -> "KeptTokens":
        """The same tokens for ``times`` batches of the same samples, one after the other: (times N, ...)."""
        return KeptTokens(
            self.ids_keep.repeat(times, 1), self.ids_restore.repeat(times, 1), self.dropped.repeat(times, 1)
        )

    def leave(self, x: Tensor) -> Tensor:
        """Take the kept tokens out: (N, L, D) -> (N, L_keep, D)."""
        return x.gather(1, self.ids_keep[..., None].expand(-1, -1, x.shape[-1]))

    def come_back(self, x: Tensor, filler: Tensor) -> Tensor:
        """Put the kept tokens where they were, ``filler`` elsewhere: (N, L_keep, D), (1, 1, D) -> (N, L, D)."""
        num_dropped = self.ids_restore.shape[1] - x.shape[1]
        x = torch.cat([x, filler.to(x.dtype).expand(len(x), num_dropped, -1)], dim=1)
        return x.gather(1, self.ids_restore[..., None].expand(-1, -1, x.shape[-1]))

    def put_back(self, x: Tensor, stash: Tensor) -> Tensor:
        """Put the kept tokens where they were, with the others of ``stash``: (N, L_keep, D), (N, L, D) -> (N, L, D)."""
        return stash.scatter(1, self.ids_keep[..., None].expand(-1, -1, x.shape[-1]), x.to(stash.dtype))

    def mean(self, values: Tensor) -> Tensor:
        """Mean of values of pixels over the patches of the kept tokens: (N, C, H, W) -> (N,)."""
        count, channels = values.shape[:2]
        across = math.isqrt(self.dropped.shape[1])
        patch = values.shape[-1] // across
        tokens = values.view(count, channels, across, patch, across, patch).mean(dim=(1, 3, 5)).flatten(1)  # (N, L)
        return tokens.gather(1, self.ids_keep).mean(dim=1)

    def mean_of_dropped(self, tokens: Tensor) -> Tensor:
        """Mean over the tokens that are not kept, 0 where all are: (N, L) -> (N,)."""
        return tokens.masked_fill(~self.dropped, 0).sum(dim=1) / self.dropped.sum(dim=1).clamp(min=1)

    def relative_index(self, index: Tensor | None) -> Tensor | None:
        """Rows and columns of the kept tokens in the relative index: (L, L) -> (N, L_keep, L_keep). None stays None."""
        return None if index is None else index[self.ids_keep[:, :, None], self.ids_keep[:, None, :]]


class Draw(NamedTuple):
    """What was drawn for one view of a batch, outside of the network.

    kept: the tokens that stay; None for all. path_drop: (N,) bool, the samples whose way through the route counts for
    nothing; None for none. group: (N, L) bool, the tokens that have the second of two noise levels; None for one level.
    past: so many samples at the end of the batch do not enter the route at all, which gives what path_drop gives for
    less work; where all tokens stay.
    """

    kept: KeptTokens | None = None
    path_drop: Tensor | None = None
    group: Tensor | None = None
    past: int = 0

    def repeat(self, times: int) -> "Draw":
        """The same draw for ``times`` batches of the same samples, one after the other."""
        return Draw(
            None if self.kept is None else self.kept.repeat(times),
            None if self.path_drop is None else self.path_drop.repeat(times),
            None if self.group is None else self.group.repeat(times, 1),
        )


NO_DRAW = Draw()


def pixels_by_token(values: Tensor, num_tokens: int) -> Tensor:
    """Values of pixels by the token that their patch is: (N, C, H, W) -> (N, L, C p p), p the side of a patch."""
    count, channels = values.shape[:2]
    across = math.isqrt(num_tokens)
    patch = values.shape[-1] // across
    values = values.view(count, channels, across, patch, across, patch).permute(0, 2, 4, 1, 3, 5)
    return values.reshape(count, num_tokens, -1)


def level_of_pixels(levels: Tensor, group: Tensor, side: int) -> Tensor:
    """The noise level of each pixel: that of its token. levels: (N, 2). group: (N, L) bool, the tokens of the second.

    Returns (N, 1, side, side).
    """
    across = math.isqrt(group.shape[1])
    by_token = torch.where(group, levels[:, 1:], levels[:, :1]).view(-1, 1, across, across)
    return by_token.repeat_interleave(side // across, dim=2).repeat_interleave(side // across, dim=3)


def num_kept_tokens(num_tokens: int, mask_ratio: float) -> int:
    """``int(L (1 - mask_ratio))``, as published. Raises ValueError outside [0, 1) or when no token would be left."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio}: must be in [0, 1)")
    num_keep = int(num_tokens * (1 - mask_ratio))
    if num_keep < 1:
        raise ValueError(f"mask_ratio {mask_ratio}: keeps none of the {num_tokens} tokens; use a smaller ratio")
    return num_keep

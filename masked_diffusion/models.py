"""Masked Diffusion Transformer (MDT, 2303.14389): embedders, one block, the side-interpolater, the model, builders.

Shapes: N samples, C latent channels, H x W latent, L tokens of width D, L_keep tokens when some are masked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp, PatchEmbed
from torch import Tensor, nn

from masked_diffusion.guidance import combine, power_cosine_weight

# ---------------------------------------------------------------------------------------------------------------------
# Embeddings of position, timestep and label
# ---------------------------------------------------------------------------------------------------------------------


def sincos_position_table(width: int, grid_size: int) -> np.ndarray:
    """2-D sin-cos position table, (grid_size**2, width) float64, one row per token in row-major order.

    The first half of the channels encodes the column, the second the row; sin before cos in each (base 10000).
    Raises ValueError when width is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"hidden_size {width}: the position table needs a multiple of 4")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    angles = np.arange(grid_size)[:, None] * frequencies  # (grid, width / 4)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    column = np.tile(axis, (grid_size, 1))
    row = np.repeat(axis, grid_size, axis=0)
    return np.concatenate([column, row], axis=1)


class TimestepEmbedder(nn.Module):
    """Timestep -> vector: sinusoidal features, then a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        half = num_frequencies // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """t: (N,) timesteps, may be fractional. Returns (N, D)."""
        angles = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """Class label -> vector; in training, labels become the null class with probability ``dropout_prob``.

    The null class is the table's last row, which exists only when ``dropout_prob > 0``.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor, label_noise: Tensor | None = None) -> Tensor:
        """y: (N,) int64 in [0, num_classes], num_classes being null. Returns (N, D).

        label_noise: (N,) uniform in [0, 1), which decides the dropout in training; None draws it here.
        """
        if self.training and self.dropout_prob > 0:
            if label_noise is None:
                label_noise = torch.rand(len(y), device=y.device)
            y = torch.where(label_noise < self.dropout_prob, self.num_classes, y)
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------------------------------
# Masking: which tokens leave, how they come back, how the relative positions follow them
# ---------------------------------------------------------------------------------------------------------------------


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
        ids_shuffle = token_noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        return cls(ids_shuffle[:, :num_keep], ids_restore, ids_restore >= num_keep)

    @classmethod
    def all_but(cls, dropped: Tensor) -> "KeptTokens":
        """Keep the tokens that are not dropped. dropped: (N, L) bool, the same number in each row."""
        order = torch.linspace(0, 0.5, dropped.shape[1], device=dropped.device)
        return cls.from_noise(dropped + order, int((~dropped[0]).sum()))

    def leave(self, x: Tensor) -> Tensor:
        """Take the kept tokens out: (N, L, D) -> (N, L_keep, D)."""
        return x.gather(1, self.ids_keep[..., None].expand(-1, -1, x.shape[-1]))

    def come_back(self, x: Tensor, filler: Tensor) -> Tensor:
        """Put the kept tokens where they were, ``filler`` elsewhere: (N, L_keep, D), (1, 1, D) -> (N, L, D)."""
        num_dropped = self.ids_restore.shape[1] - x.shape[1]
        x = torch.cat([x, filler.to(x.dtype).expand(len(x), num_dropped, -1)], dim=1)
        return x.gather(1, self.ids_restore[..., None].expand(-1, -1, x.shape[-1]))

    def relative_index(self, index: Tensor) -> Tensor:
        """Rows and columns of the kept tokens in the relative index: (L, L) -> (N, L_keep, L_keep)."""
        return index[self.ids_keep[:, :, None], self.ids_keep[:, None, :]]


def num_kept_tokens(num_tokens: int, mask_ratio: float) -> int:
    """``int(L (1 - mask_ratio))``, as published. Raises ValueError outside [0, 1) or when no token would be left."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio}: must be in [0, 1)")
    num_keep = int(num_tokens * (1 - mask_ratio))
    if num_keep < 1:
        raise ValueError(f"mask_ratio {mask_ratio}: keeps none of the {num_tokens} tokens; use a smaller ratio")
    return num_keep


# ---------------------------------------------------------------------------------------------------------------------
# Attention with a learned relative-position bias, the adaLN-Zero block, the final layer
# ---------------------------------------------------------------------------------------------------------------------


def relative_position_index(grid_size: int) -> Tensor:
    """Row of the bias table for each pair of tokens of a square grid, (L, L) int64 (BEiT, 2106.08254)."""
    rows, columns = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + grid_size - 1
    column_offset = columns[:, None] - columns[None, :] + grid_size - 1
    return row_offset * (2 * grid_size - 1) + column_offset


class RelativePositionBias(nn.Module):
    """One learned number per head and relative position, added to the attention logits.

    The table has three rows more than there are relative positions (BEiT's, for a class token). They are unused and
    kept because published checkpoints have them.
    """

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid_size - 1) ** 2 + 3, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(grid_size))

    def forward(self, index: Tensor) -> Tensor:
        """index: (L, L), or (N, L, L) where each sample has tokens of its own. Returns (1 or N, heads, L, L)."""
        bias = F.embedding(index, self.relative_position_bias_table)  # (..., L, L, heads)
        # Fused attention kernels take a mask only if its last dimension is contiguous.
        return bias.movedim(-1, -3).contiguous().view(-1, bias.shape[-1], *index.shape[-2:])


class Attention(nn.Module):
    """Multi-head self-attention; with a ``grid_size``, biased by relative position."""

    def __init__(self, hidden_size: int, num_heads: int, grid_size: int | None) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size}: must be a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.rel_pos_bias = None if grid_size is None else RelativePositionBias(grid_size, num_heads)

    def forward(self, x: Tensor, rel_index: Tensor | None) -> Tensor:
        """x: (N, L, D). rel_index: see :class:`RelativePositionBias`. Returns (N, L, D)."""
        N, L, D = x.shape
        qkv = self.qkv(x).view(N, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, L, D / heads) each
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(rel_index).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(N, L, D))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (N, L, D); shift, scale: (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def zero_(module: nn.Module) -> None:
    """Set all of a module's parameters to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """Transformer block with adaLN-Zero conditioning (DiT, 2212.09748)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, grid_size: int | None) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, grid_size)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rel_index: Tensor | None) -> Tensor:
        """x: (N, L, D); c: (N, D). Returns (N, L, D)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_attn[:, None] * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rel_index)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens -> patches: (N, L, D) -> (N, L, patch_size**2 * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_DECODE_LAYER = 2


class MDT(nn.Module):
    """Masked Diffusion Transformer, version 1.

    input_size: side of the square latent. class_dropout_prob: probability that a label becomes null in training;
    0 leaves the null class out, and with it guidance. learn_sigma: predict a variance beside the noise, twice the
    channels. mask_ratio: share of the tokens masked under ``enable_mask``; None trains without masking, with the side-
    interpolater frozen and the mask token zero. decode_layer: number of decoder blocks, the last of ``depth``; None
    means 2.

    Raises ValueError when input_size is no multiple of patch_size, decode_layer is outside 1 ... depth - 1, mask_ratio
    is outside [0, 1) or keeps no token, or a width does not divide.
    """

    rel_index: Tensor

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        mask_ratio: float | None = None,
        decode_layer: int | None = None,
    ) -> None:
        super().__init__()
        if input_size < patch_size or input_size % patch_size:
            raise ValueError(f"input_size {input_size}: must be a multiple of patch_size {patch_size}")
        decode_layer = DEFAULT_DECODE_LAYER if decode_layer is None else decode_layer
        if not 1 <= decode_layer <= depth - 1:
            raise ValueError(f"decode_layer {decode_layer}: must be in 1 ... {depth - 1} for a depth of {depth}")
        grid_size = input_size // patch_size
        num_tokens = grid_size**2

        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self.num_tokens = num_tokens
        self.mask_ratio = mask_ratio
        self.num_keep = num_tokens if mask_ratio is None else num_kept_tokens(num_tokens, mask_ratio)
        self.decode_layer = decode_layer

        # The order in which parameters are registered is the order of the optimizer's state in published files.
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, hidden_size))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_tokens, hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size), requires_grad=mask_ratio is not None)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, grid_size) for _ in range(depth))
        self.sideblocks = nn.ModuleList([Block(hidden_size, num_heads, mlp_ratio, grid_size)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        # One index for all blocks, gathered once per pass. Theirs are kept because published checkpoints have them.
        self.register_buffer("rel_index", relative_position_index(grid_size).int(), persistent=False)
        self.initialize_weights()
        # Without masking they never get a gradient, which a data-parallel run would wait for.
        self.sideblocks.requires_grad_(mask_ratio is not None)

    def initialize_weights(self) -> None:
        """Xavier for Linear layers and the patch embedding, N(0, 0.02) for tables; gates and output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RelativePositionBias):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        projection = self.x_embedder.proj
        zero_(projection)
        nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
        hidden_size, grid_size = self.pos_embed.shape[-1], math.isqrt(self.num_tokens)
        table = torch.from_numpy(sincos_position_table(hidden_size, grid_size)).float()
        with torch.no_grad():
            self.pos_embed.copy_(table)
            self.decoder_pos_embed.copy_(table)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.mask_ratio is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                zero_(module.adaLN_modulation)
        zero_(self.final_layer.linear)

    @property
    def has_null_class(self) -> bool:
        """Whether the label table has a row for the null class; without it there is no guidance."""
        return self.y_embedder.embedding_table.num_embeddings > self.num_classes

    def encode(self, x: Tensor, c: Tensor, rel_index: Tensor) -> Tensor:
        """The encoder blocks, over all or the kept tokens: (N, L or L_keep, D) -> the same shape."""
        for block in self.blocks[: -self.decode_layer]:
            x = block(x, c, rel_index)
        return x

    def side_interpolate(self, x: Tensor, c: Tensor, kept: KeptTokens) -> Tensor:
        """Predict the masked tokens from the kept ones: (N, L_keep, D) -> (N, L, D).

        Only the masked positions take the side block's output; kept positions pass by it.
        """
        x = kept.come_back(x, self.mask_token) + self.decoder_pos_embed
        return torch.where(kept.dropped[..., None], self.sideblocks[0](x, c, self.rel_index), x)

    def decode(self, x: Tensor, c: Tensor) -> Tensor:
        """The decoder blocks, over all tokens: (N, L, D) -> (N, L, D)."""
        for block in self.blocks[-self.decode_layer :]:
            x = block(x, c, self.rel_index)
        return x

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, patch_size**2 * C_out) -> (N, C_out, H, W)."""
        grid_size, p = math.isqrt(self.num_tokens), self.patch_size
        patches = patches.view(-1, grid_size, grid_size, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, grid_size * p, grid_size * p)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        enable_mask: bool = False,
        *,
        label_noise: Tensor | None = None,
        token_noise: Tensor | None = None,
        kept: KeptTokens | None = None,
    ) -> Tensor:
        """Predict the noise (and variance) of noised latents.

        x: (N, C, H, W). t: (N,) original timesteps. y: (N,) int64 in [0, num_classes], num_classes being null.
        enable_mask: mask tokens, if the model has a mask_ratio. label_noise: (N,) and token_noise: (N, L), uniform in
        [0, 1), decide label dropout and the mask; None draws them here, in this order, from torch's global generator.
        kept: mask all but these tokens, whatever the other arguments say.
        Returns (N, C_out, H, W), C_out = 2 C with learn_sigma.
        """
        x = self.x_embedder(x) + self.pos_embed  # (N, L, D)
        c = self.t_embedder(t) + self.y_embedder(y, label_noise)  # (N, D)
        if kept is None and enable_mask and self.mask_ratio is not None:
            if token_noise is None:
                token_noise = torch.rand(x.shape[:2], device=x.device)
            kept = KeptTokens.from_noise(token_noise, self.num_keep)
        if kept is not None:
            x = self.encode(kept.leave(x), c, kept.relative_index(self.rel_index))  # (N, L_keep, D)
            x = self.side_interpolate(x, c, kept)  # (N, L, D)
        else:
            x = self.encode(x, c, self.rel_index) + self.decoder_pos_embed
        x = self.decode(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float | None = None,
        diffusion_steps: int = 1000,
        scale_pow: float = 4.0,
    ) -> Tensor:
        """Forward with classifier-free guidance on a [cond | uncond] batch, as published.

        x: (2N, C, H, W), of which the first half is used for both; y: (2N,), null in the second half. Both halves
        receive the guided channels. cfg_scale None is a plain forward. Raises ValueError where there is no null class.
        """
        if cfg_scale is None:
            return self(x, t, y)
        if not self.has_null_class:
            raise ValueError("cfg_scale: this model has no null class (class_dropout_prob 0), so it cannot be guided")
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, uncond = out.chunk(2)
        weight = power_cosine_weight(t[: len(half)], cfg_scale, diffusion_steps, scale_pow)
        eps = combine(cond, uncond, weight, self.in_channels)
        return torch.cat([torch.cat([eps, eps]), out[:, eps.shape[1] :]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Builders
# ---------------------------------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "Ti": {"depth": 4, "hidden_size": 128, "num_heads": 4},  # ours: learns 8 x 8 digits in minutes on a laptop
}


def MDT_XL_2(**kwargs: Any) -> MDT:
    return MDT(patch_size=2, **SIZES["XL"], **kwargs)


def MDT_XL_4(**kwargs: Any) -> MDT:
    return MDT(patch_size=4, **SIZES["XL"], **kwargs)


def MDT_XL_8(**kwargs: Any) -> MDT:
    return MDT(patch_size=8, **SIZES["XL"], **kwargs)


def MDT_L_2(**kwargs: Any) -> MDT:
    return MDT(patch_size=2, **SIZES["L"], **kwargs)


def MDT_L_4(**kwargs: Any) -> MDT:
    return MDT(patch_size=4, **SIZES["L"], **kwargs)


def MDT_L_8(**kwargs: Any) -> MDT:
    return MDT(patch_size=8, **SIZES["L"], **kwargs)


def MDT_B_2(**kwargs: Any) -> MDT:
    return MDT(patch_size=2, **SIZES["B"], **kwargs)


def MDT_B_4(**kwargs: Any) -> MDT:
    return MDT(patch_size=4, **SIZES["B"], **kwargs)


def MDT_B_8(**kwargs: Any) -> MDT:
    return MDT(patch_size=8, **SIZES["B"], **kwargs)


def MDT_S_2(**kwargs: Any) -> MDT:
    return MDT(patch_size=2, **SIZES["S"], **kwargs)


def MDT_S_4(**kwargs: Any) -> MDT:
    return MDT(patch_size=4, **SIZES["S"], **kwargs)


def MDT_S_8(**kwargs: Any) -> MDT:
    return MDT(patch_size=8, **SIZES["S"], **kwargs)


def MDT_Ti_2(**kwargs: Any) -> MDT:
    return MDT(patch_size=2, **SIZES["Ti"], **kwargs)


_BUILDERS: list[Callable[..., MDT]] = [MDT_XL_2, MDT_XL_4, MDT_XL_8, MDT_L_2, MDT_L_4, MDT_L_8, MDT_B_2, MDT_B_4]
_BUILDERS += [MDT_B_8, MDT_S_2, MDT_S_4, MDT_S_8, MDT_Ti_2]
MODELS = {build.__name__: build for build in _BUILDERS}


def create_model(name: str, **kwargs: Any) -> MDT:
    """Build the model called ``name`` (a key of MODELS). Raises ValueError, listing the names, for an unknown one."""
    if name not in MODELS:
        raise ValueError(f"--model {name}: unknown; choose one of {', '.join(MODELS)}")
    return MODELS[name](**kwargs)

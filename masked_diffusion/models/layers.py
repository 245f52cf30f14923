"""Provide the layers that all models share: embeddings, attention with relative positions, adaLN-Zero blocks, output.

Shapes: N samples, L tokens of width D; see ``backbone.py``.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Embeddings of position, timestep and label
# ---------------------------------------------------------------------------------------------------------------------


def sincos_position_table(width: int, grid_size: int) -> np.ndarray:
    """Compute a 2-D sin-cos table of positions, (grid_size**2, width) float64, one row per token in row-major order.

    The first half of the channels encodes the column, the second half the row. In each half sin comes before cos (base
    10000). Raises ValueError when width is no multiple of 4.
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
    """Turn timesteps into vectors: sinusoidal features, then a two-layer MLP.

    The features are computed in float32, whatever the type of the weights.
    """

    frequency_bits: Tensor

    def __init__(self, hidden_size: int, num_frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        half = num_frequencies // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        # As integers, which half() leaves alone: rounded frequencies make a timestep another one.
        self.register_buffer("frequency_bits", frequencies.view(torch.int32), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """t: (N,) timesteps, may be fractional. Returns (N, D)."""
        angles = t[:, None].float() * self.frequency_bits.view(torch.float32)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Turn class labels into vectors. In training, a label becomes the null class with probability ``dropout_prob``.

    The null class is the table's last row. The row exists only when ``dropout_prob > 0``.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y: Tensor, label_noise: Tensor | None = None) -> Tensor:
        """Embed labels. y: (N,) int64 in [0, num_classes], num_classes being null. Returns (N, D).

        label_noise: (N,) uniform in [0, 1), decides the dropout in training; None draws it here.
        """
        if self.training and self.dropout_prob > 0:
            if label_noise is None:
                label_noise = torch.rand(len(y), device=y.device)
            y = torch.where(label_noise < self.dropout_prob, self.num_classes, y)
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------------------------------
# Attention with a learned relative-position bias, the adaLN-Zero block, the final layer
# ---------------------------------------------------------------------------------------------------------------------


def relative_position_index(grid_size: int) -> Tensor:
    """Compute the row of the bias table for each pair of tokens of a square grid, (L, L) int64 (BEiT, 2106.08254)."""
    rows, columns = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + grid_size - 1
    column_offset = columns[:, None] - columns[None, :] + grid_size - 1
    return row_offset * (2 * grid_size - 1) + column_offset


class RelativePositionBias(nn.Module):
    """Learn a number per head and relative position, which is added to the attention logits.

    The table has three rows more than there are relative positions (BEiT's, for a class token). They are unused, and
    kept because published checkpoints have them.
    """

    relative_position_index: Tensor
    expanded: Tensor | None

    def __init__(self, grid_size: int, num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid_size - 1) ** 2 + 3, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(grid_size))
        self.register_buffer("expanded", None, persistent=False)

    @torch.no_grad()
    def expand(self) -> None:
        """Look up the bias of all tokens once for all later passes. Later changes of the table have no effect."""
        self.expanded = None
        self.expanded = self(self.relative_position_index)

    def forward(self, index: Tensor) -> Tensor:
        """index: (L, L) of all tokens, or (N, L, L) where each sample has tokens of its own.

        Returns (1 or N, heads, L, L).
        """
        if self.expanded is not None and index.dim() == 2:
            return self.expanded
        # In float32 even where the table is a half: its gradient is a sum over very many pairs.
        bias = _LookUp.apply(self.relative_position_bias_table.float().t(), index.flatten())
        return bias.view(-1, *index.reshape(-1, *index.shape[-2:]).shape).transpose(0, 1)


class _LookUp(torch.autograd.Function):
    """Pick columns of a table (heads, T) by their index (M,): (heads, M).

    The backward pass keeps an int32 index, which takes half the memory, and widens it in passing. Torch's own kernels
    for int32 take several times as long on a CPU. So does F.embedding, whose result has to be transposed, too. No GPU
    was measured.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = table.shape[1]
        return table.index_select(1, index.long())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(len(grad), ctx.length).index_add_(1, index.long(), grad), None


class Attention(nn.Module):
    """Multi-head self-attention. With a ``grid_size`` it is biased by relative positions."""

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
    """Scale and shift tokens. x: (N, L, D); shift, scale: (N, 1 or L, D)."""
    return x * (1 + scale) + shift


def modulation(layer: nn.Module, c: Tensor, group: Tensor | None) -> Tensor:
    """Compute shifts, scales and gates from a conditioning: (N, 1, M), the same for all tokens of a sample.

    c: (N, D), or (2, N, D) for two noise levels. With two levels, group, (N, L) bool, marks the tokens that have the
    second one, and the result is (N, L, M). Each level is computed once per sample, not per token.
    """
    if c.dim() == 2 or group is None:
        return layer(c)[:, None]
    # Each level by itself: in one product of 2 N rows, equal levels would not give the bits that one gives.
    first, second = (layer(level)[:, None] for level in c)
    return torch.where(group[..., None], second, first)


def zero_(module: nn.Module) -> None:
    """Set all of a module's parameters to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def linear_weights(module: nn.Module) -> int:
    """Count the weights of a module's Linear layers: the multiply-adds of one token's or one sample's pass."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning (DiT, 2212.09748).

    grid_size: side of the token grid for a relative-position bias; None for no bias. takes_skip: merge the output of an
    earlier layer into the input, as a U-Net does (U-ViT, 2209.12152). condition_size: width of the conditioning; None
    for hidden_size. ``recomputes``: keep only the input for the backward pass.
    """

    recomputes = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        grid_size: int | None = None,
        takes_skip: bool = False,
        condition_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, grid_size)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_size or hidden_size, 6 * hidden_size))
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if takes_skip else None

    def cost(self, num_tokens: int, levels: int = 1) -> int:
        """Multiply-adds of a sample's pass with so many tokens, under so many noise levels."""
        linears = [self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2, self.skip_linear]
        per_token = sum(linear.weight.numel() for linear in linears if linear is not None)
        attention = 2 * self.attn.proj.in_features * num_tokens**2
        return num_tokens * per_token + attention + levels * linear_weights(self.adaLN_modulation)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rel_index: Tensor | None = None,
        skip: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """x, skip: (N, L, D); c, group: see :func:`modulation`. Returns (N, L, D)."""
        if self.recomputes and torch.is_grad_enabled():
            # A block draws no random numbers, and to keep their state would cost a copy from the device.
            return checkpoint(
                self._forward, x, c, rel_index, skip, group, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, c, rel_index, skip, group)

    def _forward(
        self, x: Tensor, c: Tensor, rel_index: Tensor | None, skip: Tensor | None, group: Tensor | None
    ) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation(
            self.adaLN_modulation, c, group
        ).chunk(6, dim=-1)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rel_index)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Turn tokens (N, L, D) into patches (N, L, patch_size**2 * out_channels). condition_size: see :class:`Block`."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, condition_size: int | None = None) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_size or hidden_size, 2 * hidden_size))

    def cost(self, num_tokens: int, levels: int = 1) -> int:
        """Multiply-adds of a sample's pass with so many tokens, under so many noise levels."""
        return num_tokens * self.linear.weight.numel() + levels * linear_weights(self.adaLN_modulation)

    def forward(self, x: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
        """x: (N, L, D); c, group: see :func:`modulation`."""
        shift, scale = modulation(self.adaLN_modulation, c, group).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

"""What all models share, and the baseline that the others start from (DiT, 2212.09748).

Shapes: N samples, C latent channels, H x W latent, L tokens of width D.
"""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from masked_diffusion.diffusion.guidance import combine, constant_weight
from masked_diffusion.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    RelativePositionBias,
    TimestepEmbedder,
    sincos_position_table,
    zero_,
)


class LatentTransformer(nn.Module):
    """What the models share: tokens with positions, conditioning on timestep and label, output, guidance.

    input_size: side of the square latent. class_dropout_prob: probability that a label becomes null in training;
    0 leaves the null class out, and with it guidance. learn_sigma: predict a variance beside the noise, twice the
    channels.

    Raises ValueError when input_size is no multiple of patch_size, or a width does not divide.
    """

    # Of a model that cannot mask.
    mask_ratio: float | None = None
    decode_layer: int = 0

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        class_dropout_prob: float,
        num_classes: int,
        learn_sigma: bool,
    ) -> None:
        super().__init__()
        if input_size < patch_size or input_size % patch_size:
            raise ValueError(f"input_size {input_size}: must be a multiple of patch_size {patch_size}")
        self.grid_size = input_size // patch_size
        self.num_tokens = self.grid_size**2
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        # The order in which parameters are registered is the order of the optimizer's state in published files.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_size))
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.final_layer: FinalLayer

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
        self._place(self.pos_embed)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                zero_(module.adaLN_modulation)
        zero_(self.final_layer.linear)

    @torch.no_grad()
    def _place(self, positions: Tensor) -> None:
        """Make (1, L, D) positions the sin-cos table."""
        positions.copy_(torch.from_numpy(sincos_position_table(positions.shape[-1], self.grid_size)))

    @property
    def has_null_class(self) -> bool:
        """Whether the label table has a row for the null class; without it there is no guidance."""
        return self.y_embedder.embedding_table.num_embeddings > self.num_classes

    def expand_bias(self) -> None:
        """Look every block's relative-position bias up now instead of in every pass, for weights that will not change.

        It takes 4 heads L^2 bytes per block in float32: 0.1 GB for MDT-XL/2 at 256 x 256, 1.9 GB at 512 x 512.
        """
        for module in self.modules():
            if isinstance(module, RelativePositionBias):
                module.expand()

    def embed(self, x: Tensor, t: Tensor, y: Tensor, label_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents (N, C, H, W) -> tokens (N, L, D); timesteps and labels (N,) -> conditioning c (N, D)."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y, label_noise)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(N, L, patch_size**2 * C_out) -> (N, C_out, H, W)."""
        w, p = self.grid_size, self.patch_size
        patches = patches.view(-1, w, w, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, w * p, w * p)

    def _guided(self, x: Tensor, t: Tensor, y: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
        """Forward with classifier-free guidance on a [cond | uncond] batch, as published.

        x: (2N, C, H, W), of which the first half is used for both; y: (2N,), null in the second half; weight: (N,)
        timesteps -> (N,). Both halves receive the guided channels. Raises ValueError where there is no null class.
        """
        if not self.has_null_class:
            raise ValueError("cfg_scale: this model has no null class (class_dropout_prob 0), so it cannot be guided")
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, uncond = out.chunk(2)
        eps = combine(cond, uncond, weight(t[: len(half)]), self.in_channels)
        return torch.cat([torch.cat([eps, eps]), out[:, eps.shape[1] :]], dim=1)


class DiT(LatentTransformer):
    """Diffusion Transformer: every block sees every token, positions are fixed. Arguments as MDT's but for masking."""

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
    ) -> None:
        super().__init__(input_size, patch_size, in_channels, hidden_size, class_dropout_prob, num_classes, learn_sigma)
        self.pos_embed.requires_grad_(False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, label_noise: Tensor | None = None) -> Tensor:
        """Predict the noise (and variance) of noised latents; arguments and result as :meth:`MDT.forward`."""
        x, c = self.embed(x, t, y, label_noise)  # (N, L, D), (N, D)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float | None = None) -> Tensor:
        """Forward with guidance of a constant scale on a [cond | uncond] batch, see :meth:`_guided`.

        cfg_scale None is a plain forward.
        """
        if cfg_scale is None:
            return self(x, t, y)
        return self._guided(x, t, y, partial(constant_weight, cfg_scale=cfg_scale))

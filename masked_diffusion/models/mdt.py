"""Masked Diffusion Transformer (MDT and MDTv2, 2303.14389): what masking adds to the baseline.

Shapes: N samples, C latent channels, H x W latent, L tokens of width D, L_keep tokens when some are masked.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from masked_diffusion.diffusion.guidance import power_cosine_weight
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.layers import Block, FinalLayer, relative_position_index
from masked_diffusion.models.tokens import KeptTokens, num_kept_tokens


class MDT(LatentTransformer):
    """Masked Diffusion Transformer, version 1.

    mask_ratio: share of the tokens masked under ``enable_mask``; None trains without masking, with the side-
    interpolater frozen and the mask token zero. decode_layer: number of decoder blocks, the last of ``depth``; None
    means 2. The others: see :class:`LatentTransformer`.

    Raises ValueError also when decode_layer is outside 1 ... depth - 1, or mask_ratio is outside [0, 1) or keeps no
    token.
    """

    DEFAULT_DECODE_LAYER = 2
    decoder_sees_all = False  # whether masked tokens' own embeddings reach the decoder
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
        super().__init__(input_size, patch_size, in_channels, hidden_size, class_dropout_prob, num_classes, learn_sigma)
        self.mask_ratio = mask_ratio
        self.decode_layer = self.DEFAULT_DECODE_LAYER if decode_layer is None else decode_layer
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size), requires_grad=mask_ratio is not None)

        def make_blocks(count: int, takes_skip: bool = False) -> nn.ModuleList:
            return nn.ModuleList(
                Block(hidden_size, num_heads, mlp_ratio, self.grid_size, takes_skip) for _ in range(count)
            )

        self._check_masking(depth)
        self._add_blocks(depth, make_blocks)
        self.sideblocks = make_blocks(1)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        # One index for all blocks, gathered once per pass. Theirs are kept because published checkpoints have them.
        self.register_buffer("rel_index", relative_position_index(self.grid_size).int(), persistent=False)
        self.initialize_weights()
        # Without masking they never get a gradient, which a data-parallel run would wait for.
        self.sideblocks.requires_grad_(mask_ratio is not None)

    def _check_masking(self, depth: int) -> None:
        if not 1 <= self.decode_layer <= depth - 1:
            raise ValueError(f"decode_layer {self.decode_layer}: must be in 1 ... {depth - 1} for a depth of {depth}")
        if self.mask_ratio is not None:
            num_kept_tokens(self.num_tokens, self.mask_ratio)

    def _add_blocks(self, depth: int, make_blocks: Callable[..., nn.ModuleList]) -> None:
        self.blocks = make_blocks(depth)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._place(self.decoder_pos_embed)
        if self.mask_ratio is not None:
            nn.init.normal_(self.mask_token, std=0.02)

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

    def decode(self, x: Tensor, c: Tensor, embedded: Tensor) -> Tensor:
        """The decoder blocks, over all tokens: (N, L, D) -> (N, L, D). embedded: the tokens before the encoder."""
        for block in self.blocks[-self.decode_layer :]:
            x = block(x, c, self.rel_index)
        return x

    def num_keep(self, ratio_noise: float | None) -> int:
        """How many tokens the encoder sees under masking. ratio_noise: see :meth:`forward`."""
        assert self.mask_ratio is not None
        return num_kept_tokens(self.num_tokens, self.mask_ratio)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        enable_mask: bool = False,
        *,
        label_noise: Tensor | None = None,
        token_noise: Tensor | None = None,
        ratio_noise: float | None = None,
        kept: KeptTokens | None = None,
    ) -> Tensor:
        """Predict the noise (and variance) of noised latents.

        x: (N, C, H, W). t: (N,) original timesteps. y: (N,) int64 in [0, num_classes], num_classes being null.
        enable_mask: mask tokens, if the model has a mask_ratio. label_noise: (N,) and token_noise: (N, L), uniform in
        [0, 1), decide label dropout and the mask; ratio_noise, too, how many tokens version 2 masks, and version 1
        does not use it. What is None is drawn here from torch's global generator: labels, ratio, tokens in this order.
        kept: mask all but these tokens, whatever the other arguments say.
        Returns (N, C_out, H, W), C_out = 2 C with learn_sigma.
        """
        embedded, c = self.embed(x, t, y, label_noise)  # (N, L, D), (N, D)
        if kept is None and enable_mask and self.mask_ratio is not None:
            num_keep = self.num_keep(ratio_noise)
            if token_noise is None:
                token_noise = torch.rand(embedded.shape[:2], device=x.device)
            kept = KeptTokens.from_noise(token_noise, num_keep)
        if kept is not None:
            x = self.encode(kept.leave(embedded), c, kept.relative_index(self.rel_index))  # (N, L_keep, D)
            x = self.side_interpolate(x, c, kept)  # (N, L, D)
        else:
            x = self.encode(embedded, c, self.rel_index) + self.decoder_pos_embed
        x = self.decode(x, c, embedded)
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
        """Forward with guidance of the power-cosine schedule on a [cond | uncond] batch, see :meth:`_guided`.

        cfg_scale None is a plain forward.
        """
        if cfg_scale is None:
            return self(x, t, y)
        return self._guided(x, t, y, lambda t: power_cosine_weight(t, cfg_scale, diffusion_steps, scale_pow))


class MDTv2(MDT):
    """Masked Diffusion Transformer, version 2: skips as in a U-Net, and a mask ratio drawn for each pass.

    The encoder is two halves, in-blocks and out-blocks; the out-blocks take the in-blocks' outputs, last to first. All
    decoder blocks take the embedded tokens from before the masking. mask_ratio: the least share that is masked, the
    most is 0.2 more. decode_layer: None means 4.

    Raises ValueError also when depth - decode_layer is odd, so that the halves would differ.
    """

    DEFAULT_DECODE_LAYER = 4
    RATIO_RANGE = 0.2
    decoder_sees_all = True

    def _check_masking(self, depth: int) -> None:
        if not 1 <= self.decode_layer <= depth - 2:
            raise ValueError(f"decode_layer {self.decode_layer}: must be in 1 ... {depth - 2} for a depth of {depth}")
        if (depth - self.decode_layer) % 2:
            raise ValueError(
                f"decode_layer {self.decode_layer}: leaves {depth - self.decode_layer} of {depth} blocks for the "
                "encoder, which has two equal halves; use one decoder block more or less"
            )
        if self.mask_ratio is None:
            return
        num_kept_tokens(self.num_tokens, self.mask_ratio)
        if self.num_keep(1.0) < 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio}: MDTv2 masks up to {self.RATIO_RANGE} more, which keeps none of the "
                f"{self.num_tokens} tokens; use a smaller ratio"
            )

    def _add_blocks(self, depth: int, make_blocks: Callable[..., nn.ModuleList]) -> None:
        half = (depth - self.decode_layer) // 2
        self.en_inblocks = make_blocks(half)
        self.en_outblocks = make_blocks(half, takes_skip=True)
        self.de_blocks = make_blocks(self.decode_layer, takes_skip=True)

    def encode(self, x: Tensor, c: Tensor, rel_index: Tensor) -> Tensor:
        skips = []
        for block in self.en_inblocks:
            x = block(x, c, rel_index)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, rel_index, skip=skips.pop())
        return x

    def decode(self, x: Tensor, c: Tensor, embedded: Tensor) -> Tensor:
        for block in self.de_blocks:
            x = block(x, c, self.rel_index, skip=embedded)
        return x

    def num_keep(self, ratio_noise: float | None) -> int:
        assert self.mask_ratio is not None
        if ratio_noise is None:
            ratio_noise = torch.rand(1).item()
        return int(self.num_tokens * (1 - (self.mask_ratio + self.RATIO_RANGE * ratio_noise)))

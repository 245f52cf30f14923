"""Masked Diffusion Transformer (MDT and MDTv2, 2303.14389) and the baseline it starts from (DiT, 2212.09748).

Read in this order: the baseline (:class:`DiT`), masking (:class:`KeptTokens`), what masking adds to the baseline
(:class:`MDT`), what version 2 changes (:class:`MDTv2`). Their common layers are in ``layers.py``.

Shapes: N samples, C latent channels, H x W latent, L tokens of width D, L_keep tokens when some are masked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from masked_diffusion.guidance import combine, constant_weight, power_cosine_weight
from masked_diffusion.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    RelativePositionBias,
    TimestepEmbedder,
    relative_position_index,
    sincos_position_table,
    zero_,
)

# ---------------------------------------------------------------------------------------------------------------------
# From a noised latent to tokens, and from tokens to the prediction
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# The baseline
# ---------------------------------------------------------------------------------------------------------------------


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
# The masked models
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Builders
# ---------------------------------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=LatentTransformer)

SIZES: dict[str, dict[str, Any]] = {
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "Ti": {"depth": 4, "hidden_size": 128, "num_heads": 4},  # ours: learns 8 x 8 digits in minutes on a laptop
}


FAMILIES: dict[str, type[LatentTransformer]] = {"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT}
MODELS: dict[str, Callable[..., LatentTransformer]] = {}


def _builder(family: type[Model], size: str, patch_size: int) -> Callable[..., Model]:
    """A function of the model's further keyword arguments, also found in MODELS by its name."""
    build = partial(family, patch_size=patch_size, **SIZES[size])
    MODELS[f"{family.__name__}_{size}_{patch_size}"] = build
    return build


MDT_XL_2 = _builder(MDT, "XL", 2)
MDT_XL_4 = _builder(MDT, "XL", 4)
MDT_XL_8 = _builder(MDT, "XL", 8)
MDT_L_2 = _builder(MDT, "L", 2)
MDT_L_4 = _builder(MDT, "L", 4)
MDT_L_8 = _builder(MDT, "L", 8)
MDT_B_2 = _builder(MDT, "B", 2)
MDT_B_4 = _builder(MDT, "B", 4)
MDT_B_8 = _builder(MDT, "B", 8)
MDT_S_2 = _builder(MDT, "S", 2)
MDT_S_4 = _builder(MDT, "S", 4)
MDT_S_8 = _builder(MDT, "S", 8)
MDT_Ti_2 = _builder(MDT, "Ti", 2)
MDTv2_XL_2 = _builder(MDTv2, "XL", 2)
MDTv2_L_2 = _builder(MDTv2, "L", 2)
MDTv2_B_2 = _builder(MDTv2, "B", 2)
MDTv2_S_2 = _builder(MDTv2, "S", 2)
MDTv2_Ti_2 = _builder(MDTv2, "Ti", 2)
DiT_XL_2 = _builder(DiT, "XL", 2)
DiT_XL_4 = _builder(DiT, "XL", 4)
DiT_XL_8 = _builder(DiT, "XL", 8)
DiT_L_2 = _builder(DiT, "L", 2)
DiT_L_4 = _builder(DiT, "L", 4)
DiT_L_8 = _builder(DiT, "L", 8)
DiT_B_2 = _builder(DiT, "B", 2)
DiT_B_4 = _builder(DiT, "B", 4)
DiT_B_8 = _builder(DiT, "B", 8)
DiT_S_2 = _builder(DiT, "S", 2)
DiT_S_4 = _builder(DiT, "S", 4)
DiT_S_8 = _builder(DiT, "S", 8)
DiT_Ti_2 = _builder(DiT, "Ti", 2)


def family_of(name: str) -> str:
    """``MDTv2_S_2`` -> ``MDTv2``, a key of FAMILIES. Raises ValueError, listing the names, for an unknown one."""
    if name not in MODELS:
        raise ValueError(f"--model {name}: unknown; choose one of {', '.join(MODELS)}")
    return name.split("_")[0]


def can_mask(name: str) -> bool:
    """Whether the model called ``name`` takes mask_ratio and decode_layer."""
    return issubclass(FAMILIES[family_of(name)], MDT)


def create_model(name: str, **kwargs: Any) -> LatentTransformer:
    """Build the model called ``name`` (a key of MODELS). Raises ValueError, listing the names, for an unknown one.

    mask_ratio and decode_layer are left out for a model that has no use for them.
    """
    if not can_mask(name):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("mask_ratio", "decode_layer")}
    return MODELS[name](**kwargs)

"""What all models share, and the baselines that the others start from (DiT, 2212.09748; SiT, 2401.08740).

Shapes: N samples, C latent channels, H x W latent, L tokens of width D.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from masked_diffusion.choices import FAMILIES
from masked_diffusion.diffusion.guidance import combine, constant_weight
from masked_diffusion.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    RelativePositionBias,
    TimestepEmbedder,
    relative_position_index,
    sincos_position_table,
    zero_,
)
from masked_diffusion.models.policies import View, policy_for, usual_decoder
from masked_diffusion.models.routes import MaskDecoder, Rejoin, parse_route, walk
from masked_diffusion.models.tokens import NO_DRAW, Draw


class LatentTransformer(nn.Module):
    """What the models share: tokens with positions, conditioning on timestep and label, blocks, output, guidance.

    input_size: side of the square latent. class_dropout_prob: probability that a label becomes null in training;
    0 leaves the null class out, and with it guidance. learn_sigma: predict a variance beside the noise, twice the
    channels. policy: how the model is trained, a name of POLICIES; None is the family's own. mask_ratio: share of the
    tokens that leave under the policy; None is the policy's own, but under the family's policy nobody leaves.
    decode_layer: number of decoder blocks, the last of ``depth``, where the model or the policy has a decoder; None is
    the family's number. route: ``LEAVE,BACK``, between which blocks tokens are away, where the policy has no decoder to
    say so; None is the policy's own. choose, path_drop, decoder: see
    :meth:`masked_diffusion.models.policies.Policy.with_options`; None is the policy's own.

    Raises ValueError when input_size is no multiple of patch_size, a width does not divide, the policy is not for this
    family, decode_layer is outside 1 ... depth - 1, or mask_ratio is outside [0, 1) or keeps no token.
    """

    FAMILY_POLICY = FAMILIES["DiT"].policy
    DEFAULT_DECODE_LAYER = 2
    HAS_DECODER = FAMILIES["DiT"].has_decoder  # whether there are decoder blocks under every policy
    HAS_RELATIVE_BIAS = False
    HAS_UNUSED_VARIANCE = False  # whether the output layer has a variance's channels that nothing uses
    # Of a model without a decoder of its own, see routes.Net.
    decoder_start: int | None = None
    decode_layer: int = 0
    decoder_sees_all = False  # whether masked tokens' own embeddings reach the decoder
    rel_index: Tensor | None
    decoder_pos_embed: nn.Parameter
    mask_token: nn.Parameter
    sideblocks: nn.ModuleList
    fuse: nn.Linear
    route_token: nn.Parameter
    decoder: MaskDecoder

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
        policy: str | None = None,
        route: str | None = None,
        choose: str | None = None,
        path_drop: float | None = None,
        decoder: str | None = None,
    ) -> None:
        super().__init__()
        if input_size < patch_size or input_size % patch_size:
            raise ValueError(f"input_size {input_size}: must be a multiple of patch_size {patch_size}")
        self.grid_size = input_size // patch_size
        self.num_tokens = self.grid_size**2
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma or self.HAS_UNUSED_VARIANCE else in_channels
        self.patch_size = patch_size
        self.num_classes = num_classes
        self._use_policy(policy, mask_ratio, choose, path_drop, decoder or usual_decoder(hidden_size, depth))
        bias_grid = self.grid_size if self.HAS_RELATIVE_BIAS else None
        self._block = partial(Block, hidden_size, num_heads, mlp_ratio, bias_grid)
        # The order in which parameters are registered is the order of the optimizer's state in published files.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_tokens, hidden_size))
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        if self.HAS_DECODER or self.policy.has_decoder:
            self.decode_layer = self.DEFAULT_DECODE_LAYER if decode_layer is None else decode_layer
            self._check_decoder(depth)
        self._add_blocks(depth)
        if route is not None and self.policy.takes_route:
            self.route = parse_route(route, depth)
        else:
            self.route = self.policy.route(depth, self.decode_layer)
        self._add_rejoin(hidden_size)
        self.final_layer = FinalLayer(
            self.rejoin.output_width(hidden_size), patch_size, self.out_channels, condition_size=hidden_size
        )
        # One index for all blocks, gathered once per pass. Theirs are kept because published checkpoints have them.
        index = relative_position_index(self.grid_size).int() if self.HAS_RELATIVE_BIAS else None
        self.register_buffer("rel_index", index, persistent=False)
        self.initialize_weights()

    def _use_policy(
        self, name: str | None, mask_ratio: float | None, choose: str | None, path_drop: float | None, decoder: str
    ) -> None:
        """The policy that the model is trained under, with its options."""
        family = type(self).__name__
        policy = policy_for(name or self.FAMILY_POLICY, family)
        self.decoder_form = decoder if policy.takes_decoder else None
        self.policy = policy.with_options(choose, path_drop, self.decoder_form)
        self.rejoin = self.policy.rejoin
        self.mask_ratio = mask_ratio if policy.drops else None
        if mask_ratio is None and name not in (None, self.FAMILY_POLICY):
            self.mask_ratio = policy.mask_ratio
        if self.mask_ratio is not None:
            self.policy.check_ratio(self.grid_size, self.mask_ratio, family)

    def _check_decoder(self, depth: int) -> None:
        if not 1 <= self.decode_layer <= depth - 1:
            raise ValueError(f"decode_layer {self.decode_layer}: must be in 1 ... {depth - 1} for a depth of {depth}")

    def _add_blocks(self, depth: int) -> None:
        self.blocks = self.make_blocks(depth)

    def _rejoins(self) -> list[Rejoin]:
        """Whose weights the model has."""
        return [self.rejoin]

    def _add_rejoin(self, hidden_size: int) -> None:
        for rejoin in self._rejoins():
            rejoin.add_weights(self, hidden_size, self.num_tokens, self._trains(rejoin))

    def _trains(self, rejoin: Rejoin) -> bool:
        return rejoin is self.rejoin and self.mask_ratio is not None

    def make_blocks(self, count: int, takes_skip: bool = False) -> nn.ModuleList:
        """Fresh blocks of this model's shape."""
        return nn.ModuleList(self._block(takes_skip=takes_skip) for _ in range(count))

    @property
    def stack(self) -> Sequence[Block]:
        """The blocks in the order in which they run."""
        return cast(Sequence[Block], self.blocks)

    @property
    def skips(self) -> Mapping[int, int]:
        """Blocks that take an earlier one's output, too, see :class:`masked_diffusion.models.routes.Net`."""
        return {}

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
        self.place(self.pos_embed)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                zero_(module.adaLN_modulation)
        zero_(self.final_layer.linear)
        for rejoin in self._rejoins():
            rejoin.initialize(self, self._trains(rejoin))

    @torch.no_grad()
    def place(self, positions: Tensor) -> None:
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
        """Latents (N, C, H, W) -> tokens (N, L, D); timesteps and labels (N,) -> conditioning c (N, D).

        Timesteps (N, 2) give the conditioning of each, (2, N, D).
        """
        tokens, label = self.x_embedder(x) + self.pos_embed, self.y_embedder(y, label_noise)
        if t.dim() == 1:
            return tokens, self.t_embedder(t) + label
        return tokens, torch.stack([self.t_embedder(one) + label for one in t.unbind(1)])

    @property
    def views(self) -> tuple[View, ...]:
        """The passes over an image in a training step."""
        return self.policy.views_at(self.mask_ratio)

    def num_keep(self, ratio_noise: float, share: float = 1.0) -> int:
        """How many tokens stay in a view that drops some. ratio_noise, share: see :meth:`draw`."""
        assert self.mask_ratio is not None
        return self.policy.num_keep(self.num_tokens, self.mask_ratio, ratio_noise, share)

    def draw(
        self, token_noise: Tensor, ratio_noise: float = 0.0, path_noise: Tensor | None = None, share: float = 1.0
    ) -> Draw:
        """Choose the tokens that stay in a view that drops some.

        token_noise: (N, L) uniform in [0, 1). ratio_noise: uniform in [0, 1), equal for all samples of a step; it
        matters to policies whose ratio is drawn. path_noise: (N,) uniform in [0, 1), decides whose path is dropped;
        None for nobody's. share: of the mask ratio that holds now; 0 lets all tokens stay, as at the end of a training.
        """
        return self.policy.draw(token_noise, self.num_keep(ratio_noise, share), path_noise)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        enable_mask: bool = False,
        *,
        label_noise: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Predict the noise (and variance) of noised latents.

        x: (N, C, H, W). t: (N,) original timesteps; where the draw has a group, (N, 2), the second ones its. y: (N,)
        int64 in [0, num_classes], num_classes being null.
        label_noise: (N,) uniform in [0, 1), decides label dropout. draw: which tokens leave, see :meth:`draw`; None for
        nobody. enable_mask: without a draw, draw which tokens leave, if the model has a mask_ratio. What is drawn here
        comes from torch's global generator: labels, ratio, tokens in this order.
        Returns (N, C_out, H, W), C_out = 2 C with learn_sigma.
        """
        embedded, c = self.embed(x, t, y, label_noise)  # (N, L, D), (N, D)
        if draw is None and enable_mask and self.mask_ratio is not None:
            ratio_noise = torch.rand(1).item() if self.policy.ratio_spread else 0.0
            draw = self.draw(torch.rand(embedded.shape[:2], device=x.device), ratio_noise)
        draw = draw or NO_DRAW
        return self.unpatchify(self.rejoin.output(self, walk(self, embedded, c, draw), c, draw))

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
    """Diffusion Transformer: positions are fixed, and of itself every block sees every token.

    Under a policy that masks it has the weights of the policy's rejoin beside its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pos_embed.requires_grad_(False)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float | None = None) -> Tensor:
        """Forward with guidance of a constant scale on a [cond | uncond] batch, see :meth:`_guided`.

        cfg_scale None is a plain forward.
        """
        if cfg_scale is None:
            return self(x, t, y)
        return self._guided(x, t, y, partial(constant_weight, cfg_scale=cfg_scale))


class SiT(DiT):
    """Scalable Interpolant Transformer (2401.08740): DiT's network as a velocity of rectified flow.

    Published files have DiT's names and shapes. Their layers are given the share of data in [0, 1], and return the
    velocity towards the data beside variance channels that nothing uses. This class turns both round, so that it is a
    network of ``--objective flow``: t is 1000 times the share of noise, and the output is eps - x_0.
    """

    HAS_UNUSED_VARIANCE = True

    def embed(self, x: Tensor, t: Tensor, y: Tensor, label_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return super().embed(x, 1 - t / 1000, y, label_noise)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        enable_mask: bool = False,
        *,
        label_noise: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Predict eps - x_0, (N, C, H, W). t: (N,) in [0, 1000]. The rest is as of :class:`LatentTransformer`."""
        output = super().forward(x, t, y, enable_mask, label_noise=label_noise, draw=draw)
        return -output[:, : self.in_channels]

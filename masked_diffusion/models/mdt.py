"""Masked Diffusion Transformer (MDT and MDTv2, 2303.14389): what masking adds to the baseline."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from masked_diffusion.choices import FAMILIES
from masked_diffusion.diffusion.guidance import power_cosine_weight
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.layers import Block
from masked_diffusion.models.policies import POLICIES
from masked_diffusion.models.routes import EMBEDDED, Rejoin


class MDT(LatentTransformer):
    """Masked Diffusion Transformer, version 1: relative positions, a decoder with positions, a side-interpolater.

    mask_ratio None trains without masking, with the side-interpolater frozen and the mask token zero. decode_layer None
    means 2.
    """

    FAMILY_POLICY = FAMILIES["MDT"].policy
    HAS_DECODER = FAMILIES["MDT"].has_decoder
    HAS_RELATIVE_BIAS = True

    def _add_blocks(self, depth: int) -> None:
        super()._add_blocks(depth)
        self.decoder_start = depth - self.decode_layer

    def _rejoins(self) -> list[Rejoin]:
        # Published files have the side-interpolater, whatever a model is trained under.
        own = POLICIES[self.FAMILY_POLICY].rejoin
        return [own] if self.rejoin is own else [own, self.rejoin]

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

    FAMILY_POLICY = FAMILIES["MDTv2"].policy
    DEFAULT_DECODE_LAYER = 4
    decoder_sees_all = True

    def _check_decoder(self, depth: int) -> None:
        if not 1 <= self.decode_layer <= depth - 2:
            raise ValueError(f"decode_layer {self.decode_layer}: must be in 1 ... {depth - 2} for a depth of {depth}")
        if (depth - self.decode_layer) % 2:
            raise ValueError(
                f"decode_layer {self.decode_layer}: leaves {depth - self.decode_layer} of {depth} blocks for the "
                "encoder, which has two equal halves; use one decoder block more or less"
            )

    def _add_blocks(self, depth: int) -> None:
        half = (depth - self.decode_layer) // 2
        self.en_inblocks = self.make_blocks(half)
        self.en_outblocks = self.make_blocks(half, takes_skip=True)
        self.de_blocks = self.make_blocks(self.decode_layer, takes_skip=True)
        self.decoder_start = 2 * half

    @property
    def stack(self) -> Sequence[Block]:
        return cast(Sequence[Block], [*self.en_inblocks, *self.en_outblocks, *self.de_blocks])

    @property
    def skips(self) -> Mapping[int, int]:
        half = len(self.en_inblocks)
        out = {half + i: half - 1 - i for i in range(half)}
        return {**out, **dict.fromkeys(range(2 * half, len(self.stack)), EMBEDDED)}

"""The published training step and guided sampling step, the plain way: what the benchmark compares this code with.

The same function as :class:`masked_diffusion.models.MDT` (a test compares them), at the published code's costs:

- attention in three steps, its logits and probabilities kept for backward;
- under masking, each block repeats its bias and the int64 indices of the kept tokens for each sample;
- the full and the masked view's graphs live together until one backward;
- AdamW and EMA run parameter by parameter, and norms, losses and timesteps are read by the host at every step;
- guidance carries the latent as two equal halves, and computes both at every step.

The noise and the loss are this code's own. Nothing imports this file but the benchmark.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from masked_diffusion.diffusion.guidance import power_cosine_weight
from masked_diffusion.first_stage import FirstStage
from masked_diffusion.gaussian_diffusion import GaussianDiffusion
from masked_diffusion.models import MDT
from masked_diffusion.models.layers import Attention
from masked_diffusion.models.tokens import NO_DRAW, Draw
from masked_diffusion.resample import UniformSampler


class PlainAttention(nn.Module):
    """Explicit attention around the layers of another one; takes the kept tokens' ids in place of an index."""

    index: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        assert attention.rel_pos_bias is not None
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.table = attention.rel_pos_bias.relative_position_bias_table
        index = attention.rel_pos_bias.relative_position_index
        assert isinstance(index, Tensor)
        self.register_buffer("index", index, persistent=False)

    def _bias(self, ids_keep: Tensor | None) -> Tensor:
        num_tokens = len(self.index)
        bias = self.table[self.index.view(-1)].view(num_tokens, num_tokens, -1).permute(2, 0, 1).contiguous()
        if ids_keep is None:
            return bias  # (heads, L, L)
        count, num_keep = ids_keep.shape
        bias = bias[None].repeat(count, 1, 1, 1)  # (N, heads, L, L)
        rows = ids_keep[:, None, :, None].repeat(1, self.num_heads, 1, num_tokens)
        columns = ids_keep[:, None, None, :].repeat(1, self.num_heads, num_keep, 1)
        return bias.gather(2, rows).gather(3, columns)  # (N, heads, L_keep, L_keep)

    def forward(self, x: Tensor, ids_keep: Tensor | None) -> Tensor:
        """x: (N, L, D); ids_keep: (N, L) int64 or None for all. Returns (N, L, D)."""
        count, length, width = x.shape
        qkv = self.qkv(x).reshape(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        probabilities = (logits + self._bias(ids_keep)).softmax(dim=-1)
        return self.proj((probabilities @ v).transpose(1, 2).reshape(count, length, width))


class PlainMDT(nn.Module):
    """An MDT's copy, run the plain way. Arguments of ``forward`` as the MDT's."""

    def __init__(self, model: MDT) -> None:
        super().__init__()
        self.mdt = copy.deepcopy(model)
        for block in [*self.mdt.blocks, *self.mdt.sideblocks]:
            block.attn = PlainAttention(block.attn)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        label_noise: Tensor | None = None,
        draw: Draw = NO_DRAW,
    ) -> Tensor:
        mdt = self.mdt
        x, c = mdt.embed(x, t, y, label_noise)
        kept = draw.kept
        x, ids_keep = (x, None) if kept is None else (kept.leave(x), kept.ids_keep)
        for block in mdt.blocks[: -mdt.decode_layer]:
            x = block(x, c, ids_keep)
        if kept is not None:
            x = kept.come_back(x, mdt.mask_token) + mdt.decoder_pos_embed
            dropped = kept.dropped[..., None].float()
            x = mdt.sideblocks[0](x, c, None) * dropped + x * (1 - dropped)
        else:
            x = x + mdt.decoder_pos_embed
        for block in mdt.blocks[-mdt.decode_layer :]:
            x = block(x, c, None)
        return mdt.unpatchify(mdt.final_layer(x, c))

    def guided(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """x: (2N, C, H, W), two equal halves; y: (2N,), null in the second. Returns (2N, C_out, H, W)."""
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :3].chunk(2)
        weight = power_cosine_weight(t[: len(half)], cfg_scale)[:, None, None, None]
        eps = uncond + weight * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), out[:, 3:]], dim=1)


class PlainTraining:
    """Training step by step. log_interval is 1, as far as the host's reading of numbers goes."""

    def __init__(self, model: MDT, diffusion: GaussianDiffusion, first_stage: FirstStage, lr: float) -> None:
        self.model = PlainMDT(model).train()
        self.diffusion = diffusion
        self.first_stage = first_stage
        self.schedule_sampler = UniformSampler(diffusion)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0, foreach=False)
        self.averaged = [p.detach().clone() for p in self.model.parameters()]
        self.sums: dict[str, float] = {}

    def step(self, images: Tensor, extras: dict[str, Tensor]) -> None:
        """images: (N, C, H, W), or latents where there is no autoencoder; extras: the draws of each."""
        device = next(self.model.parameters()).device
        draws = {name: value.to(device) for name, value in extras.items()}
        z = self.first_stage.encode(images.to(device), draws.get("posterior"))
        t, weights = self.schedule_sampler.from_uniform(extras["t"], device)
        full = self._losses(z, t, draws, "")
        masked = self._losses(z, t, draws, "m_", draw=self.model.mdt.draw(draws["token_noise"]))
        ((full["loss"] * weights).mean() + (masked["loss"] * weights).mean()).backward()
        self._log(t, {**full, **{f"m_{name}": value for name, value in masked.items()}})
        self._norms()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for average, parameter in zip(self.averaged, self.model.parameters(), strict=True):
            average.mul_(0.9999).add_(parameter.detach(), alpha=1 - 0.9999)

    def _losses(self, z: Tensor, t: Tensor, draws: dict[str, Tensor], prefix: str, **masking: Any) -> dict[str, Tensor]:
        model_kwargs = {"y": draws["y"], "label_noise": draws[f"{prefix}label_noise"], **masking}
        return self.diffusion.training_losses(self.model, z, t, model_kwargs, noise=draws[f"{prefix}noise"])

    def _log(self, t: Tensor, losses: dict[str, Tensor]) -> None:
        for name, values in losses.items():
            for timestep, value in zip(t, values, strict=True):
                quartile = int(4 * timestep.item() / self.diffusion.num_timesteps)
                for key in (name, f"{name}_q{quartile}"):
                    self.sums[key] = self.sums.get(key, 0.0) + value.item()

    def _norms(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                norm = parameter.norm().item() ** 2
                self.sums["param_norm"] = self.sums.get("param_norm", 0.0) + norm
                if parameter.grad is not None:
                    norm = parameter.grad.norm().item() ** 2
                    self.sums["grad_norm"] = self.sums.get("grad_norm", 0.0) + norm

"""Our models for users of ``diffusers``: a pipeline of any of them, and DiT as diffusers' own classes.

    from masked_diffusion.diffusers_format import MaskedDiffusionPipeline
    pipeline = MaskedDiffusionPipeline.from_pretrained("mdt_xl2_diffusers")
    pipeline(["otter", "golden retriever"], guidance_scale=4.0).images[0].save("otter.png")

``scripts/convert_checkpoint.py`` writes such folders.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from masked_diffusion.choices import DISCRETE_OBJECTIVES, GUIDED_CHANNELS
from masked_diffusion.data.class_names import ClassNames, names_by_label
from masked_diffusion.diffusion.guidance import Guidance
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.objectives import EDM
from masked_diffusion.first_stage import ChannelStatistics
from masked_diffusion.models import DiT, create_model
from masked_diffusion.models.backbone import LatentTransformer
from masked_diffusion.models.layers import sincos_position_table
from masked_diffusion.runs.config import DiffusionConfig, RunConfig
from masked_diffusion.sampling.guides import own_away
from masked_diffusion.sampling.image_sampler import Draws
from masked_diffusion.sampling.sampler_config import CONTINUOUS_STEPS, SamplerConfig

# What schedulers of diffusers call the predictions of processes of timesteps.
PREDICTION_TYPES = {"ddpm": ("epsilon", "sample"), "x0": ("sample",), "v": ("v_prediction",)}


class MaskedDiffusionTransformer(ModelMixin, ConfigMixin):
    """MDT, MDTv2, DiT or SiT as a model of diffusers: arguments of :func:`masked_diffusion.models.create_model`."""

    @register_to_config
    def __init__(
        self,
        model: str = "MDT_XL_2",
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        decode_layer: int | None = None,
        policy: str | None = None,
        route: str | None = None,
        choose: str | None = None,
        path_drop: float | None = None,
        mask_ratio: float | None = None,
    ) -> None:
        super().__init__()
        # What was given is registered by now, beside what diffusers notes itself.
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        self.network = create_model(settings.pop("model"), **settings)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
        **view: Any,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """hidden_states: (N, C, H, W); timestep, class_labels: (N,); view: the network's further arguments, such as
        ``draw``, which tokens leave. The sample is (N, C_out, H, W).
        """
        sample = self.network(hidden_states, timestep, class_labels, **view)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


@dataclass(frozen=True)
class _GeneratorDraws:
    """The random numbers of guidance, from where those of the images come. count: of the images."""

    count: int
    generator: torch.Generator | list[torch.Generator] | None

    def randn(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        return randn_tensor((self.count, *shape), generator=self.generator, device=torch.device(device))


class MaskedDiffusionPipeline(DiffusionPipeline):
    """Class-conditional images from a :class:`MaskedDiffusionTransformer`.

    vae: None for models of pixels. class_names: in the order of the labels; for ImageNet its words are known, too.
    channel_mean, channel_std: of the autoencoder's codes, C each, where the model's latents are normalised by them.
    scheduler: as trained, or another one of diffusers that takes the same predictions. objective: what the transformer
    predicts, a name of :data:`masked_diffusion.diffusion.objectives.OBJECTIVES`.
    """

    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: MaskedDiffusionTransformer,
        scheduler: Any,
        # Plain classes, as older diffusers know no other annotations of what may be left out.
        vae: AutoencoderKL = None,
        class_names: list = None,  # type: ignore[assignment]
        objective: str = "ddpm",
        channel_mean: list = None,  # type: ignore[assignment]
        channel_std: list = None,  # type: ignore[assignment]
    ) -> None:
        super().__init__()
        if channel_mean is not None:
            self.register_to_config(channel_mean=list(channel_mean), channel_std=list(channel_std))
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=list(class_names or ()), objective=objective)

    def label(self, item: Any) -> int:
        """A label or the name of a class as a label. Where names are numbers, a number is a name.

        Raises ValueError for what the model does not have.
        """
        num_classes = self.transformer.config.num_classes
        names, row = ClassNames(num_classes, self.config.class_names), None
        if isinstance(item, str):
            row = names.row(item)
        elif isinstance(item, Integral) and not isinstance(item, bool):
            row = names.row_of_number(int(item))
        if row is None:
            known = ", ".join(self.config.class_names[:5])
            raise ValueError(
                f"{item!r}: not one class of this model; labels are 0 ... {num_classes - 1}"
                + (f", names are such as {known}" if known else "")
            )
        return row

    def labels(self, items: Any) -> list[int]:
        """Labels of one or several classes: integers or names, alone, or in a sequence, array or tensor.

        Raises ValueError for what the model does not have, and for none.
        """
        if isinstance(items, Tensor):
            items = items.cpu().numpy()
        listed = items.tolist() if isinstance(items, np.ndarray | np.generic) else items
        if isinstance(listed, str) or not isinstance(listed, Iterable):
            listed = [listed]
        found = [self.label(item.item() if isinstance(item, Tensor) and not item.dim() else item) for item in listed]
        if not found:
            raise ValueError("class_labels: give at least one label or class name")
        return found

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any,
        guidance_scale: float | None = None,
        scale_pow: float = SamplerConfig.scale_pow,
        cfg_channels: int | None = None,
        num_inference_steps: int = SamplerConfig.num_sampling_steps,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guide_from: str = SamplerConfig.guide_from,
        guide_ratio: float | None = SamplerConfig.guide_ratio,
        guide_strong_ratio: float = SamplerConfig.guide_strong_ratio,
        schedule: str | None = None,
        cfg_interval: Sequence[float] | None = SamplerConfig.cfg_interval,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image per entry of class_labels, see :meth:`labels`. The scheduler works in float32 in any case.

        guidance_scale: largest weight. A scale of 1 draws without guidance; None takes the one the model is scored
        with. schedule: weight over time, as ``--guidance``; None is that of the model's family, power_cosine for the
        masked ones and constant for DiT and SiT. scale_pow: of ``power_cosine``, see
        :func:`masked_diffusion.diffusion.guidance.power_cosine_weight`. cfg_interval: of ``interval``, first and last
        timestep, or under ``flow`` and ``edm`` two shares of noise in [0, 1]. cfg_channels: how
        many of the latent's channels are guided; None means three of four under the objective ``ddpm``, as published,
        and else all, as in diffusers' own pipelines. output_type: ``pil``, ``np`` (N, H, W, 3) in [0, 1], ``pt``
        (N, 3, H, W), or ``latent``. guide_from, guide_ratio, guide_strong_ratio: as the flags of
        ``scripts/image_sample.py``; no second checkpoint. Raises ValueError for a class or a kind of guidance that the
        model does not have, and for a scheduler that takes other predictions than the transformer's.
        """
        self._check_scheduler()
        config, device = self.transformer.config, self._execution_device
        y = torch.tensor(self.labels(class_labels), device=device)
        shape = (len(y), config.in_channels, config.input_size, config.input_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self._set_timesteps(num_inference_steps, device)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        guide: dict[str, Any] = {} if schedule is None else {"guidance": schedule}
        guide |= {"guide_from": guide_from, "guide_ratio": guide_ratio, "guide_strong_ratio": guide_strong_ratio}
        guide |= {"cfg_interval": None if cfg_interval is None else [*cfg_interval]}
        draws = _GeneratorDraws(len(y), generator)
        guidance = self._guidance(guidance_scale, cfg_channels, draws, scale_pow=scale_pow, **guide)
        unguided_predict, guided_predict = guidance.unled(self._predict), guidance.lead(self._predict)
        is_idle = guidance.is_idle(self.scheduler.timesteps.cpu()).tolist()
        takes_variance = self._takes_variance()
        scales_input = hasattr(self.scheduler, "scale_model_input")
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        settings = {"generator": generator} if takes_generator else {}
        for t, idle in zip(self.progress_bar(self.scheduler.timesteps), is_idle, strict=True):
            x = self.scheduler.scale_model_input(latents, t) if scales_input else latents
            output = (unguided_predict if idle else guided_predict)(x, t.to(device).expand(len(y)), y)
            output = output if takes_variance else output[:, : config.in_channels]
            latents = self.scheduler.step(output, t, latents, **settings).prev_sample
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_scheduler(self) -> None:
        """Raise ValueError where the scheduler would read the network's output as something else than it is."""
        objective, name = self.config.objective, type(self.scheduler).__name__
        prediction = getattr(self.scheduler.config, "prediction_type", None)
        if objective == "flow":
            fits = name.startswith("FlowMatch") or prediction == "flow_prediction"
        elif objective == "edm":
            fits = name.startswith("EDM") and prediction == "epsilon"
        else:
            fits = not name.startswith("EDM") and prediction in PREDICTION_TYPES[objective]
        if not fits:
            raise ValueError(
                f"{name} with prediction_type {prediction}: it does not take the predictions of objective {objective}; "
                "keep the pipeline's own scheduler, or make another one with from_config(pipeline.scheduler.config)"
            )

    def _set_timesteps(self, num_steps: int, device: torch.device) -> None:
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # By itself it would space the steps down to 1 / num_train_timesteps instead of 0.
            sigmas = np.linspace(1, 0, num_steps + 1)[:-1].tolist()
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_steps, device=device)

    def _guidance(
        self, guidance_scale: float | None, cfg_channels: int | None, draws: Draws, **settings: Any
    ) -> Guidance:
        """The guidance that the model is scored with, but for what the caller asks for."""
        config, objective = self.transformer.config, self.config.objective
        if settings["guide_from"] == "checkpoint":
            raise ValueError(
                "guide_from checkpoint: this pipeline has one model; sample with scripts/image_sample.py, or choose "
                "null_label, path_drop, masked or routed"
            )
        asked = {} if guidance_scale is None else {"cfg_scale": guidance_scale}
        sampler = SamplerConfig.of_family(config.model, cfg_cond=True, **settings, **asked)
        away = None
        if sampler.guide_from != "null_label":
            network, device = self.transformer.network, self._execution_device
            new_away, _ = own_away(sampler, network, config.mask_ratio, "this model", device, "guide_from")
            away = new_away(draws)
        steps = self.scheduler.config.num_train_timesteps if objective in DISCRETE_OBJECTIVES else None
        guidance = sampler.build_guidance(config.num_classes, steps, away)
        if cfg_channels is None:
            three_of_four = objective == "ddpm" and config.in_channels == GUIDED_CHANNELS + 1
            cfg_channels = GUIDED_CHANNELS if three_of_four else config.in_channels
        guidance = dataclasses.replace(guidance, channels=cfg_channels)
        if objective != "edm":
            return guidance
        edm = ObjectiveConfig(objective="edm", sigma_data=self.scheduler.config.sigma_data)
        return guidance.at(EDM(edm, DiffusionConfig().build).timesteps)

    def _takes_variance(self) -> bool:
        """Whether the scheduler uses the network's variance channels; the others get its first channels alone."""
        if getattr(self.scheduler.config, "variance_type", None) not in ("learned", "learned_range"):
            return False
        if isinstance(self.scheduler, DDPMScheduler):
            return True
        # A solver made of our scheduler's configuration inherits this word, and would cut channels for it.
        self.scheduler.register_to_config(variance_type=None)
        return False

    def _predict(self, x: Tensor, t: Tensor, y: Tensor, **view: Any) -> Tensor:
        return self.transformer(x.to(self.transformer.dtype), t, y, return_dict=False, **view)[0].float()

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        statistics = ChannelStatistics.recorded(self.config)
        if statistics is not None:
            mean, std = (latents.new_tensor(numbers).view(-1, 1, 1) for numbers in statistics)
            latents = latents * std + mean
        if self.vae is not None:
            if statistics is None:
                shift = getattr(self.vae.config, "shift_factor", None) or 0.0
                latents = latents / self.vae.config.scaling_factor + shift
            latents = self.vae.decode(latents.to(self.vae.dtype)).sample.float()
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays


def check_timesteps(config: RunConfig) -> None:
    """Raise ValueError for an objective that diffusers' classes of DiT would take for another one."""
    if not config.objective.is_discrete:
        raise ValueError(
            f"--diffusers_class: diffusers' classes of DiT serve the timesteps of a process, and this model is of "
            f"--objective {config.objective.objective}; leave the flag out"
        )


def scheduler_of(
    process: DiffusionConfig, objective: ObjectiveConfig
) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler | EDMEulerScheduler:
    """The objective's scheduler in diffusers: Euler's method where levels are continuous, as ``--sampler euler``.

    Of a process it is DDPM, on the timesteps that our respacing chooses. Raises ValueError for an objective that no
    scheduler serves.
    """
    if objective.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=CONTINUOUS_STEPS, shift=objective.time_shift)
    if objective.objective == "edm":
        return EDMEulerScheduler(
            sigma_min=EDM.SIGMA_MIN,
            sigma_max=EDM.SIGMA_MAX,
            sigma_data=objective.sigma_data,
            rho=EDM.RHO,
            num_train_timesteps=CONTINUOUS_STEPS,
        )
    if objective.objective not in PREDICTION_TYPES:
        raise ValueError(
            f"--objective {objective.objective}: no scheduler of diffusers takes its predictions; sample it with "
            "scripts/image_sample.py"
        )
    fixed = "fixed_small" if process.sigma_small else "fixed_large"
    variance_type = "learned_range" if process.learn_sigma else fixed
    return DDPMScheduler(
        **_scheduler_settings(process, objective.objective), variance_type=variance_type, timestep_spacing="linspace"
    )


def _scheduler_settings(process: DiffusionConfig, objective: str) -> dict[str, Any]:
    """What all schedulers of diffusers call the same."""
    schedules = {"linear": "linear", "squaredcos_cap_v2": "squaredcos_cap_v2", "cosine": "squaredcos_cap_v2"}
    scale = 1000 / process.diffusion_steps
    return {
        "num_train_timesteps": process.diffusion_steps,
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "beta_schedule": schedules[process.noise_schedule],
        "prediction_type": PREDICTION_TYPES[objective][process.predict_xstart if objective == "ddpm" else 0],
        "clip_sample": False,
    }


def pipeline_of(model: LatentTransformer, config: RunConfig, vae: AutoencoderKL | None) -> MaskedDiffusionPipeline:
    """A trained model with everything around it, to be called or saved with ``save_pretrained``."""
    alike = (
        "model",
        "in_channels",
        "num_classes",
        "learn_sigma",
        "policy",
        "route",
        "choose",
        "path_drop",
        "mask_ratio",
    )
    settings = {name: getattr(config.model, name) for name in alike}
    settings |= {"input_size": config.model.latent_shape[-1], "decode_layer": model.decode_layer or None}
    transformer = MaskedDiffusionTransformer(**settings)
    transformer.network.load_state_dict(model.state_dict())
    statistics = ChannelStatistics.recorded(config.first_stage)
    return MaskedDiffusionPipeline(
        transformer.eval(),
        scheduler_of(config.diffusion, config.objective),
        vae,
        config.class_names,
        config.objective.objective,
        *(statistics or ()),
    )


# -- DiT as diffusers' own classes -------------------------------------------------------------------------------------

# Ours -> theirs. A block's attention and conditioning are below.
_BLOCK_NAMES = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_OUTER_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_CONDITIONING_NAMES = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}

DIT_PIPELINE_NULL = 1000  # written out in its code


def diffusers_dit(model: DiT) -> DiTTransformer2DModel:
    """A DiT as the class of diffusers, which has a copy of the conditioning in each block.

    Raises ValueError where the positions are not those that diffusers computes.
    """
    table = sincos_position_table(model.pos_embed.shape[-1], model.grid_size)
    if not torch.allclose(model.pos_embed[0], torch.from_numpy(table).float(), atol=1e-4):
        raise ValueError("the positions of this DiT are not the sin-cos table, which diffusers computes by itself")
    attention: Any = model.get_submodule("blocks.0.attn")
    theirs = DiTTransformer2DModel(
        num_attention_heads=attention.num_heads,
        attention_head_dim=attention.proj.in_features // attention.num_heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.grid_size * model.patch_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(_diffusers_state(model))
    use_dit_frequencies(theirs)
    return theirs.eval()


def dit_pipeline_of(model: DiT, config: RunConfig, vae: AutoencoderKL | None) -> DiTPipeline:
    """A DiT in diffusers' own pipeline, with DDIM, as that pipeline leaves the variance out.

    Its first step is at the noisiest timestep, and each ends where the next one starts, which diffusers' DDIM does with
    ``trailing`` timesteps alone. Raises ValueError for a model or autoencoder that the pipeline cannot serve.
    """
    check_timesteps(config)
    if model.num_classes != DIT_PIPELINE_NULL:
        raise ValueError(
            f"DiTPipeline takes {DIT_PIPELINE_NULL} for the null class, so it serves models of {DIT_PIPELINE_NULL} "
            f"classes, and this one has {model.num_classes}; use MaskedDiffusionPipeline"
        )
    if vae is None or getattr(vae.config, "shift_factor", None) or ChannelStatistics.recorded(config.first_stage):
        lacking = "an autoencoder" if vae is None else "latents without a shift"
        raise ValueError(f"DiTPipeline needs {lacking}; use MaskedDiffusionPipeline")
    scheduler = DDIMScheduler(
        **_scheduler_settings(config.diffusion, config.objective.objective), timestep_spacing="trailing"
    )
    names = {
        label: ", ".join(names) for label, names in enumerate(names_by_label(model.num_classes, config.class_names))
    }
    pipeline = DiTPipeline(diffusers_dit(model), vae, scheduler, id2label=names)
    pipeline.register_to_config(id2label=names)  # it does not do so itself, and would lose them when it is saved
    return pipeline


def use_dit_frequencies(transformer: DiTTransformer2DModel) -> None:
    """Let a transformer of diffusers embed timesteps as DiT does.

    Of the 128 frequencies, 10000^(-k / 128) in DiT, diffusers makes 10000^(-k / 127), and no setting in its files says
    otherwise: a transformer that ``from_pretrained`` has made needs this to give DiT's own numbers.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0


def _diffusers_state(model: DiT) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def put(prefix: str, name: str) -> None:
        state.update({f"{prefix}.{kind}": value for kind, value in modules[name].state_dict().items()})

    for ours, name in _OUTER_NAMES.items():
        put(name, ours)
    for i in range(len(model.blocks)):
        prefix = f"transformer_blocks.{i}"
        for ours, name in _BLOCK_NAMES.items():
            put(f"{prefix}.{name}", f"blocks.{i}.{ours}")
        for ours, name in _CONDITIONING_NAMES.items():
            put(f"{prefix}.norm1.emb.{name}", ours)
        for kind, value in modules[f"blocks.{i}.attn.qkv"].state_dict().items():
            for part, name in zip(value.chunk(3), ("to_q", "to_k", "to_v"), strict=True):
                state[f"{prefix}.attn1.{name}.{kind}"] = part
    return state

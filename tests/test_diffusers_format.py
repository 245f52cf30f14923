"""Our models through the classes of diffusers: the same numbers."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from golden_arrays import set_golden_weights
from sklearn.datasets import load_digits
from test_first_stage import save_tiny_autoencoder

from masked_diffusion import create_diffusion
from masked_diffusion.diffusers_format import (
    MaskedDiffusionPipeline,
    diffusers_dit,
    dit_pipeline_of,
    pipeline_of,
    scheduler_of,
    use_dit_frequencies,
)
from masked_diffusion.diffusion import samplers
from masked_diffusion.diffusion.guidance import Guidance, NullLabel, power_cosine_weight
from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.first_stage import ChannelStatistics, PixelSpace, load_first_stage
from masked_diffusion.models.layers import sincos_position_table
from masked_diffusion.randomness import key_bytes
from masked_diffusion.runs.config import DiffusionConfig, ModelConfig, RunConfig
from masked_diffusion.runs.request import Request
from masked_diffusion.sampling.guides import open_away
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.pictures import to_uint8
from masked_diffusion.sampling.sampler_config import SamplerConfig

NAMES = ["cat", "dog", "otter"]


def trained(name="MDT_Ti_2", process=None, objective=ObjectiveConfig(), **kwargs):  # noqa: B008  (frozen)
    """A model of random weights and its configuration."""
    settings = {"image_size": 16, "downsample": 2, "in_channels": 4, "num_classes": 3, "decode_layer": 2, **kwargs}
    model_config, process = ModelConfig(name, **settings), process or DiffusionConfig()
    config = RunConfig(model_config, process, {}, class_names=NAMES, objective=objective)
    model = set_golden_weights(config.model.build()).eval()
    for parameter in model.parameters():
        parameter.data *= 0.3  # of a size with which a long loop stays finite
    if name.startswith(("DiT", "SiT")):
        model.pos_embed.data.copy_(torch.from_numpy(sincos_position_table(128, 4)))
    return model.requires_grad_(False), config


def drawn_by_us(model, config, y, steps, cfg_scale=None, scale_pow=0.0):
    diffusion = dataclasses.replace(config.diffusion, timestep_respacing=str(steps)).build()
    total, denoise = config.diffusion.diffusion_steps, model
    if cfg_scale is not None:
        weight = partial(power_cosine_weight, cfg_scale=cfg_scale, diffusion_steps=total, scale_pow=scale_pow)
        denoise = Guidance(NullLabel(3), weight).lead(model)
    torch.manual_seed(0)
    noise = torch.randn(len(y), *config.model.latent_shape)
    return diffusion.p_sample_loop(denoise, noise.shape, noise, clip_denoised=False, model_kwargs={"y": y})


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CASES = {
    "MDT": ("MDT_Ti_2", DiffusionConfig()),
    "MDTv2": ("MDTv2_Ti_2", DiffusionConfig()),
    "DiT": ("DiT_Ti_2", DiffusionConfig()),
    "cosine": ("MDT_Ti_2", DiffusionConfig(noise_schedule="cosine")),
    "100 steps": ("MDT_Ti_2", DiffusionConfig(diffusion_steps=100)),
    "x0": ("MDT_Ti_2", DiffusionConfig(learn_sigma=False, predict_xstart=True, sigma_small=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_draws_what_our_sampler_draws_with_class_names(case):
    name, process = CASES[case]
    model, config = trained(name, process, learn_sigma=process.learn_sigma)
    scale_pow = 0.0 if name.startswith("DiT") else 4.0
    expected = drawn_by_us(model, config, torch.tensor([2, 0]), 7, cfg_scale=2.5, scale_pow=scale_pow)
    pipeline = quiet(pipeline_of(model, config, None))
    torch.manual_seed(0)
    images = pipeline(["Otter", 0], guidance_scale=2.5, num_inference_steps=7, output_type="latent").images
    assert_close(images, expected)
    torch.manual_seed(0)
    plain = pipeline([2, "cat"], guidance_scale=1, num_inference_steps=7, output_type="latent").images
    assert_close(plain, drawn_by_us(model, config, torch.tensor([2, 0]), 7))


@pytest.mark.parametrize("kind", ["path_drop", "masked", "routed"])
def test_the_pipeline_guides_with_one_model_as_our_sampler_does(kind):
    """The draws of both come from one generator, and the noise before them."""
    policy = {"policy": "sprint", "mask_ratio": 0.5} if kind == "path_drop" else {"mask_ratio": 0.5}
    model, config = trained(**policy)
    settings = {"guide_strong_ratio": 0.25} if kind == "routed" else {}
    sampler = SamplerConfig(7, cfg_cond=True, cfg_scale=2.5, guide_from=kind, **settings)

    class Draws:
        def randn(self, shape, device):
            return torch.randn(2, *shape)

    away = open_away(sampler, model, config, "", Request(), "cpu")[0](Draws())
    process = dataclasses.replace(config.diffusion, timestep_respacing="7").build()
    guidance = sampler.build_guidance(3, 1000, away)
    torch.manual_seed(0)
    noise, y = torch.randn(2, *config.model.latent_shape), torch.tensor([2, 0])
    idle = guidance.is_idle(torch.tensor(process.timestep_map)).tolist()

    def denoise(x, t, y):
        led = guidance.unled(model) if idle[process.timestep_map.index(int(t[0]))] else guidance.lead(model)
        return led(x, t, y)

    expected = process.p_sample_loop(denoise, noise.shape, noise, clip_denoised=False, model_kwargs={"y": y})
    pipeline = quiet(pipeline_of(model, config, None))
    torch.manual_seed(0)
    settings |= {"guidance_scale": 2.5, "num_inference_steps": 7, "output_type": "latent", "guide_from": kind}
    assert_close(pipeline([2, 0], **settings).images, expected)


def test_the_pipeline_refuses_guidance_that_it_cannot_have():
    pipeline = quiet(pipeline_of(*trained(), None))
    for kind, sentence in (
        ("checkpoint", "guide_from checkpoint: this pipeline has one model"),
        ("path_drop", "guide_from path_drop: this model is trained without dropping paths"),
        ("masked", "guide_from masked: nothing says how this model was masked; give --guide_ratio"),
    ):
        with pytest.raises(ValueError, match=sentence):
            pipeline([0], guide_from=kind)
    with pytest.raises(ValueError, match="--cfg_interval 470-80: give the smaller one first"):
        pipeline([0], schedule="interval", cfg_interval=(470, 80))


@pytest.mark.parametrize("objective", ["x0", "v"])
def test_the_pipeline_draws_what_our_sampler_draws_under_another_objective(objective):
    model, config = trained(process=DiffusionConfig(learn_sigma=False), learn_sigma=False)
    config = dataclasses.replace(config, objective=ObjectiveConfig(objective=objective))
    process = config.build_objective(7).process
    torch.manual_seed(0)
    noise, y = torch.randn(2, *config.model.latent_shape), torch.tensor([2, 0])
    expected = process.p_sample_loop(model, noise.shape, noise, clip_denoised=False, model_kwargs={"y": y})
    pipeline = quiet(pipeline_of(model, config, None))
    torch.manual_seed(0)
    assert_close(pipeline([2, 0], guidance_scale=1, num_inference_steps=7, output_type="latent").images, expected)


# Of each objective: the sampler that its scheduler in diffusers is, and settings that matter there.
OBJECTIVES = {
    "ddpm": ("ddpm", {}),
    "x0": ("ddpm", {}),
    "v": ("ddpm", {}),
    "flow": ("euler", {"time_shift": 2.0}),
    "edm": ("euler", {"sigma_data": 0.7}),
}


def trained_under(objective, name="MDT_Ti_2", **kwargs):
    settings = ObjectiveConfig(objective=objective, **OBJECTIVES[objective][1])
    return trained(name, DiffusionConfig(learn_sigma=False), settings, learn_sigma=False, **kwargs)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("objective, name", [*((name, "MDT_Ti_2") for name in OBJECTIVES), ("flow", "SiT_Ti_2")])
def test_a_loaded_pipeline_draws_our_samplers_images_under_every_objective(tmp_path, objective, name, scale):
    """Within one grey level, from the same noise with as many steps. All channels are guided, but three under ddpm."""
    model, config = trained_under(objective, name)
    vae_path = save_tiny_autoencoder(tmp_path / "vae")
    pipeline_of(model, config, AutoencoderKL.from_pretrained(vae_path)).save_pretrained(tmp_path / "pipeline")
    pipeline = quiet(MaskedDiffusionPipeline.from_pretrained(tmp_path / "pipeline"))
    settings = {"cfg_cond": True, "cfg_scale": scale, "cfg_channels": config.objective.guided_channels, "seed": 5}
    sampler = SamplerConfig.of_family(name, num_sampling_steps=8, **{**settings, "sampler": OBJECTIVES[objective][0]})
    # diffusers takes torch's generators, which stream 1 drew from.
    ours = ImageSampler(model, config, sampler, load_first_stage(str(vae_path), "cpu"), "cpu", stream=1)
    seeds = [int.from_bytes(key_bytes(5, "noise", i)[:8], "big") for i in range(2)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline([2, 0], scale, num_inference_steps=8, generator=generators, output_type="pt").images
    expected = ours(range(2), [2, 0]).astype(int)
    assert np.abs(to_uint8(images * 2 - 1) - expected).max() <= 1
    assert expected.std() > 12 and np.abs(expected[0] - expected[1]).mean() > 5


@pytest.mark.parametrize(
    "objective, settings",
    [
        ("ddpm", {"guidance": "interval", "cfg_interval": [100, 700]}),
        ("x0", {"guidance": "linear"}),
        ("v", {"guidance": "beta:2,4"}),
        ("flow", {"guidance": "interval", "cfg_interval": [0.1, 0.7]}),
        ("edm", {"guidance": "interval", "cfg_interval": [0.1, 0.7]}),
    ],
)
def test_the_pipeline_takes_each_weight_over_time_as_our_sampler_does(objective, settings):
    model, config = trained_under(objective)
    sampler = SamplerConfig(
        8,
        OBJECTIVES[objective][0],
        cfg_cond=True,
        cfg_scale=3.0,
        cfg_channels=config.objective.guided_channels,
        **settings,
    )
    ours = ImageSampler(model, config, sampler, PixelSpace(4), "cpu", stream=1)
    seeds = [int.from_bytes(key_bytes(0, "noise", i)[:8], "big") for i in range(2)]
    arguments = {"num_inference_steps": 8, "output_type": "latent", "cfg_interval": settings.get("cfg_interval")}
    images, of_family = (
        quiet(pipeline_of(model, config, None))(
            [2, 0], 3.0, generator=[torch.Generator().manual_seed(seed) for seed in seeds], schedule=name, **arguments
        ).images
        for name in (settings["guidance"], None)
    )
    expected = samplers.last(ours.states(range(2), [2, 0])).float()
    assert_close(images, expected)
    assert (of_family - expected).abs().max() > 100 * (images - expected).abs().max()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_scheduler_that_reads_other_predictions_is_refused(objective):
    pipeline = quiet(pipeline_of(*trained_under(objective), None))
    schedulers = {other: pipeline_of(*trained_under(other), None).scheduler for other in OBJECTIVES}
    for other, scheduler in schedulers.items():
        pipeline.scheduler = scheduler
        if other == objective or (objective, other) == ("ddpm", "x0"):  # the published --predict_xstart
            pipeline([0], num_inference_steps=1, output_type="latent")
            continue
        with pytest.raises(ValueError, match=f"it does not take the predictions of objective {objective}"):
            pipeline([0], num_inference_steps=1, output_type="latent")


def test_a_pipeline_of_flow_takes_a_solver_of_flows():
    pipeline = quiet(pipeline_of(*trained_under("flow"), None))
    pipeline.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    assert pipeline([1], num_inference_steps=4, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("objective, channels", [("ddpm", 4), ("ddpm", 16), ("ddpm", 1), ("flow", 4), ("edm", 16)])
def test_all_channels_are_guided_but_of_four_under_ddpm(objective, channels):
    pipeline = quiet(pipeline_of(*trained_under(objective, in_channels=channels), None))
    latents = []
    for cfg_channels in (None, channels):
        arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        latents.append(pipeline([1], 4.0, 0.01, cfg_channels=cfg_channels, **arguments).images)
    assert torch.equal(*latents) == ((objective, channels) != ("ddpm", 4))


@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_diffusers_own_pipeline_of_dit_is_refused_for_what_has_no_timesteps(objective):
    model, config = trained_under(objective, "DiT_Ti_2")
    with pytest.raises(ValueError, match=f"this model is of --objective {objective}; leave the flag out"):
        dit_pipeline_of(model, config, None)


@pytest.mark.parametrize("name, plain", [("MDT_Ti_2", 24), ("DiT_Ti_2", 0)])
def test_where_the_weight_is_1_the_unconditional_half_is_not_computed(name, plain):
    model, config = trained(name)
    pipeline = quiet(pipeline_of(model, config, None))
    sizes = []
    pipeline.transformer.network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    pipeline([0, 1], guidance_scale=3.8, num_inference_steps=250, output_type="latent")
    assert len(sizes) == 250 and sizes.count(2) == plain and sizes.count(4) == 250 - plain
    sizes.clear()
    pipeline([0, 1], guidance_scale=1, num_inference_steps=3, output_type="latent")
    assert sizes == [2, 2, 2]


def test_a_fourth_channel_is_guided_where_it_is_asked_for():
    pipeline = quiet(pipeline_of(*trained(), None))
    images = []
    for channels in (3, 4):
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        torch.manual_seed(0)
        arguments = {"guidance_scale": 4.0, "scale_pow": 0.01, "num_inference_steps": 1, "output_type": "latent"}
        images.append(pipeline([1], cfg_channels=channels, **arguments).images)
    assert torch.equal(images[0][:, :3], images[1][:, :3]) and not torch.equal(images[0][:, 3], images[1][:, 3])


def test_latents_that_are_normalised_by_channel_are_decoded_as_our_sampler_decodes_them(tmp_path):
    path = save_tiny_autoencoder(tmp_path / "vae")
    first_stage = load_first_stage(str(path), "cpu")
    first_stage.normalise(ChannelStatistics((0.1, -0.2, 0.3, 0.0), (0.5, 1.5, 2.0, 1.0)))
    model, config = trained()
    config = dataclasses.replace(config, first_stage=first_stage.description)
    pipeline_of(model, config, first_stage.vae).save_pretrained(tmp_path / "pipeline")
    pipeline = quiet(MaskedDiffusionPipeline.from_pretrained(tmp_path / "pipeline"))
    arguments = {"class_labels": [1, 2], "guidance_scale": 1, "num_inference_steps": 2}
    torch.manual_seed(0)
    latents = pipeline(**arguments, output_type="latent").images
    torch.manual_seed(0)
    images = pipeline(**arguments, output_type="pt").images
    assert_close(images, (first_stage.decode(latents) / 2 + 0.5).clamp(0, 1))
    with pytest.raises(ValueError, match="DiTPipeline needs latents without a shift"):
        dit, _ = trained("DiT_Ti_2", num_classes=1000, decode_layer=None)
        dit_pipeline_of(dit, config, AutoencoderKL.from_pretrained(save_tiny_autoencoder(tmp_path / "b", 1.0, None)))


def test_pixels_that_are_normalised_by_channel_are_drawn_in_their_own_range(tmp_path):
    pixels = PixelSpace(4)
    pixels.normalise(ChannelStatistics((0.1, -0.2, 0.3, 0.0), (0.5, 1.5, 2.0, 1.0)))
    model, config = trained()
    pipeline_of(model, dataclasses.replace(config, first_stage=pixels.description), None).save_pretrained(tmp_path)
    pipeline = quiet(MaskedDiffusionPipeline.from_pretrained(tmp_path))
    arguments = {"class_labels": [1, 2], "guidance_scale": 1, "num_inference_steps": 2}
    torch.manual_seed(0)
    latents = pipeline(**arguments, output_type="latent").images
    torch.manual_seed(0)
    images = pipeline(**arguments, output_type="pt").images
    assert_close(images, (pixels.decode(latents) / 2 + 0.5).clamp(0, 1))
    assert not torch.allclose(images, (latents / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 100, 250, 500, 1000])
def test_the_scheduler_takes_the_timesteps_of_our_respacing(steps):
    scheduler = scheduler_of(DiffusionConfig(), ObjectiveConfig())
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == create_diffusion(str(steps)).timestep_map[::-1]


def test_a_saved_pipeline_is_the_same_when_it_is_loaded_again(tmp_path):
    vae = AutoencoderKL.from_pretrained(save_tiny_autoencoder(tmp_path / "vae"))
    model, config = trained("MDTv2_Ti_2", mask_ratio=0.3)
    saved = quiet(pipeline_of(model, config, vae))
    saved.save_pretrained(tmp_path / "pipeline")
    loaded = quiet(MaskedDiffusionPipeline.from_pretrained(tmp_path / "pipeline"))
    images = []
    for pipeline in (saved, loaded):
        generator = torch.Generator().manual_seed(3)
        images.append(pipeline(["dog"], num_inference_steps=3, generator=generator, output_type="np").images)
    assert images[0].shape == (1, 16, 16, 3) and images[0].std() > 0
    np.testing.assert_allclose(*images, atol=1e-6)  # where weights lie in memory decides the order of some sums
    [picture] = loaded(["dog"], num_inference_steps=1).images
    assert picture.size == (16, 16)


def test_another_scheduler_of_diffusers_takes_its_place():
    model, config = trained()
    pipeline = quiet(pipeline_of(model, config, None))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert pipeline([1], num_inference_steps=4, output_type="pt").images.isfinite().all()


class ExactDigits(torch.nn.Module):
    """The exact noise prediction for data that is normal around each digit's mean image, and in ``null`` around all."""

    SPREAD = 0.15

    def __init__(self):
        super().__init__()
        digits = load_digits()
        means = [digits.images[digits.target == label].mean(axis=0) / 8 - 1 for label in range(10)]
        self.means: torch.Tensor
        self.register_buffer("means", torch.tensor(np.array([*means, np.mean(means, axis=0)])).float()[:, None])
        self.log_alphas = torch.from_numpy(np.log(create_diffusion("").alphas_cumprod))

    def forward(self, x, t, y):
        low = t.double().floor().clamp(0, 998).long()
        alpha_bar = torch.lerp(self.log_alphas[low], self.log_alphas[low + 1], t.double() - low).exp()
        alpha_bar = alpha_bar.float().view(-1, 1, 1, 1)
        offset = x - alpha_bar.sqrt() * self.means[y]
        return offset * (1 - alpha_bar).sqrt() / (1 - alpha_bar + alpha_bar * self.SPREAD**2)

    def read(self, latents):
        return (latents[:, None] - self.means[None, :10]).square().flatten(2).sum(2).argmin(1)


SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_scheduler_of_diffusers_draws_digits_that_can_be_read(scheduler):
    model, config = trained(image_size=8, downsample=1, in_channels=1, num_classes=10, learn_sigma=False)
    process = DiffusionConfig(learn_sigma=False)
    pipeline = quiet(pipeline_of(model, dataclasses.replace(config, diffusion=process), None))
    pipeline.transformer.network = exact = ExactDigits()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    labels = torch.arange(100) % 10
    generator = torch.Generator().manual_seed(0)
    settings = {"guidance_scale": 1, "num_inference_steps": 50, "output_type": "latent", "generator": generator}
    latents = pipeline(labels, **settings).images
    assert (exact.read(latents) == labels).float().mean() >= 0.9
    assert (latents - exact.means[labels]).std() == pytest.approx(exact.SPREAD, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_draw_nearly_what_full_precision_draws(tmp_path, dtype):
    vae = AutoencoderKL.from_pretrained(save_tiny_autoencoder(tmp_path / "vae"))
    pipeline_of(*trained(), vae).save_pretrained(tmp_path / "pipeline")
    images = []
    for settings in ({}, {"torch_dtype": dtype}):
        pipeline = quiet(MaskedDiffusionPipeline.from_pretrained(tmp_path / "pipeline", **settings))
        assert pipeline.transformer.dtype == pipeline.vae.dtype == settings.get("torch_dtype", torch.float32)
        generator = torch.Generator().manual_seed(0)
        arguments = {"num_inference_steps": 5, "output_type": "np", "generator": generator}
        images.append(pipeline(["dog"], **arguments).images)
    assert images[1].dtype == np.float32 and images[0].std() > 0
    assert np.abs(images[0] - images[1]).mean() < 0.1 * images[0].std()


@pytest.mark.parametrize(
    "labels, expected",
    [
        (1, [1]),
        ("dog", [1]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        ([np.int32(1), torch.tensor(0), "cat"], [1, 0, 0]),
        (np.array([0, 2]), [0, 2]),
        (np.array(["otter", "cat"]), [2, 0]),
        (torch.tensor([2, 1], dtype=torch.int32), [2, 1]),
        (range(3), [0, 1, 2]),
    ],
)
def test_labels_may_be_of_any_kind(labels, expected):
    assert pipeline_of(*trained(), None).labels(labels) == expected


@pytest.mark.parametrize("item", ["lion", 3, -1, 1.0, True, None, np.float32(1), torch.tensor(0.5), [0]])
def test_a_class_that_the_model_does_not_have_is_refused(item):
    pipeline = pipeline_of(*trained(), None)
    with pytest.raises(ValueError, match="not one class of this model; labels are 0 ... 2"):
        pipeline([item])


def test_where_names_are_numbers_a_number_is_a_name():
    model, config = trained()
    pipeline = pipeline_of(model, dataclasses.replace(config, class_names=["5", "7", "11"]), None)
    assert [pipeline.label(item) for item in (7, "11", 5)] == [1, 2, 0]
    with pytest.raises(ValueError, match="^1: not one class of this model; .* names are such as 5, 7, 11"):
        pipeline.label(1)


def test_no_class_at_all_is_refused():
    with pytest.raises(ValueError, match="class_labels: give at least one"):
        pipeline_of(*trained(), None)([])


# -- DiT as diffusers' own class ---------------------------------------------------------------------------------------


def test_diffusers_transformer_predicts_what_our_dit_predicts(tmp_path):
    model, _ = trained("DiT_Ti_2")
    theirs = diffusers_dit(model)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([0, 2, 3])
    torch.testing.assert_close(theirs(x, timestep=t, class_labels=y).sample, model(x, t, y), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    # What a folder cannot say: see the docstring of use_dit_frequencies.
    assert not torch.allclose(loaded(x, timestep=t, class_labels=y).sample, model(x, t, y), rtol=1e-2)
    use_dit_frequencies(loaded)
    torch.testing.assert_close(loaded(x, timestep=t, class_labels=y).sample, model(x, t, y), rtol=1e-4, atol=1e-5)


def test_a_dit_whose_positions_are_not_the_table_is_refused():
    model, _ = trained("DiT_Ti_2")
    model.pos_embed.data += 0.1
    with pytest.raises(ValueError, match="positions"):
        diffusers_dit(model)


def baseline(folder, num_classes=1000, steps=30):
    """A DiT behind the tiny autoencoder, with a process so short that all of its steps are sampled."""
    path = save_tiny_autoencoder(folder / "vae", shift_factor=None)
    model, config = trained("DiT_Ti_2", DiffusionConfig(diffusion_steps=steps), num_classes=num_classes)
    return model, dataclasses.replace(config, class_names=[]), path


@pytest.mark.parametrize("scale", [1, 4.0])
def test_diffusers_own_pipeline_draws_what_our_sampler_draws(tmp_path, scale):
    """``--sampler ddim --guidance constant --cfg_channels 4``, from the folder that diffusers loads by itself."""
    model, config, vae_path = baseline(tmp_path)
    dit_pipeline_of(model, config, AutoencoderKL.from_pretrained(vae_path)).save_pretrained(tmp_path / "pipeline")
    theirs = quiet(DiTPipeline.from_pretrained(tmp_path / "pipeline"))
    use_dit_frequencies(theirs.transformer)
    settings = {"cfg_cond": True, "guidance": "constant", "cfg_scale": scale, "cfg_channels": 4, "seed": 5}
    first_stage = load_first_stage(str(vae_path), "cpu")
    # diffusers takes torch's generators, which stream 1 drew from.
    ours = ImageSampler(model, config, SamplerConfig(30, "ddim", **settings), first_stage, "cpu", stream=1)
    labels, indices = [207, 0, 999], range(3)
    seeds = [int.from_bytes(key_bytes(5, "noise", i)[:8], "big") for i in indices]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"generator": generators, "num_inference_steps": 30, "output_type": "pt"}
    images = theirs(labels, guidance_scale=scale, **arguments).images
    state = list(ours.states(indices, labels))[-1].sample
    torch.testing.assert_close(images, (first_stage.decode(state) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert images.std() > 0.05 and (images[0] - images[1]).abs().mean() > 0.05


@pytest.mark.parametrize("scale, steps", [(1, 50), (4.0, 50), (4.0, 7)])
def test_on_a_long_process_both_pipelines_draw_the_same(tmp_path, scale, steps):
    model, config, vae_path = baseline(tmp_path, steps=1000)
    vae = AutoencoderKL.from_pretrained(vae_path)
    theirs, ours = quiet(dit_pipeline_of(model, config, vae)), quiet(pipeline_of(model, config, vae))
    ours.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    images = []
    for pipeline, more in ((theirs, {}), (ours, {"cfg_channels": 4})):
        generator = torch.Generator().manual_seed(3)
        arguments = {"guidance_scale": scale, "num_inference_steps": steps, "generator": generator, **more}
        images.append(pipeline([207, 0], output_type="np", **arguments).images)
    np.testing.assert_allclose(*images, atol=1e-4)


def test_a_loaded_dit_pipeline_knows_imagenets_words_and_takes_other_solvers(tmp_path):
    model, config, vae_path = baseline(tmp_path, steps=1000)
    dit_pipeline_of(model, config, AutoencoderKL.from_pretrained(vae_path)).save_pretrained(tmp_path / "pipeline")
    loaded = quiet(DiTPipeline.from_pretrained(tmp_path / "pipeline"))
    assert loaded.get_label_ids(["golden retriever", "tench", "n02099601"]) == [207, 0, 207]
    loaded.scheduler = DPMSolverMultistepScheduler.from_config(loaded.scheduler.config)
    assert np.isfinite(loaded([207], num_inference_steps=3, output_type="np").images).all()


def test_what_diffusers_dit_pipeline_cannot_serve_is_refused(tmp_path):
    model, config, vae_path = baseline(tmp_path)
    vae = AutoencoderKL.from_pretrained(vae_path)
    with pytest.raises(ValueError, match="DiTPipeline needs an autoencoder"):
        dit_pipeline_of(model, config, None)
    vae.register_to_config(shift_factor=0.1)
    with pytest.raises(ValueError, match="DiTPipeline needs latents without a shift"):
        dit_pipeline_of(model, config, vae)
    with pytest.raises(ValueError, match="takes 1000 for the null class.*and this one has 3"):
        dit_pipeline_of(*trained("DiT_Ti_2"), vae)

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_arrays import set_golden_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from masked_diffusion.diffusion.objective_config import ObjectiveConfig
from masked_diffusion.diffusion.samplers import SAMPLERS
from masked_diffusion.first_stage import PixelSpace, load_first_stage
from masked_diffusion.models.tokens import Draw, KeptTokens
from masked_diffusion.randomness import SampleNoise
from masked_diffusion.runs.config import DiffusionConfig, ModelConfig, RunConfig
from masked_diffusion.sampling.image_sampler import ImageSampler
from masked_diffusion.sampling.inpainting import (
    Inpainting,
    Photo,
    SideInterpolation,
    image_channels,
    interpolated_at_once,
    interpolated_by_halves,
    open_photo,
    side_interpolation,
)
from masked_diffusion.sampling.sampler_config import SamplerConfig

CONFIG = RunConfig(
    model=ModelConfig("MDT_Ti_2", image_size=8, downsample=1, in_channels=3, num_classes=4, mask_ratio=0.3),
    diffusion=DiffusionConfig(),
    first_stage=PixelSpace(3).description,
)


@pytest.fixture(scope="module")
def model():
    return set_golden_weights(CONFIG.model.build()).eval()


CONFIG_V2 = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, model="MDTv2_Ti_2", decode_layer=2))


@pytest.fixture(scope="module")
def model_v2():
    return set_golden_weights(CONFIG_V2.model.build()).eval()


def rectangle(top, left, bottom, right):
    mask = np.zeros((8, 8), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


MASK = rectangle(3, 2, 8, 7)  # cuts through tokens, which are 2 x 2


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Photo(pixels, MASK)


# -- what the sampler is given -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["side", "plain"])
@pytest.mark.parametrize("objective, name", [(o, name) for name, entry in SAMPLERS.items() for o in entry.starts])
def test_known_latents_come_out_as_they_went_in_and_the_hole_is_new(model, photo, objective, name, mode):
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(objective, sigma_data=0.5))
    if objective != "ddpm":
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(CONFIG.model, learn_sigma=False),
            diffusion=dataclasses.replace(CONFIG.diffusion, learn_sigma=False),
        )
        model = set_golden_weights(config.model.build()).eval()
    make = ImageSampler(model, config, SamplerConfig(6, name), PixelSpace(3), "cpu")
    inpainting = photo.inpainting(PixelSpace(3), side_interpolation(model, CONFIG, mode), "cpu")
    final = list(make.states(range(2), [0, 1], inpainting))[-1].sample
    known, hole = inpainting.known, inpainting.hole.expand(2, 3, -1, -1)
    assert torch.equal(final[~hole], known.expand_as(final)[~hole].to(final.dtype))
    assert (final - known)[hole].abs().mean() > 0.1
    assert not torch.equal(final[0], final[1])


class SmallNet(torch.nn.Module):
    """Not zero, and different at every place, timestep and label."""

    def forward(self, x, t, y):
        return torch.tanh(x * (1 + t / 1000).view(-1, 1, 1, 1).float()) + 0.1 * y.view(-1, 1, 1, 1)


@settings(max_examples=80, deadline=None)
@given(
    pair=st.sampled_from([(objective, name) for name, entry in SAMPLERS.items() for objective in entry.starts]),
    steps=st.integers(1, 4),
    hole=st.lists(st.booleans(), min_size=16, max_size=16),
    guided=st.booleans(),
    clip=st.booleans(),
)
def test_under_every_objective_and_sampler_the_known_part_is_kept_to_the_bit(pair, steps, hole, guided, clip):
    objective, name = pair
    model = dataclasses.replace(CONFIG.model, image_size=4, learn_sigma=False)
    process = DiffusionConfig(learn_sigma=False)
    config = RunConfig(model, process, {}, objective=ObjectiveConfig(objective, sigma_data=0.5))
    sampler = SamplerConfig(steps, name, clip, cfg_cond=guided, guidance="constant", cfg_scale=2.0)
    known = 3 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(steps))  # beyond what clipping leaves
    inpainting = Inpainting(known, torch.tensor(hole).view(1, 1, 4, 4))
    make = ImageSampler(SmallNet(), config, sampler, PixelSpace(3), "cpu")
    final = list(make.states(range(2), [0, 1], inpainting))[-1].sample
    kept = ~inpainting.hole.expand_as(final)
    assert torch.equal(final[kept], known[kept].to(final.dtype)) and final.isfinite().all()


@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_the_model_sees_the_known_region_at_the_noise_level_of_the_step(photo, name):
    seen = {}

    def watching(x, t, y):
        seen[int(t[0])] = x
        return torch.zeros(len(x), 6, 8, 8)

    make = ImageSampler(watching, CONFIG, SamplerConfig(10, name), PixelSpace(3), "cpu")
    inpainting = photo.inpainting(PixelSpace(3), None, "cpu")
    list(make.states(range(1), [0], inpainting))
    full = CONFIG.diffusion.build()
    noise = SampleNoise(0, range(1)).randn((3, 8, 8))
    for t, x in seen.items():
        expected = full.q_sample(inpainting.known, torch.tensor([t]), noise)
        known = ~inpainting.hole.expand_as(x)
        torch.testing.assert_close(x[known], expected[known], rtol=1e-3, atol=1e-3)
    assert len(seen) == 10


@pytest.mark.parametrize("mode", ["side", "plain"])
def test_a_filled_image_does_not_depend_on_its_batch(model, photo, mode):
    make = ImageSampler(model, CONFIG, SamplerConfig(4, cfg_cond=True), PixelSpace(3), "cpu")
    inpainting = photo.inpainting(PixelSpace(3), side_interpolation(model, CONFIG, mode), "cpu")
    together, alone = make(range(3), [0, 1, 2], inpainting), make([1], [1], inpainting)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(together[0], together[1])


@pytest.mark.parametrize("case", ["MDT", "MDTv2"])
def test_filling_is_guided_as_the_published_doubled_batch_is(model, model_v2, photo, case):
    """A guided pass with masked tokens equals [cond | uncond] rows that mask the same tokens."""
    net, config = (model, CONFIG) if case == "MDT" else (model_v2, CONFIG_V2)
    inpainting = photo.inpainting(PixelSpace(3), side_interpolation(net, config, "side"), "cpu")
    guidance = SamplerConfig(cfg_cond=True, guidance="constant", cfg_scale=2.0).build_guidance(4, 1000)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([300, 300]), torch.tensor([0, 2])
    ours = inpainting.denoiser(guidance.lead(net), SampleNoise(0, [0, 1], "halves"))(x, t, y)
    cond, uncond = (
        inpainting.denoiser(net, SampleNoise(0, [0, 1], "halves"))(x, t, labels)
        for labels in (y, torch.full_like(y, 4))
    )
    torch.testing.assert_close(ours[:, :3], uncond[:, :3] + 2 * (cond - uncond)[:, :3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours[:, 3:], cond[:, 3:], rtol=1e-3, atol=1e-3)


def test_the_modes_differ(model, photo):
    make = ImageSampler(model, CONFIG, SamplerConfig(4), PixelSpace(3), "cpu")
    images = [
        make([0], [1], photo.inpainting(PixelSpace(3), side_interpolation(model, CONFIG, mode), "cpu"))
        for mode in ("side", "plain")
    ]
    assert not np.array_equal(*images)


# -- the side-interpolater ---------------------------------------------------------------------------------------------


def side_calls(hole_tokens, batch):
    """Masks of the passes that one prediction makes, and the prediction, which tells the pass it came from."""
    dropped = []

    def model(x, t, y, draw=None):
        if draw is None:
            return torch.full_like(x, -1.0)
        dropped.append(draw.kept.dropped)
        return torch.full_like(x, float(len(dropped)))

    tokens = torch.from_numpy(hole_tokens).view(1, 16)
    denoise = interpolated_by_halves(model, tokens, 2, SampleNoise(0, range(batch), "halves"))
    out = denoise(torch.zeros(batch, 3, 8, 8), torch.zeros(batch), torch.zeros(batch))
    return dropped, out[:, 0, ::2, ::2].flatten(1), denoise


@pytest.mark.parametrize("batch", [1, 3])
def test_each_token_of_the_hole_is_masked_in_one_pass_and_predicted_by_the_other(batch):
    hole = np.zeros(16, dtype=bool)
    hole[[1, 2, 5, 6, 9, 10, 15]] = True
    (first, second), source, _ = side_calls(hole, batch)
    assert first.shape == (batch, 16)
    assert torch.equal(first | second, torch.from_numpy(hole).expand(batch, -1)) and not (first & second).any()
    assert set(first.sum(dim=1).tolist()) | set(second.sum(dim=1).tolist()) == {3, 4}
    assert (source[first] == 2).all() and (source[second] == 1).all()


def test_the_halves_are_drawn_anew_at_every_call_and_for_every_sample():
    hole = np.ones(16, dtype=bool)
    dropped, _, denoise = side_calls(hole, batch=2)
    denoise(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2))
    assert not torch.equal(dropped[0], dropped[2])
    assert not torch.equal(dropped[0][0], dropped[0][1])


@pytest.mark.parametrize("count", [0, 1])
def test_a_hole_that_cannot_be_halved_is_predicted_in_one_plain_pass(count):
    dropped, source, _ = side_calls(np.arange(16) < count, batch=1)
    assert not dropped and (source == -1).all()


def test_a_token_is_masked_when_any_pixel_of_it_is_to_be_filled(photo, model):
    masked = []

    def watching(x, t, y, draw=None):
        masked.append(draw.kept.dropped)
        return model(x, t, y, draw=draw)

    denoise = photo.inpainting(PixelSpace(3), SideInterpolation.of(model), "cpu").denoiser(
        watching, SampleNoise(0, [0], "halves")
    )
    denoise(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    touched = rectangle(2, 2, 8, 8)[::2, ::2].reshape(1, 16)
    assert torch.equal(masked[0] | masked[1], torch.from_numpy(touched))


def test_masking_chosen_tokens_equals_the_training_pass_that_masks_them(model):
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2])
    token_noise = torch.rand(2, 16)
    dropped = token_noise.argsort(1).argsort(1) >= model.num_keep(0.0)
    expected = model(x, t, y, draw=model.draw(token_noise))
    torch.testing.assert_close(model(x, t, y, draw=Draw(KeptTokens.all_but(dropped))), expected, rtol=1e-4, atol=1e-5)


# Why a model of this configuration cannot interpolate.
CANNOT = {
    "DiT": ("DiT_Ti_2", None, {}, "DiT_Ti_2 has no side-interpolater"),
    "mask token zero": ("MDT_Ti_2", None, {}, "this model was trained without masking"),
    "version 2": ("MDTv2_Ti_2", None, {}, "this model was trained without masking"),
    # From weights that had learned it, but without masking.
    "by its record": ("MDT_Ti_2", 0.5, {"lr": 1e-4}, "this model was trained without masking"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_model_without_a_trained_side_interpolater_is_refused_with_the_other_mode(case):
    name, mask_token, training, reason = CANNOT[case]
    settings = dataclasses.replace(CONFIG.model, model=name, mask_ratio=None, decode_layer=2)
    config, model = dataclasses.replace(CONFIG, model=settings, training=training), settings.build()
    if mask_token is not None:
        model.mask_token.data.fill_(mask_token)
    with pytest.raises(ValueError, match=f"--inpaint_mode side: {reason}.*; use --inpaint_mode plain"):
        side_interpolation(model, config, "side")
    assert side_interpolation(model, config, "plain") is None


def test_a_converted_file_whose_mask_ratio_nobody_knows_can_be_interpolated_with(model):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, mask_ratio=None))
    assert side_interpolation(model, config, "side") == SideInterpolation(2, halves=True)


def test_an_unknown_mode_is_refused(model):
    with pytest.raises(ValueError, match="--inpaint_mode middle: unknown; choose one of side, plain"):
        side_interpolation(model, CONFIG, "middle")


# -- version 2, whose decoder sees the masked tokens, too --------------------------------------------------------------


def test_version_2_interpolates_the_whole_hole_in_one_pass(photo, model_v2):
    passes = []

    def watching(x, t, y, draw=None):
        passes.append(draw.kept.dropped)
        return model_v2(x, t, y, draw=draw)

    side = side_interpolation(model_v2, CONFIG_V2, "side")
    denoise = photo.inpainting(PixelSpace(3), side, "cpu").denoiser(watching, SampleNoise(0, range(4), "halves"))
    denoise(torch.zeros(4, 3, 8, 8), torch.zeros(4), torch.zeros(4, dtype=torch.long))
    [dropped] = passes
    assert torch.equal(dropped, torch.from_numpy(rectangle(2, 2, 8, 8)[::2, ::2].reshape(1, 16)).expand(4, -1))


def test_the_one_pass_of_version_2_is_the_training_pass_that_masks_the_hole(model_v2):
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 2])
    token_noise = torch.rand(2, 16)
    hole = token_noise.argsort(1).argsort(1) >= model_v2.num_keep(0.5)
    expected = model_v2(x, t, y, draw=model_v2.draw(token_noise, 0.5))
    torch.testing.assert_close(interpolated_at_once(model_v2, hole)(x, t, y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["side", "plain"])
def test_version_2_fills_the_hole_and_keeps_what_is_known(model_v2, photo, mode):
    make = ImageSampler(model_v2, CONFIG_V2, SamplerConfig(6, "ddim", cfg_cond=True), PixelSpace(3), "cpu")
    inpainting = photo.inpainting(PixelSpace(3), side_interpolation(model_v2, CONFIG_V2, mode), "cpu")
    final = list(make.states(range(2), [0, 1], inpainting))[-1].sample
    known, hole = inpainting.known, inpainting.hole.expand(2, 3, -1, -1)
    assert (final - known)[~hole].abs().max() < 1e-4 and (final - known)[hole].abs().mean() > 0.1


def test_the_modes_of_version_2_differ(model_v2, photo):
    make = ImageSampler(model_v2, CONFIG_V2, SamplerConfig(4), PixelSpace(3), "cpu")
    sides = [side_interpolation(model_v2, CONFIG_V2, mode) for mode in ("side", "plain")]
    images = [make([0], [1], photo.inpainting(PixelSpace(3), side, "cpu")) for side in sides]
    assert not np.array_equal(*images)


def test_a_hole_without_anything_known_around_it_is_predicted_in_one_plain_pass(model_v2):
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.tensor([0])
    hole = torch.ones(1, 16, dtype=torch.bool)
    assert torch.equal(interpolated_at_once(model_v2, hole)(x, t, y), model_v2(x, t, y))


# -- photos and masks --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Save a photo and a mask. Returns their paths."""

    def save(image_size, mask_size, white=None):
        noise = np.random.default_rng(0).integers(0, 256, (image_size[1], image_size[0], 3), dtype=np.uint8)
        mask = np.zeros((mask_size[1], mask_size[0]), dtype=np.uint8)
        if white:
            left, top, right, bottom = white
            mask[top:bottom, left:right] = 255
        Image.fromarray(noise).save(tmp_path / "photo.png")
        Image.fromarray(mask).save(tmp_path / "mask.png")
        return tmp_path / "photo.png", tmp_path / "mask.png"

    return save


def test_photo_and_mask_are_cropped_alike(files):
    photo = open_photo(*files((48, 32), (48, 32), white=(8, 0, 24, 16)), image_size=16, grey=False)
    assert photo.pixels.shape == (16, 16, 3)
    expected = np.zeros((16, 16), dtype=bool)
    expected[:8, :8] = True  # 8 pixels are cut off on the left, and the rest is halved
    assert np.array_equal(photo.mask, expected)


def test_a_mask_of_the_models_size_is_taken_as_it_is(files):
    photo = open_photo(*files((48, 32), (16, 16), white=(0, 0, 1, 1)), image_size=16, grey=False)
    assert photo.mask.sum() == 1 and photo.mask[0, 0]


@pytest.mark.parametrize(
    "mask_size, white, sentence",
    [
        ((32, 48), (0, 0, 9, 9), "it is 32 x 48 pixels, the image is 48 x 32; make them equal"),
        ((8, 8), (0, 0, 9, 9), "it is 8 x 8 pixels, the image is 48 x 32"),
        ((48, 32), None, "nothing to fill, it is black"),
        ((48, 32), (0, 0, 48, 32), "it is white everywhere"),
        ((48, 32), (4, 0, 44, 32), "it is white everywhere .* nothing of the image would be kept"),  # in the middle
        ((48, 32), (0, 0, 4, 32), "nothing to fill, it is black where the model's 16 x 16 pixels are"),  # cut off
    ],
)
def test_masks_that_do_not_fit_are_refused(files, mask_size, white, sentence):
    with pytest.raises(ValueError, match=sentence):
        open_photo(*files((48, 32), mask_size, white), image_size=16, grey=False)


def test_a_hole_in_the_alpha_of_a_white_mask_is_refused_and_not_taken_for_the_whole(tmp_path, files):
    image, mask = files((16, 16), (16, 16))
    alpha = np.full((16, 16, 4), 255, dtype=np.uint8)
    alpha[4:9, 4:9, 3] = 0
    Image.fromarray(alpha).save(mask)
    with pytest.raises(ValueError, match="transparent parts count as white"):
        open_photo(image, mask, 16, grey=False)


def test_files_that_are_no_images_are_refused(tmp_path, files):
    image, mask = files((16, 16), (16, 16), white=(0, 0, 9, 9))
    image.write_text("no image")
    with pytest.raises(ValueError, match="photo.png: cannot be read as an image"):
        open_photo(image, mask, 16, grey=False)


def test_a_photo_becomes_grey_for_a_model_of_grey_images(files):
    photo = open_photo(*files((8, 8), (8, 8), white=(0, 0, 2, 2)), image_size=8, grey=True)
    assert (photo.pixels == photo.pixels[..., :1]).all()
    assert photo.inpainting(PixelSpace(1), None, "cpu").known.shape == (1, 1, 8, 8)


def test_the_photo_is_pasted_around_the_hole_to_the_last_level(photo):
    images = np.full((2, 8, 8, 3), 7, dtype=np.uint8)
    pasted = photo.paste_around(images)
    assert np.array_equal(pasted[1][~MASK], photo.pixels[~MASK]) and (pasted[:, MASK] == 7).all()


def test_behind_an_autoencoder_a_latent_belongs_to_the_hole_when_any_of_its_pixels_does(tiny_vae):
    first_stage = load_first_stage(str(tiny_vae), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), dtype=bool)
    mask[7, 8:17] = True
    inpainting = Photo(pixels, mask).inpainting(first_stage, None, "cpu")
    assert inpainting.known.shape == (1, 4, 4, 4)
    assert inpainting.hole[0, 0].nonzero().tolist() == [[0, 1], [0, 2]]
    again = Photo(pixels, mask).inpainting(first_stage, None, "cpu")
    assert torch.equal(inpainting.known, again.known)


def test_known_latents_may_differ_from_sample_to_sample(model):
    known = torch.rand(2, 3, 8, 8) - 0.5
    hole = torch.from_numpy(np.stack([rectangle(0, 0, 4, 8), rectangle(4, 0, 8, 8)]))[:, None]
    make = ImageSampler(model, CONFIG, SamplerConfig(4), PixelSpace(3), "cpu")
    final = list(make.states(range(2), [0, 1], Inpainting(known, hole, SideInterpolation.of(model))))[-1].sample
    kept = ~hole.expand_as(final)
    assert (final - known)[kept].abs().max() < 1e-4


def test_an_autoencoder_of_one_channel_reads_colour():
    one = SimpleNamespace(latent_channels=1, downsample=8)
    assert image_channels(one) == 3 and [image_channels(PixelSpace(n)) for n in (1, 3)] == [1, 3]

import os
import time
from pathlib import Path

import pytest
import torch

from masked_diffusion.first_stage import Autoencoder, PixelSpace, load_first_stage

SCALE, SHIFT = 0.31, 0.12


def save_tiny_autoencoder(folder, scaling_factor=SCALE, shift_factor=SHIFT):
    """A random diffusers autoencoder with a downsampling of 2; the interface of the published ones."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(module_folder):
    return save_tiny_autoencoder(module_folder("vae"))


@pytest.fixture(scope="module")
def vae(folder):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def first_stage(folder):
    return load_first_stage(str(folder), "cpu")


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def test_a_folder_is_loaded_with_what_a_checkpoint_records_of_it(folder, first_stage):
    assert isinstance(first_stage, Autoencoder)
    assert (first_stage.downsample, first_stage.latent_channels, first_stage.stochastic) == (2, 4, True)
    assert first_stage.description == {"vae_path": str(folder), "scaling_factor": SCALE, "shift_factor": SHIFT}


def test_a_relative_folder_is_recorded_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_first_stage(f"./{folder.name}", "cpu").description["vae_path"] == str(folder)
    assert load_first_stage(folder.name, "cpu").description["vae_path"] == str(folder)


def test_a_folder_may_begin_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_first_stage(f"~/{folder.name}", "cpu").description["vae_path"] == str(folder)


def test_a_latent_is_the_posterior_sample_shifted_and_scaled(first_stage, vae, images, noise):
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    expected = (posterior.mean + (0.5 * posterior.logvar).exp() * noise - SHIFT) * SCALE
    torch.testing.assert_close(first_stage.encode(images, noise), expected)


def test_the_posterior_is_sampled_not_its_mean_taken(first_stage, images, noise):
    at_mean = first_stage.encode(images, torch.zeros_like(noise))
    difference = first_stage.encode(images, noise) - at_mean
    assert difference.abs().mean() > 0.01
    torch.testing.assert_close(first_stage.encode(images, -noise) - at_mean, -difference, rtol=1e-4, atol=1e-5)


def test_without_given_noise_normal_noise_is_drawn_from_the_global_generator(first_stage, vae, images):
    torch.manual_seed(3)
    latents = first_stage.encode(images)
    torch.manual_seed(3)
    assert torch.equal(latents, first_stage.encode(images))
    assert not torch.allclose(latents, first_stage.encode(images), atol=1e-2)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    noise = (latents / SCALE + SHIFT - posterior.mean) / posterior.std
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.15  # 512 numbers


def test_given_noise_leaves_the_global_generator_alone(first_stage, images, noise):
    before = torch.get_rng_state()
    first_stage.decode(first_stage.encode(images, noise))
    assert torch.equal(torch.get_rng_state(), before)


def test_decoding_inverts_scale_and_shift(first_stage, vae, noise):
    with torch.no_grad():
        expected = vae.decode(noise).sample
    torch.testing.assert_close(first_stage.decode((noise - SHIFT) * SCALE), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (2, 3, 16, 16)
    assert not torch.allclose(first_stage.decode(noise), expected, atol=1e-3)


def test_an_autoencoder_without_a_shift_has_shift_0(tmp_path):
    first_stage = load_first_stage(str(save_tiny_autoencoder(tmp_path, 0.18215, None)), "cpu")
    assert first_stage.description["scaling_factor"] == 0.18215
    assert first_stage.description["shift_factor"] == 0.0


def test_the_autoencoder_is_frozen_and_makes_no_graph(first_stage, images, noise):
    images.requires_grad_(True)
    latents = first_stage.encode(images, noise)
    assert not latents.requires_grad
    assert not first_stage.decode(latents.requires_grad_(True)).requires_grad


def test_batches_and_single_images_are_encoded_alike(first_stage, images, noise):
    single = first_stage.encode(images[1:], noise[1:])
    torch.testing.assert_close(first_stage.encode(images, noise)[1:], single, rtol=1e-4, atol=1e-5)


# -- nothing to load ---------------------------------------------------------------------------------------------------


def assert_refused_soon(vae_path):
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        load_first_stage(vae_path, "cpu")
    assert time.monotonic() - begin < 20
    text = str(raised.value)
    assert text.startswith(f"--vae_path {vae_path}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("name", ["missing", "some/longer/missing", "empty"])
def test_a_folder_without_an_autoencoder_is_refused_in_one_sentence_naming_the_flag(tmp_path, name):
    (tmp_path / "empty").mkdir()
    text = assert_refused_soon(str(tmp_path / name))
    assert "config.json" in text and "none for pixel space" in text


def test_a_word_that_is_no_hub_name_is_taken_for_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "not a folder" in assert_refused_soon("sd-vae")


def test_a_hub_name_that_cannot_be_reached_is_refused_in_one_sentence_within_seconds(monkeypatch, tmp_path):
    # The hub client reads its environment when it is imported, which other tests may have done already.
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    text = assert_refused_soon("nobody/no-such-autoencoder")
    assert "the hub did not give it (Cannot reach " in text and "offline mode is enabled" in text  # the true reason
    assert "a folder with a copy of it" in text and "--vae_path none" in text


@pytest.mark.parametrize("harm", ["weights cut off", "weights missing", "config of another model", "config not JSON"])
def test_a_damaged_folder_is_refused_in_one_sentence(tmp_path, harm):
    save_tiny_autoencoder(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    if harm == "weights cut off":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif harm == "weights missing":
        weights.unlink()
    elif harm == "config not JSON":
        (tmp_path / "config.json").write_text("{")
    else:
        (tmp_path / "config.json").write_text('{"model_type": "vit", "hidden_size": 12}')
    assert "cannot load this autoencoder" in assert_refused_soon(str(tmp_path))


def test_an_autoencoder_with_pickled_code_is_refused_and_its_code_does_not_run(tmp_path):
    save_tiny_autoencoder(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    armed, marker = tmp_path / "vae" / "diffusion_pytorch_model.bin", tmp_path / "marker"

    class Touch:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"w": Touch()}, armed)
    assert_refused_soon(str(tmp_path / "vae"))
    assert not marker.exists()
    torch.load(armed, weights_only=False)
    assert marker.exists(), "the crafted file does nothing, so this test proves nothing"


# -- pixel space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "None", "NONE"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_space_is_the_identity(name, channels):
    first_stage = load_first_stage(name, "cpu", channels)
    assert isinstance(first_stage, PixelSpace)
    assert (first_stage.downsample, first_stage.latent_channels, first_stage.stochastic) == (1, channels, False)
    assert first_stage.description == {"vae_path": "none", "scaling_factor": 1.0, "shift_factor": 0.0}
    images = torch.randn(2, channels, 8, 8)
    assert torch.equal(first_stage.encode(images), images)
    assert torch.equal(first_stage.encode(images, torch.randn(2, channels, 8, 8)), images)
    assert torch.equal(first_stage.decode(images), images)

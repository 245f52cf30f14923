"""Latents of other autoencoders than Stable Diffusion's: other classes, more channels, and channels normalised."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import call, few_steps, script

from masked_diffusion.data.latent_cache import LatentCache, ShardFiles, read_record
from masked_diffusion.first_stage import CachedPosterior, ChannelStatistics, load_first_stage
from masked_diffusion.image_datasets import open_dataset
from masked_diffusion.runs.trained import Request, open_trained

SIDE = 32
ENCODE, TRAIN, SAMPLE = "scripts/encode_latents.py", "scripts/image_train.py", "scripts/image_sample.py"


def kl(downsample, channels, **settings):
    from diffusers import AutoencoderKL

    levels = downsample.bit_length()
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=channels,
        **settings,
    )


def flux():
    return kl(8, 16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)


def va_vae():
    return kl(16, 32, scaling_factor=1.0)


def dc_ae():
    from diffusers import AutoencoderDC

    widths, ones, none = (8, 8, 16, 32), (1, 1, 1, 1), ((), (), (), ())
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=ones,
        decoder_layers_per_block=ones,
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        scaling_factor=0.41407,
    )


def tiny():
    from diffusers import AutoencoderTiny

    widths, ones = (8, 8, 8), (1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=ones,
        num_decoder_blocks=ones,
        latent_channels=6,
    )


def wide():
    """Codes as wide as the features of a vision transformer: 16 x 16 x 768 of 256 pixels."""
    from diffusers import AutoencoderTiny

    widths, ones = (8,) * 5, (1,) * 5
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=ones,
        num_decoder_blocks=ones,
        latent_channels=768,
    )


def vq():
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=1.3,
    )


# What makes it, image side / latent side, channels, whether it has a posterior.
KINDS = {
    "flux": (flux, 8, 16, True),
    "va_vae": (va_vae, 16, 32, True),
    "dc_ae": (dc_ae, 8, 32, False),
    "tiny": (tiny, 4, 6, False),
    "vq": (vq, 4, 3, False),
    "wide": (wide, 16, 768, False),
}


@pytest.fixture(scope="module")
def folders(module_folder):
    root = module_folder("autoencoders")
    for name, (make, *_) in KINDS.items():
        with torch.random.fork_rng():
            torch.manual_seed(3)
            make().save_pretrained(root / name)
    return root


def encode(data_dir, vae, out, *flags):
    arguments = ["--data_dir", data_dir, "--vae_path", vae, "--out", out, "--image_size", SIDE, "--shard_size", 10]
    arguments += ["--batch_size", 8, "--num_workers", 0, "--device", "cpu", *flags]
    return script(ENCODE).main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def caches(folders, colour_folder, module_folder):
    """Normalised latents of 24 images, of a posterior and of codes; not to be changed."""
    root = module_folder("latents")
    for name in ("flux", "dc_ae"):
        assert encode(colour_folder, folders / name, root / name, "--normalize", "channel") == 0
    return root


TINY = "--model MDT_Ti_2 --mask_ratio 0.3 --decode_layer 2 --batch_size 4 --log_interval 1 --preview_samples 0 "
TINY += f"--image_size {SIDE} --num_workers 0 --device cpu"


def train(monkeypatch, folder, data_dir, vae, *flags):
    return call(monkeypatch, TRAIN, folder, "--data_dir", data_dir, "--vae_path", vae, *TINY.split(), *flags)


@pytest.fixture(scope="module")
def trained(caches, folders, module_folder):
    """A training on normalised codes, of one step."""
    folder = module_folder("trained")
    with pytest.MonkeyPatch.context() as patch:
        assert train(patch, folder, caches / "dc_ae", folders / "dc_ae", "--max_steps", 1) == 0
    return folder


def pictures():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Loading


@pytest.mark.parametrize("name", KINDS)
def test_size_and_channels_of_the_latents_follow_from_the_autoencoders_config(folders, name):
    _, downsample, channels, posterior = KINDS[name]
    first_stage = load_first_stage(str(folders / name), "cpu")
    assert (first_stage.downsample, first_stage.latent_channels) == (downsample, channels)
    assert first_stage.stochastic == posterior
    latents = first_stage.encode(pictures())
    assert latents.shape == (2, channels, SIDE // downsample, SIDE // downsample)
    assert first_stage.decode(latents).shape == (2, 3, SIDE, SIDE)
    noisy = [first_stage.encode(pictures(), torch.full_like(latents, noise)) for noise in (-1.0, 1.0)]
    assert torch.equal(*noisy) == (not posterior)


@pytest.mark.parametrize("name", ["dc_ae", "tiny", "vq"])
def test_a_latent_of_a_deterministic_encoder_is_its_code_shifted_and_scaled(folders, name):
    first_stage = load_first_stage(str(folders / name), "cpu")
    with torch.no_grad():
        code = first_stage.vae.encode(pictures())[0]
        scale = first_stage.vae.config.scaling_factor
        torch.testing.assert_close(first_stage.encode(pictures()), code * scale)
        torch.testing.assert_close(first_stage.decode(code * scale), first_stage.vae.decode(code)[0])


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderRAE"])
def test_another_class_is_refused_by_its_name_with_those_that_work(folders, tmp_path, name):
    shutil.copytree(folders / "vq", tmp_path / "video")
    config = json.loads((tmp_path / "video" / "config.json").read_text())
    (tmp_path / "video" / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    expected = f"it is a {name}, not one of AutoencoderKL, AutoencoderDC, AutoencoderTiny, VQModel"
    with pytest.raises(FileNotFoundError, match=expected):
        load_first_stage(str(tmp_path / "video"), "cpu")


@pytest.mark.parametrize(
    "model, name, built",
    [
        ("MDT_Ti", "va_vae", "MDT_Ti_1"),
        ("DiT_S", "dc_ae", "DiT_S_2"),
        ("MDTv2_XL", "tiny", "MDTv2_XL_2"),
        ("MDT_Ti_2", "va_vae", "MDT_Ti_2"),
        ("MDT_Huge", "va_vae", "MDT_Huge"),
        ("MDT_S", "nowhere", "MDT_S_2"),
    ],
)
def test_the_patch_follows_from_the_autoencoders_config_where_the_model_leaves_it_open(folders, model, name, built):
    assert script(TRAIN).with_patch_of(model, str(folders / name)) == built


def test_a_patch_is_asked_for_where_the_hubs_autoencoder_has_not_been_seen():
    complete = script(TRAIN).with_patch_of
    assert complete("MDT_S", "stabilityai/sd-vae-ft-mse") == complete("MDT_S", "none") == "MDT_S_2"
    assert complete("MDT_S_1", "somebody/dc-ae") == "MDT_S_1"
    with pytest.raises(ValueError, match="--model MDT_S: --vae_path somebody/dc-ae does not say its patch"):
        complete("MDT_S", "somebody/dc-ae")


@pytest.mark.parametrize("name, channels", [("va_vae", 32), ("wide", 768)])
def test_a_training_of_many_channels_of_2_by_2_has_a_token_for_each(
    folders, colour_folder, monkeypatch, tmp_path, name, channels
):
    flags = ["--model", "MDT_Ti", "--max_steps", 1]
    assert train(monkeypatch, tmp_path, colour_folder, folders / name, *flags) == 0
    model = json.loads((tmp_path / "config.json").read_text())["model"]
    assert (model["model"], model["downsample"], model["in_channels"]) == ("MDT_Ti_1", 16, channels)


# Normalised channels


@pytest.mark.parametrize("name", ["flux", "dc_ae"])
def test_normalised_latents_have_mean_0_and_deviation_1_in_each_channel(folders, caches, name):
    dataset = open_dataset(str(caches / name), image_size=SIDE)
    first_stage = CachedPosterior(load_first_stage(str(folders / name), "cpu"), *dataset.encoded_by)
    cache = LatentCache(str(caches / name))
    moments = torch.stack(
        [torch.from_numpy(cache.moments(i, mirrored)) for i in range(len(dataset)) for mirrored in (False, True)]
    )
    latents = first_stage.encode(moments.repeat(50, 1, 1, 1)).double()  # many samples of each posterior
    assert latents.mean((0, 2, 3)).abs().max() < 0.02 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.02
    # Decoding undoes it.
    codes = moments[:3] if name == "dc_ae" else moments[:3].chunk(2, dim=1)[0]
    no_noise = torch.zeros_like(codes)
    with torch.no_grad():
        expected = load_first_stage(str(folders / name), "cpu").vae.decode(codes)[0]
    torch.testing.assert_close(
        first_stage.decode(first_stage.encode(moments[:3], no_noise)), expected, rtol=1e-3, atol=1e-4
    )


def test_statistics_leave_unreadable_images_out_and_a_constant_channel_is_not_divided(caches, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(caches / "dc_ae", cache)
    record = read_record(str(cache))
    shards, rest = ShardFiles(cache, record), []
    for batch in range(shards.num_batches):
        moments = {name: tensor.clone() for name, tensor in load_file(shards.path(batch)).items()}
        for tensor in moments.values():
            tensor[0] = float("nan")
            tensor[1:, 5] = 2.0
            rest.append(tensor[1:])
        shards.write_part(batch, moments)
    statistics = shards.channel_statistics()
    codes = torch.cat(rest).double()
    torch.testing.assert_close(torch.tensor(statistics.mean).double(), codes.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    std = codes.std((0, 2, 3), correction=0)
    assert statistics.std[5] == 1.0
    std[5] = 1.0
    torch.testing.assert_close(torch.tensor(statistics.std).double(), std, rtol=1e-4, atol=1e-6)


def test_a_training_records_the_statistics_and_a_sampling_undoes_them(caches, folders, trained, monkeypatch, tmp_path):
    record = read_record(str(caches / "dc_ae"))
    config = json.loads((trained / "config.json").read_text())
    assert config["first_stage"]["channel_mean"] == record.channel_mean and len(record.channel_mean) == 32
    assert config["first_stage"]["channel_std"] == record.channel_std
    assert (config["model"]["downsample"], config["model"]["in_channels"]) == (8, 32)
    path = trained / "ema_0.9999_000001.pt"
    first_stage = open_trained(path, Request(), "cpu", warn=pytest.fail).first_stage
    latents = torch.randn(2, 32, 4, 4)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (record.channel_mean, record.channel_std))
    with torch.no_grad():
        expected = load_first_stage(str(folders / "dc_ae"), "cpu").vae.decode(latents * std + mean)[0]
    torch.testing.assert_close(first_stage.decode(latents), expected, rtol=1e-4, atol=1e-5)
    flags = [
        "--model_path",
        path,
        "--num_samples",
        2,
        *few_steps(2),
        "--device",
        "cpu",
        "--cfg_cond",
        "True",
    ]
    assert call(monkeypatch, SAMPLE, tmp_path, *flags) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["decoder"]["channel_std"] == record.channel_std


# What does not fit


def test_a_resume_on_latents_of_other_statistics_is_refused_by_number(
    caches, folders, colour_folder, trained, monkeypatch, tmp_path, capsys
):
    assert encode(colour_folder, folders / "dc_ae", tmp_path / "plain") == 0
    shutil.copytree(trained, tmp_path / "run")
    assert train(monkeypatch, tmp_path / "run", tmp_path / "plain", folders / "dc_ae", "--max_steps", 2) == 2
    mean = read_record(str(caches / "dc_ae")).channel_mean
    assert f"the run to resume has channel_mean {str(mean)[:60]}" in capsys.readouterr().err
    assert train(monkeypatch, tmp_path / "run", caches / "dc_ae", folders / "dc_ae", "--max_steps", 2) == 0


def test_latents_and_an_autoencoder_of_another_scale_are_refused_by_number(
    caches, folders, monkeypatch, tmp_path, capsys
):
    other = shutil.copytree(folders / "flux", tmp_path / "vae")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"shift_factor": 0.5}))
    assert train(monkeypatch, tmp_path / "run", caches / "flux", other) == 2
    expected = "its shift_factor is 0.5, the latents in --data_dir were encoded with 0.1159; give the autoencoder"
    assert expected in capsys.readouterr().err


def test_statistics_of_another_number_of_channels_are_refused_by_number(folders):
    first_stage = load_first_stage(str(folders / "tiny"), "cpu")
    with pytest.raises(ValueError, match="it has 6 channels, the recorded channel_mean has 2"):
        first_stage.normalise(ChannelStatistics((0.0, 0.0), (1.0, 1.0)))


def test_latents_encoded_under_another_normalisation_are_not_overwritten(caches, folders, colour_folder, capsys):
    before = (caches / "flux" / "latents.json").read_bytes()
    assert encode(colour_folder, folders / "flux", caches / "flux") == 2
    assert "it holds latents with normalize channel instead of none" in capsys.readouterr().err
    assert encode(colour_folder, folders / "flux", caches / "flux", "--normalize", "whiten") == 2
    assert "--normalize whiten: choose none or channel" in capsys.readouterr().err
    assert (caches / "flux" / "latents.json").read_bytes() == before


def test_the_same_command_again_finds_normalised_latents_complete(caches, folders, colour_folder, capsys):
    before = (caches / "flux" / "latents.json").read_bytes()
    assert encode(colour_folder, folders / "flux", caches / "flux", "--normalize", "channel") == 0
    assert "these latents are already complete" in capsys.readouterr().err
    assert (caches / "flux" / "latents.json").read_bytes() == before
    assert np.all(np.array(read_record(str(caches / "flux")).channel_std) > 0)

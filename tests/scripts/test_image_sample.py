"""What scripts/image_sample.py records, and when it is done."""

import json
import shutil

import numpy as np
import pytest
import torch
from support import TINY_DIGITS, call, few_steps

from masked_diffusion.choices import STREAM
from masked_diffusion.sampling import sample_set

TRAIN, SAMPLE = "scripts/image_train.py", "scripts/image_sample.py"


@pytest.fixture(scope="module")
def weights(module_folder):
    """A trained model, with noise added so that samplers and guidance show."""
    folder = module_folder("trained")
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, TRAIN, folder, *TINY_DIGITS, "--max_steps", "1") == 0
    path = folder / "ema_0.9999_000001.pt"
    state = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.items()
    }
    torch.save(noisy, path)
    return path


@pytest.fixture
def sample(monkeypatch, tmp_path, weights):
    """Sample four digits in a folder. Returns the pixels and the recorded settings."""

    def run(name, *flags):
        arguments = ["--model_path", weights, "--num_samples", "4", *few_steps(4), *flags]
        assert call(monkeypatch, SAMPLE, tmp_path / name, *arguments) == 0
        with np.load(tmp_path / name / "samples_4x8x8x3.npz") as file:
            return file["arr_0"], json.loads((tmp_path / name / "manifest.json").read_text())["settings"]

    return run


def test_use_ddim_is_the_published_spelling_of_the_sampler(sample):
    published, settings = sample("published", "--use_ddim", "True")
    named, same = sample("named", "--sampler", "ddim")
    assert np.array_equal(published, named) and settings == same and settings["sampler"] == "ddim"


def test_the_manifest_records_sampler_and_guidance(sample):
    _, settings = sample(
        "a", "--sampler", "unipc", "--cfg_cond", "True", "--guidance", "interval", "--cfg_interval", "100-900",
        "--cfg_skip_tol", "0.01",
    )  # fmt: skip
    assert settings["sampler"] == "unipc"
    assert settings["guidance"] == {
        "schedule": "interval", "cfg_scale": 3.8, "cfg_interval": [100, 900], "cfg_channels": 3,
        "cfg_skip_tol": 0.01,
    }  # fmt: skip


def test_samples_of_heuns_former_steps_are_not_gone_on_with(sample, tmp_path, capsys):
    _, settings = sample("heun", "--sampler", "heun")
    assert settings.pop("sampler_steps") == 2
    manifest = tmp_path / "heun" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "settings": settings}))
    sample("heun", "--sampler", "heun")
    assert "samples of other settings were moved aside" in capsys.readouterr().err
    assert all("sampler_steps" not in sample(name, "--sampler", name)[1] for name in ("ddpm", "unipc"))


def test_the_same_settings_are_recognised_as_done(sample, capsys):
    flags = ["--cfg_cond", "True", "--guidance", "interval", "--cfg_interval", "100-900", "--sampler", "heun"]
    first, _ = sample("a", *flags)
    again, _ = sample("a", *flags)
    assert "already complete" in capsys.readouterr().err and np.array_equal(first, again)
    sample("a", *flags, "--sampler", "ddim")
    assert "moved aside" in capsys.readouterr().err


def test_a_set_begun_under_the_first_stream_goes_on_under_it_and_a_new_one_begins_under_the_present(
    sample, monkeypatch, tmp_path, capsys
):
    flags = ["--batch_size", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(sample_set, "STREAM", 1)
        old, settings = sample("old", *flags)
    assert "stream" not in settings  # as before there were streams
    half = sample_set.SampleSet(tmp_path / "half", 4, 8, 2, settings)
    half.open({})
    half.write_part(0, old[:2])
    continued, recorded = sample("half", *flags)
    assert np.array_equal(continued, old) and recorded == settings
    sample("old", *flags)
    assert "already complete" in capsys.readouterr().err
    new, settings = sample("new", *flags)
    assert settings["stream"] == STREAM == 2 and not np.array_equal(new, old)


def test_a_set_of_the_first_stream_that_was_moved_aside_comes_back(sample, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sample_set, "STREAM", 1)
        old, _ = sample("a")
    sample("a", "--seed", "1")
    assert np.array_equal(sample("a")[0], old)
    assert "had been moved aside" in capsys.readouterr().err


def test_samples_of_another_autoencoder_at_the_same_path_are_other_samples(
    monkeypatch, tmp_path, tiny_vae, colour_folder, capsys
):
    from diffusers import AutoencoderKL

    vae, run, out = (tmp_path / name for name in ("vae", "run", "samples"))
    shutil.copytree(tiny_vae, vae)
    flags = ["--data_dir", colour_folder, "--vae_path", vae, "--model", "MDT_Ti_2", "--image_size", "32"]
    assert call(monkeypatch, TRAIN, run, *flags, "--batch_size", "2", "--max_steps", "1", "--device", "cpu") == 0
    sample = ["--model_path", run / "ema_0.9999_000001.pt", "--num_samples", "2", *few_steps(2)]
    assert call(monkeypatch, SAMPLE, out, *sample) == 0
    before = json.loads((out / "manifest.json").read_text())["settings"]["decoder"]

    other = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.5
    other.save_pretrained(vae)
    capsys.readouterr()
    assert call(monkeypatch, SAMPLE, out, *sample) == 0
    assert "moved aside" in capsys.readouterr().err
    after = json.loads((out / "manifest.json").read_text())["settings"]["decoder"]
    assert after.pop("weights_sha256") != before.pop("weights_sha256") and after == before
